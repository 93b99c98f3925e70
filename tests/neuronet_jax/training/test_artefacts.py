"""Laws of the artefacts: neutral parameters are the identity, and Fourier's theorems say what the others do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neuronet_jax.training import artefacts
from neuronet_jax.training.artefacts import (
    apply,
    draw,
    field_of_view,
    ghosting,
    motion,
    remove_face,
    spike,
    thick_slices,
)

SHAPE = (12, 16, 8)


def scan(shape: tuple[int, ...] = SHAPE) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


def number(value: float) -> jax.Array:
    return jnp.asarray(value, jnp.int32 if isinstance(value, int) else jnp.float32)


@pytest.mark.parametrize("axis", range(3))
def test_ghosts_are_copies_of_the_head_along_the_axis(axis: int) -> None:
    given, count, a = scan(), 4, 0.7
    found = ghosting(given, number(count), number(axis), number(a))
    # Planes at multiples of `count` are the mean of `count` copies, each a fraction of the side further.
    shifts = [jnp.roll(given, k * SHAPE[axis] // count, axis) for k in range(count)]
    centre = jnp.mean(given, axis, keepdims=True)  # the plane at zero stays
    expected = given - a * (sum(shifts) / count - centre)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(ghosting(given, number(count), number(axis), number(0.0)), given, atol=1e-5)


def test_a_spike_is_one_wave_at_its_place_in_k_space() -> None:
    given = scan()
    wave = spike(given, jnp.asarray([3 / 11, -2 / 15, 0.0]), number(1.5)) - given
    spectrum = np.abs(np.fft.fftn(wave))
    assert set(zip(*np.nonzero(spectrum > 1e-2 * spectrum.max()), strict=True)) == {(3, 14, 0), (9, 2, 0)}
    largest = np.abs(np.fft.fftn(given - given.mean())).max() / given.size
    assert float(jnp.max(jnp.abs(wave))) == pytest.approx(1.5 * largest, rel=1e-4)
    np.testing.assert_array_equal(spike(given, jnp.zeros(3), number(0.0)), given)


def test_motion_takes_each_part_of_k_space_from_its_own_pose() -> None:
    given = jnp.zeros(SHAPE).at[3:8, 4:11, 2:6].set(scan((5, 7, 4)))
    shift = jnp.asarray([1.0, 2.0, 0.0])
    moved = jnp.roll(given, (-1, -2), (0, 1))
    still, gone, found = (np.fft.fftn(v) for v in (given, moved, motion(given, jnp.eye(3), shift, number(0.75))))
    # read along y from −8 to 7, three quarters of it before the motion: up to −8 + 12 = 4, exclusive
    before = ((np.arange(16) + 8) % 16 - 8) < 4
    # the real part of the whole keeps what both halves of k-space agree on
    mixed = np.where(before[None, :, None], still, gone)
    mirrored = np.conj(np.roll(mixed[::-1, ::-1, ::-1], 1, (0, 1, 2)))
    np.testing.assert_allclose(found, (mixed + mirrored) / 2, atol=1e-3)
    np.testing.assert_allclose(motion(given, jnp.eye(3), jnp.zeros(3), number(0.4)), given, atol=1e-5)


@pytest.mark.parametrize("time", [0.1, 0.4, 0.6, 0.95])
def test_the_centre_of_k_space_shows_the_unmoved_head(time: float) -> None:
    given = jnp.zeros(SHAPE).at[4:8, 5:9, 2:6].set(1.0)
    found = motion(given, jnp.eye(3), jnp.asarray([3.0, 0.0, 0.0]), number(time))
    profile = np.asarray(found).sum((1, 2))
    assert int(np.argmax(np.convolve(profile, np.ones(4), "valid"))) == 4


@pytest.mark.parametrize("axis", range(3))
def test_thick_slices_are_means_of_their_voxels(axis: int) -> None:
    given = scan()
    np.testing.assert_allclose(thick_slices(given, number(axis), number(1.0)), given, atol=1e-5)
    lines = np.moveaxis(np.asarray(thick_slices(given, number(axis), number(2.0))), axis, 0)
    source = np.moveaxis(np.asarray(given), axis, 0)
    means = (source[::2] + source[1::2]) / 2
    np.testing.assert_allclose(lines[0], means[0], atol=1e-5)  # before the first slice's middle
    np.testing.assert_allclose(lines[1], 0.75 * means[0] + 0.25 * means[1], atol=1e-5)
    np.testing.assert_allclose(lines[2], 0.25 * means[0] + 0.75 * means[1], atol=1e-5)
    ramp = jnp.broadcast_to(jnp.arange(16.0).reshape(1, 16, 1), (4, 16, 4))
    thick = np.asarray(thick_slices(ramp, number(1), number(2.5)))[0, :, 0]
    np.testing.assert_allclose(thick[2:12], np.arange(2.0, 12.0), atol=0.05)  # a staircase of voxels stays a line


def test_a_field_of_view_ends_at_either_end() -> None:
    upper = field_of_view(SHAPE, number(2), jnp.asarray(True), number(0.25))
    assert upper[..., :6].all() and not upper[..., 6:].any()
    lower = field_of_view(SHAPE, number(0), jnp.asarray(False), number(0.25))
    assert lower[3:].all() and not lower[:3].any()


def test_a_removed_face_leaves_the_brain_and_what_is_behind_it() -> None:
    given = jnp.abs(scan((20, 20, 20))) + 1.0
    labels = jnp.zeros((1, 20, 20, 20), jnp.uint8).at[0, 6:14, 5:10, 12:18].set(1)
    found = remove_face(given, labels, number(45.0))
    changed = np.asarray(found != given)
    assert changed[:, 19, 0].all()  # in front and below
    assert not changed[:, :10, 10:].any()  # the brain, and what is above and behind it
    np.testing.assert_array_equal(found[labels[0] > 0], given[labels[0] > 0])
    y, z = np.nonzero(changed[0])
    # the plane touches the brain at y = 9, z = 12, with a margin of 2 voxels along its normal
    assert (y - z > (9 - 12) + 2 * 2**0.5 - 1e-3).all() and (y - z).min() == 0
    np.testing.assert_array_equal(remove_face(given, jnp.zeros_like(labels), number(45.0)), given)


def test_a_sample_has_each_fault_with_its_share_and_keeps_what_it_has_not() -> None:
    drawn = jax.vmap(lambda key: draw(key, 0.25))(jax.random.split(jax.random.key(0), 2000))
    np.testing.assert_allclose(drawn.has.mean(axis=0), 0.25, atol=0.04)
    assert int(drawn.ghosts.min()) == artefacts.GHOSTS[0] and int(drawn.ghosts.max()) == artefacts.GHOSTS[1]
    image, labels = scan()[..., None], jnp.ones((2, *SHAPE), jnp.uint8)
    none = apply(image, labels, draw(jax.random.key(1), 0.0))
    np.testing.assert_array_equal(none[0], image)
    np.testing.assert_array_equal(none[1], labels)
    everything = apply(image, labels, draw(jax.random.key(1), 1.0))
    assert jnp.isfinite(everything[0]).all() and 0 < int((everything[1] == 0).sum()) < everything[1].size
