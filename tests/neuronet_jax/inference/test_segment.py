import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import nibabel as nib
import numpy as np
import pytest
from flax import nnx
from nibabel.orientations import apply_orientation, inv_ornt_aff

from experiments.flags import load
from neuronet_jax.errors import NeuronetError, RejectError
from neuronet_jax.evaluation.metrics import dice_per_class, mean_dice
from neuronet_jax.inference import tiling
from neuronet_jax.inference.segment import predict, segment
from neuronet_jax.inference.segmentation import Options
from neuronet_jax.inference.tiling import receptive_margin
from neuronet_jax.labels import PROTOCOLS
from neuronet_jax.models.network import build
from neuronet_jax.models.readout import Readout
from neuronet_jax.runs.checkpoint import Checkpoints
from neuronet_jax.runs.directory import RunDirectory
from neuronet_jax.runs.model import Model
from neuronet_jax.runs.provenance import Provenance, TrainingData
from neuronet_jax.runs.restore import restore
from neuronet_jax.training import mesh, step

FILTERS = (2, 4)
PROTOCOL_NAMES = ("fsl_fast", "fsl_first")


def _model(family: str = "neuronet", filters: tuple[int, ...] = FILTERS, **changes) -> Model:
    config = load("all_targets:demo")
    settings = replace(config.model, family=family, filters=filters, compute_dtype="float32")
    config = replace(config, protocols=PROTOCOL_NAMES, model=settings)
    return Model(build(settings, PROTOCOL_NAMES, seed=3), config, voxel_size_mm=2.0, **changes)


@pytest.fixture(scope="module")
def model() -> Model:
    return _model()


def _head(shape: tuple[int, int, int] = (45, 52, 49), seed: int = 0) -> np.ndarray:
    """Returns an asymmetric cluster of blobs in noise, non-negative, as int16."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij"))
    image = 600.0 * (np.sum(grid**2, axis=0) < 0.8)
    for _ in range(12):
        centre = rng.uniform(-0.6, 0.6, 3).reshape(3, 1, 1, 1)
        image += rng.uniform(-300, 500) * (np.sum((grid - centre) ** 2, axis=0) < 0.06)
    return np.clip(image + rng.normal(0, 20, shape), 0, None).astype(np.int16)


def _affine(spacing_mm: float = 2.0) -> np.ndarray:
    affine = np.diag([spacing_mm] * 3 + [1.0])
    affine[:3, 3] = (-44, -50, -40)
    return affine


@pytest.fixture(scope="module")
def head() -> np.ndarray:
    return _head()


@pytest.fixture(scope="module")
def labels(model, head) -> dict[str, np.ndarray]:
    return segment(model, head)


def test_an_array_gives_tool_ids_of_its_shape(labels, head):
    assert list(labels) == list(PROTOCOL_NAMES)
    for name, ids in labels.items():
        assert ids.shape == head.shape and ids.dtype == np.uint8
        found = set(np.unique(ids).tolist())
        assert found <= set(PROTOCOLS[name].ids.tolist()) and len(found) > 1  # something to compare below


def test_labels_are_those_of_the_network_itself(model, head):
    labels = segment(model, head, options=Options(clean_up=False))
    whitened = (head - head.mean()) / head.std()
    padded = np.pad(whitened, [(0, -n % 32) for n in head.shape], constant_values=-head.mean() / head.std())
    logits = jax.jit(lambda network, x: network.logits(x))(model.network, padded.astype(np.float32)[None, ..., None])
    classes = np.asarray(jnp.argmax(logits["fsl_first"], -1))[0][tuple(slice(n) for n in head.shape)]
    assert np.mean(PROTOCOLS["fsl_first"].ids[classes] == labels["fsl_first"]) > 0.9999  # ties may fall either way


ORIENTATIONS = [
    np.array(list(zip(order, signs, strict=True)))
    for order in itertools.permutations(range(3))
    for signs in itertools.product((1, -1), repeat=3)
]


@pytest.mark.parametrize("number", range(48))
def test_F01_any_orientation_gives_the_same_labels_on_its_own_grid(model, head, labels, number):
    orientation = ORIENTATIONS[number]
    affine = _affine() @ inv_ornt_aff(orientation, head.shape)
    image = nib.Nifti1Image(apply_orientation(head, orientation), affine)
    image.set_qform(affine, code=1)
    image.set_sform(affine, code=4)
    result = segment(model, image)
    for name, ids in labels.items():
        np.testing.assert_array_equal(np.asarray(result[name].dataobj), apply_orientation(ids, orientation))
        np.testing.assert_array_equal(result[name].affine, image.affine)
        assert int(result[name].header["qform_code"]) == 1 and int(result[name].header["sform_code"]) == 4
        np.testing.assert_allclose(result[name].get_qform(), affine, atol=1e-4)


class Shells(nnx.Module):
    """A network with known labels: the number of thresholds below a voxel, midway between `_ball`'s materials."""

    def __init__(self):
        self.thresholds = nnx.Param(jnp.array([0.5, 2.6]))

    def coarse(self, image: jax.Array) -> list[jax.Array]:
        return [image[:, ::2, ::2, ::2]]

    def readable(self, coarse: list[jax.Array]) -> list[jax.Array]:
        return coarse

    def finest(self, image: jax.Array, coarse: jax.Array, inside: jax.Array) -> jax.Array:
        return image[:, 2:-2, 2:-2, 2:-2]

    def range(self, image: jax.Array, coarse: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.min(image)[None], jnp.max(image)[None]

    def readout(self) -> Readout:
        """The scores 0, v − t₁, 2v − t₁ − t₂, of which the largest changes at the thresholds; never WM."""
        low, high = self.thresholds[...]
        slopes, biases = jnp.array([[0.0, 1, 2, 0]]), jnp.stack([0 * low, -low, -low - high, -1e3 + 0 * low])
        return Readout([slopes, 0 * slopes], [biases, 0 * biases])


def _shells() -> Model:
    config = load("fsl_fast:demo")
    return Model(Shells(), replace(config, model=replace(config.model, filters=FILTERS)), voxel_size_mm=2.0)


def _ball(spacing_mm: tuple[float, float, float], tilt: float) -> nib.Nifti1Image:
    """Returns two smooth concentric balls of radius 36 and 20 mm in a field of 100 mm, turned by `tilt` radians about
    z.
    """
    shape = tuple(round(100 / s) for s in spacing_mm)
    turn = np.array([[np.cos(tilt), -np.sin(tilt), 0], [np.sin(tilt), np.cos(tilt), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = turn * np.array(spacing_mm)
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    radius_mm = np.linalg.norm(index @ affine[:3, :3].T + affine[:3, 3], axis=-1)
    image = 400 / (1 + np.exp(radius_mm - 36)) + 400 / (1 + np.exp(radius_mm - 20))
    return nib.Nifti1Image(image.astype(np.float32), affine)


@pytest.mark.parametrize(
    ("spacing_mm", "tilt", "turns"),
    [
        ((0.7, 0.7, 0.7), 0.0, (5, 22, 47)),
        ((1.2, 2.0, 3.0), 0.0, (5, 22, 47)),
        ((2.0, 2.0, 2.0), 0.5, (5, 22, 47)),
        ((1.5, 2.0, 3.0), 0.3, range(48)),
    ],
    ids=["fine", "anisotropic", "oblique", "anisotropic and oblique"],
)
def test_F01_any_voxel_size_gives_labels_on_its_own_grid(spacing_mm, tilt, turns):
    image = _ball(spacing_mm, tilt)
    result = segment(_shells(), image)["fsl_fast"]
    assert result.shape == image.shape
    np.testing.assert_allclose(result.get_sform(), image.get_sform(), atol=1e-6)
    ids = np.asarray(result.dataobj)
    # the same classifier without any resampling: only the faces, half a 2 mm voxel thick, may differ
    assert mean_dice(dice_per_class(segment(_shells(), image.get_fdata())["fsl_fast"], ids, 4)) > 0.95
    for turn in turns:
        orientation = ORIENTATIONS[turn]
        affine = image.affine @ inv_ornt_aff(orientation, image.shape)
        turned = segment(_shells(), nib.Nifti1Image(apply_orientation(image.get_fdata(), orientation), affine))[
            "fsl_fast"
        ]
        table = dice_per_class(apply_orientation(ids, orientation), np.asarray(turned.dataobj), 4)
        assert mean_dice(table) > 0.99


@pytest.mark.parametrize("family", ["reference", "neuronet"])
def test_F05_the_margin_holds_the_receptive_field(family):
    model = _model(family, (2, 4, 4))
    network, margin = model.network, receptive_margin(model.config.model)
    scores = jax.jit(lambda image: network.logits(image)["fsl_fast"][0, :, 4, 4])  # type: ignore[attr-defined]
    image = np.random.default_rng(0).normal(size=(1, 2 * margin + 16, 8, 8, 1)).astype(np.float32)
    before, furthest = scores(image), 0
    for voxel in (0, margin + 1, margin + 4, margin + 11, 2 * margin + 15):
        changed = image.copy()
        changed[:, voxel] += 3.0
        affected = np.flatnonzero(np.any(scores(changed) != before, axis=-1))
        furthest = max(furthest, int(np.abs(affected - voxel).max()))
    assert margin / 2 < furthest <= margin


def test_F05_tiles_give_the_labels_of_the_whole_volume():
    image = np.random.default_rng(1).normal(size=(150, 40, 130)).astype(np.float32)  # padded to 160 × 64 × 160
    whole = predict(_model(), image)
    tiled = predict(_model(max_voxels=80 * 64 * 80), image)
    assert whole.shape == (2, 150, 40, 130)
    assert np.mean(whole == tiled) >= 0.9999  # other shapes may sum in another order


def test_F05_windows_cover_an_axis_once_and_keep_the_margin():
    for side, tile, margin in [(96, 96, 8), (160, 96, 24), (512, 192, 80), (224, 192, 80)]:
        believed = np.zeros(side, int)
        for start, kept in tiling.windows(side, tile, margin):
            assert 0 <= start <= side - tile and start % 8 == 0
            assert kept.start == 0 or kept.start >= start + margin
            assert kept.stop == side or kept.stop <= start + tile - margin
            believed[kept] += 1
        assert believed.min() == believed.max() == 1


@pytest.mark.parametrize("shape", [(1, 1, 7), (33, 31, 32), (9, 70, 20)])
def test_F05_any_size_gives_its_own_grid(shape):
    image = np.random.default_rng(0).normal(100, 10, shape)
    assert segment(_shells(), image)["fsl_fast"].shape == shape


def test_F05_shapes_share_compiled_programs():
    traced = []

    class Traced(Shells):
        def coarse(self, image: jax.Array) -> list[jax.Array]:
            traced.append(image.shape)
            return super().coarse(image)

    rng = np.random.default_rng(0)
    for side in (33, 40, 50, 64, 64, 65):
        segment(replace(_shells(), network=Traced()), rng.normal(size=(side, 40, 40)))  # as after every validation
    assert traced == [(1, 64, 64, 64, 1), (1, 96, 64, 64, 1)]


def test_F06_out_of_memory_goes_on_with_smaller_tiles():
    tried = []

    class Limited(Shells):
        def coarse(self, image: jax.Array) -> list[jax.Array]:
            tried.append(image.shape[1:4])
            if image.size > 80 * 64 * 80:
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
            return super().coarse(image)

    image = np.random.default_rng(1).normal(size=(150, 40, 130)).astype(np.float32)
    with pytest.warns(UserWarning, match="ran out of memory"):
        result = predict(replace(_shells(), network=Limited()), image)
    np.testing.assert_array_equal(result, predict(_shells(), image))
    assert tried[0] == (160, 64, 160) and len(tried) > 1


def test_a_path_and_a_nibabel_image_give_nifti_images(tmp_path):
    image = _ball((2.0, 2.0, 2.0), 0.0)
    nib.save(image, tmp_path / "T1.nii.gz")
    by_path = segment(_shells(), tmp_path / "T1.nii.gz")["fsl_fast"]
    by_image = segment(_shells(), image)["fsl_fast"]
    by_array = segment(_shells(), image.get_fdata(dtype=np.float32))["fsl_fast"]
    assert isinstance(by_path, nib.Nifti1Image) and by_path.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(np.asarray(by_path.dataobj), by_array)
    np.testing.assert_array_equal(np.asarray(by_image.dataobj), by_array)


@pytest.mark.parametrize(("content", "code"), [(None, "E_IO"), (b"", "E_FORMAT")])
def test_F03_an_error_names_the_file_that_was_given(tmp_path, content, code):
    path = tmp_path / "T1.nii.gz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RejectError, match=f"{code}: {path}: ") as raised:
        segment(_shells(), path)
    assert raised.value.code == code


def test_a_choice_of_protocols(model, head, labels):
    assert list(segment(model, head, ["fsl_first"])) == ["fsl_first"]
    with pytest.raises(NeuronetError, match="this model predicts fsl_fast, fsl_first, not 'malp_em'"):
        segment(model, head, ["malp_em"])


@pytest.mark.parametrize(
    ("image", "code"),
    [
        (np.zeros((20, 20, 20)), "E_CONSTANT"),
        (np.full((20, 20, 20), 7.0), "E_CONSTANT"),
        (np.full((20, 20, 20), np.nan), "E_NAN"),
        (np.zeros((20, 20)), "E_NDIM"),
        (np.zeros((20, 20, 20), complex), "E_DTYPE"),
    ],
)
def test_F03_a_bad_array_is_rejected(image, code):
    with pytest.raises(RejectError) as raised:
        segment(_shells(), image)
    assert raised.value.code == code


@pytest.mark.parametrize("kind", ["noise", "inverted", "stripped", "spike", "negative"])
def test_F04_inputs_other_than_T1_heads_still_give_labels(model, head, kind):
    rng = np.random.default_rng(0)
    image = {
        "noise": rng.normal(500, 100, head.shape),
        "inverted": head.max() - head,
        "stripped": head * (head > 400),
        "spike": np.where(np.arange(head.size).reshape(head.shape) == 999, 1e6, head),
        "negative": head.astype(float) - 300,
    }[kind]
    for ids in segment(model, image).values():
        assert ids.shape == head.shape


@pytest.mark.parametrize("averaged", [True, False])
def test_restore_gives_the_best_checkpoint_with_averaged_weights(tmp_path, averaged):
    config = _model().config
    config = replace(config, optimizer=replace(config.optimizer, ema_decay=0.9 if averaged else 0.0))
    graphdef, state = step.init_state(config, mesh.make_mesh(config, jax.devices()[:1]))
    checkpoints = Checkpoints(tmp_path, keep=3)
    for number, score in ((1, 0.3), (2, 0.8), (3, 0.5)):
        weights = jax.tree.map(lambda x: x + jnp.asarray(number, x.dtype), (state.params, state.moments))  # noqa: B023
        changed = {"average": weights} if averaged else {"params": weights[0], "moments": weights[1]}
        checkpoints.save(number, replace(state, **changed), {}, config, score)
    checkpoints.close()
    data = TrainingData(PROTOCOL_NAMES, 2.0, split_hash="abc", note="made for a test")
    RunDirectory(tmp_path).describe(config, data)

    model = restore(tmp_path)
    assert (model.voxel_size_mm, model.origin.step) == (2.0, 2)
    assert model.origin.note == "made for a test" and model.origin.split_hash == "abc"
    assert restore(tmp_path).origin == model.origin and len(model.origin.weights_sha256) == 64
    both = restore(tmp_path, tmp_path)
    assert both.provenance == Provenance((model.origin, model.origin)) and len(both.members) == 2
    expected = nnx.state(nnx.merge(graphdef, state.params, state.moments))
    for restored, fresh in zip(jax.tree.leaves(nnx.state(model.network)), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(restored, fresh + 2, rtol=1e-6)
    assert segment(model, _head((20, 20, 20)))["fsl_first"].shape == (20, 20, 20)


def test_restore_of_no_run_says_what_to_give(tmp_path):
    with pytest.raises(NeuronetError, match="--run takes the --workdir of a training run"):
        restore(tmp_path)
