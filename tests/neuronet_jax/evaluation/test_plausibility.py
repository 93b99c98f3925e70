"""F4: inputs that are not whole T1-weighted heads are recognised, on variants of the MNI152 head.

The labels come from the template's own tissue maps, as from a network that goes by anatomy, or from the image's
intensities, as from one that goes by brightness.
"""

from functools import cache

import nibabel as nib
import numpy as np
import pytest
from nilearn.datasets import load_mni152_gm_template, load_mni152_template, load_mni152_wm_template
from scipy import ndimage

from neuronet_jax.errors import RejectError
from neuronet_jax.evaluation import agreement, plausibility
from neuronet_jax.images import intensity, nifti
from neuronet_jax.labels import PROTOCOLS

Maps = dict[str, np.ndarray]


@cache
def _mni() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns T1 (skull-stripped), labels 1 CSF, 2 GM, 3 WM, and the affine, at 2 mm."""
    image = load_mni152_template(resolution=2)
    t1 = np.asarray(image.dataobj, np.float32)
    grey, white = (
        np.asarray(load(resolution=2).dataobj) for load in (load_mni152_gm_template, load_mni152_wm_template)
    )
    brain = np.asarray(ndimage.binary_fill_holes(t1 > 0.1))
    labels = np.where(brain, 1 + np.argmax([np.full(t1.shape, 0.3), grey, white], axis=0), 0).astype(np.uint8)
    return t1 * 1000, labels, image.affine


def _verdict(data: np.ndarray, labels: np.ndarray, affine: np.ndarray | None = None) -> tuple[str, ...]:
    affine = _mni()[2] if affine is None else affine
    volume = nifti.check_image(nib.Nifti1Image(data.astype(np.float32), affine))
    maps = {"fsl_fast": labels, "spm_tissue": labels}
    return plausibility.check(volume, maps, agreement.compare(maps, affine))


def _inverted(t1: np.ndarray) -> np.ndarray:
    return np.where(t1 > 0.1 * t1.max(), 1.05 * t1.max() - t1, 0)


def test_F04_a_t1_head_passes():
    t1, labels, _ = _mni()
    assert _verdict(t1, labels) == ()


@pytest.mark.parametrize("by", ["anatomy", "brightness"])
def test_F04_t2_contrast_is_named(by):
    t1, labels, _ = _mni()
    t2 = _inverted(t1)
    if by == "brightness":  # bright CSF is labelled white matter, so the order of the means is kept
        inside = t2[labels > 0]
        order = np.digitize(t2, np.quantile(inside, (0.15, 0.6))) + 1
        labels = np.where(labels > 0, order, 0).astype(np.uint8)
    assert _verdict(t2, labels) == ("W_CONTRAST",)


def test_F04_noise_is_not_a_brain():
    _, labels, _ = _mni()
    noise = np.random.default_rng(0).normal(100, 20, labels.shape)
    assert _verdict(noise, np.zeros_like(labels)) == ("W_BRAIN_VOLUME", "W_NO_BRAIN")
    assert _verdict(noise, labels) == ("W_CONTRAST",)  # a network that sees brains everywhere


def test_F04_a_sphere_is_not_a_brain():
    t1, _, _ = _mni()
    centre = np.reshape(t1.shape, (3, 1, 1, 1)) / 2
    radius_mm = 2 * np.sqrt(((np.indices(t1.shape) - centre) ** 2).sum(axis=0))
    labels = np.select([radius_mm < 65, radius_mm < 70, radius_mm < 72], [3, 2, 1], 0).astype(np.uint8)
    image = np.where(radius_mm < 72, 800.0, 0) + np.random.default_rng(0).random(t1.shape)
    assert _verdict(image, labels) == ("W_NO_BRAIN",)


def test_F04_zeros_are_rejected():
    volume = nifti.check_image(nib.Nifti1Image(np.zeros((90, 100, 90), np.float32), np.eye(4)))
    with pytest.raises(RejectError, match="E_CONSTANT"):
        intensity.clip_spikes(volume.data)


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("upper", [True, False])
def test_F04_a_head_cut_at_half_height_is_named(padded, upper):
    t1, labels, _ = _mni()
    middle = t1.shape[2] // 2
    kept = slice(middle, None) if upper else slice(None, middle)
    if padded:
        there = np.zeros(t1.shape, bool)
        there[:, :, kept] = True
        image, labels = np.where(there, t1, 0), np.where(there, labels, 0).astype(np.uint8)
    else:
        image, labels = t1[:, :, kept], labels[:, :, kept]
    found = _verdict(image, labels)
    assert "W_CUT" in found and not {"W_CONTRAST", "W_NO_BRAIN"} & set(found)


def test_F04_the_orientation_of_the_file_does_not_matter():
    t1, labels, affine = _mni()
    t1, labels = t1[:, :, : t1.shape[2] // 2], labels[:, :, : t1.shape[2] // 2]
    to_old = np.array([[0, 0, -1, t1.shape[0] - 1], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1.0]])
    turned = [np.ascontiguousarray(a[::-1].transpose(1, 2, 0)) for a in (t1, labels)]
    assert _verdict(turned[0], turned[1], affine @ to_old) == _verdict(t1, labels)


def test_first_alone_and_contradictions():
    t1, labels, affine = _mni()
    volume = nifti.check_image(nib.Nifti1Image(t1, affine))
    first: Maps = {"fsl_first": np.where(labels == 3, 16, 0).astype(np.uint8)}
    assert plausibility.check(volume, first, agreement.compare(first, affine)) == ()
    malp_em = np.choose(labels, [0, 1, 41, 16]).astype(np.uint8)  # third ventricle, a gyrus, white matter
    tissue = np.choose(labels, [0, 1, 3, 4]).astype(np.uint8)
    maps = {"malp_em": malp_em, "malp_em_tissue": tissue}
    assert plausibility.check(volume, maps, agreement.compare(maps, affine)) == ()
    maps["malp_em_tissue"] = np.where(tissue > 0, 5, 0).astype(np.uint8)
    assert "W_AGREEMENT" in plausibility.check(volume, maps, agreement.compare(maps, affine))


def test_real_brains_pass_under_their_reference_labels(real_data):
    folder = real_data / "cohort" / "1000"
    volume = nifti.read_image(folder / "T1.nii.gz")
    maps = {n: nifti.read_labels(folder / p.filename).data.astype(np.uint8) for n, p in PROTOCOLS.items()}
    assert plausibility.check(volume, maps, agreement.compare(maps, volume.affine)) == ()
    inverted = volume.holding(_inverted(volume.data))
    assert plausibility.check(inverted, maps, agreement.compare(maps, volume.affine)) == ("W_CONTRAST",)
