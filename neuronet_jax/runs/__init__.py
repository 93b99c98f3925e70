"""Runs: the folder that training writes, its checkpoints, and the model restored from them."""
