"""Chooses settings for a network by trials on the validation subjects, as many for every arm, with Optuna.

A study is nothing but the record of its trials: the next one follows from those before and the seed. It is therefore
continued after an interruption without a database.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from neuronet_jax.errors import NeuronetError

# What is tuned, and between which values. The rate is drawn on a logarithmic scale.
RATE = (5e-4, 2e-2)
INTENSITY = (0.0, 1.0)

Settings = Mapping[str, float]  # by field of the config


def propose(trials: Sequence[tuple[Settings, float]], seed: int) -> dict[str, float]:
    """Returns the settings of the next trial, given those before with their Dice.

    Raises NeuronetError without Optuna.
    """
    optuna = _optuna()
    distributions = {
        "optimizer.learning_rate": optuna.distributions.FloatDistribution(*RATE, log=True),
        "augment.intensity": optuna.distributions.FloatDistribution(*INTENSITY),
    }
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed + len(trials)))
    for settings, dice in trials:
        study.add_trial(optuna.trial.create_trial(params=dict(settings), distributions=distributions, value=dice))
    return {name: float(value) for name, value in study.ask(distributions).params.items()}


def best(trials: Sequence[tuple[Settings, float]]) -> Settings:
    """Returns the settings with the highest Dice, the first of equal ones."""
    return max(trials, key=lambda trial: trial[1])[0]


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise NeuronetError("--trials needs Optuna: pip install 'neuronet-jax[tuning]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
