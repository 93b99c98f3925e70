"""The network that ships with the package: five protocols, whole heads and stripped brains, at 2 mm.

    python -m data_prep.build --manifest=cohort.csv --store=stores/pretrained/brains --voxel-size-mm=2
    python -m data_prep.heads --maps=label_maps --brains=stores/pretrained/brains --heads-per-brain=6 \
        --store=stores/pretrained/heads --voxel-size-mm=2
    python -m experiments.train --config=pretrained --workdir=runs/pretrained
    neuronet export --run=runs/pretrained --out=release --weights-only

The data, their licences and the scores are in `docs/pretrained.md`. Seed 0. Measured cost: 5 s a step on two free CPU
cores, 201 minutes for 1,350 steps on two cores with other work. Painting the heads takes 49 s.
"""

from ml_collections import ConfigDict

from experiments.configs.common import config
from neuronet_jax.labels import TASKS


def get_config(variant: str = "") -> ConfigDict:
    if variant:
        raise ValueError(f"pretrained has no variants, got {variant!r}")
    settings = config(TASKS["all_targets"])
    settings.update(
        {
            "data": {
                "store": "stores/pretrained/brains",
                "stores": ("stores/pretrained/heads",),
                "weights": (0.35, 0.65),
                "crop": (64, 64, 64),
                "foreground_fraction": 0.75,
                "workers": 0,
                "read_threads": 4,
                "prefetch": 2,
            },
            "augment": {"intensity": 0.5, "spatial": 0.5, "elastic": 0.5, "resolution": 0.5, "any_contrast": 0.1},
            "optimizer": {"learning_rate": 5e-3, "warmup_steps": 50, "ema_decay": 0.99},
            "batch": 2,
            "steps": 1_500,
            "log_every": 10,
            "evaluate_every": 500,
            "evaluate_subjects": 3,
            "checkpoint_every": 100,
        }
    )
    return settings
