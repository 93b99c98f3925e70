"""Laws of moving to the network's grid and back, and parity with nibabel and scipy."""

import itertools

import nibabel as nib
import numpy as np
import pytest
import scipy.ndimage
from hypothesis import given, settings
from hypothesis import strategies as st
from nibabel.funcs import as_closest_canonical

from neuronet_jax.errors import NeuronetError
from neuronet_jax.images import space
from neuronet_jax.images.space import Grid, Volume

RNG = np.random.default_rng(0)
SHAPE = (7, 10, 13)
IMAGE = RNG.normal(size=SHAPE).astype(np.float32)
LABELS = RNG.integers(0, 5, SHAPE).astype(np.uint8)
RAS = np.array([[2.0, 0, 0, -11], [0, 2, 0, 5], [0, 0, 2, 3], [0, 0, 0, 1]])

ORIENTATIONS = [
    "".join(letters) for order in itertools.permutations(("RL", "AP", "SI")) for letters in itertools.product(*order)
]


def oriented(data: np.ndarray, affine: np.ndarray, codes: str) -> Volume:
    """Returns the same brain as a different scanner stores it, by nibabel."""
    turn = nib.orientations.ornt_transform(
        nib.orientations.io_orientation(affine), nib.orientations.axcodes2ornt(codes)
    )
    turned = nib.orientations.apply_orientation(data, turn)
    return Volume(turned, affine @ nib.orientations.inv_ornt_aff(turn, data.shape))


def rotation(axis: int, degrees: float) -> np.ndarray:
    """Returns a rotation about one axis, float64 [4 4]."""
    angle = np.deg2rad(degrees)
    matrix = np.eye(4)
    i, j = (a for a in range(3) if a != axis)
    matrix[i, i] = matrix[j, j] = np.cos(angle)
    matrix[i, j], matrix[j, i] = -np.sin(angle), np.sin(angle)
    return matrix


@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_all_48_orientations_become_one_and_return_exactly(codes):
    turned = oriented(LABELS, RAS, codes)
    conformed = space.conform(turned, 2.0, is_label=True)
    np.testing.assert_array_equal(conformed.data, LABELS)
    np.testing.assert_array_equal(conformed.affine, RAS)
    assert conformed.data.flags.c_contiguous
    np.testing.assert_array_equal(space.to_grid(conformed, turned.grid), turned.data)


def test_there_are_48_orientations():
    assert len(set(ORIENTATIONS)) == 48


@pytest.mark.parametrize("codes", ["LAS", "LPS", "PSR", "ARI"])
def test_A13_any_orientation_gives_the_same_resampled_image(codes):
    """The grids still coincide when resampling is added to the flips."""
    affine = RAS @ np.diag([0.35, 0.5, 0.6, 1.0])
    expected = space.conform(Volume(IMAGE, affine), 1.1, is_label=False)
    result = space.conform(oriented(IMAGE, affine, codes), 1.1, is_label=False)
    np.testing.assert_array_equal(result.data, expected.data)
    np.testing.assert_allclose(result.affine, expected.affine, atol=1e-9)


@pytest.mark.parametrize("codes", ORIENTATIONS[::5])
def test_reorientation_is_that_of_nibabel(codes):
    turned = oriented(IMAGE, rotation(0, 12) @ rotation(2, -9) @ RAS, codes)
    result = space.reorient(turned)
    reference = as_closest_canonical(nib.Nifti1Image(turned.data, turned.affine))
    np.testing.assert_array_equal(result.data, np.asarray(reference.dataobj))
    np.testing.assert_allclose(result.affine, reference.affine, atol=1e-12)


@settings(max_examples=100, deadline=None)
@given(st.tuples(*[st.floats(-180, 180)] * 3), st.floats(-0.5, 0.5))
def test_A14_reorientation_is_idempotent_and_invertible(degrees, shear):
    """Holds near 45 degrees and under shear too, where the closest axes are nearly tied."""
    affine = rotation(0, degrees[0]) @ rotation(1, degrees[1]) @ rotation(2, degrees[2]) @ np.diag([1.0, 2, 3, 1])
    affine = affine @ np.array([[1, shear, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])
    once = space.reorient(Volume(LABELS, affine))
    twice = space.reorient(once)
    np.testing.assert_array_equal(twice.data, once.data)
    np.testing.assert_array_equal(twice.affine, once.affine)
    np.testing.assert_array_equal(space.to_grid(once, Grid(SHAPE, affine)), LABELS)


@pytest.mark.parametrize("degrees", [44.9, 45.0, 45.1, 135.0])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_A14_at_45_degrees(axis, degrees):
    volume = Volume(LABELS, rotation(axis, degrees) @ RAS)
    once = space.reorient(volume)
    assert space.orientation(once.affine) == ((0, 1, 2), (1, 1, 1))
    np.testing.assert_array_equal(space.to_grid(once, volume.grid), LABELS)


@pytest.mark.parametrize("voxel_size_mm", [0.7, 1.0, 1.7, 2.0])
def test_conforming_twice_changes_nothing(voxel_size_mm):
    affine = rotation(0, 20) @ np.diag([1.0, 0.8, 1.5, 1.0])
    once = space.conform(Volume(IMAGE, affine), voxel_size_mm, is_label=False)
    twice = space.conform(once, voxel_size_mm, is_label=False)
    np.testing.assert_array_equal(twice.data, once.data)
    np.testing.assert_array_equal(twice.affine, once.affine)
    np.testing.assert_allclose(once.spacing_mm, voxel_size_mm)


def test_voxels_of_the_right_size_pass_bit_for_bit():
    affine = np.diag([1.0004, 0.9996, 1.0, 1.0])
    result = space.conform(Volume(IMAGE, affine), 1.0, is_label=False)
    assert result.data.tobytes() == IMAGE.tobytes()
    np.testing.assert_array_equal(result.affine, affine)


@pytest.mark.parametrize(("voxel_size_mm", "border"), [(0.6, 0), (0.99, 0), (2.0, 3), (1.7, 3)])
def test_a_linear_function_is_resampled_exactly(voxel_size_mm, border):
    """f(x, y, z) in mm keeps its values at the new voxels. The anti-alias filter needs its 4 sigmas to the border."""
    shape, affine = (
        (30, 31, 32),
        rotation(2, 10) @ np.array([[1.0, 0, 0, 3], [0, 1, 0, -5], [0, 0, 1, 7], [0, 0, 0, 1]]),
    )

    def function(shape, affine):
        voxels = np.stack([*np.meshgrid(*map(np.arange, shape), indexing="ij"), np.ones(shape)], axis=-1)  # [x y z 4]
        return (voxels @ affine.T)[..., :3] @ [0.3, -0.2, 0.5]

    image = space.conform(Volume(function(shape, affine).astype(np.float32), affine), voxel_size_mm, is_label=False)
    inner = (slice(border, -border or None),) * 3
    assert image.data[inner].size > 500
    np.testing.assert_allclose(image.data[inner], function(image.data.shape, image.affine)[inner], atol=1e-4)


def test_linear_resampling_is_that_of_scipy():
    """Upsampling needs no anti-alias filter, so this is plain linear interpolation at the same points."""
    image = space.conform(Volume(IMAGE, np.diag([2.0, 2, 2, 1])), 0.7, is_label=False)
    reference = scipy.ndimage.affine_transform(
        IMAGE.astype(np.float64),
        np.linalg.inv(np.diag([2.0, 2, 2, 1])) @ image.affine,
        output_shape=image.data.shape,
        order=1,
        mode="nearest",
    )
    np.testing.assert_allclose(image.data, reference, atol=1e-6)


def test_anti_alias_filter_is_that_of_scipy():
    """Downsampling by 2 applies a Gaussian of FWHM √(2² − 1) voxels, then takes every second voxel."""
    image = space.conform(Volume(IMAGE, np.eye(4)), 2.0, is_label=False).data
    sigma = np.sqrt(3) / np.sqrt(8 * np.log(2))
    reference = scipy.ndimage.gaussian_filter(
        IMAGE.astype(np.float64), sigma, mode="nearest", radius=int(np.ceil(4 * sigma))
    )
    np.testing.assert_allclose(image, reference[::2, ::2, ::2][: image.shape[0], : image.shape[1]], atol=1e-6)


def test_halving_the_resolution_picks_label_voxels():
    result = space.conform(Volume(LABELS, np.eye(4)), 2.0, is_label=True)
    np.testing.assert_array_equal(result.data, LABELS[::2, ::2, ::2])
    np.testing.assert_array_equal(result.affine, np.diag([2.0, 2, 2, 1]))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.floats(0.1, 12))
def test_samples_lie_within_the_voxels_and_fill_them(side, step):
    first, _, count = space._samples(side, step)
    assert first >= 0
    assert first + (count - 1) * step <= side - 1 + 1e-6
    assert side - 1 - (count - 1) * step < step + 1e-6  # one more would not fit


def test_image_and_labels_share_the_grid():
    for voxel_size_mm in (0.9, 1.3, 2.1):
        image = space.conform(Volume(IMAGE, RAS), voxel_size_mm, is_label=False)
        labels = space.conform(Volume(LABELS, RAS), voxel_size_mm, is_label=True)
        assert image.grid.shape == labels.grid.shape
        np.testing.assert_array_equal(image.affine, labels.affine)


@pytest.mark.parametrize("voxel_size_mm", [0.5, 1.0, 1.5])
def test_upsampled_labels_return_exactly(voxel_size_mm):
    """The finer grid has a voxel nearest to every input voxel's centre, so going there and back is the identity."""
    labels = space.conform(oriented(LABELS, RAS, "PIR"), voxel_size_mm, is_label=True)
    np.testing.assert_array_equal(space.to_grid(labels, Grid(SHAPE, RAS)), LABELS)


def test_padding_and_cropping_are_undone():
    for target in ((16, 16, 16), (4, 5, 6), (16, 5, 13)):
        origin = space.crop_origin(SHAPE, target, (1, 1, 1), (6, 9, 12))
        placed = space.place(LABELS, target, origin)
        restored = space.to_grid(Volume(placed, space.shifted(RAS, origin)), Grid(SHAPE, RAS))
        kept = tuple(slice(max(o, 0), o + t) for o, t in zip(origin, target, strict=True))
        expected = np.zeros_like(LABELS)
        expected[kept] = LABELS[kept]
        inside = tuple(slice(max(o, 0), min(o + t, s)) for o, t, s in zip(origin, target, SHAPE, strict=True))
        np.testing.assert_array_equal(restored[inside], expected[inside])
        far = np.ones(SHAPE, bool)
        far[tuple(slice(max(i.start - 1, 0), i.stop + 1) for i in inside)] = False
        assert not restored[far].any()  # no label appears beyond the voxel next to the border


def test_A27_place_pads_and_crops():
    line = np.arange(1, 6).reshape(5, 1, 1)
    np.testing.assert_array_equal(space.place(line, (8, 1, 1), (-1, 0, 0)).ravel(), [0, 1, 2, 3, 4, 5, 0, 0])
    np.testing.assert_array_equal(space.place(line, (3, 1, 1), (1, 0, 0)).ravel(), [2, 3, 4])
    np.testing.assert_array_equal(space.place(line, (3, 1, 1), (4, 0, 0)).ravel(), [5, 0, 0])
    np.testing.assert_array_equal(space.place(line, (3, 1, 1), (9, 0, 0)).ravel(), [0, 0, 0])


def test_A27_crops_follow_the_labels_within_the_volume():
    assert space.crop_origin((10, 10, 10), (13, 12, 10), (0, 0, 0), (1, 1, 1)) == (-1, -1, 0)  # room: centred padding
    assert space.crop_origin((10, 10, 10), (4, 4, 4), (3, 0, 8), (7, 2, 10)) == (3, 0, 6)  # on the labels, inside


def test_labels_of_a_rotated_grid_follow_the_nearest_voxel():
    """The grids differ by a rotation; an explicit loop over voxels gives the reference."""
    target = Grid(
        (6, 6, 6), rotation(1, 30) @ np.array([[2.0, 0, 0, 0.3], [0, 2, 0, 6.1], [0, 0, 2, 3.3], [0, 0, 0, 1]])
    )
    result = space.to_grid(Volume(LABELS, RAS), target)
    to_source = np.linalg.inv(RAS) @ target.affine
    for voxel in itertools.product(range(6), repeat=3):
        source = np.rint((to_source @ [*voxel, 1])[:3]).astype(int)
        if all(0 <= i < side for i, side in zip(source, SHAPE, strict=True)):
            assert result[voxel] == LABELS[tuple(source)]
        elif any(not -1 <= i <= side for i, side in zip(source, SHAPE, strict=True)):
            assert result[voxel] == 0


def test_a_wrong_voxel_size_is_named():
    with pytest.raises(NeuronetError, match="positive step"):
        space.conform(Volume(IMAGE, RAS), -1.0, is_label=False)
