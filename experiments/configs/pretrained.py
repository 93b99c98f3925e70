"""The network that ships with the package: five protocols, whole heads and stripped brains, at 1 mm.

It begins at 2 mm, where a crop holds more of a head for the same cost, goes on at 1.5 mm, and ends at 1 mm, where the
references were made. `experiments.pretrain` does all of it, from the cohort and the label maps to the release:

    python -m experiments.pretrain --manifest=cohort.csv --maps=label_maps --out=runs/pretrained

`pretrained:2mm` and `pretrained:1.5mm` are its first stages, `pretrained` is the last one; each begins with the weights
of the stage before (`--init`). The data, their licences and the scores are in `docs/pretrained.md`. Seed 0. Measured
cost on two free CPU cores: 3 to 5 s a step with crops of 64³, 15 to 17 s with the crops of 80³ at 1 mm.
"""

from typing import NamedTuple

from ml_collections import ConfigDict

from experiments.configs.common import config
from neuronet_jax.labels import TASKS


class Stage(NamedTuple):
    steps: int
    learning_rate: float
    resolution: float  # strength of the blur, whose range is in voxels
    crop: int = 64
    foreground_fraction: float = 0.75


STAGES = {  # by grid, in their order
    "2mm": Stage(1_350, 5e-3, 0.5),
    "1.5mm": Stage(1_000, 4e-3, 0.5),
    # crops of 64³ show little of neck and face: 46 and 12 ml of two heads were taken for brain, and 31 and 5 after 300
    # steps with 80³
    "1mm": Stage(1_000, 3e-3, 0.3, crop=80, foreground_fraction=0.6),
}


def get_config(variant: str = "") -> ConfigDict:
    *earlier, last = STAGES
    if variant not in ("", *earlier):
        raise ValueError(f"the variants are '', {' and '.join(map(repr, earlier))}, got {variant!r}")
    grid = variant or last
    stage = STAGES[grid]
    settings = config(TASKS["all_targets"])
    settings.update(
        {
            "data": {
                "store": f"stores/pretrained/brains-{grid}",
                "stores": (f"stores/pretrained/heads-{grid}",),
                "weights": (0.35, 0.65),
                "crop": (stage.crop,) * 3,
                "foreground_fraction": stage.foreground_fraction,
                "workers": 0,
                "read_threads": 4,
                "prefetch": 2,
            },
            "augment": {
                "intensity": 0.6,
                "spatial": 0.5,
                "elastic": 0.5,
                "resolution": stage.resolution,
                "any_contrast": 0.1,
            },
            "optimizer": {"learning_rate": stage.learning_rate, "warmup_steps": 50, "ema_decay": 0.99},
            "batch": 2,
            "steps": stage.steps,
            "log_every": 10,
            "evaluate_every": 250,
            "evaluate_subjects": 3,
            "checkpoint_every": 50,
        }
    )
    return settings
