from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from effformer.checks import FormatError
from effformer.train import load_data

IMAGES = (np.arange(3 * 4 * 5) % 256).astype(np.uint8).reshape(3, 4, 5)
LABELS = np.array([2, 0, 1], np.uint8)


def idx(array: np.ndarray) -> bytes:
    head = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}i", *array.shape)
    return head + array.tobytes()


def write(
    folder: Path, images: bytes, labels: bytes, *, part: str = "train", zipped: bool = True
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for kind, raw in (("images-idx3-ubyte", images), ("labels-idx1-ubyte", labels)):
        name = f"{part}-{kind}"
        if zipped:
            (folder / f"{name}.gz").write_bytes(gzip.compress(raw))
        else:
            (folder / name).write_bytes(raw)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("place", "source"), [(".", "{}"), (".", "mnist:{}"), ("FashionMNIST/raw", "fashion-mnist:{}")]
)
def test_idx(tmp_path: Path, zipped: bool, place: str, source: str) -> None:
    write(tmp_path / place, idx(IMAGES), idx(LABELS), zipped=zipped)
    write(tmp_path / place, idx(IMAGES[:1]), idx(LABELS[:1]), part="t10k", zipped=zipped)
    data = load_data(source.format(tmp_path))
    assert data["x"].shape == (3, 1, 4, 5)
    assert data["y"].tolist() == [2, 0, 1]
    expected = torch.tensor(IMAGES[:, None] / 255 * 2 - 1, dtype=torch.float32)
    torch.testing.assert_close(data["x"], expected)
    assert len(load_data(source.format(tmp_path), part="test")) == 1


BROKEN = {
    "not idx": (b"PNG" + bytes(40), "not an IDX file"),
    "labels as images": (idx(LABELS), "not an IDX file of uint8 with 3"),
    "truncated": (idx(IMAGES)[:-7], "3 x 4 x 5 values, but 53 follow"),
    "longer": (idx(IMAGES) + b"x", "but 61 follow"),
    "empty": (idx(IMAGES[:0]), "0 x 4 x 5"),
    "only a head": (idx(IMAGES)[:9], "not an IDX file"),
    "other length": (idx(IMAGES[:2]), "2 images, but .* 3 labels"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_idx(tmp_path: Path, case: str) -> None:
    raw, message = BROKEN[case]
    write(tmp_path, raw, idx(LABELS))
    with pytest.raises(FormatError, match=message):
        load_data(tmp_path)


@pytest.mark.parametrize("damage", [lambda raw: raw[:30], lambda raw: b"no gzip at all"])
def test_broken_gzip(tmp_path: Path, damage) -> None:  # type: ignore[no-untyped-def]
    write(tmp_path, idx(IMAGES), idx(LABELS))
    file = tmp_path / "train-images-idx3-ubyte.gz"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(FormatError, match="broken gzip"):
        load_data(tmp_path)


def test_missing_idx(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no train-images-idx3-ubyte"):
        load_data(f"mnist:{tmp_path}")
    write(tmp_path, idx(IMAGES), idx(LABELS))
    with pytest.raises(FileNotFoundError, match="no t10k-images"):
        load_data(f"mnist:{tmp_path}", part="test")


def test_folder_without_classes(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="found neither"):
        load_data(tmp_path)
    (tmp_path / "cat").mkdir()
    with pytest.raises(FormatError, match="cat: this class has no images"):
        load_data(tmp_path)


def test_loose_images(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    Image.new("L", (2, 2)).save(tmp_path / "cover.png")
    with pytest.raises(FormatError, match=r"one sub-folder .* cover\.png lies beside"):
        load_data(tmp_path)


@pytest.mark.parametrize("keep", [0, 20, 60])
def test_corrupt_image(tmp_path: Path, keep: int) -> None:
    (tmp_path / "cat").mkdir()
    file = tmp_path / "cat" / "a.png"
    Image.effect_noise((16, 16), 50).save(file)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(FormatError, match=r"a\.png: cannot be read"):
        load_data(tmp_path)


def test_deep_pixels_are_refused(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    Image.fromarray(np.full((4, 4), 40_000, np.uint16)).save(tmp_path / "cat" / "a.png")
    with pytest.raises(FormatError, match="8-bit"):
        load_data(tmp_path)


def test_rotation_of_cameras_is_applied(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by 90 degrees
    Image.new("L", (6, 4)).save(tmp_path / "cat" / "a.jpg", exif=exif)
    assert load_data(tmp_path)["x"].shape == (1, 1, 6, 4)


def test_what_would_unpack_to_gigabytes_is_refused(tmp_path: Path) -> None:
    head = bytes([0, 0, 8, 3]) + struct.pack(">3i", 10**6, 10**3, 10)
    write(tmp_path / "a", head + bytes(100), idx(LABELS))
    with pytest.raises(FormatError, match="announces 1000000 x 1000 x 10 values; read are 1 to"):
        load_data(str(tmp_path / "a"))
    (tmp_path / "b" / "class").mkdir(parents=True)
    picture = tmp_path / "b" / "class" / "x.bmp"
    Image.new("L", (4, 4)).save(picture)
    raw = bytearray(picture.read_bytes())
    raw[18:26] = struct.pack("<2i", 30_000, 30_000)
    picture.write_bytes(raw)
    with pytest.raises(FormatError, match=r"x\.bmp: announces more than .* pixels; shrink it"):
        load_data(str(tmp_path / "b"))
