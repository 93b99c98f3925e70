"""Data preparation: from a raw archive of scans and label maps to one finished store."""

from neuronet_jax import namesakes

namesakes.check(__name__)
