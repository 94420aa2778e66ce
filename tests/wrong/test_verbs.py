"""Wrong words on the command line are answered rightly, or refused in one sentence that leaves all as it was."""

from __future__ import annotations

import os
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from effformer.cli import main

from .corpus import Slow, limited
from .verbs import CALLS, INNER, Trial, lay_out, options, trials

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(sys.platform != "linux", reason="devices, pipes and signals of Linux"),
]
SECONDS = 30
SAMPLE = 3


class Place:
    """A folder with files of every kind, which is laid out again once something changed in it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.original = folder / "work", folder / "original"
        self.original.mkdir()
        self.things = lay_out(self.original)
        self.restore()

    def restore(self) -> None:
        self.folder.mkdir(exist_ok=True)  # others stand in it
        for path in self.folder.iterdir():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        for path in self.original.iterdir():
            copy(path, self.folder / path.name)
        self.before = self.content()

    def content(self) -> dict[str, Any]:
        """Every name with what it is, where it lies and when it was written."""
        found: dict[str, Any] = {}
        for path in self.folder.rglob("*"):
            facts = path.lstat()
            inside = () if path.is_dir() else (facts.st_size, facts.st_mtime_ns)
            found[str(path.relative_to(self.folder))] = (facts.st_mode, facts.st_ino, *inside)
        return found

    def changed(self) -> list[str]:
        """Names that came, went or hold something else."""
        now = self.content()
        return sorted(k for k in {*now, *self.before} if now.get(k) != self.before.get(k))


def copy(path: Path, place: Path) -> None:
    if path.is_fifo():
        os.mkfifo(place)
    elif path.is_dir() and not path.is_symlink():
        shutil.copytree(path, place, symlinks=True)
    else:
        shutil.copy2(path, place, follow_symlinks=False)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("wrong"))


@pytest.fixture(autouse=True)
def _apart(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the folder, without trainings of the demo and of judges, and the processes of the benchmark."""
    monkeypatch.chdir(place.folder)
    monkeypatch.setattr("effformer.cli.demo_steps.run_demo", ended)
    monkeypatch.setattr("effformer.profile.benchmark", ended)
    monkeypatch.setattr("effformer.train.train_classifier", ended)


def ended(*_: object, **__: object) -> None:
    raise typer.Exit


def fault(trial: Trial, place: Place) -> str | None:
    """What is wrong with the answer, None if nothing is."""
    try:
        with limited(SECONDS):
            result = CliRunner().invoke(main.app, trial.words)
    except Slow:
        place.restore()
        return f"did not end in {SECONDS} s"
    changed = place.changed()
    if changed:
        place.restore()
    said = result.stderr.removeprefix("\n")
    if result.exit_code == 0:
        return None
    if (
        result.exit_code == 1
        and trial.words[0] == "verify"
        and isinstance(result.exception, SystemExit)
    ):
        return None
    if result.exit_code != 2:
        return f"code {result.exit_code}: {result.exception!r:.300}"
    if changed:
        return f"refused, and yet changed {changed[:4]}: {said[-200:]}"
    if "╭─ Error" in said:  # click refuses a word before a verb sees it
        return None
    ours = [line for line in said.splitlines() if line.startswith("effformer: ")]
    if not ours or said.splitlines()[-1] != ours[-1]:
        return f"no sentence: {said[-300:]!r}"
    if result.stdout or INNER.search(said) or len(said) > 1500:
        return f"not in words of ours: {result.stdout[:100]} {said[-400:]!r}"
    return None


def faults(call: str, place: Place, some: int | None = None) -> list[str]:
    made = list(trials(call, place.things))
    chosen = made if some is None else random.Random(call).sample(made, some)
    found = []
    for trial in chosen:
        if said := fault(trial, place):
            found.append(f"{call}, {trial.what}: {said}")
    return found


def test_every_verb_is_tried() -> None:
    group: Any = typer.main.get_command(main.app)
    assert {words[0] for words in CALLS.values()} == {*group.commands}
    assert sum(len(options(verb)) for verb in group.commands) > 100


@pytest.mark.parametrize("call", CALLS)
def test_some_wrong_words(call: str, place: Place) -> None:
    assert faults(call, place, SAMPLE) == []


@pytest.mark.slow
@pytest.mark.parametrize("call", CALLS)
def test_every_wrong_word(call: str, place: Place) -> None:
    right = CliRunner().invoke(main.app, CALLS[call])
    assert right.exit_code == 0, right.stderr
    place.restore()
    assert faults(call, place) == []
