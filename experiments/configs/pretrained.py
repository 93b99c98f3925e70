"""The network that ships with the package: five protocols, whole heads and stripped brains, at 1.5 mm.

It begins at 2 mm (`pretrained:2mm`), where a crop holds more of a head for the same cost, and goes on at 1.5 mm:

    for mm in 2 1.5; do
        python -m data_prep.build --manifest=cohort.csv --store=stores/pretrained/brains-${mm}mm --voxel-size-mm=$mm
        python -m data_prep.heads --maps=label_maps --brains=stores/pretrained/brains-${mm}mm --heads-per-brain=6 \
            --store=stores/pretrained/heads-${mm}mm --voxel-size-mm=$mm
    done
    python -m experiments.train --config=pretrained:2mm --workdir=runs/pretrained-2mm
    python -m experiments.train --config=pretrained --init=runs/pretrained-2mm --workdir=runs/pretrained
    python -m experiments.evaluate --run=runs/pretrained --calibrate
    neuronet export --run=runs/pretrained --out=release --weights-only

The data, their licences and the scores are in `docs/pretrained.md`. Seed 0. Measured cost: 3 to 5 s a step on two free
CPU cores, 9 s with other work. Painting the heads takes half a minute.
"""

from ml_collections import ConfigDict

from experiments.configs.common import config
from neuronet_jax.labels import TASKS


def get_config(variant: str = "") -> ConfigDict:
    if variant not in ("", "2mm"):
        raise ValueError(f"the variants are '' and '2mm', got {variant!r}")
    grid = variant or "1.5mm"
    settings = config(TASKS["all_targets"])
    settings.update(
        {
            "data": {
                "store": f"stores/pretrained/brains-{grid}",
                "stores": (f"stores/pretrained/heads-{grid}",),
                "weights": (0.35, 0.65),
                "crop": (64, 64, 64),
                "foreground_fraction": 0.75,
                "workers": 0,
                "read_threads": 4,
                "prefetch": 2,
            },
            "augment": {"intensity": 0.6, "spatial": 0.5, "elastic": 0.5, "resolution": 0.5, "any_contrast": 0.1},
            "optimizer": {"learning_rate": 5e-3 if variant else 4e-3, "warmup_steps": 50, "ema_decay": 0.99},
            "batch": 2,
            "steps": 1_250,
            "log_every": 10,
            "evaluate_every": 300,
            "evaluate_subjects": 3,
            "checkpoint_every": 100,
        }
    )
    return settings
