from __future__ import annotations

import hashlib
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
from closeness import assert_close
from PIL import Image

from effformer.checks import FormatError
from effformer.train import Dataset, load_data
from effformer.train.readers import cut_away, resize


def test_digits_are_the_published_ones() -> None:
    data = load_data("digits")
    assert data["x"].shape == (1797, 1, 8, 8)
    assert data["x"].dtype == torch.float32
    assert data["y"].dtype == torch.int64
    assert data.classes == tuple("0123456789")
    # counts of the test part as its description prints them
    assert data["y"].bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert sorted((data["x"].unique() * 8 + 8).tolist()) == list(range(17))
    first_row = ((data["x"][0, 0, 0] + 1) * 8).tolist()
    assert first_row == [0, 0, 5, 13, 9, 1, 0, 0]


def test_digits_agree_with_scikit_learn() -> None:
    reference = pytest.importorskip("sklearn.datasets", reason="needs scikit-learn").load_digits()
    data = load_data("digits")
    np.testing.assert_array_equal(((data["x"][:, 0] + 1) * 8).numpy(), reference.images)
    np.testing.assert_array_equal(data["y"].numpy(), reference.target)


def test_digits_carry_their_licence() -> None:
    folder = resources.files("effformer.train") / "data"
    text = (folder / "digits-credits.txt").read_text(encoding="utf-8")
    assert "Alpaydin" in text
    assert "CC BY 4.0" in text
    assert len((folder / "digits.safetensors").read_bytes()) < 150_000


def test_split_is_a_seeded_partition() -> None:
    data = load_data("digits")
    train, held_out = data.split(0.1, seed=3)
    assert (len(train), len(held_out)) == (1617, 180)
    together = torch.cat([train["x"], held_out["x"]]).flatten(1)
    assert torch.equal(together.sort(0).values, data["x"].flatten(1).sort(0).values)
    again = data.split(0.1, seed=3)[1]
    assert torch.equal(again["x"], held_out["x"])
    assert not torch.equal(data.split(0.1, seed=4)[1]["x"], held_out["x"])
    assert held_out.fingerprint() == again.fingerprint() != train.fingerprint()


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5, 2.0])
def test_split_refuses(fraction: float) -> None:
    with pytest.raises(ValueError, match=r"Dataset.split: fraction must lie in \(0, 1\)"):
        load_data("digits").split(fraction)


def test_split_needs_two() -> None:
    with pytest.raises(ValueError, match="two are needed"):
        load_data("digits").subset(torch.tensor([0])).split()


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (torch.zeros(2, 8), torch.zeros(3).long(), r"one row for every sample.*\(2, 8\).*\(3,\)"),
        (torch.zeros(2, 8), torch.tensor(1), "one row for every sample"),
        (torch.zeros(2, 8), torch.zeros(2), "int64"),
        (torch.zeros(2, 8), torch.zeros(2, 1).long(), r"expected 'y' \(2,\)"),
        (torch.zeros(2, 8), torch.tensor([0, 2]), r"0\.\.2, but there are 2 classes"),
        (torch.zeros(0, 8), torch.zeros(0).long(), "no samples"),
    ],
)
def test_dataset_refuses(x: torch.Tensor, y: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Dataset("made up", {"x": x, "y": y}, ("a", "b"))


def test_any_named_tensors_make_a_data_set() -> None:
    tokens = torch.arange(12).view(4, 3)
    given = {"tokens": tokens, "mask": tokens > 2, "labels": torch.tensor([0, 1, 1, 0])}
    data = Dataset("texts", given, ("a", "b"), target="labels")
    assert len(data) == 4
    rows = data.rows(torch.tensor([3, 1]))
    assert {name: x.tolist() for name, x in rows.items()} == {
        "tokens": [[9, 10, 11], [3, 4, 5]], "mask": [[True] * 3, [True] * 3], "labels": [0, 1],
    }  # fmt: skip
    learned, held_out = data.split(0.25)
    assert sorted([*learned["tokens"][:, 0].tolist(), *held_out["tokens"][:, 0].tolist()]) == [
        0, 3, 6, 9,
    ]  # fmt: skip
    assert Dataset("no classes", {"x": tokens}).classes == ()
    with pytest.raises(ValueError, match=r"unknown tensor 'y'.*tokens, mask, labels"):
        data["y"]
    with pytest.raises(ValueError, match="unknown tensor 'y'"):
        Dataset("texts", given, ("a", "b"))
    with pytest.raises(ValueError, match="expected named tensors"):
        Dataset("nothing", {})
    with pytest.raises(TypeError, match=r"Dataset\.tensors: expected a dict, got Tensor"):
        Dataset("one", tokens)  # type: ignore[arg-type]


def test_fingerprints_tell_data_apart_and_images_keep_theirs() -> None:
    x, y = torch.arange(8.0).view(2, 1, 2, 2), torch.tensor([0, 1])
    digest = hashlib.sha256(repr((tuple(x.shape), ("a", "b"))).encode())
    digest.update(x.numpy().tobytes())
    digest.update(y.numpy().tobytes())
    data = Dataset("images", {"x": x, "y": y}, ("a", "b"))
    assert data.fingerprint() == digest.hexdigest()
    others = [
        Dataset("", {"x": x.view(2, 4), "y": y}, ("a", "b")),
        Dataset("", {"x": x, "y": y}, ("a", "c")),
        Dataset("", {"x": x, "y": 1 - y}, ("a", "b")),
        Dataset("", {"x": x, "z": y}, ("a", "b"), target="z"),
        Dataset("", {"x": x, "y": y, "mask": y.bool()}, ("a", "b")),
        Dataset("", {"x": x, "y": y, "mask": ~y.bool()}, ("a", "b")),
    ]
    assert len({d.fingerprint() for d in (data, *others)}) == 7


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(path)


def test_grey_folder(tmp_path: Path) -> None:
    save(tmp_path / "cat" / "a.png", np.full((4, 6), 255))
    save(tmp_path / "dog" / "b.png", np.zeros((4, 6)))
    save(tmp_path / "dog" / "c.PNG", np.full((4, 6), 51))
    (tmp_path / "dog" / "notes.txt").write_text("not an image")
    (tmp_path / ".hidden").mkdir()
    data = load_data(tmp_path)
    assert data.classes == ("cat", "dog")
    assert data["x"].shape == (3, 1, 4, 6)
    assert data["y"].tolist() == [0, 1, 1]
    torch.testing.assert_close(data["x"][:, 0, 0, 0], torch.tensor([1.0, -1.0, -0.6]))


def test_colour_folder_and_resize(tmp_path: Path) -> None:
    pixels = np.zeros((10, 20, 3))
    pixels[..., 0] = 255
    save(tmp_path / "red" / "a.png", pixels)
    save(tmp_path / "grey" / "a.png", np.full((12, 12), 102))
    with pytest.raises(
        FormatError, match=r"a\.png: the image is 20 x 10, but .* is 12 x 12; give size"
    ):
        load_data(tmp_path)
    data = load_data(tmp_path, size=4)
    assert data["x"].shape == (2, 3, 4, 4)
    torch.testing.assert_close(data["x"][1].mean((1, 2)), torch.tensor([1.0, -1.0, -1.0]))
    torch.testing.assert_close(data["x"][0].mean((1, 2)), torch.full((3,), -0.2))


def test_torchvision_by_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torchvision = pytest.importorskip("torchvision", reason="needs effformer[vision]")

    class Stored:
        classes = ("plane", "car")

        def __init__(self, root: str, train: bool, download: bool) -> None:
            assert (root, download) == (str(tmp_path), False)
            self.data = np.full((3, 4, 4, 3), 255 if train else 0, np.uint8)
            self.data[..., 1] = 51
            self.targets = [0, 1, 1]

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Stored)
    data = load_data(f"cifar10:{tmp_path}")
    assert data["x"].shape == (3, 3, 4, 4)
    torch.testing.assert_close(data["x"][0, :, 0, 0], torch.tensor([1.0, -0.6, 1.0]))
    assert data.classes == ("plane", "car")
    assert load_data(f"cifar10:{tmp_path}", part="test")["x"][0, 0, 0, 0] == -1


def test_torchvision_split_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torchvision = pytest.importorskip("torchvision", reason="needs effformer[vision]")

    class Stored:
        def __init__(self, root: str, split: str, download: bool) -> None:
            assert split == "test"
            self.data = np.zeros((2, 3, 6, 6), np.uint8)
            self.labels = np.array([1, 0])

    monkeypatch.setattr(torchvision.datasets, "SVHN", Stored)
    data = load_data(f"svhn:{tmp_path}", part="test", size=3)
    assert data["x"].shape == (2, 3, 3, 3)
    assert data.classes == ("0", "1")


def test_torchvision_never_downloads(tmp_path: Path) -> None:
    pytest.importorskip("torchvision", reason="needs effformer[vision]")
    with pytest.raises(FileNotFoundError, match="no intact CIFAR10"):
        load_data(f"cifar10:{tmp_path}")


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("digit", ValueError, "did you mean 'digits'"),
        ("mnst:/data", ValueError, "did you mean 'mnist'"),
        ("mnist", ValueError, "'mnist:DIR'"),
        ("missing/folder", FileNotFoundError, "does not exist"),
    ],
)
def test_unknown_sources(source: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        load_data(source)


def test_options_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="load_data: part: unknown value 'val'"):
        load_data("digits", part="val")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"load_data: size must lie in \[1, 16384\]"):
        load_data("digits", size=0)
    with pytest.raises(ValueError, match="no test part"):
        load_data("digits", part="test")
    save(tmp_path / "a" / "x.png", np.zeros((2, 2)))
    with pytest.raises(ValueError, match="no test part"):
        load_data(tmp_path, part="test")
    with pytest.raises(FileNotFoundError, match="is a file"):
        load_data(tmp_path / "a" / "x.png")


def test_digits_can_be_resized() -> None:
    data = load_data("digits", size=16)
    assert data["x"].shape == (1797, 1, 16, 16)
    assert data["x"].abs().max() <= 1


@pytest.mark.parametrize("stored", ["folder", "tensor"])
def test_rectangles_keep_as_much_as_they_can(stored: str, tmp_path: Path) -> None:
    """A ramp from left to right in images twice as wide as high."""
    ramp = np.repeat(np.arange(40)[None] * 6, 20, axis=0)
    save(tmp_path / "a" / "1.png", ramp)
    if stored == "folder":

        def made(size: int | tuple[int, int]) -> Dataset:
            return load_data(tmp_path, size=size)
    else:
        images = load_data(tmp_path)["x"]

        def made(size: int | tuple[int, int]) -> Dataset:
            pair = (size, size) if isinstance(size, int) else size
            return Dataset("ramp", {"x": resize(images, pair)}, cut=cut_away((20, 40), pair))

    whole = made((10, 20))
    assert (whole["x"].shape[2:], whole.cut) == ((10, 20), 0.0)
    wide = made((5, 20))  # all columns, the middle half of the rows
    assert (wide["x"].shape[2:], wide.cut) == ((5, 20), 0.5)
    assert_close(wide["x"][0, 0, 0], whole["x"][0, 0, 0], rtol=0.02, atol=0.02)
    square = made(10)  # the middle half of the columns
    assert (square["x"].shape[2:], square.cut) == ((10, 10), 0.5)
    assert_close(square["x"][0, 0, 0], whole["x"][0, 0, 0, 5:15], rtol=0.02, atol=0.02)
    assert square.subset(torch.tensor([0])).cut == 0.5


def test_the_image_that_loses_most_is_told(tmp_path: Path) -> None:
    save(tmp_path / "a" / "1.png", np.zeros((8, 8)))
    save(tmp_path / "a" / "2.png", np.zeros((8, 10)))
    assert load_data(tmp_path, size=4).cut == pytest.approx(0.2)
    assert load_data(tmp_path, size=(4, 5)).cut == pytest.approx(0.2)
