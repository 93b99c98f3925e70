"""The published network in TensorFlow, with the operations of its authors' implementation, as a contender.

That implementation itself needs TensorFlow 1. Its graph is rebuilt here under `tf.function`: SAME convolutions, unfused
batch normalisation, and upsampling by a transposed convolution whose kernel mixes all channels, with zeros off its
diagonal. TensorFlow is not an extra. Run `pip install tensorflow` in the environment of the benchmark or, for versions
that conflict with it (numpy below 2), in a separate one: `--against=tensorflow@tf-2.15/bin/python`.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np

from experiments.benchmark.contender import CHECK_SIDE, CHECK_STEPS, Contender, Job
from experiments.benchmark.work import CLASSES, FILTERS, random_batch, random_variables
from neuronet_jax.labels import PROTOCOLS

EPSILON, MOMENTUM = 1e-3, 0.99  # of every normalisation (published)
RATE, BETAS, ADAM_EPSILON = 1e-3, (0.9, 0.999), 1e-5  # of Adam (published; betas are its defaults)


class TensorFlow(Contender):
    """The published network in TensorFlow, graph mode."""

    def __init__(self, job: Job):
        super().__init__(job)
        import tensorflow as tf  # pyright: ignore[reportMissingImports]

        if job.dtype != "float32":
            raise ValueError("the published implementation computes in float32: use --dtype=float32")
        self.tf = tf

    def prepare(self) -> Callable[[], Any]:
        job, tf = self.job, self.tf
        network = Network(tf)
        if job.what == "train":
            image, labels = random_batch(job.batch, (job.side,) * 3)
            step = network.train_step(tf.constant(image), tf.constant(labels.astype(np.int32)))
            return lambda: step().numpy()
        if job.what != "inference":
            raise ValueError(f"TensorFlow trains on crops and labels them here, but cannot run {job.what!r}")
        labels = tf.function(lambda image: network.labels(image))
        image = tf.constant(random_batch(job.batch, (job.side,) * 3)[0])
        return lambda: labels(image).numpy()

    def numbers(self) -> dict[str, np.ndarray]:
        tf = self.tf
        image, labels = random_batch(1, (CHECK_SIDE,) * 3)
        logits = Network(tf).logits(tf.constant(image), train=False)
        step = Network(tf).train_step(tf.constant(image), tf.constant(labels.astype(np.int32)))
        losses = [float(step()) for _ in range(CHECK_STEPS)]
        named = zip(PROTOCOLS, logits, strict=True)
        return {"losses": np.array(losses)} | {f"logits_{name}": z.numpy() for name, z in named}

    def about(self) -> dict[str, str]:
        return super().about() | {"tensorflow": self.tf.__version__}


class Network:
    """All variables by their published names, and the graph over them. Arrays are [b x y z c]."""

    def __init__(self, tf: Any):
        self.tf = tf
        values = random_variables(0)
        self.variables = {name: tf.Variable(value, trainable="moving" not in name) for name, value in values.items()}
        self.trained = [v for v in self.variables.values() if v.trainable]

    def conv(self, x: Any, name: str, stride: int = 1) -> Any:
        return self.tf.nn.conv3d(x, self.variables[f"{name}/kernel"], [1, stride, stride, stride, 1], "SAME")

    def norm(self, x: Any, prefix: str, train: bool) -> Any:
        tf, name = self.tf, f"{prefix}/batch_normalization"
        gamma, beta, *moving = (
            self.variables[f"{name}/{part}"] for part in ("gamma", "beta", "moving_mean", "moving_variance")
        )
        if not train:
            return tf.nn.batch_normalization(x, *moving, beta, gamma, EPSILON)
        mean, variance = tf.nn.moments(x, [0, 1, 2, 3])
        count = tf.cast(tf.size(x) // x.shape[-1], tf.float32)
        for old, new in zip(moving, (mean, variance * count / (count - 1)), strict=True):
            old.assign(MOMENTUM * old + (1 - MOMENTUM) * new)
        return tf.nn.batch_normalization(x, mean, variance, beta, gamma, EPSILON)

    def unit(self, x: Any, prefix: str, stride: int, filters: int, train: bool) -> Any:
        tf = self.tf
        y = self.conv(tf.nn.relu6(self.norm(x, f"{prefix}/sub_unit0", train)), f"{prefix}/sub_unit0/conv3d", stride)
        y = self.conv(tf.nn.relu6(self.norm(y, f"{prefix}/sub_unit1", train)), f"{prefix}/sub_unit1/conv3d")
        if stride > 1:
            x = tf.nn.max_pool3d(x, stride, stride, "SAME")
        more = filters - x.shape[-1]
        return y + tf.pad(x, [[0, 0]] * 4 + [[more // 2, more - more // 2]])

    def upsample(self, x: Any) -> Any:
        line = np.array([0.25, 0.75, 0.75, 0.25], np.float32)
        weights = np.einsum("i,j,k,cd->ijkcd", line, line, line, np.eye(x.shape[-1], dtype=np.float32))
        b, i, j, k, c = self.tf.unstack(self.tf.shape(x))
        return self.tf.nn.conv3d_transpose(x, weights, [b, 2 * i, 2 * j, 2 * k, c], [1, 2, 2, 2, 1], "SAME")

    def logits(self, image: Any, train: bool) -> list[Any]:
        features = [self.conv(image, "conv3d")]
        for scale, (_, filters) in enumerate(pairwise(FILTERS), start=1):
            down = self.unit(features[-1], f"encoder/unit_{scale}_0", 2, filters, train)
            features.append(self.unit(down, f"encoder/unit_{scale}_1", 1, filters, train))
        return [self.decode(features, f"tail_{tail}", train) for tail in range(len(CLASSES))]

    def decode(self, features: list[Any], tail: str, train: bool) -> Any:
        coarsest = len(features) - 2
        z = self.conv(features[-1], f"{tail}/upscore_{coarsest}/filter_conversion")
        for scale in reversed(range(coarsest + 1)):
            prefix = f"{tail}/upscore_{scale}"
            z = self.upsample(z) + self.norm(self.conv(features[scale], f"{prefix}/conv3d"), prefix, train)
        return self.conv(z, f"{tail}/last/conv3d")

    def labels(self, image: Any) -> Any:
        tf = self.tf
        return tf.stack([tf.cast(tf.argmax(z, -1), tf.uint8) for z in self.logits(image, train=False)], 1)

    def train_step(self, image: Any, labels: Any) -> Callable[[], Any]:
        tf = self.tf
        slots = [(tf.Variable(tf.zeros_like(v)), tf.Variable(tf.zeros_like(v))) for v in self.trained]
        powers = [tf.Variable(beta) for beta in BETAS]

        @tf.function
        def step() -> Any:
            with tf.GradientTape() as tape:
                logits = self.logits(image, train=True)
                losses = [
                    tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels[:, p], logits=z))
                    for p, z in enumerate(logits)
                ]
                loss = tf.add_n(losses) / len(losses)
            for v, (m, u), g in zip(self.trained, slots, tape.gradient(loss, self.trained), strict=True):
                tf.raw_ops.ResourceApplyAdam(
                    var=v.handle,
                    m=m.handle,
                    v=u.handle,
                    beta1_power=powers[0],
                    beta2_power=powers[1],
                    lr=RATE,
                    beta1=BETAS[0],
                    beta2=BETAS[1],
                    epsilon=ADAM_EPSILON * tf.sqrt(1 - powers[1]),  # TensorFlow adds it before correcting the bias
                    grad=g,
                )
            for power, beta in zip(powers, BETAS, strict=True):
                power.assign(power * beta)
            return loss

        return step
