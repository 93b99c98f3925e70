"""Programs that compose the library: train, evaluate, compare, benchmark."""

from neuronet_jax import namesakes

namesakes.check(__name__, needs=["data_prep"])
