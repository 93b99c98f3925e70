"""Scores on another grid against the plain way: all scores at full resolution, then SciPy's linear interpolation."""

from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import nibabel as nib
import numpy as np
import pytest
from flax import nnx
from scipy.ndimage import map_coordinates

from experiments.flags import load
from neuronet_jax.errors import NeuronetError
from neuronet_jax.images import nifti
from neuronet_jax.images.headers import Limits
from neuronet_jax.images.space import Volume
from neuronet_jax.inference import volume
from neuronet_jax.inference.onto_grid import DOUBT_NATS, Reading
from neuronet_jax.inference.segment import segment, segment_volume
from neuronet_jax.inference.segmentation import Confidence, Options
from neuronet_jax.inference.volume import _shifts, read_volume
from neuronet_jax.labels import MALP_EM_TO_TISSUE, PROTOCOLS
from neuronet_jax.models.network import build
from neuronet_jax.runs.model import Model, ensemble
from neuronet_jax.runs.restore import weights_sha256

NAMES = ("fsl_first", "malp_em", "malp_em_tissue")
CLASSES = tuple(PROTOCOLS[name].num_classes for name in NAMES)
FILTERS = (2, 4, 4)
AWAY = [np.arange(1.3, 30, 0.7), np.arange(29.0, 2, -1.9), np.arange(0.0, 31, 1.25)]  # finer, flipped and coarser


def _model(names: tuple[str, ...] = NAMES, seed: int = 0, family: str = "neuronet", **changes) -> Model:
    config = load("all_targets:demo")
    settings = replace(config.model, family=family, filters=FILTERS, compute_dtype="float32")
    network = build(settings, names, seed)
    # As drawn, one class would win nearly everywhere: a louder readout makes the most of few voxels.
    for decoder in network.decoders.protocols.values():
        for kernel in decoder.kernels if family == "neuronet" else decoder.projections:
            kernel[...] = kernel[...] * 6
    return Model(network, replace(config, protocols=names, model=settings), voxel_size_mm=2.0, **changes)


@pytest.fixture(scope="module")
def model() -> Model:
    return _model()


def _noise(shape: tuple[int, int, int] = (32, 32, 32), seed: int = 0) -> np.ndarray:
    """Whitened noise, smooth enough to have structures."""
    coarse = np.random.default_rng(seed).normal(size=[-(-side // 4) + 1 for side in shape])
    where = np.stack(np.meshgrid(*(np.arange(side) / 4 for side in shape), indexing="ij"))
    return (2 * map_coordinates(coarse, where, order=1)).astype(np.float32)


def _volume(head: np.ndarray, spacing_mm: tuple[float, float, float] = (2.0, 2.0, 2.0)) -> Volume:
    image = nib.Nifti1Image(np.round(100 + 40 * head).astype(np.int16), np.diag([*spacing_mm, 1.0]))
    return nifti.check_image(image, Limits(fov_mm=(10, 600)))


@pytest.fixture(scope="module")
def scores(model) -> list[np.ndarray]:
    """Per protocol [x y z k], the plain way."""
    return [np.asarray(s[0]) for s in model.network.logits(_noise()[None, ..., None]).values()]


def _interpolated(scores: np.ndarray) -> np.ndarray:
    where = np.stack(np.meshgrid(*AWAY, indexing="ij"))
    return np.stack([map_coordinates(k, where, order=1) for k in np.moveaxis(scores, -1, 0)], axis=-1)


def _softmax(scores: np.ndarray) -> np.ndarray:
    powers = np.exp(scores.astype(np.float64) - scores.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def test_labels_and_posteriors_on_another_grid_are_those_of_interpolated_scores(model, scores):
    reading = Reading(CLASSES, posteriors=((0, 3), (1, 17)))
    result = read_volume(model, _noise(), 0.0, NAMES, reading, Options(), AWAY)
    for p, plain in enumerate(map(_interpolated, scores)):
        assert len(np.unique(result.classes[p])) > 2
        assert np.mean(result.classes[p] == plain.argmax(-1)) > 0.9999  # ties may fall either way
        for s, (protocol, k) in enumerate(reading.posteriors):
            if protocol == p:
                np.testing.assert_allclose(result.posteriors[s], _softmax(plain)[..., k], atol=1e-5)


def test_confidence_is_that_of_the_plain_softmax(model, scores):
    result = read_volume(model, _noise(), 0.0, NAMES, Reading(CLASSES, confidence=True), Options())
    ends = np.cumsum((0, *CLASSES))
    for p, plain in enumerate(map(_softmax, scores)):
        doubtful = np.log(plain[..., 1:].max(-1) / plain[..., 0]) > -DOUBT_NATS
        assert np.any(doubtful)
        chosen, plain = result.classes[p][doubtful], plain[doubtful]
        found = Confidence(*result.sums[:, ends[p] : ends[p + 1]])
        entropy = -np.sum(plain * np.log(plain), axis=-1)
        np.testing.assert_array_equal(found.voxels, np.bincount(chosen.ravel(), minlength=CLASSES[p]))
        np.testing.assert_allclose(found.probability, plain.sum(0), rtol=1e-4)
        for k in np.unique(chosen):
            np.testing.assert_allclose(found.certain[k], plain[:, k][chosen == k].sum(), rtol=1e-4)
            np.testing.assert_allclose(found.entropy[k], entropy[chosen == k].sum(), rtol=1e-3)


def test_beyond_the_field_of_view_is_background(model):
    """Up to one voxel outside, the outermost voxel continues."""
    positions = [np.arange(-3.0, 36.5, 0.5), np.arange(32.0), np.arange(32.0)]
    result = read_volume(model, _noise(), 0.0, NAMES, Reading(CLASSES, posteriors=((1, 17),)), Options(), positions)
    whole = read_volume(model, _noise(), 0.0, NAMES, Reading(CLASSES), Options())
    outside = (positions[0] <= -1) | (positions[0] >= 32)
    assert not result.classes[:, outside].any() and not result.posteriors[:, outside].any()
    assert np.mean(result.classes[:, positions[0] == -0.5] == whole.classes[:, :1]) > 0.999
    assert np.mean(result.classes[:, ~outside][:, 1::2] == whole.classes) > 0.999


def _rare(family: str, averaged: bool) -> tuple[Model, np.ndarray]:
    """A model to which all but some noise in one corner is surely background, and a volume that has it."""
    model = _model(("malp_em",), family=family)
    side = 60 if averaged else 64  # padded to 64: room for shifts
    image = np.zeros((side, side, side), np.float32)
    image[4:24, 6:20, 8:24] = 3 * _noise((20, 14, 16))
    scores = np.asarray(model.network.logits(np.pad(image, (0, 64 - side))[None, ..., None])["malp_em"][0])
    lead = np.quantile(scores[..., 1:].max(-1) - scores[..., 0], 0.999)  # so that little is labelled
    network = nnx.clone(model.network)
    _favour_background(network, float(lead) * (0.4 if averaged else 1))  # the mean of several is less extreme
    return replace(model, network=network), image


def _favour_background(network: Any, lead: float) -> None:
    """Adds to the background's score everywhere, through the readout's bias."""
    decoder = network.decoders.protocols["malp_em"]
    gain = jnp.where(jnp.arange(139) == 0, jnp.float32(lead), 0)
    if hasattr(decoder, "bias"):
        decoder.bias[...] += gain
    else:  # the shift of the finest normalisation, through the last mixing
        decoder.norms[0].beta[...] += jnp.linalg.solve(decoder.last[...].T, gain)


dealt = volume._dealt


@pytest.mark.parametrize("family", ["neuronet", pytest.param("reference", marks=pytest.mark.soak)])
@pytest.mark.parametrize(
    "options",
    [
        pytest.param(Options(), id="once"),
        pytest.param(Options(flip=True, crops=2), id="averaged", marks=pytest.mark.soak),
    ],
)
def test_blocks_that_are_not_read_hold_nothing_but_background(family, options, monkeypatch):
    """Labels and sums of the blocks that remain are those of reading every block, on both kinds of grid."""
    model, image = _rare(family, options.flip)
    away = [np.arange(0.3, 59, 0.9), np.arange(58.0, 0, -1.1), np.arange(0.0, 59, 1.3)]
    asked = Reading((139,), confidence=True)
    for positions in (None, away):
        read = []
        with monkeypatch.context() as patched:
            patched.setattr(
                volume, "_dealt", lambda mesh, blocks, seen=read: seen.append(len(blocks)) or dealt(mesh, blocks)
            )
            few = read_volume(model, image, 0.0, ["malp_em"], asked, options, positions)
            patched.setattr(volume, "SLACK", 1e9)
            whole = read_volume(model, image, 0.0, ["malp_em"], asked, options, positions)
        assert 0 < read[1] < read[-1] == read[0], read  # of the first, the bounds are computed
        assert 0 < np.count_nonzero(whole.classes) < 0.5 * whole.classes.size
        np.testing.assert_array_equal(few.classes, whole.classes)
        np.testing.assert_allclose(few.sums, whole.sums, rtol=1e-6)


@pytest.mark.parametrize("family", ["neuronet", "reference"])
def test_the_bound_holds_for_every_voxel(family):
    """Checks on noise that no score of a structure lies further above the background's than the block's bound says."""
    model = _model(family=family)
    image = _noise((64, 32, 32)) * 2
    logits = model.network.logits(image[None, ..., None])
    leads = [np.asarray(z[0, ..., 1:].max(-1) - z[0, ..., 0]) for z in logits.values()]
    mesh = volume.mesh_over_cores(1)
    tile = next(volume.tiles((64, 32, 32), (64, 32, 32), 8))
    kinds, members = zip(*volume._members(mesh, model, image, tile, NAMES, False, [0]), strict=True)
    for x in range(2):
        hands = np.zeros((volume.CHUNK, 3), np.int32)
        hands[0] = x, 0, 0
        bounds = np.asarray(volume._leads(mesh, kinds, CLASSES, members, hands, np.array([1], np.int32)))[0]
        for bound, found in zip(bounds, leads, strict=True):
            highest = found[32 * x : 32 * x + 33].max()
            assert highest <= bound + 1e-4
            assert bound < 4 * highest  # and says something


def test_F05_tiles_give_the_labels_and_sums_of_the_whole_volume(model):
    model, names = _model(("fsl_first", "malp_em_tissue")), ["fsl_first", "malp_em_tissue"]
    image = _noise((150, 20, 30))  # padded to 160; a tile has 128, of which 36 at each cut are not believed
    positions = [np.arange(0, 149.5, 0.8), np.arange(19.0, -0.5, -1.0), np.arange(0.2, 29, 1.3)]
    reading = Reading((16, 6), confidence=True, posteriors=((0, 2),))
    small = replace(model, max_voxels=130 * 32 * 32)
    for options, where in ((Options(), None), (Options(flip=True, crops=2), positions)):
        whole = read_volume(model, image, 0.0, names, reading, options, where)
        tiled = read_volume(small, image, 0.0, names, reading, options, where)
        assert np.mean(whole.classes == tiled.classes) > 0.9999
        np.testing.assert_allclose(tiled.posteriors, whole.posteriors, atol=1e-4)
        np.testing.assert_allclose(tiled.sums[0].sum(), whole.sums[0].sum(), rtol=1e-4)  # each voxel once
        np.testing.assert_allclose(tiled.sums[2], whole.sums[2], rtol=1e-4)


def test_a_mirrored_head_gives_the_mirrored_result_when_both_are_averaged(model):
    head = _volume(_noise((37, 30, 33)), (1.5, 2.0, 2.0))  # 28 voxels of 2 mm
    mirrored = replace(head, data=head.data[::-1])
    posteriors = ("fsl_first:LeftHippocampus", "fsl_first:RightHippocampus")
    options = Options(flip=True, posteriors=posteriors, clean_up=False)
    first, second = (segment_volume(model, volume, options=options) for volume in (head, mirrored))
    for name in NAMES:
        protocol = PROTOCOLS[name]
        expected = protocol.mirror(protocol.to_classes(first.maps[name]))
        assert np.mean(expected == protocol.to_classes(second.maps[name])) > 0.9999
        np.testing.assert_allclose(
            second.confidence[name].probability, first.confidence[name].probability[protocol.partners], rtol=1e-3
        )
    left, right = options.posteriors
    np.testing.assert_allclose(second.posteriors[left], first.posteriors[right][::-1], atol=1e-4)
    alone = segment_volume(model, mirrored).maps["malp_em"]
    assert np.mean(alone == second.maps["malp_em"]) < 0.99  # the average is not the network run once


def test_crops_are_the_mean_over_the_networks_positions(model):
    """Against running the network on shifted volumes and averaging their scores, away from the border."""
    image, shifts = _noise((30, 30, 30)), _shifts(2, 4)
    padded = np.pad(image, (0, 2))
    plain = [model.network.logits(np.roll(padded, (s, s, s), (0, 1, 2))[None, ..., None]) for s in shifts]
    mean = np.mean([np.roll(p["malp_em"][0], (-s,) * 3, (0, 1, 2)) for p, s in zip(plain, shifts, strict=True)], axis=0)
    result = read_volume(model, image, 0.0, ["malp_em"], Reading((139,)), Options(crops=2))
    inner = (slice(1, 29),) * 3
    assert np.mean(result.classes[0][inner] == mean.argmax(-1)[inner]) > 0.9999
    once = read_volume(model, image, 0.0, ["malp_em"], Reading((139,)), Options())
    assert np.mean(result.classes == once.classes) < 0.99
    assert (_shifts(1, 8), _shifts(2, 8), _shifts(3, 8), _shifts(4, 8)) == ([0], [0, 4], [0, 2, 6], [0, 2, 4, 6])
    with pytest.raises(NeuronetError, match="crops must be 1 to 4"):
        _shifts(5, 8)


def test_an_ensemble_is_the_mean_of_its_members(model):
    image, reading, other = _noise(), Reading(CLASSES), _model(seed=1)
    once = read_volume(model, image, 0.0, NAMES, reading, Options())
    twice = read_volume(ensemble(model, model), image, 0.0, NAMES, reading, Options())
    assert np.mean(twice.classes == once.classes) > 0.9999
    both = read_volume(ensemble(model, other), image, 0.0, NAMES, reading, Options())
    logits = [np.asarray(m.network.logits(image[None, ..., None])["malp_em"][0]) for m in (model, other)]
    assert np.mean(both.classes[1] == np.argmax(logits[0] + logits[1], -1)) > 0.9999
    assert np.mean(both.classes == once.classes) < 0.9


def test_an_ensemble_needs_models_that_predict_the_same(model):
    with pytest.raises(NeuronetError, match="one protocols, got fsl_first, malp_em, malp_em_tissue and fsl_first"):
        ensemble(model, _model(("fsl_first",)))
    with pytest.raises(NeuronetError, match=r"one voxel size in mm, got 2\.0 and 1\.0"):
        ensemble(model, replace(model, voxel_size_mm=1.0))
    with pytest.raises(NeuronetError, match="fast runs one network"):
        segment(ensemble(model, model), _noise(), options=Options(fast=True))


def test_consistent_tissue_is_the_merge_of_the_structures(model):
    volume = _volume(_noise((40, 40, 40)), (1.4, 2.0, 2.0))
    wanted = ("malp_em_tissue:DeepGM", "malp_em:LeftThalamusProper", "malp_em:RightThalamusProper")
    result = segment_volume(model, volume, options=Options(consistent_tissue=True, posteriors=wanted))
    np.testing.assert_array_equal(result.maps["malp_em_tissue"], MALP_EM_TO_TISSUE[result.maps["malp_em"]])
    assert list(result.maps) == list(NAMES)
    structures, tissues = result.confidence["malp_em"], result.confidence["malp_em_tissue"]
    for whole, parts in ((tissues.voxels, structures.voxels), (tissues.probability, structures.probability)):
        np.testing.assert_allclose(whole, np.bincount(MALP_EM_TO_TISSUE, parts), rtol=1e-4)
    assert np.all(tissues.certain >= np.bincount(MALP_EM_TO_TISSUE, structures.certain) - 0.1)
    assert np.all(tissues.entropy <= np.bincount(MALP_EM_TO_TISSUE, structures.entropy) + 0.1)
    deep, left, right = (result.posteriors[name] for name in wanted)
    assert np.all(deep >= left + right - 1e-5) and deep.max() <= 1 + 1e-5
    alone = segment_volume(model, volume, ["malp_em_tissue"], Options(consistent_tissue=True))
    np.testing.assert_array_equal(alone.maps["malp_em_tissue"], result.maps["malp_em_tissue"])
    assert list(alone.maps) == list(alone.confidence) == ["malp_em_tissue"]
    with pytest.raises(NeuronetError, match="derives tissues from malp_em; this model predicts fsl_first"):
        segment_volume(_model(("fsl_first",)), volume, options=Options(consistent_tissue=True))


def test_fast_is_the_network_run_once_around_the_head():
    model = _model(("fsl_first",))
    head = np.zeros((90, 60, 60), np.float32)
    head[20:60] = 300 + 40 * _noise((40, 60, 60))
    plain, fast = segment(model, head), segment(model, head, options=Options(fast=True))
    assert np.mean(plain["fsl_first"][20:60] == fast["fsl_first"][20:60]) > 0.9
    assert not fast["fsl_first"][:15].any() and not fast["fsl_first"][65:].any()  # 10 mm around the box
    assert plain["fsl_first"][65:].any()
    assert segment_volume(model, _volume(_noise((40, 40, 40))), options=Options(fast=True)).confidence == {}


def test_options_that_make_no_sense_are_refused(model):
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"crops": 0}, "crops must be at least 1"),
        ({"fast": True, "flip": True}, "fast leaves out averages"),
        ({"posteriors": ("malp_em",)}, "no structure ''"),
        ({"posteriors": ("malp_em:LeftHipocampus",)}, "nearest name is 'LeftHippocampus'"),
        ({"posteriors": ("freesurfer:LeftHippocampus",)}, "PROTOCOL:STRUCTURE"),
    )
    for options, message in cases:
        with pytest.raises(NeuronetError, match=message):
            Options(**options)
    with pytest.raises(NeuronetError, match="needs malp_em, which is not among the protocols fsl_first"):
        segment(model, _noise(), ["fsl_first"], Options(posteriors=("malp_em:LeftHippocampus",)))


def test_heads_of_one_scanner_share_programs(model):
    """Other affines, other places of the brain: not another program."""
    before = volume._read._cache_size()  # type: ignore[attr-defined]
    for number in range(3):
        image = np.zeros((64, 64, 64), np.float32)
        image[5 * number : 40, 3 : 40 - 4 * number, 8:60] = 1
        positions = [np.arange(0.1 * number, 63, 0.7 + 0.0001 * number)[:88] for _ in range(3)]
        read_volume(model, image, 0.0, ["fsl_first"], Reading((16,)), Options(), positions)
    assert volume._read._cache_size() - before <= 1  # type: ignore[attr-defined]


def test_the_name_of_the_weights_is_theirs_alone():
    tree = {"a": jnp.arange(4.0), "b": [jnp.ones((2, 2))]}
    name = weights_sha256(tree, {})
    assert name == weights_sha256({"b": [np.ones((2, 2), np.float32)], "a": np.arange(4, dtype=np.float32)}, {})
    assert len({name, weights_sha256({**tree, "a": jnp.arange(4.0) + 1e-6}, {}), weights_sha256({}, tree)}) == 3


def test_misplaced_arguments_are_answered_by_what_to_write(model):
    misplaced: Any = Options()
    for call, message in (
        (lambda: segment(model, np.ones((8, 8, 8)), misplaced), r"give the options by name, options=Options\(…\)"),
        (lambda: segment(model, np.ones((8, 8, 8)), "fsl_fast"), r"such as \['fsl_fast'\], got one string"),
        (lambda: segment("T1.nii.gz", model), r"the model comes first, as in segment\(neuronet_jax.restore\(\), image"),  # type: ignore
        (lambda: segment(model, ["T1.nii.gz"]), "one image at a time"),  # type: ignore
        (lambda: segment(model, None), "one image at a time"),  # type: ignore
        (lambda: Options(posteriors="malp_em:X"), r"such as \('malp_em:X',\), got one string"),  # type: ignore
    ):
        with pytest.raises(NeuronetError, match=message):
            call()
    assert len(repr(model)) < 200 and ", ".join(model.config.protocols) in repr(model)
