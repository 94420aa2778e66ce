"""SD3 medium's 2 B parameters in bfloat16 from its official layout to diffusers': memory and time of the conversion
against the size of the file and against copying it.

python benchmarks/convert_large.py [--small] [FOLDER]: needs 13 GB of room in the folder, the temporary one by
default.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from markdown import Row, write
from torch import Tensor

import effformer
from effformer.lazy import LazyTensor
from effformer.profile import machine, peak_rss

SMALL = "--small" in sys.argv
MODEL, SHARD, ROUNDS = ("mmdit-nano", 300_000, 1) if SMALL else ("sd3-medium", 1_000_000_000, 3)
FOLDER = next((word for word in sys.argv[1:] if word != "--small"), None)


def empty() -> torch.nn.Module:
    with torch.device("meta"):
        return effformer.build_model(MODEL)


def drawn(like: Tensor, seed: int) -> LazyTensor:
    """Random values, made when they are written."""
    meta = like.to(torch.bfloat16)

    def make() -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(meta.shape, generator=generator, dtype=torch.bfloat16) * 0.02

    return LazyTensor(meta, make)


def convert(source: Path, target: Path, layout: str, shard: int | None) -> None:
    effformer.convert_weights(empty(), source, target, layout, shard=shard, force=True)


def copied(files: list[Path], folder: Path) -> None:
    """The bytes at another place, on the disk."""
    for file in files:
        shutil.copyfile(file, folder / file.name)
        with (folder / file.name).open("rb") as copy:
            os.fsync(copy.fileno())


def seconds(call: object, *args: object) -> float:
    start = time.perf_counter()
    call(*args)  # type: ignore[operator]
    return time.perf_counter() - start


def rows_of(folder: Path, title: str, shard: int | None, aim: float) -> tuple[list[Row], int]:
    """Memory and time of one form of the file, and its size."""
    name = "w.safetensors" if shard is None else "w.safetensors.index.json"
    there, made = folder / "there", folder / "made"
    there.mkdir()
    made.mkdir()
    state = {k: drawn(x, i) for i, (k, x) in enumerate(empty().state_dict().items())}
    effformer.convert_weights(empty(), state, there / name, "official", shard=shard)
    del state
    files = [*there.glob("*.safetensors")]
    size = sum(f.stat().st_size for f in files)
    grown = peak_rss(convert, there / name, made / name, "diffusers", shard)
    times: dict[str, list[float]] = {"convert": [], "copy": []}
    for _ in range(ROUNDS):
        times["copy"].append(seconds(copied, files, made))
        shutil.rmtree(made)
        made.mkdir()
        times["convert"].append(seconds(convert, there / name, made / name, "diffusers", shard))
        shutil.rmtree(made)
        made.mkdir()
    ratio = median(a / b for a, b in zip(times["convert"], times["copy"], strict=True))
    shutil.rmtree(there)
    shutil.rmtree(made)
    rows = [
        Row(what=f"{title}: memory that the conversion adds", value=f"{grown / 1e9:.2f} GB", ratio=grown / size, target=aim),
        Row(what=f"{title}: copying the files", value=f"{median(times['copy']):.1f} s"),
        Row(what=f"{title}: converting them", value=f"{median(times['convert']):.1f} s", ratio=ratio, target=2.0),
    ]  # fmt: skip
    return rows, size


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=FOLDER) as name:
        folder = Path(name)
        sharded, size = rows_of(folder, "shards of 1 GB", SHARD, 0.25)
        single, _ = rows_of(folder, "one file", None, 1.2)
    notes = [
        f"{MODEL}, random bfloat16 weights, {size / 1e9:.2f} GB on the disk; official layout in, diffusers' out",
        "memory: growth of the resident memory of a fresh process, with everything imported before; its "
        "ratio is against the size of the file",
        "time: copying and converting took turns, both forced to the disk; its ratio is against copying",
    ]
    title = "Converting weights larger than the memory"
    write("convert_large", title, [*sharded, *single], machine(), notes, keep=not SMALL)


if __name__ == "__main__":
    main()
