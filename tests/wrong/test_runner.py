"""Hostile bundles and arguments: the edge runner answers, or refuses in one sentence before it takes memory."""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import re
import resource
import shutil
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from effformer.export import choice, run
from effformer.export.run import Bundle, main

from .corpus import Slow, limited
from .verbs import INNER, SAVED, VALUES, lay_out

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="devices, pipes and limits of Linux"
)
SECONDS = 10
ROOM = 2**30
"""Bytes that a refusal may take."""
SAMPLE = 60
WORDS = ("--labels", "0", "--steps", "1", "--threads", "1")


def nested(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


HOSTILE: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2, 7, 10**6, 2**31, 2**63, 10**30, 10**400, 0.5, -0.0, 1e300, math.nan, math.inf,
    -math.inf, "", " ", ".", "..", "../x", "/etc/passwd", "/dev/zero", "run.py", "velocity.onnx", "self_test.npy",
    "a\0b", "a\nb", "caf\udce9", "x" * 10**6, "1", "nan", [], {}, [0], [math.nan] * 3, [1, 8, 8], [1, 8, 8, 8],
    [2**16] * 3, [-1.0, 10**400], [0] * 10**5, ["x"], [None], {"file": "../x"}, {"": {}}, {"../x": {"bytes": 1, "sha256": ""}},
    nested(50), nested(900),
)  # fmt: skip
RUNNER = ("run.py", "opened.py", "pictures.py", "facts.py", "choice.py")
UNUSED = {"effformer", "model", "convention", "network_convention", "quantization"}
OPTIONS = (
    "--labels",
    "--out",
    "--steps",
    "--guidance",
    "--sampler",
    "--seed",
    "--threads",
    "--form",
    "--which",
    "--nothing",
)


class Trial(NamedTuple):
    """A change of a bundle, the words that follow, and whether no answer can be right."""

    what: str
    change: Callable[[Path], None]
    words: tuple[str, ...] = WORDS
    wrong: bool = False


def make(folder: Path) -> None:
    """A bundle that records a sample, too."""
    shutil.copytree(SAVED / "bundle", folder)
    samples = Bundle(folder).sample([1, 2], steps=1, seed=3)
    np.save(folder / "sample.npy", samples)
    facts = read(folder)
    record = {"file": "sample.npy", "seed": 3, "labels": [1, 2], "steps": 1, "tolerance": 1e-2}
    facts["self_test"]["sample"] = record
    facts["session"] = {"threads": 1, "spinning": False, "denormals_to_zero": True, "arena": True}
    shutil.copyfile(folder / "velocity.onnx", folder / "velocity.int8.onnx")
    for name in RUNNER[1:]:
        shutil.copyfile(Path(run.__file__).with_name(name), folder / name)
    facts["forms"] = {
        form: {"velocity": file, "narrow": False, "tolerance": 1e-2, "sample_tolerance": 1e-2}
        for form, file in (("float32", "velocity.onnx"), ("int8", "velocity.int8.onnx"))
    }
    write(folder, facts, "sample.npy", "velocity.int8.onnx", *RUNNER[1:])


def read(folder: Path) -> Any:
    return json.loads((folder / "bundle.json").read_text())


def write(folder: Path, facts: Any, *files: str) -> None:
    """A description, and in it the records of files that were changed."""
    for name in files:
        content = (folder / name).read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        facts["files"][name] = {"bytes": len(content), "sha256": digest}
    (folder / "bundle.json").write_text(json.dumps(facts))


def fields(facts: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    for name, value in facts.items() if isinstance(facts, dict) else enumerate(facts):
        yield (*above, name)
        if isinstance(value, (dict, list)):
            yield from fields(value, (*above, name))


def edited(path: tuple[Any, ...], value: Any, *, leave: bool = False) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        facts = read(folder)
        inner = facts
        for name in path[:-1]:
            inner = inner[name]
        if leave:
            del inner[path[-1]]
        else:
            inner[path[-1]] = value
        write(folder, facts)

    return change


def of_fields(facts: Any, unused: Collection[str] = UNUSED) -> Iterator[Trial]:
    for path in fields(facts):
        at = ".".join(map(str, path))
        used = not {*path} & {*unused}
        required = (
            used
            and not isinstance(path[-1], int)
            and path[-1]
            not in ("decoder", "sample", "guidance_channels", "session", "forms", *RUNNER)
        )
        yield Trial(f"{at} left out", edited(path, None, leave=True), wrong=required)
        for value in HOSTILE:
            shown = repr(value)[:40] if not isinstance(value, int) or value < 10**40 else "10**400"
            other = isinstance(value, (str, list, dict, bool)) and type(value) is not type(
                inside(facts, path)
            )
            change = edited(path, value)
            yield Trial(f"{at} = {shown}", change, wrong=used and other)
            yield Trial(f"{at} = {shown}, self-test", change, ("--self-test",), used and other)


def inside(facts: Any, path: tuple[Any, ...]) -> Any:
    for name in path:
        facts = facts[name]
    return facts


def of_files(facts: Any, other: Path) -> Iterator[Trial]:
    contents = {
        "empty": b"", "text": b"hello", "bytes": bytes(range(256)) * 9, "deep": b"[" * 100_000, "not UTF-8": b'{"a": "\xff"}',
        "a mark": b"\xef\xbb\xbf{}", "zip": b"PK\x03\x04aaaa", "header": b"\x93NUMPY\x01\x00\xff\xff{", "digits": b"9" * 5000,
        "nan": b"NaN", "a list": b"[1]", "weights": (other / "model/model.safetensors").read_bytes(),
        "another graph": b"\x08\x07" + b"\x3a\x00" * 9, "a picture": b"\x89PNG\r\n\x1a\n",
    }  # fmt: skip
    for name in ("bundle.json", *facts["files"]):
        wrong = name not in (*RUNNER, "velocity.onnx", "velocity.int8.onnx")  # the other form runs
        words = (WORDS,) if name in ("bundle.json", "velocity.onnx") else (("--self-test",),)
        for given in words:
            for kind, content in contents.items():
                yield Trial(f"{name}: {kind}", filled(name, content, fit=False), given, True)
                if name != "bundle.json":
                    yield Trial(
                        f"{name}: {kind}, recorded", filled(name, content, fit=True), given, wrong
                    )
            for part in range(8):
                yield Trial(f"{name}: {part}/8", cut(name, part / 8, fit=False), given, True)
                if name != "bundle.json":
                    yield Trial(
                        f"{name}: {part}/8, recorded", cut(name, part / 8, fit=True), given, wrong
                    )
            for kind, put in PLACES.items():
                yield Trial(f"{name}: {kind}", placed(name, put), given, True)
        for kind in ("self_test.npy", "run.py", "pictures.py", "velocity.onnx"):
            if kind != name != "bundle.json" and kind in facts["files"]:
                yield Trial(f"{name}: {kind}", swapped(name, kind), words[0], False)


PLACES: dict[str, Callable[[Path], None]] = {
    "missing": lambda path: None,
    "a folder": lambda path: path.mkdir(),
    "a pipe": lambda path: os.mkfifo(path),
    "a link to nowhere": lambda path: path.symlink_to("nowhere"),
    "a loop": lambda path: path.symlink_to(path.name),
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a link out": lambda path: path.symlink_to("/etc/passwd"),
}


def placed(name: str, put: Callable[[Path], None]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        put(folder / name)

    return change


def filled(name: str, content: bytes, *, fit: bool) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_bytes(content)
        if fit:
            write(folder, read(folder), name)

    return change


def cut(name: str, part: float, *, fit: bool) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = (folder / name).read_bytes()
        filled(name, content[: int(part * len(content))], fit=fit)(folder)

    return change


def swapped(name: str, other: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        filled(name, (folder / other).read_bytes(), fit=True)(folder)

    return change


def of_words(things: list[str]) -> Iterator[Trial]:
    def same(folder: Path) -> None:
        pass

    yield Trial("no words", same, ())
    for option in OPTIONS:
        for value in dict.fromkeys((*VALUES, *(things if option == "--out" else ()))):
            yield Trial(f"{option} {value[:40]!r}", same, (*WORDS, f"{option}={value}"))
        yield Trial(f"{option} of nothing", same, (*WORDS, option))
    for labels in (
        "0-9999",
        "0-99999999999",
        ",".join(["0-9"] * 1001),
        "-1",
        "10",
        "0,,1",
        "٣",
        "0" * 10**5,
    ):
        yield Trial(f"--labels {labels[:40]}", same, (f"--labels={labels}", "--steps=1"))
    for more in ("1e308", "1000000", "9" * 20, "0x10", "1_0", "+1", "1j"):
        for option in ("--steps", "--guidance", "--seed", "--threads"):
            yield Trial(
                f"{option} {more}",
                same,
                (*WORDS, f"{option}={more}"),
                option != "--seed" and more in ("1e308", "1000000"),
            )


class Place:
    """A bundle among files of every kind, made anew for every trial that changes it."""

    def __init__(
        self, folder: Path, make: Callable[[Path], Any] = make, main: Callable[[list[str]], int] = main
    ) -> None:  # fmt: skip
        self.folder, self.main = folder / "work", main
        self.folder.mkdir()
        self.things = lay_out(self.folder)
        self.original, self.bundle = folder / "bundle", self.folder / "hostile"
        make(self.original)

    def fault(self, trial: Trial, capsys: pytest.CaptureFixture[str]) -> str | None:
        """What is wrong with the answer, None if nothing is."""
        shutil.rmtree(self.bundle, ignore_errors=True)
        shutil.copytree(self.original, self.bundle)
        trial.change(self.bundle)
        (self.bundle / "choice.json").unlink(missing_ok=True)
        before = {*self.folder.rglob("*")}
        capsys.readouterr()
        try:
            with limited(SECONDS), little_memory():
                code = self.main([str(self.bundle), *trial.words])
        except Slow:
            return f"did not end in {SECONDS} s"
        except SystemExit as end:  # the parser of arguments refuses
            code = 2 if capsys.readouterr().err.startswith("usage: ") else end.code
            return None if code == 2 else f"ended with {code}"
        except BaseException as error:
            return f"{type(error).__name__}: {str(error)[:300]!r}"
        finally:
            made = {*self.folder.rglob("*")} - before - {self.bundle / "choice.json"}
            for path in made:
                path.unlink()
        said = capsys.readouterr().err
        if code == 0:
            return "answered" if trial.wrong else None
        if made:
            return f"refused, and yet wrote {made}"
        if code != 2 or not said.startswith("error: ") or said.count("\n") != 1:
            return f"code {code}: {said[:300]!r}"
        return (
            f"not in words of ours: {said[:400]!r}"
            if INNER.search(said) or len(said) > 1500
            else None
        )


@contextmanager
def little_memory() -> Iterator[None]:
    held = int(re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024  # type: ignore[index]
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (held + ROOM, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.fixture(autouse=True)
def _once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forms are timed by one call each."""
    monkeypatch.setattr(choice, "SECONDS", 0.0)
    monkeypatch.setattr(choice, "LEAST", 1)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("runner"))


def trials(place: Place) -> list[Trial]:
    facts = read(place.original)
    return [*of_fields(facts), *of_files(facts, place.folder), *of_words(place.things)]


def faults(
    place: Place,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    some: int | None = None,
    made: list[Trial] | None = None,
) -> list[str]:
    monkeypatch.chdir(place.folder)
    made = trials(place) if made is None else made
    chosen = made if some is None else random.Random(0).sample(made, some)
    found = ((trial.what, place.fault(trial, capsys)) for trial in chosen)
    return [f"{what}: {said}" for what, said in found if said]


def test_some_hostile_bundles(
    place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place.folder)
    same = Trial("nothing", lambda folder: None)
    assert place.fault(same, capsys) is None
    assert place.fault(same._replace(wrong=True), capsys) == "answered"
    assert place.fault(same._replace(words=("--self-test",), wrong=True), capsys) == "answered"
    assert faults(place, capsys, monkeypatch, SAMPLE) == []


@pytest.mark.slow
def test_every_hostile_bundle(
    place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(trials(place)) > 4000
    assert faults(place, capsys, monkeypatch) == []
