import numpy as np
import pytest
from scipy import ndimage
from scipy.spatial import KDTree

from neuronet_jax.errors import NeuronetError
from neuronet_jax.evaluation.surfaces import surfaces_per_class

ONE_MM = np.ones(3)


def _slab(first: int, last: int) -> np.ndarray:
    labels = np.zeros((40, 40, 40), np.uint8)
    labels[first:last, 5:35, 5:35] = 1
    return labels


def test_a_shifted_slab_is_as_far_as_it_was_shifted():
    spacing_mm = np.array([1.5, 1.0, 1.0])
    table = surfaces_per_class(_slab(10, 20), _slab(12, 22), 2, spacing_mm, tolerance_mm=1.0)
    assert table.hd95_mm[1] == 3.0  # two voxels of 1.5 mm
    # none of the 1800 mm² of large faces is within 1 mm; of the 1800 mm² of rim, all but two voxels of ten at one end
    assert 0.8 * 1800 / 3600 < table.nsd[1] < 1800 / 3600  # elements on the edges are smaller
    assert surfaces_per_class(_slab(10, 20), _slab(12, 22), 2, spacing_mm, tolerance_mm=3.0).nsd[1] == 1
    assert np.isnan(table.hd95_mm[0]) and np.isnan(table.nsd[0])


def test_identical_maps_have_distance_zero_wherever_they_lie():
    labels = np.random.default_rng(0).integers(0, 5, (20, 21, 22)).astype(np.uint8)  # touches every border
    table = surfaces_per_class(labels, labels, 5, ONE_MM, 0.5)
    assert table.hd95_mm[1:].tolist() == [0] * 4 and table.nsd[1:].tolist() == [1] * 4


@pytest.mark.parametrize("swap", [False, True])
def test_F11_empty_in_both_is_not_applicable_and_empty_in_one_counts(swap):
    reference, predicted = _slab(10, 20), _slab(10, 20)
    predicted[30:35, 10:20, 10:20] = 3
    pair = (predicted, reference) if swap else (reference, predicted)
    table = surfaces_per_class(*pair, 4, ONE_MM, 1.0)
    assert (table.hd95_mm[1], table.nsd[1]) == (0, 1)
    assert np.isnan(table.hd95_mm[2]) and np.isnan(table.nsd[2])
    assert (table.hd95_mm[3], table.nsd[3]) == (np.inf, 0)


def test_agrees_with_distances_between_surface_points():
    rng = np.random.default_rng(1)
    spacing_mm = np.array([0.8, 1.0, 2.0])
    masks = [ndimage.gaussian_filter(rng.normal(size=(30, 32, 20)), 3) > 0.02 for _ in range(2)]
    clouds = []
    for mask in masks:  # corners between eight voxels that are neither all inside nor all outside
        inside = ndimage.uniform_filter(np.pad(mask, 1).astype(float), 2, mode="constant")
        clouds.append(np.argwhere((inside > 1e-9) & (inside < 1 - 1e-9)) * spacing_mm)
    there = KDTree(clouds[1]).query(clouds[0])[0]
    back = KDTree(clouds[0]).query(clouds[1])[0]
    table = surfaces_per_class(masks[0].astype(np.uint8), masks[1].astype(np.uint8), 2, spacing_mm, 1.0)
    # points are not weighted by area here, which moves a percentile by less than a voxel
    assert table.hd95_mm[1] == pytest.approx(max(np.percentile(there, 95), np.percentile(back, 95)), abs=1.0)
    points = np.mean(np.concatenate([there, back]) <= 1.0)
    assert table.nsd[1] == pytest.approx(points, abs=0.03)


def test_each_class_equals_the_library_on_the_whole_volume():
    import surface_distance

    rng = np.random.default_rng(2)
    maps = [np.digitize(ndimage.gaussian_filter(rng.normal(size=(26, 24, 22)), 2), (-0.05, 0, 0.05)) for _ in range(2)]
    spacing_mm = np.array([1.0, 1.2, 0.9])
    table = surfaces_per_class(maps[0], maps[1], 4, spacing_mm, 1.0)
    for index in (1, 2, 3):
        with pytest.warns(DeprecationWarning, match="scipy.ndimage"):
            distances = surface_distance.compute_surface_distances(maps[0] == index, maps[1] == index, spacing_mm)
        assert table.hd95_mm[index] == surface_distance.compute_robust_hausdorff(distances, 95)
        assert table.nsd[index] == surface_distance.compute_surface_dice_at_tolerance(distances, 1.0)


def test_a_different_grid_is_refused():
    with pytest.raises(NeuronetError, match="one grid"):
        surfaces_per_class(np.zeros((3, 3, 3), int), np.zeros((3, 3, 4), int), 2, ONE_MM, 1.0)
