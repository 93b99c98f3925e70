"""Inference: from an image to label maps on its own grid."""
