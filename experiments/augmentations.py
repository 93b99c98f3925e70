"""Draws one picture for each augmentation, on a synthetic head of the demo cohort: those of `docs/augmentations.md`.

    python -m experiments.augmentations --out=docs/images/augmentations

Each picture shows the head without it and with it, at a strength that training draws now and then.
"""

import argparse
import io
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from PIL import Image
from scipy import ndimage

from data_prep.demo.cohort import ensure_demo_store
from neuronet_jax import runtime
from neuronet_jax.config import AugmentConfig
from neuronet_jax.files import Files
from neuronet_jax.labels import PROTOCOLS
from neuronet_jax.programs import DONE, Parser, run
from neuronet_jax.store.reader import Store
from neuronet_jax.store.schema import Subject
from neuronet_jax.tissues import AIR, NUMBER
from neuronet_jax.training import artefacts, augment, generate

_SIDE = 120  # pixels of a slice
_QUALITY = 60  # of WebP: a picture then takes about 6 kB
_NONE = AugmentConfig(False, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
# Tissues by class of malp_em_tissue, for painting.
_TISSUES = ("", "ventricles", "thalamus", "cerebral cortex", "cerebral white matter", "cerebellar cortex")

Changed = Callable[[Array, Array], Array]  # of an image [x y z 1] and labels [p x y z], the changed image


def _scalar(value: float) -> Array:
    return jnp.asarray(value, jnp.int32 if isinstance(value, int) else jnp.float32)


def _intensity(**values: float | Array) -> Changed:
    plain = augment.draw(jax.random.key(0), _NONE)
    return lambda image, labels: augment.change_intensity(
        image, replace(plain, **{name: jnp.asarray(value, jnp.float32) for name, value in values.items()})
    )


def _of_scan(change: Callable[[Array], Array]) -> Changed:
    return lambda image, labels: change(image[..., 0])[..., None]


def _cut(image: Array, labels: Array) -> Array:
    inside = artefacts.field_of_view(image.shape[:3], _scalar(2), jnp.asarray(False), _scalar(0.3))
    return jnp.where(inside[..., None], image, jnp.min(image))


def _pose() -> Array:
    return artefacts.rotation(jnp.deg2rad(jnp.asarray([12.0, 6.0, 8.0]))) @ jnp.diag(jnp.asarray([1.1, 0.92, 1.05]))


PICTURES: dict[str, Changed] = {
    "mirror": lambda image, labels: image[::-1],
    "spatial": lambda image, labels: augment.warp(image, labels, _pose())[0],
    "elastic": lambda image, labels: augment.warp(
        image, labels, jnp.eye(3), 0.03 * jax.random.normal(jax.random.key(3), (3, 5, 5, 5))
    )[0],
    "blur": lambda image, labels: augment.blur(image, jnp.asarray([0.3, 1.5, 1.0])),
    "gamma": _intensity(log_gamma=-0.4),
    "bias": _intensity(log_bias=0.25 * jax.random.normal(jax.random.key(2), (3, 3, 3))),
    "noise": _intensity(noise=0.25),
    "motion": _of_scan(
        lambda scan: artefacts.motion(
            scan, artefacts.rotation(jnp.asarray([0.1, 0.0, 0.05])), jnp.full(3, 3.0), _scalar(0.58)
        )
    ),
    "ghosting": _of_scan(lambda scan: artefacts.ghosting(scan, _scalar(5), _scalar(1), _scalar(0.9))),
    "spike": _of_scan(lambda scan: artefacts.spike(scan, jnp.asarray([0.05, 0.1, 0.12]), _scalar(2.0))),
    "thick-slices": _of_scan(lambda scan: artefacts.thick_slices(scan, _scalar(2), _scalar(4.5))),
    "face": lambda image, labels: artefacts.remove_face(image[..., 0], labels, _scalar(45.0))[..., None],
    "field-of-view": _cut,
}


def draw(store: Store, out: Path) -> list[str]:
    """Writes NAME.webp for every augmentation below `out`, and returns the names."""
    subject = store.split("train")[0]
    image = (store.read_image(subject.slot) - subject.mean) / subject.std
    labels = store.read_labels(subject.slot, ("malp_em_tissue",))
    given = jnp.asarray(image, jnp.float32)[..., None]
    pictures: dict[str, Callable[..., Any]] = {name: jax.jit(change) for name, change in PICTURES.items()}
    volume = jnp.asarray(_painted(store, subject))[..., None]
    for name, share in (("t1-like", 0.0), ("any-contrast", 1.0)):
        palette = generate.draw(jax.random.key(5), share, jnp.asarray(False))
        pictures[name] = lambda *_, palette=palette: augment.blur(generate.paint(volume, palette), jnp.full(3, 0.5))
    files = Files(str(out.absolute()))
    for name, change in pictures.items():
        changed = change(given, jnp.asarray(labels))
        files.write(f"{name}.webp", _webp(np.asarray(given)[..., 0], np.asarray(changed)[..., 0]))
    return list(pictures)


def _painted(store: Store, subject: Subject) -> np.ndarray:
    """Returns the head as tissues: those of the brain by their labels, the others by what is dark and bright."""
    (classes,) = store.read_labels(subject.slot, ("malp_em_tissue",))
    image = store.read_image(subject.slot)
    bright: np.ndarray = np.asarray(ndimage.gaussian_filter(image, 1.0)) > 0.25 * np.percentile(image, 99)
    head = np.asarray(ndimage.binary_fill_holes(ndimage.binary_closing(bright, iterations=3)))
    tissues = np.where(head, NUMBER["compact bone"], AIR)
    tissues[bright] = NUMBER["soft tissue"]
    tissues[np.asarray(ndimage.binary_dilation(classes > 0), bool)] = NUMBER["CSF around the brain"]
    for number in range(1, PROTOCOLS["malp_em_tissue"].num_classes):
        tissues[classes == number] = NUMBER[_TISSUES[number]]
    return -tissues.astype(np.float32)


def _webp(before: np.ndarray, after: np.ndarray) -> bytes:
    """Returns sagittal and axial slices before and after, side by side."""
    panels = []
    for volume in (before, after):
        low, high = np.percentile(volume, (1, 99.5))
        grey = np.clip((volume - low) / (high - low), 0, 1)
        x, _, z = (side // 2 for side in grey.shape)
        for view in (grey[x - 6].T[::-1], grey[:, :, z + 4].T[::-1]):  # beside the midline, at the ventricles
            picture = Image.fromarray((255 * view).round().astype(np.uint8))
            panel = Image.new("L", (_SIDE, _SIDE))
            picture.thumbnail((_SIDE, _SIDE))
            panel.paste(picture, ((_SIDE - picture.width) // 2, (_SIDE - picture.height) // 2))
            panels.append(np.asarray(panel))
    content = io.BytesIO()
    Image.fromarray(np.concatenate(panels, axis=1)).save(content, "WEBP", quality=_QUALITY, method=6)
    return content.getvalue()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser("python -m experiments.augmentations", description=__doc__)
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder of the pictures")
    parser.add_argument(
        "--store", metavar="DEST", help="store of a head with malp_em_tissue (default: the demo cohort)"
    )
    return run(parser, _draw, arguments)


def _draw(options: argparse.Namespace) -> int:
    runtime.plain()
    names = draw(Store.open(options.store or str(ensure_demo_store())), options.out)
    print(f"{len(names)} pictures in {options.out}")
    return DONE


if __name__ == "__main__":
    sys.exit(main())
