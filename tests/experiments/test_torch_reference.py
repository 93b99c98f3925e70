"""The benchmark's contender is the published network: golden numbers of the reference implementation itself."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the benchmark's contender needs the extra `benchmark`")

from experiments.benchmark import torch_reference as reference
from neuronet_jax.labels import PROTOCOLS

CLASSES = tuple(protocol.num_classes for protocol in PROTOCOLS.values())


@pytest.fixture(scope="module")
def numbers(golden):
    return {mode: dict(np.load(golden / f"neuronet_all_{mode}.npz")) for mode in ("eval", "train")}


@pytest.fixture
def network(numbers):
    network = reference.NeuroNet(CLASSES)
    variables = {name[4:]: value for name, value in numbers["eval"].items() if name.startswith("var/")}
    reference.load_variables(network, variables)
    return network


@pytest.fixture(scope="module")
def image(numbers):
    return torch.from_numpy(numbers["eval"]["x"]).permute(0, 4, 1, 2, 3)


def test_has_the_published_number_of_parameters():
    network = reference.NeuroNet(CLASSES)
    assert sum(p.numel() for p in network.parameters()) == 2_493_171
    assert [sum(p.numel() for p in d.parameters()) for d in network.decoders] == [1_000, 4_192, 1_000, 53_515, 1_512]


def test_variables_round_trip(network, numbers):
    out = reference.variables(network)
    for name, value in out.items():
        np.testing.assert_array_equal(value, numbers["eval"][f"var/{name}"])
    assert len(out) == sum(name.startswith("var/") for name in numbers["eval"])


def test_inference_gives_the_golden_logits(network, image, numbers):
    network.eval()
    with torch.no_grad():
        logits, labels = network(image), network.labels(image)
    for p, name in enumerate(PROTOCOLS):
        expected = numbers["eval"][f"out/logits_{name}"]
        got = logits[p].permute(0, 2, 3, 4, 1).numpy()
        assert np.abs(got - expected).max() < 1e-4 * expected.std()
        np.testing.assert_array_equal(labels[0, p].numpy(), got[0].argmax(-1))


@pytest.mark.parametrize("layout", ["contiguous_format", "channels_last_3d"])
def test_training_gives_the_golden_loss_gradients_and_moments(network, image, numbers, layout):
    expected = numbers["train"]
    network = network.train().to(memory_format=getattr(torch, layout))
    labels = torch.from_numpy(np.stack([expected[f"y/{name}"] for name in PROTOCOLS], 1)).long()
    loss = reference.loss(network(image.contiguous(memory_format=getattr(torch, layout))), labels)
    loss.backward()
    assert loss.item() == pytest.approx(float(expected["loss"]), rel=1e-5)
    for name, tensor in reference.named_variables(network):
        if f"after/{name}" in expected:
            np.testing.assert_allclose(tensor.numpy(), expected[f"after/{name}"], rtol=1e-4, atol=1e-6, err_msg=name)
        else:
            assert torch.linalg.vector_norm(tensor.grad).item() == pytest.approx(
                float(expected[f"grad_norm/{name}"]), rel=1e-3
            ), name
