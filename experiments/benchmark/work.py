"""The work that all contenders share: weights and crops."""

import math

import numpy as np

from neuronet_jax.labels import PROTOCOLS

FILTERS = (16, 32, 64, 128)  # published
# Fields of the config with which the published network trains: cross-entropy, Adam at a constant rate, nothing else.
PUBLISHED_TRAINING = {
    "loss.dice": 0.0,
    "optimizer.schedule": "constant",
    "optimizer.learning_rate": 1e-3,
    "optimizer.weight_decay": 0.0,
    "optimizer.clip_norm": 0.0,
    "optimizer.ema_decay": 0.0,
    "augment.flip": "false",
    "augment.intensity": 0.0,
    "augment.spatial": 0.0,
}
CLASSES = tuple(protocol.num_classes for protocol in PROTOCOLS.values())


def published_shapes(classes: tuple[int, ...] = CLASSES) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the published network's variables; kernels are [i j k c f]."""
    shapes: dict[str, tuple[int, ...]] = {"conv3d/kernel": (3, 3, 3, 1, FILTERS[0])}

    def norm(prefix: str, channels: int) -> None:
        for name in ("gamma", "beta", "moving_mean", "moving_variance"):
            shapes[f"{prefix}/batch_normalization/{name}"] = (channels,)

    for scale in range(1, len(FILTERS)):
        channels, filters = FILTERS[scale - 1 : scale + 1]
        for unit, (size, inputs) in enumerate(((4, channels), (3, filters))):
            prefix = f"encoder/unit_{scale}_{unit}/sub_unit"
            norm(f"{prefix}0", inputs)
            shapes[f"{prefix}0/conv3d/kernel"] = (size, size, size, inputs, filters)
            norm(f"{prefix}1", filters)
            shapes[f"{prefix}1/conv3d/kernel"] = (3, 3, 3, filters, filters)
    for tail, k in enumerate(classes):
        coarsest = len(FILTERS) - 2
        shapes[f"tail_{tail}/upscore_{coarsest}/filter_conversion/kernel"] = (1, 1, 1, FILTERS[-1], k)
        for scale in range(coarsest + 1):
            shapes[f"tail_{tail}/upscore_{scale}/conv3d/kernel"] = (1, 1, 1, FILTERS[scale], k)
            norm(f"tail_{tail}/upscore_{scale}", k)
        shapes[f"tail_{tail}/last/conv3d/kernel"] = (1, 1, 1, k, k)
    return shapes


def random_variables(seed: int) -> dict[str, np.ndarray]:
    """Draws weights and moments so that every term matters: none is zero or one, and activations keep their size."""
    rng = np.random.default_rng(seed)
    values = {}
    for name, shape in published_shapes().items():
        if len(shape) == 5:
            limit = math.sqrt(3 / math.prod(shape[:4]))  # uniform with variance 1 / fan-in
            value = rng.uniform(-limit, limit, shape)
        elif name.endswith(("gamma", "moving_variance")):
            value = rng.uniform(0.5, 1.5, shape)
        else:
            value = rng.normal(0, 0.1, shape)
        values[name] = value.astype(np.float32)
    return values


def random_batch(batch: int, sides: tuple[int, ...], seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Returns a whitened image f32 [b x y z 1] and labels i64 [b p x y z]. Speed does not depend on their content."""
    rng = np.random.default_rng(seed)
    image = rng.standard_normal((batch, *sides, 1), np.float32)
    labels = [rng.integers(0, k, (batch, *sides)) for k in CLASSES]
    return image, np.stack(labels, 1)


def training_batch(batch: int, sides: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Returns `random_batch` as the arrays of the training pipeline, with all protocols present."""
    image, labels = random_batch(batch, sides)
    return {
        "image": image,
        "labels": labels.astype(np.uint8),
        "present": np.ones((batch, len(CLASSES)), bool),
        "slot": np.arange(batch, dtype=np.int32),
    }
