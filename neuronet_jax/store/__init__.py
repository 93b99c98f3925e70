"""The store: a population of conformed heads and label maps as sharded zarr3 arrays."""
