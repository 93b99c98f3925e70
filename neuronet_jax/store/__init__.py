"""The store: a population of conformed scans and label maps as sharded zarr3 arrays."""
