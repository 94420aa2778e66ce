"""Wrong words for every verb of the command line, made of its own options and of right calls."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
import typer
from safetensors.torch import save_file
from web_package import package

import effformer
from effformer.cli import main

__all__ = ["CALLS", "INNER", "SAVED", "VALUES", "Trial", "lay_out", "options", "trials"]

SAVED = Path(__file__).parents[1] / "saved"
TINY = (
    "--set", "depth=1", "--set", "dim=16", "--set", "heads=2", "--set", "patch=4", "--set", "input_size=8",
    "--set", "channels=1", "--set", "num_classes=10",
)  # fmt: skip
RUN = ("--steps", "2", "--batch", "2", "--warmup", "0", "--threads", "1")

CALLS: dict[str, tuple[str, ...]] = {
    "demo": ("demo", "-o", "new"),
    "list": ("list", "models"),
    "show": ("show", "model"),
    "card": ("card", "model", "-o", "new.md"),
    "card of a bundle": ("card", "bundle", "--latency"),
    "build": ("build", "sit-nano", *TINY, "-o", "new"),
    "profile": ("profile", "model"),
    "bench": ("bench", "model", "--rounds", "1", "--runs", "1", "--warmup", "0", "--threads", "1"),
    "train": ("train", "sit-nano", *TINY[:8], *RUN, "-o", "new"),
    "train of a recipe": ("train", "--recipe", "digits-quick", *TINY[:8], *RUN, "-o", "new"),
    "sample": ("sample", "model", "--labels", "0", "--steps", "1", "-o", "new.png"),
    "sample with a cache": (
        "sample", "model", "--labels", "0", "--steps", "9", "--cache", "newton", "-o", "new.npy",
    ),
    "sample of a bundle": ("sample", "bundle", "--labels", "0", "--steps", "1", "-o", "new.npy"),
    "evaluate": ("evaluate", "classifier", "--data", "digits"),
    "evaluate of a bundle": ("evaluate", "bundle", "--data", "digits", "--samples", "2", "--steps", "1"),
    "compress": ("compress", "model", "-o", "new"),
    "compress by a recipe": ("compress", "model", "--recipe", "recipe.yaml", "-o", "new"),
    "sensitivity": ("sensitivity", "model", "--budget", "bits=9", "-o", "new.json"),
    "prune": ("prune", "model", "--keep", "0.5", "-o", "new"),
    "linearize": (
        "linearize", "model", "--data", "samples.safetensors", "--steps", "1", "--whole", "1", "--batch", "2",
        "--threads", "1", "-o", "new",
    ),
    "export": ("export", "model", "--no-verify", "-o", "new.onnx"),
    "export of a bundle": ("export", "model", "--no-verify", "-o", "new"),
    "export of a site": (
        "export", "model", "--no-verify", "--target", "web", "--runtime", "package", "-o", "new",
    ),
    "verify": ("verify", "bundle/velocity.onnx", "model", "--cases", "1"),
    "verify of a bundle": ("verify", "bundle"),
    "convert": ("convert", "model/model.safetensors", "-m", "sit-nano", *TINY, "-o", "new.safetensors"),
    "convert of a folder": ("convert", "model", "--to", "official", "-o", "new.safetensors"),
    "new": ("new", "ffn", "squared", "-o", "new"),
    "doctor": ("doctor",),
}  # fmt: skip
"""Right calls, which run in the folder of `lay_out` and write new things only."""

VALUES = (
    "", " ", "nan", "inf", "-inf", "-1", "0", "1.5", "1e999", str(10**30), "9" * 5000, "true", "null", "[]",
    "{}", "[" * 3000, "no-such-name", "naïve名", "caf\udce9", "a\0b", "a\nb", "..", "/", "*", "[", "=", "a=b",
    "a..b=1", "name=1", ",", ":", "-", "0,1", "5-1", "x" * 300,
)  # fmt: skip
KEYS = (
    "depth", "dim", "heads", "patch", "attn", "attn.scale", "layers", "eps", "name", "steps", "ema", "lr", "block",
)  # fmt: skip
SETTINGS = (
    "where=1", "self=1", "changes=1", "attn.where=1", "attn.self=1", "attn.core.where=1",
    *(f"{key}={value}" for key in KEYS for value in (
        "nan", "NaN", "-1", "0", "1.5", "100000", str(10**30), "[]", "{}", "null", "true", "x", "a\\u0000", "[[[]]]",
        '{"0":{"attn":3}}',
    )),
)  # fmt: skip
NEW = (
    "new",
    "new.png",
    "new.npy",
    "new.onnx",
    "new.json",
    "new.html",
    "new.txt",
    "new.md",
    "new.safetensors",
)
PATIENT = {("minutes", "1.5"), ("train_pairs", "steps=100000"), ("pairs", "steps=100000")}
"""Right words that take as long as they say."""
READ = {"weights", "data", "recipe", "quality"}
"""Options that name what is read, as arguments do."""

INNER = re.compile(
    r"Traceback|object has no attribute|'NoneType'|not subscriptable|not iterable|unsupported operand|invalid literal|"
    r"could not convert|embedded null|unexpected keyword|positional argument|<class '|<object |Errno|\bRuntimeError|"
    r"size mismatch|codec can't|object is not|list index|must be real number|Warning:|CHECK|torch\.nn\.|SymInt"
)
"""Words of Python and torch, which say nothing to a user."""


class Trial(NamedTuple):
    """Words of the command line, and what is tried."""

    words: tuple[str, ...]
    what: str


def lay_out(folder: Path) -> list[str]:
    """Put files of every kind into a folder; return their names."""
    for name, place in (
        ("model", "models/sit"), ("text model", "models/bert"), ("packed", "models/sit-fp4"), ("bundle", "bundle"),
        ("run", "run"), ("vision", "models/vit"),
    ):  # fmt: skip
        shutil.copytree(SAVED / place, folder / name)
    classifier = effformer.build_model(
        "vit-nano", depth=1, dim=16, heads=2, patch=4, image_size=8, channels=1, num_classes=10
    )
    effformer.save_pretrained(classifier, folder / "classifier")
    package(folder / "package")
    _damage_models(folder)
    weights = (folder / "model/model.safetensors").read_bytes()
    graph = (folder / "bundle/velocity.onnx").read_bytes()
    contents = {
        "empty": b"", "text": b"hello", "empty.safetensors": b"", "empty.onnx": b"", "empty.pt": b"",
        "text.onnx": b"hello", "text.pt": b"hello", "deep.json": b"[" * 100_000, "bytes": bytes(range(256)) * 9,
        "bytes.pt": b"\xff\xfe", "cut.safetensors": weights[:2000], "cut.onnx": graph[:2000], "weights.onnx": weights,
        "graph.safetensors": graph, "recipe.yaml": b"steps: [{prune: {keep: 0.5}}, {quantize: {scheme: int8}}]",
        "picture.png": b"\x89PNG\r\n\x1a\n", "report.html": b"<p>", "caf\udce9": b"x",
        "long.safetensors": b"\xff" * 8 + b"{", "deep.safetensors": b"\xa0\x86\1\0\0\0\0\0" + b"[" * 100_000,
    }  # fmt: skip
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    images = {"x": torch.linspace(-1, 1, 1024).reshape(4, 4, 8, 8), "y": torch.arange(4)}
    save_file(images, folder / "samples.safetensors")
    torch.save([1, 2], folder / "list.pt")
    torch.save({"x": torch.ones(2), "n": {"y": torch.ones(1)}}, folder / "foreign.pt")
    (folder / "cut.pt").write_bytes((folder / "foreign.pt").read_bytes()[:300])
    for name in ("folder", "notes", "classes", "classes/a", "classes/b", "holder"):
        (folder / name).mkdir()
    (folder / "notes/notes.txt").write_text("mine")
    (folder / "classes/a/1.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (folder / "classes/b/1.npy").write_bytes(b"x")
    (folder / "holder/config.json").mkdir()
    for name, leads in (("broken", "nowhere"), ("loop", "loop"), ("linked", "model")):
        (folder / name).symlink_to(leads)
    os.mkfifo(folder / "pipe.onnx")
    os.mkfifo(folder / "pipe.safetensors")
    return [
        *sorted(p.name for p in folder.iterdir()), "none", "none/none", "text/below", "", ".", "..", "a\0b",
        "x" * 300, "loop/x", "/dev/null", "/dev/full", "/dev/zero", "/proc/self/mem", "model/model.safetensors",
        "bundle/velocity.onnx", "bundle/self_test.npy", "run/checkpoints/step-00000003.safetensors", "run/run.json",
    ]  # fmt: skip


def _damage_models(folder: Path) -> None:
    facts = json.loads((folder / "model/config.json").read_text())
    changes: dict[str, Any] = {
        "list": [1], "nan": facts | {"config": facts["config"] | {"dim": float("nan")}},
        "huge": facts | {"config": facts["config"] | {"depth": 10**6, "dim": 10**6}},
        "format": facts | {"format": "x"}, "family": facts | {"family": ["sit"]}, "trained": facts | {"trained": 3},
        "transforms": facts | {"transforms": [3]}, "name": facts | {"name": {}}, "config": facts | {"config": "x"},
    }  # fmt: skip
    texts = {name: json.dumps(value).encode() for name, value in changes.items()}
    texts |= {"deep": b"[" * 100_000, "latin": b"\xff\xfe", "nothing": b"", "half": b'{"a'}
    for name, text in texts.items():
        shutil.copytree(folder / "model", folder / f"model {name}")
        (folder / f"model {name}/config.json").write_bytes(text)
    for name, text in (("deep", b"[" * 100_000), ("latin", b"\xff"), ("nothing", b"")):
        shutil.copytree(folder / "bundle", folder / f"bundle {name}")
        (folder / f"bundle {name}/bundle.json").write_bytes(text)
    for name in ("model.safetensors", "config.json"):
        shutil.copytree(folder / "model", folder / f"without {name}")
        (folder / f"without {name}" / name).unlink()


def options(verb: str) -> list[click.Parameter]:
    """What a verb takes, as its own command says."""
    group: Any = typer.main.get_command(main.app)
    return list(group.commands[verb].params)


def trials(call: str, things: list[str]) -> Iterator[Trial]:
    """Every argument and option of a verb with every bad value, one at a time."""
    words = CALLS[call]
    yield Trial(words[:1], "no words")
    yield Trial((*words, "--no-such-option"), "an unknown option")
    yield Trial((*words, *["more"] * 9), "more arguments")
    position = 0
    for parameter in options(words[0]):
        name = str(parameter.name)
        if parameter.param_type_name == "argument":
            position += 1
            given = position < len(words) and not words[position].startswith("-")
            for value in dict.fromkeys((*things, *VALUES)):
                made = [*words[:position], value, *words[position + given :]]
                yield Trial(tuple(made), f"{name} {value[:40]!r}")
            continue
        spelled = next(o for o in parameter.opts if o.startswith("--"))
        if getattr(parameter, "is_flag", False):
            yield Trial((*words, spelled), spelled)
            yield Trial((*words, f"{spelled}=x"), f"{spelled}=x")
            continue
        values = list(VALUES)
        if name in READ or name == "out":
            values += things
        if name == "out":
            values += NEW
        if name in ("pairs", "train_pairs"):
            values += SETTINGS
        for value in dict.fromkeys(values):
            if (name, value) not in PATIENT:
                yield Trial((*words, f"{spelled}={value}"), f"{spelled}={value[:40]!r}")
