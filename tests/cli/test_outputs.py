"""What an output may replace, and what an interruption leaves behind."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import effformer
from effformer.cli import main

from .running import SMALL, answer, invoke, refusal, started


def changed(folder: Path) -> Path:
    """A model whose weights are no longer those that were drawn."""
    model = effformer.build_model("vit-nano")
    with torch.no_grad():
        next(model.parameters()).add_(1)
    return effformer.save_pretrained(model, folder)


def test_build_replaces_nothing_that_is_worth_more(tmp_path: Path) -> None:
    place = changed(tmp_path / "m")
    before = (place / "model.safetensors").read_bytes()
    assert "random ones do not replace" in refusal("build", "vit-nano", "-o", str(place))
    assert (place / "model.safetensors").read_bytes() == before
    invoke("build", "vit-nano", "-o", str(place), "--force")
    invoke("build", "vit-nano", "-o", str(place))  # its own
    weights = effformer.save_weights(effformer.load_model(place), tmp_path / "w.safetensors")
    invoke("build", "vit-nano", "--weights", str(weights), "-o", str(place))
    assert "random ones do not replace" in refusal("build", "vit-nano", "-o", str(place))
    other = str(changed(tmp_path / "other"))
    assert "compressed ones do not replace" in refusal("compress", other, "-o", str(place))


def test_convert_keeps_the_file_that_it_reads(tmp_path: Path) -> None:
    model, file = effformer.build_model("vit-nano"), tmp_path / "x.pt"
    torch.save({"model": model.state_dict(), "optimizer": {"step": 1}}, file)
    before = file.read_bytes()
    words = ["convert", str(file), "-m", "vit-nano", "-o"]
    assert "did not write as random weights or" in refusal(*words, str(file))
    assert file.read_bytes() == before
    foreign = tmp_path / "theirs.safetensors"
    save_file({"w": torch.ones(1)}, foreign, metadata={"format": "pt"})
    assert "--force" in refusal(*words, str(foreign))
    for _ in range(2):
        invoke(*words, str(tmp_path / "ours.safetensors"))
    invoke(*words, str(foreign), "--force")


def test_reports_and_graphs_replace_only_their_own(saved: Path, tmp_path: Path) -> None:
    run = tmp_path / "run.json"
    run.write_text('{"format": 1}')
    for verb, source in (("profile", str(saved)), ("bench", "sit-nano")):
        assert "did not write as" in refusal(verb, source, "-o", str(run))
    assert "did not write as graph" in refusal(
        "export", str(saved), "--format", "onnx", "-o", str(run)
    )
    (tmp_path / "s.npy").write_bytes(b"\x93NUMPY numbers of mine")
    assert "did not write as samples" in refusal(
        "sample", str(saved), "-o", str(tmp_path / "s.npy")
    )
    assert run.read_text() == '{"format": 1}'
    for suffix in ("json", "txt", "html"):
        page = str(tmp_path / f"cost.{suffix}")
        for _ in range(2):
            invoke("profile", str(saved), "-o", page)
        assert "did not write as comparison" in refusal("bench", str(saved), "-o", page)
    for suffix in ("npy", "png"):
        for _ in range(2):
            samples = str(tmp_path / f"drawn.{suffix}")
            invoke("sample", str(saved), "--steps", "1", "--labels", "1", "-o", samples)


@pytest.mark.slow
def test_a_refused_quantization_leaves_the_older_graph(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "m.onnx"
    words = ["export", str(saved), "--no-verify", "-o", str(place)]
    invoke(*words)
    before = place.read_bytes()

    def refused(*_: object, **__: object) -> None:
        raise effformer.checks.FormatError("nothing was quantized")

    monkeypatch.setattr("effformer.export.within.quantize_onnx", refused)
    assert "nothing was quantized" in refusal(*words, "--quantize", "int8")
    assert place.read_bytes() == before
    monkeypatch.undo()
    data = answer(*words, "--quantize", "int8")
    assert data["quantized"]["path"] == data["path"] == str(place)
    assert place.stat().st_size == data["quantized"]["bytes_after"]


WORDS = ["train", "sit-nano", *SMALL, "--set", "patch=4", "--batch", "8", "--threads", "1"]


def test_a_failed_training_does_not_refuse_the_corrected_one(tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    assert "try a lower lr" in refusal(
        *WORDS, "--steps", "4", "--warmup", "0", "--lr", "1e30", "--train", "clip=null", "-o", run
    )
    assert answer(*WORDS, "--steps", "2", "-o", run)["steps"] == 2


def test_an_interruption_before_the_first_step_says_that_there_is_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("effformer.train.train", interrupted)
    words = [*WORDS, "--steps", "2", "-o", str(tmp_path / "run")]
    assert "interrupted; there is no checkpoint yet" in invoke(*words, code=130).stderr
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "step-00000002.safetensors").touch()
    assert "the last checkpoint is intact" in invoke(*words, code=130).stderr


def test_an_interruption_before_a_verb_begins_is_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(main, "app", interrupted)
    with pytest.raises(SystemExit, match="130"):
        main.main()
    assert capsys.readouterr().err == "effformer: interrupted\n"


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="sends POSIX signals")
def test_ctrl_c_leaves_a_checkpoint_of_the_last_step(tmp_path: Path) -> None:
    """No checkpoint is due for long; a second process is refused meanwhile."""
    run = tmp_path / "run"
    words = [*WORDS, "--steps", "100000", "--save-every", "50000", "-o", str(run)]
    stopped = started(*words)
    deadline = time.monotonic() + 300
    while not (run / "metrics.jsonl").exists():
        assert stopped.poll() is None, stopped.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert f"in use by process {stopped.pid} on" in refusal(*words, "--resume")
    stopped.send_signal(signal.SIGINT)
    _, said = stopped.communicate(timeout=120)
    assert stopped.returncode == 130, said
    assert "interrupted; the last checkpoint is intact, --resume goes on from it" in said
    _, state = effformer.train.read_checkpoint(run)
    assert state["step"] % 50_000
    assert sorted(p.name for p in run.iterdir()) == ["checkpoints", "metrics.jsonl", "run.json"]


@pytest.mark.filterwarnings("default")
def test_a_warning_is_a_note(tmp_path: Path) -> None:
    model = effformer.build_model("sit-nano", input_size=8, depth=1)
    with torch.no_grad():
        next(model.parameters()).fill_(torch.nan)
    folder = effformer.save_pretrained(model, tmp_path / "m")
    said = invoke("profile", str(folder)).stderr
    assert said.startswith("effformer: ")
    assert said.count("NaN or infinite values in ") == said.count("\n") == 1
    assert "Warning" not in said
