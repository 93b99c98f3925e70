"""Training: batches, augmentation, losses, the sharded step, metrics, signals."""
