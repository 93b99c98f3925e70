"""Images: NIfTI files, the space they lie in, their intensities."""
