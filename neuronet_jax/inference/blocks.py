"""Blocks of a volume: the scores in a small cube follow from windows of the image and of the coarse features.

Only the features of the coarser scales, an eighth of the voxels and less, exist for the whole volume. The finest
features and the scores of all classes exist for one block at a time, and only where a structure can be.

The same code serves test-time augmentation and ensembles: each member of the average knows where in its own volume a
block lies. The finest features of the members stand side by side, with a row of the readout
for each, and their coarser scores are summed.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from neuronet_jax.models import conv
from neuronet_jax.models.readout import Readout, spans

# Voxels along a block's sides. Smaller ones follow a brain's outline more closely, larger ones compute less twice.
BLOCK = 32
FINE = BLOCK + 2  # voxels of the finest features: one beyond the block for interpolation, and even
HALF = FINE // 2 + 2  # voxels at half resolution that FINE voxels are interpolated from
# Zeros around a member's image and coarse features, so that no window reaches beyond the arrays: a shift of up to 8
# voxels, and the halos of `Network.finest` and of interpolation.
IMAGE_HALO, COARSE_HALO = 16, 8
_PRECISE = jax.lax.Precision.HIGH  # the default would round scores to bfloat16 on a TPU
CHUNK = 64  # blocks that a program is given at a time, on each device


class Kind(NamedTuple):
    """The part of a member that is part of the program's key."""

    structure: Any  # of the network
    mirrored: bool  # its volume is the head mirrored along x


class Member(NamedTuple):
    """One volume of an average, and the network that reads it."""

    arrays: Any  # of the network
    image: Float[Array, "1 x y z 1"]  # with IMAGE_HALO
    coarse: list[Array]  # float [1 x/2 y/2 z/2 c], …: as `Network.coarse` returns them, with COARSE_HALO
    readout: Readout  # of the classes that are read, in their order
    shift: np.ndarray  # int32 [3], even: voxels by which the volume is moved on, after mirroring


class Fields(NamedTuple):
    """The parts of a block's scores, `fine·matrix + bias + upsampled half`."""

    fine: Float[Array, "x c y z"]  # FINE voxels along each side
    half: Float[Array, "x k y z"]  # HALF voxels along each side, float32: the first lies one before the block
    matrix: Float[Array, "c k"]  # float32
    bias: Float[Array, "k"]  # float32


def padded(image: Float[Array, "x y z"], coarse: Sequence[Array]) -> tuple[Array, list[Array]]:
    """Returns a member's image and coarse features with their halos."""

    def halo(x: Array, width: int) -> Array:
        return jnp.pad(x, ((0, 0), *((width, width),) * 3, (0, 0)))

    return halo(image[None, ..., None], IMAGE_HALO), [halo(features, COARSE_HALO) for features in coarse]


def fields(kinds: Sequence[Kind], members: Sequence[Member], corner: Int[Array, "3"]) -> Fields:
    """Returns the mean of the members' fields in the block whose first voxel is `corner`."""
    fine, halves, matrices, biases = [], [], [], []
    for kind, member in zip(kinds, members, strict=True):
        network, readout = nnx.merge(kind.structure, member.arrays), member.readout
        start = _start(kind, member, corner)
        windows = _windows(member.coarse, start)
        inside = _inside(start - 2, FINE + 4, member.image, IMAGE_HALO)
        image = _window(member.image, start - 2 + IMAGE_HALO, FINE + 4)
        finest = jnp.moveaxis(network.finest(image, windows[0].features, inside[None, ..., None])[0], -1, 1)
        half = _half_scores(network, readout, windows)
        fine.append(finest[::-1] if kind.mirrored else finest)
        halves.append(half[::-1] if kind.mirrored else half)
        matrices.append(readout.matrices[0].astype(jnp.float32))
        biases.append(readout.biases[0].astype(jnp.float32))
    share = jnp.float32(1 / len(fine))
    together = jnp.concatenate([part.astype(fine[0].dtype) for part in fine], axis=1)
    return Fields(
        together, jnp.moveaxis(sum(halves) * share, -1, 1), jnp.concatenate(matrices) * share, sum(biases) * share
    )


def lead(
    kinds: Sequence[Kind], members: Sequence[Member], classes: tuple[int, ...], corner: Int[Array, "3"]
) -> Float[Array, "p"]:
    """Returns how far the score of any structure can lie above the background's in a block, for each protocol.

    This is an upper bound for every voxel and for every interpolation between voxels. Upsampled and interpolated scores
    are weighted means of those at half resolution (and of zeros beyond the border), which bound them. The share of the
    finest features follows from bounds of each feature.
    """
    halves, rest = [], []
    for kind, member in zip(kinds, members, strict=True):
        network, readout = nnx.merge(kind.structure, member.arrays), member.readout
        start = _start(kind, member, corner)
        windows = _windows(member.coarse, start)
        half = _half_scores(network, readout, windows)
        halves.append(half[::-1] if kind.mirrored else half)
        low, high = network.range(_window(member.image, start - 2 + IMAGE_HALO, FINE + 4), windows[0].features)
        matrix, bias = readout.matrices[0].astype(jnp.float32), readout.biases[0].astype(jnp.float32)
        parts = []
        for a, b in spans(classes):
            over = matrix[:, a + 1 : b] - matrix[:, a : a + 1]  # c k
            share = high @ jnp.maximum(over, 0) + low @ jnp.minimum(over, 0)
            parts.append(share + bias[a + 1 : b] - bias[a])
        rest.append(parts)
    half = jnp.mean(jnp.stack(halves), axis=0) if len(halves) > 1 else halves[0]
    bounds = []
    for p, (a, b) in enumerate(spans(classes)):
        highest = jnp.max(half[..., a + 1 : b] - half[..., a : a + 1], axis=(0, 1, 2))
        share = sum(parts[p] for parts in rest) / np.float32(len(rest))
        bounds.append(jnp.max(highest + share))
    return jnp.stack(bounds)


def over_blocks(
    mesh: Mesh, one: Callable[[Any, Array], Any], shared: Any, blocks: Int[Array, "d*n i"], counts: Int[Array, "d"]
) -> Any:
    """Returns `one(shared, block)` for the first `counts` of each device's n blocks, stacked: a loop on each device."""
    # accelerators need many blocks at a time to be busy, a core's cache holds one
    group = 1 if mesh.devices.flat[0].platform == "cpu" else 16

    def device(shared: Any, blocks: Array, counts: Array) -> Any:
        def step(i: Array, done: Any) -> Any:
            some = jax.lax.dynamic_slice_in_dim(blocks, i * group, group)
            if group == 1:
                found = jax.tree.map(lambda part: part[None], one(shared, some[0]))
            else:
                found = jax.vmap(lambda block: one(shared, block))(some)
            return jax.tree.map(
                lambda whole, part: jax.lax.dynamic_update_slice_in_dim(whole, part, i * group, 0), done, found
            )

        shapes = jax.eval_shape(one, shared, blocks[0])
        empty = jax.tree.map(lambda s: jnp.zeros((len(blocks), *s.shape), s.dtype), shapes)
        return jax.lax.fori_loop(0, (counts[0] + group - 1) // group, step, empty)

    specs = (P(), P(*mesh.axis_names), P(*mesh.axis_names))
    return jax.shard_map(device, mesh=mesh, in_specs=specs, out_specs=P(*mesh.axis_names), check_vma=False)(
        shared, blocks, counts
    )


class _Coarse(NamedTuple):
    """A window of one scale's features."""

    features: Array  # 1 x y z c
    first: Int[Array, "3"]  # its first voxel
    inside: Float[Array, "x y z"]  # 1 within the volume


def _start(kind: Kind, member: Member, corner: Int[Array, "3"]) -> Int[Array, "3"]:
    """Returns the first of the FINE voxels from `corner` on, in the member's own, perhaps mirrored, volume."""
    if kind.mirrored:
        side = member.image.shape[1] - 2 * IMAGE_HALO
        corner = jnp.concatenate([side - FINE - corner[:1], corner[1:]])
    return corner + member.shift


def _windows(coarse: Sequence[Array], start: Int[Array, "3"]) -> list[_Coarse]:
    """Returns the window of each coarser scale that the FINE voxels from `start` on are interpolated from."""
    windows, first, width = [], start // 2 - 1, HALF
    for scale, features in enumerate(coarse):
        if scale:  # first voxel's left neighbour to last voxel's right one
            first, width = (first - 1) // 2, -(-(width + 3) // 2)
        window = _window(features, first + COARSE_HALO, width)
        windows.append(_Coarse(window, first, _inside(first, width, features, COARSE_HALO)))
    return windows


def _window(volume: Array, first: Int[Array, "3"], width: int) -> Array:
    zero = jnp.zeros((), first.dtype)
    return jax.lax.dynamic_slice(volume, (zero, *first, zero), (1, width, width, width, volume.shape[-1]))


def _inside(first: Int[Array, "3"], width: int, volume: Array, halo: int) -> Float[Array, "x y z"]:
    """Returns 1 on the voxels of a window that lie in the volume, 0 beyond it."""
    x, y, z = (
        ((first[axis] + jnp.arange(width) >= 0) & (first[axis] + jnp.arange(width) < volume.shape[axis + 1] - 2 * halo))
        for axis in range(3)
    )
    return (x[:, None, None] & y[None, :, None] & z[None, None, :]).astype(jnp.float32)


def _half_scores(network: Any, readout: Readout, windows: Sequence[_Coarse]) -> Float[Array, "x y z k"]:
    """Returns the scores of the coarser scales, HALF voxels along each side; zero beyond the volume."""
    features = network.readable([window.features for window in windows])
    total = None
    for scale in reversed(range(len(windows))):
        small, matrix = features[scale][0], readout.matrices[scale + 1]
        scores = jnp.einsum("xyzc,ck->xyzk", small, matrix.astype(small.dtype), preferred_element_type=jnp.float32)
        scores = scores + readout.biases[scale + 1].astype(jnp.float32).reshape(1, 1, 1, -1)
        if total is not None:
            scores = scores + _upsampled(total, windows[scale].first - 2 * windows[scale + 1].first, len(small))
        total = scores * windows[scale].inside[..., None]  # what one scale has beyond its border, no other scale sees
    assert total is not None
    return total


def _upsampled(x: Float[Array, "x y z k"], begin: Int[Array, "3"], width: int) -> Float[Array, "u v w k"]:
    """Returns `width` voxels along each side of the upsampled x, from `begin` on.

    Products are used because XLA cannot fuse them into every use of the scores and so compute them again for each.
    """
    upsampling = jnp.asarray(conv.upsampling_matrix(len(x)))
    along_x, along_y, along_z = (jax.lax.dynamic_slice_in_dim(upsampling, begin[axis], width) for axis in range(3))
    x = jnp.einsum("xyzk,wz->xywk", x, along_z, precision=_PRECISE)
    x = jnp.einsum("xywk,vy->xvwk", x, along_y, precision=_PRECISE)
    return jnp.einsum("xvwk,ux->uvwk", x, along_x, precision=_PRECISE)
