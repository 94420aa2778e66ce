"""Named tensors in memory: the packaged digits, and images that are on the disk already.

Nothing is ever downloaded.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from safetensors.torch import load
from torch import Tensor

from effformer.arguments import Shape, checked
from effformer.notebook import Shown, picture_grid, tables
from effformer.values import Checked, Fraction, Range, Seed

from ..checks import check_ids, need, shown, unknown
from .readers import Size, cut_away, find_idx, read_folder, read_idx, resize

__all__ = ["Dataset", "halved", "load_data", "placed"]


Part = Literal["train", "test"]
Side = Annotated[int, Range(1, 16384)]
Index = Annotated[Tensor, Shape("(K,)", whole=True)]
Share = Annotated[float, Range(0, 1, above=True, below=True)]

# Data sets in IDX files: name -> folder under which torchvision keeps them.
_IDX = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "kmnist": "KMNIST"}
# name -> (torchvision class, whether its constructor takes train=bool rather than split=str)
_TORCHVISION = {
    "cifar10": ("CIFAR10", True),
    "cifar100": ("CIFAR100", True),
    "usps": ("USPS", True),
    "svhn": ("SVHN", False),
    "stl10": ("STL10", False),
}


@dataclass(frozen=True, slots=True, eq=False)
class Dataset(Shown, Checked):
    """Named tensors whose first axis counts the samples.

    The names are those of the arguments of the models that read them. Images with labels are
    ``{"x": (N, C, H, W) float32 in [-1, 1], "y": (N,) int64}``; a text may be
    ``{"tokens": (N, L), "mask": (N, L), "labels": (N,)}``.

    Attributes:
        name: how the data were named to `load_data`.
        tensors: name -> (N, ...).
        classes: names of the classes, empty if there are none.
        target: name of the tensor (N,) int64 that holds an index into ``classes``.
        value_range: values of black and white in ``x``, None if that is no picture or not known.
        cut: largest share of an image that was cut away to bring all to one size.

    Raises:
        TypeError: ``tensors`` is no mapping of tensors.
        ValueError: no samples, lengths that differ, or targets that are no classes.

    Example:
        >>> from effformer.train import load_data
        >>> train, held_out = load_data("digits").split(0.1, seed=0)
        >>> len(train), len(held_out), train["y"].shape
        (1617, 180, torch.Size([1617]))
    """

    name: str
    tensors: Mapping[str, Tensor]
    classes: tuple[str, ...] = ()
    target: str = "y"
    value_range: tuple[float, float] | None = None
    cut: Fraction = 0.0

    def _facts(self) -> dict[str, Any]:
        tensors = [
            {"tensor": name, "shape": tuple(x.shape), "type": str(x.dtype).removeprefix("torch.")}
            for name, x in self.tensors.items()
        ]
        return {"samples": len(self), "classes": ", ".join(self.classes), "tensors": tensors}

    def _body(self) -> str:
        x = self.tensors.get("x")
        grid = "" if x is None else picture_grid(x, self.value_range or (-1.0, 1.0), self.name)
        return f"<h3>{escape(self.name)}</h3>{grid}{''.join(tables(self._facts()))}"

    def check(self) -> None:
        where = f"Dataset {self.name!r}"
        shapes = {name: tuple(x.shape) for name, x in self.tensors.items()}
        if not shapes or not all(shapes.values()) or len({s[0] for s in shapes.values()}) != 1:
            raise ValueError(
                f"{where}: expected named tensors with one row for every sample, got "
                f"{shown(shapes)}"
            )
        if len(self) == 0:
            raise ValueError(f"{where}: there are no samples")
        if self.classes:
            self._check_target(where)

    def _check_target(self, where: str) -> None:
        labels = self[self.target]
        if labels.dim() != 1 or labels.dtype != torch.int64:
            raise ValueError(
                f"{where}: expected {self.target!r} ({len(self)},) of int64, got "
                f"{tuple(labels.shape)} {labels.dtype}"
            )
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= len(self.classes):
            raise ValueError(
                f"{where}: {self.target!r} lies in {low}..{high}, but there are "
                f"{len(self.classes)} classes"
            )

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise unknown("tensor", name, list(self.tensors), where=f"Dataset {self.name!r}")
        return self.tensors[name]

    @checked
    def rows(self, index: Index) -> dict[str, Tensor]:
        """A batch: the samples at ``index`` (K,) int64.

        Raises:
            ValueError: there is no such sample.
        """
        check_ids(index, len(self), where="Dataset.rows: index")
        return {name: x[index] for name, x in self.tensors.items()}

    @checked
    def subset(self, index: Index) -> Dataset:
        """The data set of the samples at ``index`` (K,) int64."""
        return replace(self, tensors=self.rows(index))

    @checked
    def split(self, fraction: Share = 0.1, *, seed: Seed = 0) -> tuple[Dataset, Dataset]:
        """Shuffle and cut into (training, held-out).

        Args:
            fraction: share of the held-out part, in (0, 1); rounded to at least one sample on both
                sides.
            seed: the same seed gives the same cut.

        Raises:
            ValueError: ``fraction`` outside (0, 1), or a single sample.
        """
        if len(self) < 2:
            raise ValueError(f"Dataset.split: {self.name!r} has one sample, two are needed")
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        held_out = min(max(round(fraction * len(self)), 1), len(self) - 1)
        return self.subset(order[held_out:]), self.subset(order[:held_out])

    def fingerprint(self) -> str:
        """SHA-256 over all tensors: two data sets with the same one train the same."""
        first, *others = self.tensors
        digest = hashlib.sha256(repr((tuple(self[first].shape), self.classes)).encode())
        if (first, *others) != ("x", "y"):  # runs on labelled images keep the one that they have
            facts = [(n, tuple(x.shape), str(x.dtype)) for n, x in self.tensors.items()]
            digest.update(repr((facts, self.target)).encode())
        for tensor in self.tensors.values():
            flat = tensor.detach().cpu().contiguous().flatten()
            digest.update(flat.view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


@checked
def load_data(
    source: str | os.PathLike[str],
    *,
    part: Part = "train",
    size: Side | tuple[Side, Side] | None = None,
) -> Dataset:
    """Load images ``x`` and their labels ``y`` by name, by ``name:path``, or by path.

    Pixel values 0..max become ``2 v / max - 1``, so all images lie in [-1, 1].

    Args:
        source: one of

            - ``"digits"``: the UCI handwritten digits, 1,797 images (1, 8, 8), part of this
              package;
            - ``"mnist:DIR"``, ``"fashion-mnist:DIR"``, ``"kmnist:DIR"``: IDX files (gzip or not) in
              DIR or where torchvision puts them under DIR;
            - ``"cifar10:DIR"``, ``"cifar100:DIR"``, ``"usps:DIR"``, ``"svhn:DIR"``,
              ``"stl10:DIR"``: torchvision data sets that were downloaded to DIR before (needs
              torchvision);
            - a folder with IDX files, or a folder with one sub-folder of images per class.
        part: "train" or "test"; the digits and image folders have only one part, which
            `Dataset.split` cuts.
        size: side, or (height, width): images are resized to cover it, antialiased, and their centre
            is cut out; ``cut`` of the result says how much is lost. None keeps the size.

    Raises:
        ValueError: unknown name, or a part that does not exist.
        FileNotFoundError: there is nothing at the path.
        FormatError: the files are not what they should be; the message names the file.

    Reference: digits: E. Alpaydin, C. Kaynak, Optical Recognition of Handwritten Digits, 1998, CC
    BY 4.0, UCI Machine Learning Repository, doi:10.24432/C50P49.
    """
    text = os.fspath(source)
    name, _, path = text.partition(":")
    folder, sides = Path(text), (size, size) if isinstance(size, int) else size
    if path and name in _IDX:
        return _idx(name, Path(path), part, sides)
    if path and name in _TORCHVISION:
        return _torchvision(name, Path(path), part, sides)
    if text != "digits" and not folder.is_dir():
        raise _not_found(text)
    if text != "digits" and (find_idx(folder, "train") or find_idx(folder, "test")):
        return _idx(text, folder, part, sides)
    if part == "test":
        raise ValueError(
            f"load_data: {text!r} has no test part; cut it with load_data({text!r}).split(0.1)"
        )
    return _digits(sides) if text == "digits" else _folder(folder, sides)


def _not_found(text: str) -> Exception:
    name, _, path = text.partition(":")
    names = ["digits", *_IDX, *_TORCHVISION]
    if text.rstrip(":") in names:
        text = text.rstrip(":")
        return ValueError(f"load_data: {text!r} needs the folder that holds it: '{text}:DIR'")
    if Path(text).exists():
        return FileNotFoundError(f"load_data: {text!r} is a file, not a folder")
    if os.sep in (name if path else text):
        return FileNotFoundError(f"load_data: {text!r} does not exist")
    hint = f"{', '.join(names)}, or a folder"
    return unknown("data set", name, names, where="load_data", hint=hint)


def _digits(size: Size | None) -> Dataset:
    file = resources.files("effformer.train") / "data" / "digits.safetensors"
    tensors = load(file.read_bytes())
    classes = [str(i) for i in range(10)]
    return _dataset("digits", tensors["images"], tensors["labels"], 16, classes, size)


def has_test(source: str) -> bool:
    """Whether `load_data` finds a test part."""
    name, _, path = source.partition(":")
    if path and name in (*_IDX, *_TORCHVISION):
        return name in _TORCHVISION or _idx_files(name, Path(path), "test") is not None
    return find_idx(Path(source), "test") is not None


def _idx_places(name: str, folder: Path) -> list[Path]:
    return [folder, folder / _IDX[name] / "raw"] if name in _IDX else [folder]


def _idx_files(name: str, folder: Path, part: Part) -> tuple[Path, Path] | None:
    found = (find_idx(place, part) for place in _idx_places(name, folder))
    return next((files for files in found if files), None)


def _idx(name: str, folder: Path, part: Part, size: Size | None) -> Dataset:
    places, found = _idx_places(name, folder), _idx_files(name, folder, part)
    if found is None:
        wanted = "train-images-idx3-ubyte" if part == "train" else "t10k-images-idx3-ubyte"
        looked = " and ".join(str(place) for place in places)
        raise FileNotFoundError(f"load_data: no {wanted}[.gz] with its labels in {looked}")
    images, labels = read_idx(*found)
    classes = [str(i) for i in range(int(labels.max()) + 1)]
    return _dataset(name, images, labels, 255, classes, size)


def _torchvision(name: str, folder: Path, part: Part, size: Size | None) -> Dataset:
    cls, by_flag = _TORCHVISION[name]
    make = getattr(need("torchvision.datasets", "vision"), cls)
    chosen = {"train": part == "train"} if by_flag else {"split": part}
    try:
        found = make(str(folder), download=False, **chosen)
    except (RuntimeError, OSError) as error:
        raise FileNotFoundError(
            f"load_data: no intact {cls} ({part}) in {folder}; download it there first, "
            f"for instance with torchvision.datasets.{cls}({str(folder)!r}, download=True)"
        ) from error
    pixels = torch.as_tensor(found.data)
    if pixels.dim() == 3:
        pixels = pixels[:, None]
    elif pixels.shape[-1] == 3:  # CIFAR: (N, H, W, C)
        pixels = pixels.permute(0, 3, 1, 2)
    labels = torch.as_tensor(found.targets if by_flag else found.labels)
    classes = getattr(found, "classes", None) or [str(i) for i in range(int(labels.max()) + 1)]
    return _dataset(name, pixels, labels, 255, classes, size)


def _folder(folder: Path, size: Size | None) -> Dataset:
    images, labels, classes, cut = read_folder(folder, size)
    return replace(_dataset(str(folder), images, labels, 255, classes, None), cut=cut)


def _dataset(
    name: str, pixels: Tensor, labels: Tensor, peak: int, classes: Sequence[str], size: Size | None
) -> Dataset:
    images = pixels.float().mul_(2 / peak).sub_(1).contiguous()
    cut = 0.0
    if size is not None:
        cut = cut_away((images.shape[2], images.shape[3]), size)
        images = resize(images, size)
    tensors = {"x": images, "y": labels.long()}
    return Dataset(name, tensors, tuple(classes), value_range=(-1.0, 1.0), cut=cut)


def placed(
    batch: Mapping[str, Tensor], device: torch.device, half: torch.dtype | None
) -> dict[str, Tensor]:
    """A batch where a model is, its float32 numbers in half precision where the weights are."""
    return {name: halved(x.to(device), half) for name, x in batch.items()}


def halved(x: Any, half: torch.dtype | None) -> Any:
    """A tensor of float32 in half precision, if there is one; everything else as it is."""
    return x.to(half) if half and isinstance(x, Tensor) and x.dtype == torch.float32 else x
