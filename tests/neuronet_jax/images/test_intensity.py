import numpy as np
import pytest

from neuronet_jax.errors import RejectError
from neuronet_jax.images.intensity import clip_spikes, statistics, whiten

HEAD = np.abs(np.random.default_rng(0).normal(100, 30, (20, 20, 20))).astype(np.float32)


def test_statistics_by_hand():
    result = statistics(np.array([[[0, 0, 3, 5]]], np.float32))
    assert result.mean == 2
    assert result.std == pytest.approx(np.sqrt((4 + 4 + 1 + 9) / 4))


def test_statistics_accumulate_in_float64():
    """A float32 sum over a head of 16-bit values would lose the mean in rounding."""
    image = np.tile(np.array([40000, 40001], np.float32), 2**22).reshape(2**9, 2**7, 2**7)
    result = statistics(image)
    assert result.mean == 40000.5
    assert result.std == pytest.approx(0.5, abs=1e-9)


def test_whitened_volumes_have_zero_mean_and_unit_variance():
    numbers = statistics(HEAD)
    result = whiten(HEAD, numbers.mean, numbers.std)
    assert result.dtype == np.float32
    assert float(result.mean(dtype=np.float64)) == pytest.approx(0, abs=1e-5)
    assert float(result.std(dtype=np.float64)) == pytest.approx(1, abs=1e-5)


def test_whitening_ignores_units():
    """Scaling and shifting the scanner's units changes nothing: only contrast counts."""
    one, other = statistics(HEAD), statistics(HEAD * 7 + 100)
    np.testing.assert_allclose(
        whiten(HEAD, one.mean, one.std), whiten(HEAD * 7 + 100, other.mean, other.std), atol=1e-4
    )


@pytest.mark.parametrize("value", [0, 5, -3, 1e30])
def test_A25_constant_volumes_are_rejected(value):
    with pytest.raises(RejectError, match="E_CONSTANT"):
        statistics(np.full((8, 8, 8), value, np.float32))
    if value == 0:
        with pytest.raises(RejectError, match="E_CONSTANT"):
            clip_spikes(np.zeros((8, 8, 8), np.float32))


def test_A25_rounding_noise_counts_as_constant():
    image = np.full((8, 8, 8), 1e6, np.float32)
    image[0, 0, 0] = np.nextafter(np.float32(1e6), np.float32(2e6))
    with pytest.raises(RejectError, match="E_CONSTANT"):
        statistics(image)


def test_A25_nan_is_rejected():
    image = HEAD.copy()
    image[0, 0, 0] = np.nan
    with pytest.raises(RejectError, match="E_NAN"):
        statistics(image)


def test_A26_one_spike_is_clipped():
    image = HEAD.copy()
    image[3, 4, 5] = 1e6
    result, warnings = clip_spikes(image)
    assert warnings == ("W_INTENSITY",)
    assert np.isfinite(result).all()
    assert result[3, 4, 5] < 10 * HEAD.max()
    assert (
        np.delete(result.ravel(), np.ravel_multi_index((3, 4, 5), image.shape)).tolist()
        == np.delete(HEAD.ravel(), np.ravel_multi_index((3, 4, 5), image.shape)).tolist()
    )
    assert statistics(result).std == pytest.approx(statistics(HEAD).std, rel=0.05)


def test_A26_a_negative_spike_is_clipped():
    image = HEAD.copy()
    image[3, 4, 5] = -1e6
    result, warnings = clip_spikes(image)
    assert warnings == ("W_INTENSITY",)
    assert result.min() > -10 * HEAD.max()


def test_A26_wrapped_integers_are_noted():
    """Bright voxels of an unsigned image saved as int16 turn negative; they are kept, and a warning is given."""
    image = (HEAD * 300).astype(np.uint16).astype(np.int16).astype(np.float32)
    assert image.min() < 0
    result, warnings = clip_spikes(image)
    assert warnings == ("W_INTENSITY",)
    assert np.isfinite(result).all()


def test_A26_defaced_background_does_not_hide_the_head():
    """With 99.95 % exact zeros, a percentile over all voxels would clip the head away."""
    image = np.zeros((100, 100, 100), np.float32)
    image[:8, :8, :8] = HEAD[:8, :8, :8]
    result, warnings = clip_spikes(image)
    assert result is image
    assert warnings == ()


def test_A26_ordinary_images_pass_unchanged():
    result, warnings = clip_spikes(HEAD)
    assert result is HEAD
    assert warnings == ()
