"""Painted heads: a brightness per tissue, T1-like unless told, and scans as they are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neuronet_jax.errors import NeuronetError
from neuronet_jax.tissues import AIR, NUMBER, TISSUES, in_brain, to_tissues
from neuronet_jax.training.generate import WHITENING_MEAN, WHITENING_STD, Palette, draw, generate, paint, whole

WHITE, GREY, CSF = NUMBER["cerebral white matter"], NUMBER["cerebral cortex"], NUMBER["CSF around the brain"]


def test_every_id_has_one_tissue_and_an_unknown_one_is_named() -> None:
    ids = [i for tissue in TISSUES for i in tissue.ids]
    assert len(ids) == len(set(ids))
    assert to_tissues(np.array([[0, 2, 41], [3, 24, 515]])).tolist() == [
        [AIR, WHITE, WHITE],
        [GREY, CSF, NUMBER["compact bone"]],
    ]
    assert in_brain(np.array([AIR, WHITE, CSF])).tolist() == [False, True, False]
    with pytest.raises(NeuronetError, match=r"\[9, 600\]"):
        to_tissues(np.array([0, 9, 600]))


def test_a_voxel_of_a_tissue_takes_its_brightness_and_a_scanned_one_keeps_its_own() -> None:
    count = len(TISSUES) + 1
    flat = Palette(
        brightness=jnp.arange(count, dtype=jnp.float32),
        texture=jnp.zeros(count),
        texture_key=jax.random.key(0),
        mean=jnp.float32(0.5),
        std=jnp.float32(2.0),
    )
    volume = jnp.asarray([-1.0, -2.0, -count + 1.0, 0.0, 0.7]).reshape(5, 1, 1, 1)
    expected = (np.array([1, 2, count - 1, 0, 0.7]) - 0.5) / 2
    np.testing.assert_allclose(paint(volume, flat)[:, 0, 0, 0], expected, rtol=1e-6)


def test_a_whole_head_is_t1_like_by_its_seed_and_not_whitened() -> None:
    volume = np.full((12, 12, 12), -WHITE, np.float32)
    volume[:4] = -CSF
    volume[4] = 0.7  # scanned
    first, again, other = (whole(volume, seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first[5:] != other[5:]).all() and first.dtype == np.float32 and first.min() >= 0
    np.testing.assert_allclose(first[4], 0.7, rtol=1e-5)
    assert first[5:].mean() > 2 * first[:4].mean()


def test_t1_is_ordered_in_every_head_and_any_contrast_is_not() -> None:
    def orders(any_contrast: float, scanned: bool) -> float:
        """Returns the share of heads in which CSF < grey < white."""
        keys = jax.random.split(jax.random.key(1), 200)
        light = jax.vmap(lambda key: draw(key, any_contrast, jnp.asarray(scanned)).brightness)(keys)
        assert float(light.min()) >= 0
        return float(jnp.mean((light[:, CSF] < light[:, GREY]) & (light[:, GREY] < light[:, WHITE])))

    assert orders(0.0, False) == 1.0
    assert orders(1.0, False) < 0.5
    assert orders(1.0, True) == 1.0  # around a scanned brain, which is T1-weighted, so is the head


def test_the_texture_has_the_variance_that_the_table_says() -> None:
    soft = NUMBER["soft tissue"]
    palette = draw(jax.random.key(3), 0.0, jnp.asarray(False))
    image = paint(jnp.full((48, 48, 48, 1), -float(soft)), palette) * palette.std + palette.mean
    # clipped at black, which a fraction of a percent of the voxels reaches
    assert float(jnp.mean(image)) == pytest.approx(float(palette.brightness[soft]), rel=0.05)
    assert float(jnp.std(image)) == pytest.approx(float(palette.texture[soft]), rel=0.1)


def test_only_painted_samples_change_each_by_its_own_palette_and_the_key_decides() -> None:
    volume = -jnp.ones((3, 8, 8, 8, 1)) * WHITE
    batch = {"image": volume, "painted": jnp.asarray([True, False, True])}
    first, again = (generate(batch, jax.random.key(0), 0.0)["image"] for _ in range(2))
    other = generate(batch, jax.random.key(1), 0.0)["image"]
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(first[1], volume[1])
    assert not np.allclose(first[0], first[2]) and not np.allclose(first[0], other[0])
    low = (0.9 - WHITENING_MEAN[1]) / WHITENING_STD[1]
    high = (1.1 - WHITENING_MEAN[0]) / WHITENING_STD[0]
    assert low < float(first[0].mean()) < high
