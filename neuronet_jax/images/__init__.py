"""Images: NIfTI input and output, voxel grids, and intensity normalisation."""
