"""Compiled programs kept between processes: a training step takes 20 s to compile on two cores, restarts are common."""

import hashlib
import platform
from pathlib import Path

import jax

from neuronet_jax.files import user_cache


def keep_compiled() -> None:
    """Turns on JAX's persistent compilation cache below the user's cache folder, unless the user has chosen one.

    `JAX_COMPILATION_CACHE_DIR` names another folder, `JAX_ENABLE_COMPILATION_CACHE=false` turns it off.
    """
    if not jax.config.jax_compilation_cache_dir:  # pyright: ignore[reportAttributeAccessIssue]: made at import
        jax.config.update("jax_compilation_cache_dir", str(user_cache() / f"xla-{_processor()}"))


def _processor() -> str:
    """A name for what this host's processor can do: in a shared home folder lies code for others."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        features = next(line for line in lines if line.lower().startswith(("flags", "features")))
    except (OSError, StopIteration):
        features = platform.processor()
    return f"{platform.machine()}-{hashlib.sha256(features.encode()).hexdigest()[:12]}"
