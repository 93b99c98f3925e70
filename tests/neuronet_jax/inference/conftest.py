"""The tests that label whole heads compile with optimisations."""

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(scope="package", autouse=True)
def optimised() -> Iterator[None]:
    """Compiles as users do: whole heads take three times as long in the quick programs of `make test`."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
