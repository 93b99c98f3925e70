"""Speed and memory against other implementations, side by side: `python -m experiments.benchmark`."""
