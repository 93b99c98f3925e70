"""Evaluation: overlap and surface metrics, agreement, predicted quality, plausibility."""
