"""A run that is killed (SIGKILL) and resumed ends with the very bits of an uninterrupted one."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import effformer
from effformer.checks import FormatError
from effformer.files import host
from effformer.train import (
    Classification,
    Generation,
    TrainConfig,
    load_data,
    read_checkpoint,
    read_metrics,
    train,
)

CONFIG = TrainConfig(steps=40, batch=6, accumulate=2, lr=1e-3, warmup=3, weight_decay=0.01, seed=7)
OBJECTIVE = Generation(loss={"name": "flow-matching", "time": "logit-normal"}, label_drop=0.2)

# Runs in a process of its own and kills itself: in a forward pass, or while it writes a checkpoint.
VICTIM = """
import os, signal, sys
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
import test_resume as case
from effformer.train import checkpoint

out, stage, at = sys.argv[2], sys.argv[3], int(sys.argv[4])

def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

objective, calls = case.OBJECTIVE, 0
def counted(*args):
    global calls
    calls += 1
    if stage == "forward" and calls == at:
        die()
    return case.OBJECTIVE(*args)

save_file, replace = checkpoint.save_file, os.replace
def torn(tensors, path, metadata):
    save_file(tensors, path, metadata)
    if f"{at:08d}" in path.name:
        os.truncate(path, path.stat().st_size // 2)
        die()
if stage == "writing":
    checkpoint.save_file = torn
if stage == "renaming":
    checkpoint.os.replace = lambda a, b: die() if f"{at:08d}" in str(b) else replace(a, b)

case.start(out, counted)
"""


def model() -> nn.Module:
    torch.manual_seed(0)
    return effformer.build_model(
        "sit-nano",
        input_size=8,
        channels=1,
        num_classes=10,
        learn_sigma=False,
        dropout=0.1,
        depth=1,
    )


class Wrapped:
    """The objective with a hook; it describes itself as the objective does."""

    def __init__(self, call) -> None:  # type: ignore[no-untyped-def]
        self.call, self.config = call, OBJECTIVE

    def __call__(self, *args):  # type: ignore[no-untyped-def]
        return self.call(*args)


def start(out: str | Path, call=OBJECTIVE) -> dict[str, Tensor]:  # type: ignore[no-untyped-def]
    network = model()
    data = load_data("digits").subset(torch.arange(50))
    train(network, data, Wrapped(call), CONFIG, out=out, resume=True, save_every=10, log_every=4)
    return network.state_dict()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Tensor], Path]:
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("whole")
    return start(out), out


def kill(out: Path, stage: str, at: int) -> None:
    here = str(Path(__file__).parent)
    command = [sys.executable, "-c", VICTIM, here, str(out), stage, str(at)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr


def test_killed_again_and_again(
    tmp_path: Path, uninterrupted: tuple[dict[str, Tensor], Path]
) -> None:
    kill(tmp_path, "writing", 20)  # half of the second checkpoint is on the disk
    assert read_checkpoint(tmp_path)[1]["step"] == 10
    kill(tmp_path, "renaming", 20)  # it is complete, but has not its name yet
    assert read_checkpoint(tmp_path)[1]["step"] == 10
    kill(tmp_path, "forward", 30)  # step 25, between checkpoints, in the middle of an accumulation
    assert read_checkpoint(tmp_path)[1]["step"] == 20
    assert read_metrics(tmp_path)[-1]["step"] == 24
    ended = start(tmp_path)
    expected, whole = uninterrupted
    torch.testing.assert_close(ended, expected, rtol=0, atol=0)
    ours, theirs = read_checkpoint(tmp_path)[0], read_checkpoint(whole)[0]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    keys = ("step", "loss", "lr", "grad_norm")
    histories = [[[r[k] for k in keys] for r in read_metrics(p)] for p in (tmp_path, whole)]
    assert histories[0] == histories[1]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        "step-00000030.safetensors", "step-00000040.safetensors",
    ]  # fmt: skip


def test_what_a_killed_process_left_beside_the_checkpoints_is_removed(
    uninterrupted: tuple[dict[str, Tensor], Path], tmp_path: Path
) -> None:
    """A finished run writes no checkpoint any more, so nothing else would remove it."""
    run = tmp_path / "run"
    shutil.copytree(uninterrupted[1], run)
    before = sorted(run.rglob("*"))
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (run / "checkpoints" / f".effformer-{host()}-{dead.pid}-01234567").mkdir()
    start(run)
    assert sorted(run.rglob("*")) == before


def test_stopped_before_the_first_checkpoint(
    tmp_path: Path, uninterrupted: tuple[dict[str, Tensor], Path]
) -> None:
    calls = 0

    def interrupted(*args):  # type: ignore[no-untyped-def]
        nonlocal calls
        calls += 1
        if calls == 11:
            raise KeyboardInterrupt
        return OBJECTIVE(*args)

    with pytest.raises(KeyboardInterrupt):
        start(tmp_path, interrupted)
    assert read_metrics(tmp_path)[-1]["step"] == 4
    torch.testing.assert_close(start(tmp_path), uninterrupted[0], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, s: ({k: v for k, v in t.items() if "optimizer" not in k}, s), "has 0 of"),
        (lambda t, s: (dict(list(t.items())[:-1]), s), "of the optimizer, without which"),
        (lambda t, s: (t, s | {"step": 39}), "written at step 39, its name says 40"),
        (lambda t, s: (t, s | {"step": -1}), "step -1 is no number of steps"),
        (lambda t, s: (t, s | {"step": 40.0}), "step 40.0 is no number of steps"),
        (lambda t, s: (t, s | {"seconds": None}), "seconds None are no time"),
    ],
)
def test_a_checkpoint_that_cannot_be_continued_is_refused(
    change: Callable[..., Any],
    message: str,
    uninterrupted: tuple[dict[str, Tensor], Path],
    tmp_path: Path,
) -> None:
    shutil.copytree(uninterrupted[1], tmp_path / "run")
    *older, file = sorted((tmp_path / "run/checkpoints").iterdir())
    for path in older:  # a damaged checkpoint falls back to the one before
        path.unlink()
    tensors, state = change(*read_checkpoint(file))
    save_file(tensors, file, metadata={"effformer": json.dumps(state)})
    with pytest.raises(FormatError, match=message):
        start(tmp_path / "run")


def test_a_finished_run_is_not_trained_again(uninterrupted: tuple[dict[str, Tensor], Path]) -> None:
    expected, out = uninterrupted
    network = model()
    result = train(
        network,
        load_data("digits").subset(torch.arange(50)),
        Wrapped(None),
        CONFIG,
        out=out,
        resume=True,
    )
    assert result.resumed == result.steps == 40
    assert result.loss == read_metrics(out)[-1]["loss"]
    torch.testing.assert_close(network.state_dict(), expected, rtol=0, atol=0)


def test_other_settings_are_refused(tmp_path: Path) -> None:
    config = TrainConfig(steps=4, batch=4, warmup=1)
    data = load_data("digits").subset(torch.arange(20))

    def linear(width: int = 10) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(64, width))

    train(linear(), data, Classification(), config, out=tmp_path)
    cases = [
        (
            linear(),
            data,
            Classification(),
            config.replace(lr=5e-4),
            r"config\.lr was 0\.001 and is 0\.0005",
        ),
        (
            linear(),
            data,
            Classification(smoothing=0.1),
            config,
            r"objective\.smoothing was 0\.0 and is 0\.1",
        ),
        (linear(11), data, Classification(), config, r"model\.parameters"),
        (
            linear(),
            data.subset(torch.arange(19)),
            Classification(),
            config,
            r"data\.samples was 20 and is 19",
        ),
        (
            linear(),
            data.subset(torch.arange(19, -1, -1)),
            Classification(),
            config,
            r"data\.sha256",
        ),
    ]
    for network, samples, objective, changed, message in cases:
        with pytest.raises(ValueError, match=message):
            train(network, samples, objective, changed, out=tmp_path, resume=True)


def test_broken_checkpoint_is_reported(tmp_path: Path) -> None:
    config = TrainConfig(steps=4, batch=4, warmup=1)
    data = load_data("digits").subset(torch.arange(20))
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    result = train(network, data, Classification(), config, out=tmp_path)
    assert result.checkpoint is not None
    result.checkpoint.write_bytes(result.checkpoint.read_bytes()[:-10])
    with pytest.raises(FormatError, match=r"step-00000004.*not a readable checkpoint"):
        train(network, data, Classification(), config, out=tmp_path, resume=True)


def test_runs_from_before_classes_had_names_go_on(tmp_path: Path) -> None:
    small = {"input_size": 8, "channels": 1, "num_classes": 10, "learn_sigma": False, "patch": 4}
    config = TrainConfig(steps=2, batch=4, warmup=0)

    def run(*, resume: bool) -> int:
        model = effformer.build_model("sit-nano", **small)
        data = load_data("digits").subset(torch.arange(8))
        return train(model, data, Generation(), config, out=tmp_path, resume=resume).resumed

    run(resume=False)
    facts = json.loads((tmp_path / "run.json").read_text())
    assert facts["trained"].pop("classes")[:2] == ["0", "1"]
    del facts["about"]
    (tmp_path / "run.json").write_text(json.dumps(facts))
    assert run(resume=True) == 2
