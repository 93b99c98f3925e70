"""NeuroNet-JAX as a contender."""

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from experiments.benchmark import heads
from experiments.benchmark.contender import CHECK_SIDE, CHECK_STEPS, Contender, Job
from experiments.benchmark.work import (
    PUBLISHED_TRAINING,
    random_batch,
    random_variables,
    training_batch,
)


class Jax(Contender):
    """NeuroNet-JAX, with its own training step and inference."""

    family = "reference"

    def __init__(self, job: Job):
        super().__init__(job)
        # The pool grows as needed, so that its peak means something and others fit beside it.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        import jax

        from neuronet_jax import runtime

        runtime.one_per_core()  # as in all programs of the library; no effect on a GPU
        self.jax, self.runtime = jax, runtime

    def config(self, side: int, batch: int, dtype: str) -> Any:
        from experiments import flags

        fields = {
            "model.family": self.family,
            "model.compute_dtype": dtype,
            "data.crop": side,
            "batch": batch,
            "mesh.space": self.space(side, batch),
            **PUBLISHED_TRAINING,
        }
        return flags.load("all_targets", [f"--config.{name}={value}" for name, value in fields.items()])

    def split(self, batch: int) -> int:
        """Returns the number of devices that split the batch: on a CPU, the cores that it fills; one GPU."""
        local = self.jax.devices()
        return self.runtime.sharers(batch, len(local)) if local[0].platform == "cpu" else 1

    def space(self, side: int, batch: int) -> int:
        """Returns the number of devices that share a crop: the cores that the batch leaves idle, if it can be cut."""
        local = self.jax.devices()
        free = len(local) // self.split(batch) if local[0].platform == "cpu" else 1
        return free if side % (8 * free) == 0 else 1

    def network(self, config: Any) -> Any:
        """Returns the network with the shared weights: the given ones, or the published network's."""
        from flax import nnx

        from neuronet_jax import dltk

        if self.job.weights:
            return heads.with_weights(self.build(config), np.load(self.job.weights))
        if self.family != "reference":
            return self.build(config)
        network = nnx.eval_shape(lambda: self.build(config))
        dltk.load_variables(network, random_variables(0))
        return network

    def build(self, config: Any) -> Any:
        """Returns a network with random weights."""
        from neuronet_jax.models.network import build

        return build(config.model, config.protocols, config.seed)

    def training(self, config: Any) -> tuple[Callable[..., Any], Any, Any]:
        """Returns the compiled step, the state and the batch on one device."""
        from flax import nnx

        from neuronet_jax.training.mesh import make_mesh, put_batch, replicated
        from neuronet_jax.training.step import fresh_state, make_train_step

        mesh = make_mesh(config, self.jax.devices()[: self.split(config.batch) * config.mesh.space])
        graphdef, params, moments = nnx.split(self.network(config), nnx.Param, nnx.BatchStat, graph=False)
        state = self.jax.device_put(fresh_state(config, params, moments), replicated(mesh))
        batch = put_batch(mesh, training_batch(config.batch, config.data.crop))
        train_step: Any = make_train_step(config, graphdef, mesh)
        return train_step.lower(state, batch).compile(), state, batch

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
        from neuronet_jax.runs.model import Model

        if job.what == "inference":
            labels = self.labels(Model(self.network(config), config, voxel_size_mm=1.0))
            image = self.jax.device_put(random_batch(job.batch, (job.side,) * 3)[0])
            return lambda: self.jax.block_until_ready(labels(image))
        from neuronet_jax.inference.segment import segment
        from neuronet_jax.inference.segmentation import Options

        if job.weights:
            config = dataclasses.replace(config, model=dataclasses.replace(config.model, family="neuronet"))
        model = Model(self.network(config), config, heads.HEADS[job.what].voxel_size_mm)
        return lambda: segment(model, job.head, options=Options(clean_up=False))

    def label_maps(self, found: Any) -> dict[str, np.ndarray]:
        return {name: np.asarray(image.dataobj) for name, image in found.items()}

    def labels(self, model: Any) -> Callable[[Any], Any]:
        """Labels crops [b x y z 1], split over the cores, as an exported program does."""
        from flax import nnx

        structure, arrays = model.parts
        program = self.jax.jit(lambda arrays, image: nnx.merge(structure, arrays).labels(image))
        return lambda image: program(arrays, self.runtime.over_cores(image, 2, model.config.model.stride))

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
            memory["temp"] = self._temp  # XLA's plan, in addition to arguments and results
        if statistics := self.jax.devices()[0].memory_stats():
            memory["device"] = statistics["peak_bytes_in_use"] / 2**30
        return memory

    def about(self) -> dict[str, str]:
        device = self.jax.devices()[0]
        kind = "cpu" if device.platform == "cpu" else device.device_kind
        return super().about() | {"jax": self.jax.__version__, "device": kind}


class JaxPlain(Jax):
    """The same library without its fused readout: all scores at full resolution, differentiated by JAX."""

    def build(self, config: Any) -> Any:
        import jax
        import jax.numpy as jnp

        from neuronet_jax.models.head_tallies import Groups
        from neuronet_jax.models.network import Network

        class PlainNetwork(Network):
            def scan(self, tally: Any, image: Any, labels: Any, train: bool) -> Any:
                every = jnp.concatenate(list(self.logits(image, train).values()), axis=-1)  # b x y z k
                whole = every[None, None], jnp.moveaxis(labels, 1, -1)[None, None]  # the volume as a single block
                return tally.sums(Groups(self.classes, class_axis=6), *whole)

            def scan_weighted(self, tally: Any, weights: Any, image: Any, labels: Any, train: bool) -> Any:
                sums = self.scan(tally, image, labels, train)
                products = jax.tree.map(lambda weight, value: jnp.sum(weight * value), weights, sums)
                return jax.tree.reduce(jnp.add, products), jax.lax.stop_gradient(sums)

            def labels(self, image: Any) -> Any:
                chosen = [jnp.argmax(z, axis=-1).astype(jnp.uint8) for z in self.logits(image).values()]
                return jnp.stack(chosen, axis=1)

        return PlainNetwork(config.model, config.protocols, np.random.default_rng(config.seed))


class JaxNeuronet(Jax):
    """Our own architecture at the same task. Its numbers differ, so it is timed but not compared."""

    family = "neuronet"
