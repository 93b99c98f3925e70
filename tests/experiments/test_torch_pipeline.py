"""The baseline for whole heads: the same network and the same labels as `segment`."""

from dataclasses import replace

import jax.numpy as jnp
import nibabel as nib
import numpy as np
import pytest
from flax import nnx

torch = pytest.importorskip("torch", reason="the benchmark's contender needs the extra `benchmark`")

from experiments.benchmark import heads, torch_neuronet, torch_pipeline
from experiments.flags import load
from neuronet_jax.inference.segment import segment
from neuronet_jax.inference.segmentation import Options
from neuronet_jax.labels import PROTOCOLS
from neuronet_jax.models.network import Network, build
from neuronet_jax.runs.model import Model

FILTERS = (4, 6, 8, 10)


def _network() -> Network:
    """Returns a network with parameters and moments drawn so that every term matters."""
    config = replace(load("all_targets").model, filters=FILTERS, compute_dtype="float32")
    network = build(config, tuple(PROTOCOLS), seed=1)
    structure, state = nnx.split(network, graph=False)
    rng = np.random.default_rng(0)
    drawn = [
        (
            path,
            v.replace(jnp.asarray(rng.uniform(0.5, 1.5, v[...].shape).astype(np.float32)) if v[...].ndim == 1 else v),
        )
        for path, v in nnx.to_flat_state(state)
    ]
    return nnx.merge(structure, nnx.from_flat_state(drawn))


def _weights(network: Network) -> dict[str, np.ndarray]:
    state = nnx.to_flat_state(nnx.state(network, graph=False))
    return {".".join(map(str, path)): np.asarray(v[...]) for path, v in state}


def _twin(network: Network) -> torch_neuronet.NeuroNet:
    twin = torch_neuronet.NeuroNet({name: p.num_classes for name, p in PROTOCOLS.items()}, FILTERS).eval()
    torch_neuronet.load_weights(twin, _weights(network))
    return twin


def test_the_twin_computes_the_same_logits():
    network = _network()
    image = np.random.default_rng(0).normal(size=(1, 16, 24, 32, 1)).astype(np.float32)
    expected = network.logits(jnp.asarray(image))
    twin = _twin(network)
    with torch.inference_mode():
        features = twin.features(torch.from_numpy(np.moveaxis(image, -1, 1)))
        logits = [decoder(features) for decoder in twin.protocols()]
    for (name, wanted), got in zip(expected.items(), logits, strict=True):
        difference = np.abs(got.permute(0, 2, 3, 4, 1).numpy() - np.asarray(wanted)).max()
        assert difference < 1e-4 * np.asarray(wanted).std(), name


def test_weights_that_do_not_fit_are_refused():
    weights = _weights(_network())
    twin = torch_neuronet.NeuroNet({name: p.num_classes for name, p in PROTOCOLS.items()}, FILTERS)
    missing = {name: value for name, value in weights.items() if name != "encoder.stem.kernel"}
    with pytest.raises(ValueError, match=r"no weights are given for encoder\.stem\.weight"):
        torch_neuronet.load_weights(twin, missing)
    with pytest.raises(KeyError):
        torch_neuronet.load_weights(twin, {**weights, "encoder.root.kernel": weights["encoder.stem.kernel"]})


def test_saved_weights_fill_a_network():
    network = _network()
    config = replace(load("all_targets").model, filters=FILTERS, compute_dtype="float32")
    filled = heads.with_weights(build(config, tuple(PROTOCOLS), seed=2), _weights(network))
    for name, value in _weights(filled).items():
        np.testing.assert_array_equal(value, _weights(network)[name], err_msg=name)


@pytest.mark.parametrize(("side", "spacing_mm"), [(64, 2.0), (61, 2.1)])
def test_the_pipeline_finds_the_labels_that_segment_finds(tmp_path, side, spacing_mm):
    """The volume is one tile that needs no padding: 61 voxels of 2.1 mm are 64 of 2 mm."""
    network = _network()
    rng = np.random.default_rng(0)
    head = np.clip(100 + 30 * rng.normal(size=(side,) * 3), 0, None).astype(np.int16)
    path = tmp_path / "head.nii"
    nib.save(nib.Nifti1Image(head[:, ::-1], np.diag([spacing_mm, -spacing_mm, spacing_mm, 1])), path)
    config = load("all_targets")
    config = replace(config, model=replace(config.model, filters=FILTERS, compute_dtype="float32"))
    ours = segment(Model(network, config, 2.0), path, options=Options(clean_up=False))
    with torch.inference_mode():
        theirs = torch_pipeline.segment(
            _twin(network), path, 2.0, 64, lambda tile: torch.from_numpy(np.moveaxis(tile, -1, 1).copy())
        )
    maps = [{name: np.asarray(image.dataobj) for name, image in found.items()} for found in (ours, theirs)]
    assert sum(len(np.unique(found)) for found in maps[0].values()) > 10
    assert heads.agreement(*maps) > heads.AGREEMENT


def test_tiles_label_every_voxel_once():
    labelled = np.zeros((200, 240, 128), int)
    for starts, kept in torch_pipeline._tiles(labelled.shape, (128, 128, 128)):
        labelled[kept] += 1
        for start, box, side in zip(starts, kept, labelled.shape, strict=True):
            assert start % torch_pipeline.MULTIPLE == 0
            assert box.start == 0 or box.start >= start + torch_pipeline.MARGIN
            assert box.stop == side or box.stop <= start + 128 - torch_pipeline.MARGIN
    assert labelled.min() == labelled.max() == 1
