from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from effformer.checks import FormatError
from effformer.train import load_checkpoint, read_checkpoint, read_metrics
from effformer.train.checkpoint import RunFolder

IDENTITY = {"config": {"steps": 10, "lr": 0.1}, "data": {"sha256": "abc"}}
STATE = {"step": 5, "seconds": 1.0, "loss": 2.0}


def run(path: Path, *, resume: bool = False, identity: object = IDENTITY) -> RunFolder:
    return RunFolder(path, identity, resume=resume)  # type: ignore[arg-type]


def test_checkpoint_round_trip(tmp_path: Path) -> None:
    shared = torch.randn(3, 4)
    tensors = {
        "model.a": shared,
        "model.b": shared,
        "model.c": shared.t(),
        "ema.n": torch.tensor(7),
    }
    folder = run(tmp_path)
    path = folder.save(5, tensors, STATE, keep=1)
    for source in (path, tmp_path):
        found, state = read_checkpoint(source)
        assert state == STATE
        torch.testing.assert_close(found, tensors, rtol=0, atol=0)


def test_only_the_last_stay(tmp_path: Path) -> None:
    folder = run(tmp_path)
    for step in (5, 10, 100, 20):
        folder.save(step, {"model.a": torch.zeros(1)}, STATE, keep=2)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        "step-00000020.safetensors", "step-00000100.safetensors",
    ]  # fmt: skip
    newest = folder.newest()
    assert newest is not None
    assert newest.name == "step-00000100.safetensors"


def test_a_failed_save_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run(tmp_path)
    folder.save(5, {"model.a": torch.zeros(1)}, STATE, keep=1)

    def full(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("effformer.train.checkpoint.save_file", full)
    with pytest.raises(OSError, match="no space"):
        folder.save(10, {"model.a": torch.ones(1)}, STATE, keep=1)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000005.safetensors"]
    assert read_checkpoint(tmp_path)[0]["model.a"] == 0


def test_leftovers_of_a_killed_save_are_removed(tmp_path: Path) -> None:
    run(tmp_path)
    (tmp_path / "checkpoints" / "step-00000005.part").write_bytes(b"half")
    assert run(tmp_path, resume=True).newest() is None
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_killed_before_the_description_was_written(tmp_path: Path) -> None:
    (tmp_path / "run.json.part").write_text("{")
    run(tmp_path)
    assert json.loads((tmp_path / "run.json").read_text())["format"] == 1


def begun(path: Path) -> None:
    """A run that came to a checkpoint."""
    run(path).save(5, {"model.a": torch.zeros(1)}, STATE, keep=1)


def test_present_run_needs_resume(tmp_path: Path) -> None:
    begun(tmp_path)
    with pytest.raises(ValueError, match="already holds a run; --resume"):
        run(tmp_path)
    run(tmp_path, resume=True)


def test_other_run_is_refused_and_says_what_differs(tmp_path: Path) -> None:
    begun(tmp_path)
    other = {"config": {"steps": 10, "lr": 0.2}, "data": {"sha256": "abc", "name": "x"}}
    message = r"config\.lr was 0\.1 and is 0\.2; data\.name was 'absent' and is 'x'$"
    with pytest.raises(ValueError, match=message):
        run(tmp_path, resume=True, identity=other)


def test_foreign_folder_is_refused_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    for resume in (False, True):
        with pytest.raises(FormatError, match=r"holds other things \(thesis\.txt\)"):
            run(tmp_path, resume=resume)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(FormatError, match="is a file"):
        run(tmp_path / "thesis.txt")


@pytest.mark.parametrize("place", ["/proc/effformer-run", "blocked/run"])
def test_unwritable_folder(tmp_path: Path, place: str) -> None:
    (tmp_path / "blocked").write_text("a file where a folder is wanted")
    with pytest.raises(ValueError, match=r"cannot write a run to .*choose another folder"):
        run(tmp_path / place)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "x"}'])
def test_broken_description(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(FormatError, match="not the description of a run"):
        run(tmp_path, resume=True)


def test_run_of_a_newer_version(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"format": 99}')
    with pytest.raises(FormatError, match="format 99; this version reads up to 1"):
        run(tmp_path, resume=True)


@pytest.mark.parametrize(
    "damage",
    [lambda raw: raw[:100], lambda raw: raw[:-3], lambda raw: b"", lambda raw: b"\x80\x04pickle"],
)
def test_broken_checkpoint(tmp_path: Path, damage) -> None:  # type: ignore[no-untyped-def]
    path = run(tmp_path).save(5, {"model.a": torch.zeros(50)}, STATE, keep=1)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(FormatError, match="not a readable checkpoint"):
        read_checkpoint(path)


def test_foreign_safetensors(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(FormatError, match="not a readable checkpoint"):
        read_checkpoint(tmp_path / "other.safetensors")


def test_missing_checkpoint(tmp_path: Path) -> None:
    run(tmp_path)
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        read_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_checkpoint(tmp_path / "nothing.safetensors")


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    path = run(tmp_path).save(
        5, {"model.weight": torch.zeros(2, 2), "model.bias": torch.zeros(2)}, STATE, keep=1
    )
    assert load_checkpoint(path, nn.Linear(2, 2), weights="raw") == 5
    with pytest.raises(ValueError, match="does not fit the model"):
        load_checkpoint(path, nn.Linear(3, 2), weights="raw")
    with pytest.raises(ValueError, match="weights: unknown value 'emma'"):
        load_checkpoint(path, nn.Linear(2, 2), weights="emma")  # type: ignore[arg-type]


def test_metrics_survive_a_half_written_line(tmp_path: Path) -> None:
    folder = run(tmp_path)
    for step in (5, 10, 15):
        folder.log({"step": step, "loss": 1 / step})
    with folder.metrics.open("a") as file:
        file.write('{"step": 20, "lo')
    assert [r["step"] for r in read_metrics(tmp_path)] == [5, 10, 15]
    folder.rewind(10)
    folder.log({"step": 15, "loss": 0.5})
    assert [r["loss"] for r in read_metrics(folder.metrics)] == [0.2, 0.1, 0.5]


def test_metrics_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(FormatError, match=r"no metrics of a run \(not UTF-8 text\)"):
        read_metrics(path)
    path.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(FormatError, match="line 2"):
        read_metrics(path)


# -- one process at a time, and damage ------------------------------------------------------------


def test_one_process_at_a_time(tmp_path: Path) -> None:
    first = run(tmp_path)
    with pytest.raises(ValueError, match=rf"is in use by process {os.getpid()} on .*, since 2"):
        run(tmp_path, resume=True)
    first.close()
    run(tmp_path, resume=True).close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoints", "run.json"]


OWNER = """
import sys, time
from pathlib import Path
from effformer.train.checkpoint import RunFolder
held = RunFolder(Path(sys.argv[1]), {"config": {"steps": 10, "lr": 0.1}, "data": {"sha256": "abc"}}, resume=True)
print("held", flush=True)
time.sleep(60)
"""


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path: Path) -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER, str(tmp_path)], stdout=subprocess.PIPE)
    try:
        assert owner.stdout is not None
        assert owner.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match=rf"is in use by process {owner.pid} on"):
            run(tmp_path, resume=True)
    finally:
        owner.kill()
        owner.communicate()
    assert (tmp_path / "run.lock").exists()
    run(tmp_path, resume=True)


def test_where_the_system_has_no_locks_the_owner_must_be_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(fcntl, "flock", none)
    first = run(tmp_path)
    with pytest.raises(ValueError, match="is in use by"):
        run(tmp_path, resume=True)
    monkeypatch.setattr("effformer.train.lock.alive", lambda pid: False)
    run(tmp_path, resume=True)
    first.close()


def test_a_run_without_a_checkpoint_gives_way_to_the_corrected_one(tmp_path: Path) -> None:
    failed = run(tmp_path)
    failed.log({"step": 1, "loss": 2.0})
    failed.close()
    other = {"config": {"steps": 20, "lr": 0.2}}
    again = run(tmp_path, identity=other)
    assert again.restore() is None
    assert read_metrics(tmp_path) == []
    again.close()
    (tmp_path / "model").mkdir()  # its checkpoints are gone, what it led to is not
    with pytest.raises(ValueError, match="already holds a run"):
        run(tmp_path)


def flip(path: Path, where: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[where] ^= 1
    path.write_bytes(raw)


def test_a_flipped_bit_is_found_and_the_older_checkpoint_used(tmp_path: Path) -> None:
    folder = run(tmp_path)
    for step in (5, 10):
        state = {**STATE, "step": step}
        path = folder.save(step, {"model.a": torch.full((9,), float(step))}, state, keep=2)
        folder.log({"step": step, "loss": 1.0})
    flip(path, -1)
    with pytest.raises(FormatError, match=r"step-00000010.* is damaged \(its checksum differs\)"):
        read_checkpoint(path)
    with pytest.warns(UserWarning, match=r"step-00000010.*going on from step-00000005"):
        assert read_checkpoint(tmp_path)[1]["step"] == 5
    with pytest.warns(UserWarning, match="is damaged"):
        found = folder.restore()
    assert found is not None
    assert found[1][1]["step"] == 5
    assert [r["step"] for r in read_metrics(tmp_path)] == [5]
    folder.save(7, {"model.a": torch.zeros(9)}, {**STATE, "step": 7}, keep=1)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        "step-00000007.safetensors", "step-00000010.damaged",
    ]  # fmt: skip
    flip(tmp_path / "checkpoints" / "step-00000007.safetensors", -1)
    with pytest.raises(FormatError, match="is damaged"):
        folder.restore()


def test_checkpoints_without_a_checksum_are_read(tmp_path: Path) -> None:
    places = tmp_path / "checkpoints"
    places.mkdir()
    save_file(
        {"model.a": torch.ones(2)},
        places / "step-00000005.safetensors",
        metadata={"effformer": json.dumps(STATE)},
    )
    assert read_checkpoint(tmp_path)[1] == STATE


def test_nothing_is_loaded_unless_everything_fits(tmp_path: Path) -> None:
    net = nn.Linear(2, 2)
    tensors = {"model.weight": torch.ones(2, 2), "model.bias": torch.ones(2)}
    averaged = {"ema.weight": torch.ones(3, 2), "ema.bias": torch.ones(2)}
    path = run(tmp_path).save(5, tensors | averaged, STATE, keep=1)
    message = r"averaged weights of .*: weight is \(3, 2\), the model has \(2, 2\); build"
    with pytest.raises(ValueError, match=message):
        load_checkpoint(path, net)
    assert not torch.equal(net.weight, torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"missing: 0\.bias, 0\.weight; unexpected: bias, weight"):
        load_checkpoint(path, nn.Sequential(net), weights="raw")


def test_kinds_and_values_of_a_checkpoint(tmp_path: Path) -> None:
    net, folder = nn.Linear(2, 2), run(tmp_path)
    bias = torch.ones(2)
    path = folder.save(
        5, {"model.weight": torch.ones(2, 2).int(), "model.bias": bias}, STATE, keep=1
    )
    with pytest.raises(ValueError, match=r"wrong: weight is int32, the model has float32; build"):
        load_checkpoint(path, net, weights="raw")
    bad = {"model.weight": torch.ones(2, 2), "model.bias": bias / 0}
    path = folder.save(5, bad, STATE, keep=1)
    with pytest.warns(UserWarning, match=r"NaN or infinite values in bias, and so"):
        load_checkpoint(path, net, weights="raw")
