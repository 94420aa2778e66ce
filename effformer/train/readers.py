"""Read images from files: IDX (the format of MNIST) and folders with one sub-folder per class."""

from __future__ import annotations

import gzip
import math
import warnings
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..checks import FormatError, need, reason

if TYPE_CHECKING:
    from .datasets import Part

__all__ = ["Size", "cut_away", "find_idx", "read_folder", "read_idx", "resize"]

Size = tuple[int, int]
"""Height and width."""

_MOST_BYTES = 2**30  # of one array, unpacked; the largest published set in this format has 0.64e9
_SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
)


def find_idx(folder: Path, part: Part) -> tuple[Path, Path] | None:
    """The image and label file of a part, with or without ``.gz``; None if one is missing."""
    stem = "train" if part == "train" else "t10k"
    found = []
    for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"):
        plain = folder / f"{stem}-{kind}"
        zipped = plain.with_name(plain.name + ".gz")
        found += [path for path in (plain, zipped) if path.is_file()][:1]
    return (found[0], found[1]) if len(found) == 2 else None


def read_idx(images: Path, labels: Path) -> tuple[Tensor, Tensor]:
    """Read a pair of IDX files.

    An IDX file is two zero bytes, the type (8 = uint8), the number of dimensions, the sizes as
    big-endian int32, and the values.

    Returns:
        Images (N, 1, H, W) and labels (N,), both uint8.

    Raises:
        FormatError: not IDX, truncated, empty, or the two files differ in length.
    """
    pixels, classes = _idx_array(images, 3), _idx_array(labels, 1)
    if len(pixels) != len(classes):
        raise FormatError(
            f"{images.name} holds {len(pixels)} images, but {labels.name} {len(classes)} labels"
        )
    return pixels[:, None], classes


def _idx_array(path: Path, dims: int) -> Tensor:
    head = 4 + 4 * dims
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            raw = file.read(head)
            if raw[:4] != bytes([0, 0, 8, dims]) or len(raw) < head:
                raise FormatError(f"{path}: not an IDX file of uint8 with {dims} dimension(s)")
            sizes = np.frombuffer(raw, ">i4", dims, 4).tolist()
            announced = f"{path}: announces {' x '.join(map(str, sizes))} values"
            if min(sizes) < 1 or math.prod(sizes) > _MOST_BYTES:
                raise FormatError(f"{announced}; read are 1 to {_MOST_BYTES:,}")
            values = file.read(math.prod(sizes))
            found = len(values) + len(file.read(2**20))  # however much there is
            if found != math.prod(sizes):
                raise FormatError(f"{announced}, but {found} follow")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise FormatError(
            f"{path}: broken gzip file ({reason(error)}); copy or download it again"
        ) from error
    return torch.from_numpy(np.frombuffer(values, np.uint8).copy()).view(sizes)


def read_folder(folder: Path, size: Size | None = None) -> tuple[Tensor, Tensor, list[str], float]:
    """Read a folder with one sub-folder per class.

    Classes are the sub-folders in alphabetical order; files whose suffix is not that of an image,
    and hidden ones, are passed over. If every image is grey there is one channel, else three;
    transparency is dropped.

    Args:
        folder: the top folder.
        size: images are resized to cover it, and their centre is cut out; None: all images have one
            size already.

    Returns:
        Images (N, C, H, W) uint8, labels (N,) int64, class names, the largest share of an image that
        was cut away.

    Raises:
        FormatError: no classes, a class without images, images outside a class, a broken image, or
            several sizes.
    """
    visible = sorted(p for p in folder.iterdir() if not p.name.startswith("."))
    classes = [p for p in visible if p.is_dir()]
    if loose := [p for p in visible if p.suffix.lower() in _SUFFIXES]:
        raise FormatError(
            f"{folder}: expected one sub-folder of images per class, but {loose[0].name} "
            "lies beside them"
        )
    if not classes:
        raise FormatError(
            f"{folder}: expected IDX files or one sub-folder of images per class, found neither"
        )
    pictures: list[Any] = []
    labels: list[int] = []
    most = 0.0
    first: tuple[Path, tuple[int, int]] | None = None
    for label, place in enumerate(classes):
        files = sorted(p for p in place.iterdir() if _is_image(p))
        if not files:
            raise FormatError(f"{place}: this class has no images ({', '.join(sorted(_SUFFIXES))})")
        for file in files:
            picture = _open(file)
            if size is not None:
                most = max(most, cut_away((picture.height, picture.width), size))
                picture = _fitted(picture, size)
            first = first or (file, picture.size)
            if picture.size != first[1]:
                raise FormatError(
                    f"{file}: the image is {_by(picture.size)}, but {first[0]} is {_by(first[1])}; "
                    "give size=... to bring all to one size"
                )
            pictures.append(picture)
            labels.append(label)
    mode = "L" if all(p.mode == "L" for p in pictures) else "RGB"
    arrays = np.stack([np.asarray(p.convert(mode)) for p in pictures])
    images = torch.from_numpy(arrays)
    images = images[:, None] if mode == "L" else images.permute(0, 3, 1, 2).contiguous()
    return images, torch.tensor(labels), [p.name for p in classes], most


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in _SUFFIXES and not path.name.startswith(".") and path.is_file()


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"


def _fitted(picture: Any, size: Size) -> Any:
    resampling = need("PIL.Image").Resampling.BILINEAR
    return need("PIL.ImageOps").fit(picture, size[::-1], resampling)


def _open(path: Path) -> Any:
    """Decode one image to mode L (grey) or RGB."""
    pil, ops = need("PIL.Image"), need("PIL.ImageOps")
    try:
        with warnings.catch_warnings():
            # judged by the size that it announces, before anything is decoded
            warnings.simplefilter("error", pil.DecompressionBombWarning)
            with pil.open(path) as file:
                picture = ops.exif_transpose(file)
                picture.load()
    except (pil.DecompressionBombError, pil.DecompressionBombWarning) as error:
        raise FormatError(
            f"{path}: announces more than {pil.MAX_IMAGE_PIXELS:,} pixels; shrink it first"
        ) from error
    except (OSError, SyntaxError, ValueError) as error:
        raise FormatError(f"{path}: cannot be read as an image ({reason(error)})") from error
    if picture.mode.startswith(("I", "F")):
        raise FormatError(
            f"{path}: {picture.mode} pixels; only 8-bit images are read, convert it first"
        )
    return picture.convert("L" if picture.mode in ("1", "L", "LA") else "RGB")


def resize(images: Tensor, size: Size) -> Tensor:
    """Bring images (N, C, H, W) to (N, C, *size): shrink or enlarge, then cut the centre."""
    height, width = images.shape[-2:]
    scale = max(size[0] / height, size[1] / width)
    high, wide = max(round(height * scale), size[0]), max(round(width * scale), size[1])
    images = torch.nn.functional.interpolate(images, (high, wide), mode="bilinear", antialias=True)
    top, left = (high - size[0]) // 2, (wide - size[1]) // 2
    return images[..., top : top + size[0], left : left + size[1]].contiguous()


def cut_away(own: Size, size: Size) -> float:
    """Share of an image (height, width) that lies outside of the largest part with the sides of
    ``size``.
    """
    ratio = (own[0] * size[1]) / (own[1] * size[0])
    return 1 - min(ratio, 1 / ratio)
