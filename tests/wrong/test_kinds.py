"""Hostile bundles of texts and of streams, and hostile arguments of their runners."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from effformer.export import streams, texts

from .test_runner import WORDS, Place, Trial, faults, of_fields, of_files, pytestmark, read
from .verbs import INNER, SAVED, VALUES

__all__ = ["pytestmark"]

assert INNER
RUNNERS: dict[str, tuple[Any, tuple[str, ...], dict[str, tuple[str, ...]]]] = {
    "texts": (
        texts.main, ("--text", "the cat", "--threads", "1"),
        {"--text": ("a" * 2000, "東京 [SEP]", "\0"), "--file": (), "--out": (), "--threads": ()},
    ),
    "streams": (
        streams.main, ("--tokens", "1,2,3", "--threads", "1"),
        {"--tokens": ("24", "1,", "1-3", "٣", "9" * 40, "0," * 50 + "0"), "--more": ("100000", "38", "-1"), "--out": (), "--input": ()},
    ),
}  # fmt: skip
UNUSED = {
    "effformer", "model", "quantization", "macs", "pooling", "normalise", "type", "range", "session", "__pycache__",
    # what is free to be any text or token
    "texts", "whole",
}  # fmt: skip


def trials(place: Place, kind: str) -> Iterator[Trial]:
    _, words, options = RUNNERS[kind]
    facts = read(place.original)
    free = UNUSED | ({"inputs", "outputs"} if kind == "texts" else {"shape"})
    for trial in (*of_fields(facts, free), *of_files(facts, place.folder)):
        if re.match(r"(in|out)puts\.([12]|0\.name)", trial.what) and "inputs.0" not in trial.what:
            trial = trial._replace(wrong=False)  # told to readers, not to the runner
        if trial.words == WORDS:
            own = trial.what.startswith(
                ("opened.py", "run.py", "choice.py", "facts.py", "wordpiece.py")
            )
            # the record is read by the test of it alone
            told = "self_test" in trial.what or (own and "recorded" in trial.what)
            yield trial._replace(words=words, wrong=trial.wrong and not told)
        else:
            code = trial.what.split(":")[0].endswith((".py", ".txt"))
            yield trial._replace(wrong=trial.wrong and not (code and "recorded" in trial.what))
    for option, values in options.items():
        for value in dict.fromkeys((*VALUES, *values, *(place.things if not values else ()))):
            yield Trial(
                f"{option} {value[:40]!r}", lambda folder: None, (*words, f"{option}={value}")
            )


@pytest.fixture(scope="module", params=RUNNERS)
def there(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Place, str]:
    kind = request.param

    def make(folder: Path) -> None:
        shutil.copytree(SAVED / kind, folder)

    return Place(tmp_path_factory.mktemp(kind), make, RUNNERS[kind][0]), kind


def test_some_hostile_bundles(
    there: tuple[Place, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    place, kind = there
    monkeypatch.chdir(place.folder)
    same = Trial("nothing", lambda folder: None, RUNNERS[kind][1])
    assert place.fault(same, capsys) is None
    assert place.fault(same._replace(words=("--self-test",), wrong=True), capsys) == "answered"
    assert faults(place, capsys, monkeypatch, 30, [*trials(place, kind)]) == []


@pytest.mark.slow
def test_every_hostile_bundle(
    there: tuple[Place, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    place, kind = there
    made = [*trials(place, kind)]
    assert len(made) > 1500
    assert faults(place, capsys, monkeypatch, None, made) == []
