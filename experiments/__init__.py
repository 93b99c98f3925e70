"""Programs that compose the library: train, evaluate, compare, benchmark."""
