"""The benchmark against other implementations: `python -m experiments.benchmark`."""
