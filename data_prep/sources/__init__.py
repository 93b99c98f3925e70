"""Sources: where subjects come from."""
