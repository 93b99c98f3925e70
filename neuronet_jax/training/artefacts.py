"""Faults of a scan, on the device: motion, ghosts, spikes, thick slices, a cut field of view, a removed face.

`draw` draws all parameters of a sample; other functions apply them. Names and ranges are TorchIO's (Pérez-García et
al., Computer Methods and Programs in Biomedicine 208, 2021), where it has them.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer

GHOSTS = (4, 10)  # copies of the head along one axis
GHOST_INTENSITY = (0.5, 1.0)  # 1 removes the planes of k-space that make the ghosts
SPIKE_INTENSITY = (1.0, 3.0)  # of the largest value of k-space; larger ones leave no head to see
MOVED_DEGREES, MOVED_VOXELS = 10.0, 5.0  # TorchIO moves by 10 mm; of 2 mm voxels that is 5
DOWNSAMPLING = (1.5, 5.0)  # thickness of slices, in voxels
CUT = 0.35  # at most so much of the crop's side is missing
FACE_DEGREES = (25.0, 65.0)  # between the floor of the removed part and the horizontal plane
FACE_MARGIN = 2.0  # voxels in front of the brain that stay


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Artefacts:
    """The faults of one sample. Each is there with the same probability."""

    has: Bool[Array, "6"]  # in the order of `apply`
    matrix: Float[Array, "3 3"]  # the pose after the motion, from output to input voxels
    shift: Float[Array, "3"]  # voxels
    time: Float[Array, ""]  # share of k-space that was read before the motion
    ghosts: Integer[Array, ""]
    ghost_axis: Integer[Array, ""]
    ghost_intensity: Float[Array, ""]
    spike: Float[Array, "3"]  # place in k-space, −0.5 to 0.5 from its centre, in sides
    spike_intensity: Float[Array, ""]
    thick_axis: Integer[Array, ""]
    thickness: Float[Array, ""]
    cut_axis: Integer[Array, ""]
    cut_end: Bool[Array, ""]  # the upper end, or the lower
    cut: Float[Array, ""]  # share of the side
    face_degrees: Float[Array, ""]


def draw(key: Array, share: float) -> Artefacts:
    """Draws the faults of one sample, each of which is there with probability `share`."""
    keys = iter(jax.random.split(key, 16))

    def uniform(low: float, high: float, shape: tuple[int, ...] = ()) -> Array:
        return jax.random.uniform(next(keys), shape, minval=low, maxval=high)

    def axis() -> Array:
        return jax.random.randint(next(keys), (), 0, 3)

    return Artefacts(
        has=jax.random.bernoulli(next(keys), share, (6,)),
        matrix=rotation(jnp.deg2rad(uniform(-MOVED_DEGREES, MOVED_DEGREES, (3,)))),
        shift=uniform(-MOVED_VOXELS, MOVED_VOXELS, (3,)),
        time=uniform(0.0, 1.0),
        ghosts=jax.random.randint(next(keys), (), GHOSTS[0], GHOSTS[1] + 1),
        ghost_axis=axis(),
        ghost_intensity=uniform(*GHOST_INTENSITY),
        spike=uniform(-0.5, 0.5, (3,)),
        spike_intensity=uniform(*SPIKE_INTENSITY),
        thick_axis=axis(),
        thickness=uniform(*DOWNSAMPLING),
        cut_axis=axis(),
        cut_end=jax.random.bernoulli(next(keys)),
        cut=uniform(0.0, CUT),
        face_degrees=uniform(*FACE_DEGREES),
    )


def apply(
    image: Float[Array, "x y z 1"], labels: Integer[Array, "p x y z"], a: Artefacts
) -> tuple[Float[Array, "x y z 1"], Integer[Array, "p x y z"]]:
    """Applies the faults that a sample has."""
    scan = image[..., 0]

    def after(number: int, changed: Array, before: Array) -> Array:
        return jnp.where(a.has[number], changed, before)

    scan = after(0, motion(scan, a.matrix, a.shift, a.time), scan)
    scan = after(1, ghosting(scan, a.ghosts, a.ghost_axis, a.ghost_intensity), scan)
    scan = after(2, spike(scan, a.spike, a.spike_intensity), scan)
    scan = after(3, thick_slices(scan, a.thick_axis, a.thickness), scan)
    scan = after(4, remove_face(scan, labels, a.face_degrees), scan)
    inside = field_of_view(scan.shape, a.cut_axis, a.cut_end, a.cut) | ~a.has[5]
    return jnp.where(inside, scan, jnp.min(scan))[..., None], jnp.where(inside[None], labels, 0)


def motion(
    scan: Float[Array, "x y z"], matrix: Float[Array, "3 3"], shift: Float[Array, "3"], time: Float[Array, ""]
) -> Float[Array, "x y z"]:
    """Moves the head while it is scanned: k-space is read along y, from −Nyquist on, and in the new pose after `time`.

    The pose that the centre of k-space shows is the unmoved one, so that labels stay where they are.
    """
    centre = (jnp.asarray(scan.shape, jnp.float32) - 1.0) / 2.0
    axes = [jnp.arange(side, dtype=jnp.float32) - c for side, c in zip(scan.shape, centre, strict=True)]
    grid = jnp.stack(jnp.meshgrid(*axes, indexing="ij"))  # 3 x y z
    source = jnp.einsum("ij,jxyz->ixyz", matrix, grid) + (centre + shift).reshape(3, 1, 1, 1)
    moved = jax.scipy.ndimage.map_coordinates(scan, list(source), order=1, mode="nearest")
    read = (_frequencies(scan.shape[1]) + scan.shape[1] // 2) / scan.shape[1]  # when each plane was, 0 to 1
    still = jnp.where(time > 0.5, read < time, read >= time)  # the side with the centre
    return jnp.fft.ifftn(jnp.where(still[None, :, None], jnp.fft.fftn(scan), jnp.fft.fftn(moved))).real


def ghosting(
    scan: Float[Array, "x y z"], ghosts: Integer[Array, ""], axis: Integer[Array, ""], intensity: Float[Array, ""]
) -> Float[Array, "x y z"]:
    """Weakens every `ghosts`th plane of k-space by `intensity`, except the centre: copies along the axis."""
    weakened = jnp.zeros(scan.shape, bool)
    for number, side in enumerate(scan.shape):
        frequencies = _frequencies(side)
        planes = ((frequencies % ghosts) == 0) & (frequencies != 0)
        weakened = weakened | ((axis == number) & _along(planes, number))
    left = jnp.where(weakened, 1.0 - intensity, 1.0).astype(jnp.complex64)
    return jnp.fft.ifftn(jnp.fft.fftn(scan) * left).real


def spike(scan: Float[Array, "x y z"], place: Float[Array, "3"], intensity: Float[Array, ""]) -> Float[Array, "x y z"]:
    """Adds one wave over the whole scan: a point of k-space, `intensity` times its largest value at zero mean.

    TorchIO takes the largest value with the mean, which whitened crops of training do not have.
    """
    sides = jnp.asarray(scan.shape, jnp.float32)
    frequency = jnp.round(place * (sides - 1.0)) / sides  # periods per voxel
    phase = sum(
        _along(f * jnp.arange(side, dtype=jnp.float32), n)
        for n, (f, side) in enumerate(zip(frequency, scan.shape, strict=True))
    )
    largest = jnp.max(jnp.abs(jnp.fft.fftn(scan - jnp.mean(scan)))) / scan.size
    return scan + intensity * largest * jnp.cos(2.0 * jnp.pi * phase)


def thick_slices(
    scan: Float[Array, "x y z"], axis: Integer[Array, ""], thickness: Float[Array, ""]
) -> Float[Array, "x y z"]:
    """Averages over slices of `thickness` voxels along the axis, and interpolates linearly back to the grid."""
    changed = scan
    for number in range(3):
        lines = jnp.moveaxis(scan, number, 0)
        side = lines.shape[0]
        # The integral over the voxels, up to any real border: the mean of a slice is a difference of two.
        total = jnp.concatenate([jnp.zeros_like(lines[:1]), jnp.cumsum(lines, axis=0)])
        count = jnp.ceil(side / thickness)
        place = jnp.clip((jnp.arange(float(side)) + 0.5) / thickness - 0.5, 0.0, count - 1.0)
        lower = jnp.floor(place)
        upper = jnp.minimum(lower + 1.0, count - 1.0)
        weight = (place - lower)[:, None, None]
        mixed = (1.0 - weight) * _slice(total, lower, thickness) + weight * _slice(total, upper, thickness)
        changed = jnp.where(axis == number, jnp.moveaxis(mixed, 0, number), changed)
    return changed


def _slice(total: Float[Array, "x1 y z"], number: Float[Array, "x"], thickness: Float[Array, ""]) -> Array:
    """Returns the mean of slices by number; the last one ends with the volume."""
    side = total.shape[0] - 1
    low, high = number * thickness, jnp.minimum((number + 1.0) * thickness, float(side))

    def at(border: Array) -> Array:
        whole = jnp.clip(jnp.floor(border).astype(jnp.int32), 0, side - 1)
        part = (border - whole.astype(jnp.float32))[:, None, None]
        return total[whole] + part * (total[whole + 1] - total[whole])

    return (at(high) - at(low)) / (high - low)[:, None, None]


def field_of_view(
    shape: tuple[int, ...], axis: Integer[Array, ""], end: Bool[Array, ""], cut: Float[Array, ""]
) -> Bool[Array, "x y z"]:
    """Returns the voxels that are left when the share `cut` of an axis is missing at its lower or upper end."""
    inside = jnp.ones(shape, bool)
    for number, side in enumerate(shape):
        place = (jnp.arange(side, dtype=jnp.float32) + 0.5) / side
        inside = inside & ((axis != number) | _along(jnp.where(end, place < 1.0 - cut, place > cut), number))
    return inside


def remove_face(
    scan: Float[Array, "x y z"], labels: Integer[Array, "p x y z"], degrees: Float[Array, ""]
) -> Float[Array, "x y z"]:
    """Blackens what lies in front of and below the brain: beyond a tilted plane that touches it. Axes are RAS+.

    Nothing changes in a crop without labelled voxels.
    """
    angle = jnp.deg2rad(degrees)
    _, forward, up = (_along(jnp.arange(side, dtype=jnp.float32), n) for n, side in enumerate(scan.shape))
    distance = jnp.sin(angle) * forward - jnp.cos(angle) * up + jnp.zeros(scan.shape)
    brain = jnp.any(labels > 0, axis=0)
    touching = jnp.max(jnp.where(brain, distance, -jnp.inf)) + FACE_MARGIN
    return jnp.where((distance > touching) & jnp.any(brain), jnp.min(scan), scan)


def rotation(angles: Float[Array, "3"]) -> Float[Array, "3 3"]:
    """Returns the rotation by the given radians about x, then y, then z."""
    (cx, cy, cz), (sx, sy, sz) = jnp.cos(angles), jnp.sin(angles)
    x = jnp.array([[1.0, 0.0, 0.0], [0.0, cx, -sx], [0.0, sx, cx]])
    y = jnp.array([[cy, 0.0, sy], [0.0, 1.0, 0.0], [-sy, 0.0, cy]])
    z = jnp.array([[cz, -sz, 0.0], [sz, cz, 0.0], [0.0, 0.0, 1.0]])
    return z @ y @ x


def _frequencies(side: int) -> Integer[Array, "x"]:
    """Returns the frequencies of `fft` along an axis, in periods per side: 0, 1, …, −2, −1."""
    return (jnp.arange(side) + side // 2) % side - side // 2


def _along(values: Array, axis: int) -> Array:
    """Returns values [n] as an array that broadcasts along one axis of [x y z]."""
    return values.reshape([-1 if number == axis else 1 for number in range(3)])
