"""Segmentation tools that are run for the label maps which a cohort lacks."""
