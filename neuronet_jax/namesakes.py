"""Checks that `experiments` and `data_prep` are this project's packages. Other projects use these names as well."""

import importlib.util
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from neuronet_jax.errors import CodedWarning, NeuronetError

PACKAGES = ("experiments", "data_prep")
_HOME = Path(__file__).resolve().parents[1]  # this library and both packages lie side by side
_checked: set[str] = set()


def check(package: str, needs: Sequence[str] = ()) -> None:
    """Checks one of PACKAGES while it is being imported, and those that it `needs`.

    Raises ImportError if one of them does not lie beside this library. Warns with W_NAMESAKE if the package hides a
    folder of the same name, whose modules then cannot be imported.
    """
    import multiprocessing  # imported here: `neuronet --help` does not need it

    for name in (package, *needs):
        spec = importlib.util.find_spec(name)
        found = Path(spec.origin).resolve().parent if spec and spec.origin else None
        if found != _HOME / name:
            raise ImportError(
                f"E_NAMESAKE: {name!r} must be the package in {_HOME}, but Python finds {found or 'a plain folder'}. "
                "Rename that one or run the program in a different folder, for instance with python -P -m"
            )
    _checked.add(package)
    if multiprocessing.parent_process() is None:  # workers would repeat the warning
        for folder in hidden(package):
            reason = f"{folder} is hidden by {_HOME / package}, which comes with NeuroNet-JAX; rename the folder"
            warnings.warn(CodedWarning("W_NAMESAKE", reason), stacklevel=3)


def hidden(package: str) -> list[Path]:
    """Returns the folders of that name where Python looks for packages, if they hold code of other projects."""
    places = [Path(entry or ".").resolve() for entry in dict.fromkeys(sys.path)]
    others = [place / package for place in dict.fromkeys(places) if place != _HOME]
    # an older or newer copy of this project is no stranger
    return [path for path in others if any(path.glob("*.py")) and not (path.parent / "neuronet_jax").is_dir()]


def require() -> None:
    """Raises NeuronetError if one of PACKAGES is loaded whose files a different distribution has replaced."""
    for name in PACKAGES:
        if name in sys.modules and name not in _checked:
            raise NeuronetError(
                f"E_NAMESAKE: {_HOME / name} was changed by a different distribution with a package {name!r}; install "
                "NeuroNet-JAX in an environment of its own"
            )
