"""Named configurations, one module each, resolved by name."""
