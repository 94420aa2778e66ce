"""Verbs that are killed and interrupted over and over while they replace an older result."""

from __future__ import annotations

import hashlib
import json
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from killing import INTERRUPT, KILL, Fate, Moment, Victims

import effformer
from effformer.train import read_checkpoint, read_metrics

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="forks, and sends POSIX signals"),
]
SMALL = "--set input_size=8 --set channels=1 --set num_classes=10 --set depth=1 --set dim=16"
TRAIN = (
    "train sit-nano --set depth=1 --set dim=16 --set patch=4 --steps 24 --batch 8 --save-every 3 "
    "--threads 1 --resume --out"
)
WEIGHTS = re.compile(rb"[a-z]+\.onnx\.[0-9a-f]{8}\.data")
"""Names of the files that hold the weights of a large graph."""
WRITER = re.compile(rb"(?<=weights of a graph) \w+ \d+$")
"""What such a file says of the process that wrote it."""


class Job(NamedTuple):
    """A verb that writes another result for every value of {n}, and how often it is hit."""

    words: str
    out: str
    kills: int = 20
    interrupts: int = 14
    settings: dict[str, Any] = {}  # noqa: RUF012


JOBS = {
    "build": Job(f"build sit-nano {SMALL} --seed {{n}}", "m"),
    "compress": Job("compress {models}/{n}", "c"),
    "convert": Job("convert {models}/{n}", "w.safetensors"),
    "sample": Job("sample {models}/0 --steps 2 --seed {n}", "s.png"),
    "profile": Job("profile {models}/{n}", "p.html"),
    "export": Job(
        "export {models}/{n} --no-verify", "m.onnx", 5, 4, {"effformer.export.graph.SINGLE_FILE_LIMIT": 0}
    ),
    "export --quantize": Job("export {models}/{n} --no-verify --quantize int8", "q.onnx", 4, 3),
    "export_bundle": Job("export {models}/{n} --no-verify", "b", 4, 3),
}  # fmt: skip


@pytest.fixture(scope="module")
def victims(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victims]:
    made = Victims(tmp_path_factory.mktemp("log") / "said")
    yield made
    made.close()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two saved models."""
    folder = tmp_path_factory.mktemp("models")
    for n in (0, 1):
        small = {"input_size": 8, "channels": 1, "num_classes": 10, "depth": 1}
        model = effformer.build_model("sit-nano", **small, dim=16 * (n + 1))
        effformer.save_pretrained(model, folder / str(n))
    return folder


def files(folder: Path) -> dict[str, str]:
    """Every file by name, with a sum of what it holds, but what killed processes left."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(content(path)).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and ".effformer-" not in str(path.relative_to(folder))
    }


def content(path: Path) -> bytes:
    """What a file holds, less what is drawn anew whenever it is written."""
    held = path.read_bytes()
    if path.suffix == ".safetensors":  # the facts of its header stand in any order
        end = 8 + int.from_bytes(held[:8], "little")
        return json.dumps(json.loads(held[8:end]), sort_keys=True).encode() + held[end:]
    for name in set(WEIGHTS.findall(held)) if path.suffix == ".onnx" else ():
        held = held.replace(name, b"") + path.with_name(name.decode()).read_bytes()
        held = WRITER.sub(b"", held)
    return held


def split(folder: Path, out: str) -> tuple[dict[str, str], dict[str, str]]:
    """What lies at a place and what beside it."""
    found = files(folder)
    own = {k for k in found if k.split("/")[0] == out}
    data = {k for k in found if k.startswith(f"{out}.") and WEIGHTS.fullmatch(k.encode())}
    return {k: found[k] for k in own}, {k: v for k, v in found.items() if k not in own | data}


def moments(job: Job, whole: Fate, seed: str) -> list[Moment]:
    """Half of them at steps of the writing, half at any time."""
    draws = random.Random(seed)
    made = []
    for sign, count in ((KILL, job.kills), (INTERRUPT, job.interrupts)):
        steps = draws.sample(range(whole.steps), min(count - count // 2, whole.steps))
        made += [Moment(sign, step=step) for step in steps]
        made += [Moment(sign, seconds=draws.uniform(0, whole.seconds)) for _ in range(count // 2)]
    draws.shuffle(made)
    return made


def check_words(fate: Fate, moment: Moment) -> None:
    """The signal came too late, or the process ended as it should."""
    if moment.signal == KILL:
        assert fate.status in (0, -KILL), fate.said
    else:
        assert fate.status in (0, 130), fate.said
        assert "Traceback" not in fate.said
        if fate.steps:  # the verb had begun
            assert (fate.status == 130) == ("effformer: interrupted; " in fate.said), fate.said


@pytest.mark.parametrize("name", JOBS)
def test_the_older_or_the_newer_result_is_whole(
    name: str, victims: Victims, models: Path, tmp_path: Path
) -> None:
    job = JOBS[name]

    def call(n: int, place: Path, moment: Moment | None = None) -> Fate:
        words = [*job.words.format(n=n, models=models).split(), "-o", str(place / job.out)]
        fate = victims.call(words, place, moment, job.settings)
        assert moment or fate.status == 0, fate.said
        return fate

    fates, results = [], []
    for n in (0, 1):
        (tmp_path / str(n)).mkdir()
        fates.append(call(n, tmp_path / str(n)))
        results.append(split(tmp_path / str(n), job.out)[0])
    assert results[0] != results[1]
    place = tmp_path / "work"
    place.mkdir()
    (place / "notes.txt").write_text("mine")
    (place / f"{job.out}.data").write_text("mine")
    (place / ".effformer-notes").mkdir()
    effformer.save_pretrained(effformer.build_model("vit-nano"), place / "model")
    beside, now = split(place, job.out)[1], 0
    fate = call(now, place)
    for moment in moments(job, fate, name):
        check_words(call(1 - now, place, moment), moment)
        at, others = split(place, job.out)
        assert others == beside
        assert at in results
        now = results.index(at)
    call(1 - now, place)
    assert split(place, job.out) == (results[1 - now], beside)
    new = {k.split("/")[0] for k in files(tmp_path / "0")}
    old = {k.split("/")[0] for k in beside} | {".effformer-notes"}
    assert len([p for p in place.iterdir() if p.name not in old]) == len(new)
    assert victims.temporary() == []


@pytest.mark.parametrize("sign", [KILL, INTERRUPT])
def test_trainings_end_with_the_same_weights(sign: int, victims: Victims, tmp_path: Path) -> None:
    words = TRAIN.split()

    def call(run: Path, moment: Moment | None = None) -> Fate:
        return victims.call([*words, str(run)], run, moment)

    whole, run, draws = tmp_path / "whole", tmp_path / "run", random.Random(sign)
    fate, count, last = call(whole), 0, 0
    assert fate.status == 0, fate.said
    while not (run / "model").exists():
        if count % 3 < 2:
            hit = Moment(sign, step=draws.randrange(fate.steps // 6))
        else:
            hit = Moment(sign, seconds=draws.uniform(0, fate.seconds))
        ended = call(run, hit)
        check_words(ended, hit)
        found = list(run.glob("checkpoints/step-*"))
        if "interrupted; " in ended.said:
            assert ("the last checkpoint is intact" in ended.said) == bool(found)
        reached = read_checkpoint(run)[1]["step"] if found else 0
        assert reached >= last
        last = reached
        count += 1
        assert count < 200
    assert count > 2
    assert call(run).status == 0
    assert files(run / "model") == files(whole / "model")
    histories = [[(r["step"], r["loss"]) for r in read_metrics(p)] for p in (run, whole)]
    assert histories[0][-1] == histories[1][-1]
    assert sorted(p.name for p in run.iterdir()) == sorted(p.name for p in whole.iterdir())
    assert len(list((run / "checkpoints").iterdir())) == 2
