"""The settings that every named config shares.

A config names its protocols; everything else is here, once. The comparison is over tasks, and a task is a tuple of
protocol names; `labels.TASKS` has the published ones. `--config.model.family=reference` selects the published network
instead of ours and changes nothing else.
"""

from ml_collections import ConfigDict


def config(protocols: tuple[str, ...], variant: str = "") -> ConfigDict:
    """Returns the complete, locked settings of a run on `protocols`.

    `variant` is "" for the full run, or "demo" for minutes on two CPU cores with the 2 mm demo cohort.
    Raises ValueError on any other variant.
    """
    settings = ConfigDict(
        {
            "protocols": protocols,
            "data": {
                "store": "",  # empty: the demo cohort
                "crop": (128, 128, 128),  # voxels, as published
                "foreground_fraction": 0.5,
                "workers": 4,
                "read_threads": 16,
                "prefetch": 4,
                "stores": (),
                "weights": (),
            },
            "augment": {
                "flip": True,
                "intensity": 1.0,
                "spatial": 0.0,
                "elastic": 0.0,
                "resolution": 0.0,
                "any_contrast": 0.0,
                "artefacts": 0.0,
            },
            "model": {"family": "neuronet", "filters": (16, 32, 64, 128), "compute_dtype": "auto", "norm": "batch"},
            "loss": {"cross_entropy": 1.0, "dice": 1.0, "class_balance": 0.0, "consistency": 0.0},
            "optimizer": {
                "learning_rate": 2e-3,  # twice the published one: eight crops per step, and a warm-up
                "schedule": "cosine",
                "warmup_steps": 500,
                "epsilon": 1e-5,  # as published
                "weight_decay": 1e-4,
                "clip_norm": 1.0,
                "ema_decay": 0.999,  # averages over about 1,000 steps
                "spike_factor": 10.0,  # in the demo, the norms of sound batches stayed below twice their average
                "base_batch": 0,
            },
            "mesh": {"space": 1},
            "batch": 8,
            "accumulate": 1,
            "steps": 100_000,  # as published
            "seed": 0,
            "log_every": 50,
            "evaluate_every": 2_000,
            "evaluate_subjects": 10,  # the published validation set
            "checkpoint_every": 1_000,
            "keep_checkpoints": 3,
            "profile_steps": "",
            "sinks": (),
        }
    )
    if variant == "demo":
        settings.update(_DEMO)
    elif variant:
        raise ValueError(f"the variants are '' and 'demo', got {variant!r}")
    return settings.lock()


# Two cores train a batch of two 48³ crops in 0.8 s: about four minutes in all. So short a run learns most from small
# crops, a high learning rate and weak intensity augmentation.
_DEMO = {
    "data": {"crop": (48, 48, 48), "foreground_fraction": 0.75, "workers": 0, "read_threads": 4, "prefetch": 2},
    "augment": {"intensity": 0.3},
    "optimizer": {"learning_rate": 5e-3, "warmup_steps": 10, "ema_decay": 0.95},  # averages over about 20 steps
    "batch": 2,
    "steps": 300,
    "log_every": 10,
    "evaluate_every": 1_000,  # only at the end
    "evaluate_subjects": 2,
    "checkpoint_every": 100,
    "keep_checkpoints": 2,
}
