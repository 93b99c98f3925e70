"""Runs: the folder that training leaves, its checkpoints, and the model restored from them."""
