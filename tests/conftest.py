"""Tests run on eight CPU devices, with JAX's implicit promotions forbidden."""

import os
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

SHARED = Path(__file__).resolve().parents[2] / "shared"  # beside the repository, never inside


def _folder(path: Path) -> Path:
    if not path.is_dir():
        pytest.skip(f"needs {path}, which is not on this machine")
    return path


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder with `cohort/` (15 real brains with all protocols), `whole_head/` and `label_maps/`."""
    return _folder(SHARED / "data")


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder with the golden numbers of the published network: `neuronet_all_*.npz` and `saved_model/`."""
    return _folder(SHARED / "reference" / "dltk")
