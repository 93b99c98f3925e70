"""Programs that compose the library: train, evaluate, report, demo and benchmark."""

from neuronet_jax import namesakes

namesakes.check(__name__, needs=["data_prep"])
