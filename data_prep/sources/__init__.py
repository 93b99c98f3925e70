"""Sources of subjects."""
