"""What the benchmark measures, each in a process of its own: our network in JAX, the published one in PyTorch, a classical tool.

    python -m experiments.contenders JOB

serves requests from standard input, one JSON object per line, and answers each with one: `numbers` writes what must agree
between contenders, `time` runs the work, `memory` tells the peak. `experiments/benchmark.py` is the other end.
"""

import dataclasses
import itertools
import json
import math
import os
import platform
import re
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from neuronet_jax.labels import PROTOCOLS

CHECK_SIDE = 24  # voxels of the volume on which the contenders must agree: three voxels at the coarsest scale
CHECK_STEPS = 3  # losses compared: the second and third see the gradients of all weights
FILTERS = (16, 32, 64, 128)  # published
CLASSES = tuple(protocol.num_classes for protocol in PROTOCOLS.values())


@dataclasses.dataclass(frozen=True)
class Job:
    """One contender's work."""

    contender: str  # a key of CONTENDERS
    dtype: str  # of the activations: float32 or bfloat16
    what: str  # "train": a step, "inference": labels of the same crop, "head": of a whole head in such tiles
    side: int  # voxels of the cubic crop
    batch: int
    head: str  # .npy file of the whole head, raw intensities [x y z]


class Contender:
    """The base of all: `prepare` returns the work to be timed, which returns when the device is done."""

    def __init__(self, job: Job):
        self.job = job

    def prepare(self) -> Callable[[], Any]:
        raise NotImplementedError

    def numbers(self) -> dict[str, np.ndarray] | None:
        """`logits_<protocol>` and `losses` for the shared weights in float32; None where there is nothing to compare."""
        return None

    def memory(self) -> dict[str, float]:
        """Peak GiB: `rss` of the process (Linux's VmHWM), `device` where there is one."""
        return {"rss": peak_rss_gib()}

    def about(self) -> dict[str, str]:
        return {"python": platform.python_version(), "device": "cpu"}


class Jax(Contender):
    """This library, with its own training step and inference."""

    family = "reference"

    def __init__(self, job: Job):
        super().__init__(job)
        # The pool grows as needed, so that its peak means something and others fit beside it.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        import jax

        self.jax = jax

    def config(self, side: int, batch: int, dtype: str) -> Any:
        from experiments import flags

        fields = {
            "model.family": self.family,
            "model.compute_dtype": dtype,
            "data.crop": side,
            "batch": batch,
            "loss.dice": 0.0,
            "optimizer.schedule": "constant",
            "optimizer.learning_rate": 1e-3,
            "optimizer.weight_decay": 0.0,
            "optimizer.clip_norm": 0.0,
            "optimizer.ema_decay": 0.0,
            "augment.flip": "false",
            "augment.intensity": 0.0,
            "augment.spatial": 0.0,
        }
        return flags.load("all_targets", [f"--config.{name}={value}" for name, value in fields.items()])

    def network(self, config: Any) -> Any:
        """With the shared weights, where it is the published network."""
        from neuronet_jax import dltk
        from neuronet_jax.models import build

        network = build(config.model, config.protocols, config.seed)
        if self.family == "reference":
            dltk.load_variables(network, random_variables(0))
        return network

    def training(self, config: Any) -> tuple[Callable[..., Any], Any, Any]:
        """The compiled step, the state and the batch on one device."""
        from flax import nnx

        from neuronet_jax.mesh import make_mesh, put_batch
        from neuronet_jax.step import init_state, make_train_step

        mesh = make_mesh(config, self.jax.devices()[:1])
        graphdef, state = init_state(config, mesh)
        _, params, moments = nnx.split(self.network(config), nnx.Param, nnx.BatchStat, graph=False)
        state = dataclasses.replace(state, params=params, moments=moments)
        image, labels = random_batch(config.batch, config.data.crop)
        batch = {
            "image": image,
            "labels": labels.astype(np.uint8),
            "present": np.ones((config.batch, len(CLASSES)), bool),
            "slot": np.arange(config.batch, dtype=np.int32),
        }
        batch = put_batch(mesh, batch)
        step = make_train_step(config, graphdef, mesh).lower(state, batch).compile()
        return step, state, batch

    def prepare(self) -> Callable[[], Any]:
        job = self.job
        config = self.config(job.side, job.batch, job.dtype)
        if job.what == "train":
            step, state, batch = self.training(config)
            self._temp = step.memory_analysis().temp_size_in_bytes / 2**30

            def train() -> Any:
                nonlocal state
                state, metrics = step(state, batch)
                self.jax.block_until_ready((state, metrics))

            return train
        from neuronet_jax.inference import Model

        model = Model(self.network(config), config, voxel_size_mm=1.0)
        if job.what == "inference":
            image = self.jax.device_put(random_batch(job.batch, (job.side,) * 3)[0])
            return lambda: self.jax.block_until_ready(model.labels(image))
        return self.segment_head(model, whitened_head(job.head))

    def segment_head(self, model: Any, head: np.ndarray) -> Callable[[], Any]:
        return lambda: tile_by_tile(lambda tile: np.asarray(model.labels(tile)), head, self.job.side)

    def numbers(self) -> dict[str, np.ndarray] | None:
        if self.family != "reference":
            return None
        with self.jax.default_matmul_precision("highest"):
            config = self.config(CHECK_SIDE, 1, "float32")
            image, _ = random_batch(1, config.data.crop)
            logits = self.jax.jit(self.network(config).logits)(image)
            step, state, batch = self.training(config)
            losses = []
            for _ in range(CHECK_STEPS):
                state, metrics = step(state, batch)
                losses.append(float(metrics["loss"]))
        return {"losses": np.array(losses)} | {f"logits_{name}": np.asarray(z) for name, z in logits.items()}

    def memory(self) -> dict[str, float]:
        memory = super().memory()
        if hasattr(self, "_temp"):
            memory["temp"] = self._temp  # what XLA plans beside arguments and results
        if statistics := self.jax.devices()[0].memory_stats():
            memory["device"] = statistics["peak_bytes_in_use"] / 2**30
        return memory

    def about(self) -> dict[str, str]:
        device = self.jax.devices()[0]
        kind = "cpu" if device.platform == "cpu" else device.device_kind
        return super().about() | {"jax": self.jax.__version__, "device": kind}


class JaxWhole(Jax):
    """A whole head as `neuronet_jax.segment` does it: in one piece where it fits."""

    def segment_head(self, model: Any, head: np.ndarray) -> Callable[[], Any]:
        from neuronet_jax.inference import predict

        return lambda: predict(model, head)


class JaxPlain(Jax):
    """The same library without its two tricks: XLA's own 3-D convolution, and all scores at full resolution."""

    def __init__(self, job: Job):
        super().__init__(job)
        import jax.numpy as jnp
        import optax

        from neuronet_jax import models, step
        from neuronet_jax.models import conv

        def loss(network: Any, batch: Any, config: Any, train: bool) -> Any:
            logits = network.logits(batch["image"], train)
            labels = batch["labels"].astype(jnp.int32)
            parts = [
                optax.softmax_cross_entropy_with_integer_labels(logits[name], labels[:, p]).mean()
                for p, name in enumerate(config.protocols)
            ]
            return jnp.stack(parts).mean(), {}

        def labels(network: Any, image: Any) -> Any:
            return jnp.stack([jnp.argmax(z, -1).astype(jnp.uint8) for z in network.logits(image).values()], axis=1)

        conv.conv3d = conv.native_conv3d
        step.network_loss = loss
        models.Network.labels = labels


class JaxNeuronet(Jax):
    """Our own architecture at the same task: other numbers, so it is timed but not compared."""

    family = "neuronet"


class Torch(Contender):
    """The published network in PyTorch, eager."""

    compiled = False

    def __init__(self, job: Job):
        super().__init__(job)
        import torch  # pyright: ignore[reportMissingImports]

        from experiments import torch_reference

        self.torch, self.reference = torch, torch_reference
        on_gpu = torch.cuda.is_available() and os.environ.get("JAX_PLATFORMS") != "cpu"
        self.device = torch.device("cuda" if on_gpu else "cpu")
        torch.backends.cudnn.benchmark = True  # as a user in search of speed would
        # JAX computes float32 products in TF32 on GPUs by default; so may PyTorch.
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True

    def network(self) -> Any:
        network = self.reference.NeuroNet(CLASSES, FILTERS)
        self.reference.load_variables(network, random_variables(0))
        return network.to(self.device, memory_format=self.torch.channels_last_3d)

    def batch(self, batch: int, side: int) -> tuple[Any, Any]:
        image, labels = random_batch(batch, (side,) * 3)
        return self.image(image), self.torch.from_numpy(labels).to(self.device)

    def image(self, image: np.ndarray) -> Any:
        """[b x y z 1] → [b 1 x y z] in channels-last memory."""
        tensor = self.torch.from_numpy(np.moveaxis(image, -1, 1).astype(np.float32)).to(self.device)
        return tensor.contiguous(memory_format=self.torch.channels_last_3d)

    def autocast(self) -> Any:
        lower = self.job.dtype == "bfloat16"
        return self.torch.autocast(self.device.type, self.torch.bfloat16, enabled=lower)

    def train_step(self, network: Any, image: Any, labels: Any) -> Callable[[], Any]:
        network.train()
        optimizer = self.reference.optimizer(network)
        forward = self.torch.compile(network) if self.compiled else network

        def train() -> Any:
            optimizer.zero_grad(set_to_none=True)
            with self.autocast():
                loss = self.reference.loss(forward(image), labels)
            loss.backward()
            optimizer.step()
            self.wait()
            return loss

        return train

    def prepare(self) -> Callable[[], Any]:
        job, torch = self.job, self.torch
        network = self.network()
        if job.what == "train":
            return self.train_step(network, *self.batch(job.batch, job.side))
        network.eval()
        forward = torch.compile(network.labels) if self.compiled else network.labels

        def labels(image: Any) -> Any:
            with torch.inference_mode(), self.autocast():
                return forward(image)

        if job.what == "inference":
            image = self.batch(job.batch, job.side)[0]

            def infer() -> Any:
                labels(image)
                self.wait()

            return infer
        head = whitened_head(job.head)
        return lambda: tile_by_tile(lambda tile: labels(self.image(tile)).cpu().numpy(), head, job.side)

    def numbers(self) -> dict[str, np.ndarray]:
        torch = self.torch
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        exact = type(self)(dataclasses.replace(self.job, dtype="float32"))
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        image, labels = exact.batch(1, CHECK_SIDE)
        network = exact.network().eval()
        with torch.inference_mode():
            logits = network(image)
        train = exact.train_step(exact.network(), image, labels)
        losses = [train().item() for _ in range(CHECK_STEPS)]
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        named = zip(PROTOCOLS, logits, strict=True)
        return {"losses": np.array(losses)} | {
            f"logits_{name}": z.permute(0, 2, 3, 4, 1).float().cpu().numpy() for name, z in named
        }

    def wait(self) -> None:
        if self.device.type == "cuda":
            self.torch.cuda.synchronize()

    def memory(self) -> dict[str, float]:
        memory = super().memory()
        if self.device.type == "cuda":
            memory["device"] = self.torch.cuda.max_memory_allocated() / 2**30
        return memory

    def about(self) -> dict[str, str]:
        on_gpu = self.device.type == "cuda"
        name = self.torch.cuda.get_device_name() if on_gpu else "cpu"
        return super().about() | {"torch": self.torch.__version__, "device": name}


class TorchCompile(Torch):
    """The same through `torch.compile`."""

    compiled = True


class Dipy(Contender):
    """DIPY's hidden Markov random field tissue classifier: three tissues of a skull-stripped head, on CPU."""

    def prepare(self) -> Callable[[], Any]:
        from dipy.segment.tissue import TissueClassifierHMRF  # pyright: ignore[reportMissingImports]

        if self.job.what != "head":
            raise ValueError(f"dipy segments a whole head, it has no {self.job.what!r}: use --what=head")
        image = np.load(self.job.head).astype(np.float64)
        return lambda: TissueClassifierHMRF(verbose=False).classify(image, nclasses=3, beta=0.1)

    def about(self) -> dict[str, str]:
        return super().about() | {"dipy": version("dipy")}


CONTENDERS: dict[str, type[Contender]] = {
    "jax": Jax,
    "jax-whole": JaxWhole,
    "jax-plain": JaxPlain,
    "jax-neuronet": JaxNeuronet,
    "torch-eager": Torch,
    "torch-compile": TorchCompile,
    "dipy": Dipy,
}


def published_shapes(classes: tuple[int, ...] = CLASSES) -> dict[str, tuple[int, ...]]:
    """The published network's variables; kernels are [i j k c f]."""
    shapes: dict[str, tuple[int, ...]] = {"conv3d/kernel": (3, 3, 3, 1, FILTERS[0])}

    def norm(prefix: str, channels: int) -> None:
        for name in ("gamma", "beta", "moving_mean", "moving_variance"):
            shapes[f"{prefix}/batch_normalization/{name}"] = (channels,)

    for scale in range(1, len(FILTERS)):
        channels, filters = FILTERS[scale - 1 : scale + 1]
        for unit, (size, inputs) in enumerate(((4, channels), (3, filters))):
            prefix = f"encoder/unit_{scale}_{unit}/sub_unit"
            norm(f"{prefix}0", inputs)
            shapes[f"{prefix}0/conv3d/kernel"] = (size, size, size, inputs, filters)
            norm(f"{prefix}1", filters)
            shapes[f"{prefix}1/conv3d/kernel"] = (3, 3, 3, filters, filters)
    for tail, k in enumerate(classes):
        coarsest = len(FILTERS) - 2
        shapes[f"tail_{tail}/upscore_{coarsest}/filter_conversion/kernel"] = (1, 1, 1, FILTERS[-1], k)
        for scale in range(coarsest + 1):
            shapes[f"tail_{tail}/upscore_{scale}/conv3d/kernel"] = (1, 1, 1, FILTERS[scale], k)
            norm(f"tail_{tail}/upscore_{scale}", k)
        shapes[f"tail_{tail}/last/conv3d/kernel"] = (1, 1, 1, k, k)
    return shapes


def random_variables(seed: int) -> dict[str, np.ndarray]:
    """Weights and moments drawn so that every term matters: none is zero or one, activations keep their size."""
    rng = np.random.default_rng(seed)
    values = {}
    for name, shape in published_shapes().items():
        if len(shape) == 5:
            limit = math.sqrt(3 / math.prod(shape[:4]))  # uniform with variance 1 / fan-in
            value = rng.uniform(-limit, limit, shape)
        elif name.endswith(("gamma", "moving_variance")):
            value = rng.uniform(0.5, 1.5, shape)
        else:
            value = rng.normal(0, 0.1, shape)
        values[name] = value.astype(np.float32)
    return values


def random_batch(batch: int, sides: tuple[int, ...], seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """A whitened image f32 [b x y z 1] and labels i64 [b p x y z]; speed does not depend on what they show."""
    rng = np.random.default_rng(seed)
    image = rng.standard_normal((batch, *sides, 1), np.float32)
    labels = [rng.integers(0, k, (batch, *sides)) for k in CLASSES]
    return image, np.stack(labels, 1)


def whitened_head(path: str) -> np.ndarray:
    image = np.load(path).astype(np.float32)
    return (image - image.mean()) / image.std()


def tile_by_tile(labels: Callable[[np.ndarray], np.ndarray], head: np.ndarray, side: int) -> np.ndarray:
    """Labels [p x y z] of a head by the fewest cubic tiles that cover it; `labels` takes [1 x y z 1] to [1 p x y z]."""
    head = np.pad(head, [(0, max(0, side - n)) for n in head.shape])
    out = np.empty((len(CLASSES), *head.shape), np.uint8)
    starts = [np.linspace(0, n - side, -(-n // side)).round().astype(int) for n in head.shape]
    for x, y, z in itertools.product(*starts):
        box = (slice(x, x + side), slice(y, y + side), slice(z, z + side))
        out[(slice(None), *box)] = labels(head[box][None, ..., None])[0]
    return out


def peak_rss_gib() -> float:
    """The most memory that this process has held; NaN where the system does not tell (only Linux does)."""
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) / 2**20 if found else math.nan


def serve(job: Job, requests: Any, answers: Any) -> None:
    """Answers requests until they end. An exception ends it too, as an answer `{"error": …}`."""
    try:
        contender = CONTENDERS[job.contender](job)
        work: Callable[[], Any] | None = None
        for line in requests:
            request = json.loads(line)
            if request["do"] == "numbers":
                numbers = contender.numbers()
                if numbers is not None:
                    np.savez(request["path"], **numbers)
                answer: dict[str, Any] = {"compared": numbers is not None}
            elif request["do"] == "time":
                work = work or contender.prepare()
                begun = time.perf_counter()
                for _ in range(request["times"]):
                    work()
                answer = {"seconds": (time.perf_counter() - begun) / request["times"]}
            else:
                answer = {"memory": contender.memory(), "about": contender.about()}
            print(json.dumps(answer), file=answers, flush=True)
    except Exception as error:
        print(json.dumps({"error": f"{type(error).__name__}: {str(error).strip()[:300]}"}), file=answers, flush=True)


def main() -> None:
    # Libraries print to standard output; the answers keep it to themselves.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(Job(**json.loads(sys.argv[1])), sys.stdin, answers)


if __name__ == "__main__":
    main()
