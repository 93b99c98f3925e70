"""One network for all protocols, or one for each? Trains both at equal budgets and compares them. See `__main__.py`."""
