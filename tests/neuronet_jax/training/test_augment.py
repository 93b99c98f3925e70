"""Laws of the augmentation: strength 0 is the identity, mirroring is an involution, a batch equals one by one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neuronet_jax.config import AugmentConfig
from neuronet_jax.labels import PROTOCOLS
from neuronet_jax.training.augment import augment, blur, change_intensity, draw, mirror, warp

NAMES = ("malp_em", "fsl_first")
FULL = AugmentConfig(
    flip=True, intensity=1.0, spatial=1.0, elastic=1.0, resolution=1.0, any_contrast=1.0, artefacts=1.0
)

NONE = AugmentConfig(False, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)


def batch_of(b: int = 2, side: int = 8) -> dict[str, jax.Array]:
    random = np.random.default_rng(0)
    labels = np.stack([random.integers(0, PROTOCOLS[n].num_classes, (b, side, side, side)) for n in NAMES], axis=1)
    image = random.standard_normal((b, side, side, side, 1))
    return {"image": jnp.asarray(image, jnp.float32), "labels": jnp.asarray(labels, jnp.uint8)}


def test_neutral_strengths_are_the_identity() -> None:
    batch = batch_of()
    same = augment(batch, jax.random.key(0), NONE, NAMES)
    assert all(same[name] is batch[name] for name in batch)
    neutral = jax.jit(draw, static_argnums=1)(jax.random.key(0), NONE)
    np.testing.assert_allclose(change_intensity(batch["image"][0], neutral), batch["image"][0], atol=2e-5)
    image, labels = jax.jit(warp)(batch["image"][0], batch["labels"][0], neutral.matrix)
    np.testing.assert_allclose(image, batch["image"][0], atol=1e-6)
    np.testing.assert_array_equal(labels, batch["labels"][0])


def test_mirroring_swaps_partners_and_is_an_involution() -> None:
    batch = batch_of()
    image, labels = batch["image"][0], batch["labels"][0]
    yes = jnp.asarray(True)
    once = mirror(image, labels, yes, NAMES)
    np.testing.assert_array_equal(once[0], image[::-1])
    right, left = 38 + 2, 39  # basal forebrain: 40 is right, 39 left, against the table's habit
    np.testing.assert_array_equal(once[1][0] == left, labels[0, ::-1] == right)
    twice = mirror(*once, yes, NAMES)
    np.testing.assert_array_equal(twice[0], image)
    np.testing.assert_array_equal(twice[1], labels)
    np.testing.assert_array_equal(mirror(image, labels, jnp.asarray(False), NAMES)[1], labels)


def test_warping_by_a_quarter_turn_is_a_rotation_of_the_array() -> None:
    batch = batch_of()
    turn = jnp.asarray([[0.0, 1.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    image, labels = warp(batch["image"][0], batch["labels"][0], turn)
    np.testing.assert_allclose(image[..., 0], np.rot90(batch["image"][0, ..., 0]), atol=1e-5)
    np.testing.assert_array_equal(labels[0], np.rot90(batch["labels"][0, 0]))


def test_a_constant_displacement_is_a_shift_and_a_smooth_one_keeps_its_points() -> None:
    batch = batch_of()
    image, labels = batch["image"][0], batch["labels"][0]
    along_x = jnp.zeros((3, 5, 5, 5)).at[0].set(2 / 8)  # of a side of eight voxels
    moved, classes = warp(image, labels, jnp.eye(3), along_x)
    np.testing.assert_allclose(moved[:6], image[2:], atol=1e-5)
    np.testing.assert_array_equal(classes[:, :6], labels[:, 2:])
    bump = jnp.zeros((3, 5, 5, 5)).at[1, 2, 2, 2].set(0.25)
    ramp = jnp.broadcast_to(jnp.arange(40.0).reshape(1, 40, 1, 1), (40, 40, 40, 1))  # its value is y
    pulled = warp(ramp, jnp.zeros((1, 40, 40, 40), jnp.uint8), jnp.eye(3), bump)[0] - ramp
    assert float(jnp.max(pulled)) == pytest.approx(0.25 * 40, rel=0.05)  # at the control point in the middle
    assert float(jnp.max(jnp.abs(pulled[:4]))) < 0.5  # and little far from it


def test_blur_spreads_a_point_by_its_deviation_along_each_axis_and_keeps_its_sum() -> None:
    point = jnp.zeros((15, 15, 15, 1)).at[7, 7, 7, 0].set(1.0)
    blurred = np.asarray(blur(point, jnp.asarray([0.0, 0.7, 1.0])))[..., 0]
    np.testing.assert_allclose(blurred.sum(), 1.0, rtol=1e-5)
    offsets = np.arange(15) - 7.0
    for axis, sigma in enumerate((0.0, 0.7, 1.0)):
        profile = blurred.sum(axis=tuple(a for a in range(3) if a != axis))
        assert (profile * offsets**2).sum() == pytest.approx(sigma**2, abs=0.03)


def test_C08_finite_and_within_the_label_set_over_many_keys() -> None:
    run = jax.jit(lambda batch, key: augment(batch, key, FULL, NAMES))
    batch = batch_of(b=1)
    constant = {**batch, "image": jnp.zeros_like(batch["image"])}
    allowed = [{0, *np.unique(batch["labels"][0, p]).tolist()} for p in range(2)]  # 0: outside the field of view
    for p, name in enumerate(NAMES):
        allowed[p] |= set(PROTOCOLS[name].partners[sorted(allowed[p])])
    for seed in range(200):
        for source in (batch, constant):
            changed = run(source, jax.random.key(seed))
            assert changed["image"].shape == batch["image"].shape and changed["labels"].dtype == jnp.uint8
            assert jnp.isfinite(changed["image"]).all()
            for p in range(2):
                assert set(np.unique(changed["labels"][0, p])) <= allowed[p]


def test_every_sample_is_changed_by_its_own_draw() -> None:
    batch = batch_of(b=1)
    twins = jax.tree.map(lambda x: jnp.concatenate([x, x]), batch)
    compiled = jax.jit(augment, static_argnums=(2, 3))
    changed = compiled(twins, jax.random.key(1), FULL, NAMES)
    assert not jnp.array_equal(changed["image"][0], changed["image"][1])
    again = compiled(twins, jax.random.key(1), FULL, NAMES)
    np.testing.assert_array_equal(changed["image"], again["image"])


@pytest.mark.parametrize("field", ["log_gamma", "log_gain", "offset", "noise"])
def test_strength_scales_what_is_drawn(field: str) -> None:
    key = jax.random.key(2)
    one, two = (draw(key, dataclasses.replace(FULL, intensity=s)) for s in (1.0, 2.0))
    np.testing.assert_allclose(getattr(two, field), 2 * getattr(one, field), rtol=1e-6)
