"""The published network in PyTorch as a contender."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from experiments.benchmark.contender import CHECK_SIDE, CHECK_STEPS, Contender, Job
from experiments.benchmark.heads import HEADS
from experiments.benchmark.work import CLASSES, FILTERS, random_batch, random_variables
from neuronet_jax.labels import PROTOCOLS


class Torch(Contender):
    """The published network in PyTorch, eager."""

    compiled = False

    def __init__(self, job: Job):
        super().__init__(job)
        import torch  # pyright: ignore[reportMissingImports]

        from experiments.benchmark import torch_pipeline, torch_reference

        self.torch, self.reference, self.pipeline = torch, torch_reference, torch_pipeline
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
        """Returns the image [b x y z 1] as [b 1 x y z] in channels-last memory."""
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
        if job.what == "inference":
            forward = torch.compile(network.labels) if self.compiled else network.labels
            image = self.batch(job.batch, job.side)[0]

            def infer() -> None:
                with torch.inference_mode(), self.autocast():
                    forward(image)
                self.wait()

            return infer
        if job.weights:
            network = self.trained_network()

        def segment() -> Any:
            with torch.inference_mode(), self.autocast():
                return self.pipeline.segment(
                    network, Path(job.head), HEADS[job.what].voxel_size_mm, job.tile, self.image
                )

        return segment

    def label_maps(self, found: Any) -> dict[str, np.ndarray]:
        return {name: np.asarray(image.dataobj) for name, image in found.items()}

    def trained_network(self) -> Any:
        from experiments.benchmark import torch_neuronet

        classes = {name: protocol.num_classes for name, protocol in PROTOCOLS.items()}
        network: Any = torch_neuronet.NeuroNet(classes, FILTERS).eval()
        torch_neuronet.load_weights(network, np.load(self.job.weights))
        return network.to(self.device, memory_format=self.torch.channels_last_3d)

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
