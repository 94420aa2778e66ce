"""Bad input ends with exit code 2 and one sentence; what was there before is untouched."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import effformer
from effformer.checks import FormatError
from effformer.cli import main
from effformer.train.checkpoint import read_metrics

from .running import SMALL, answer, invoke, refusal, started


def fingerprint(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


DAMAGES: list[tuple[str, Callable[[Path], None], str]] = [
    ("truncated", lambda f: cut(f / "model.safetensors"), "is truncated or not a safetensors"),
    ("empty", lambda f: (f / "model.safetensors").write_bytes(b""), "is truncated or not"),
    ("pickled", lambda f: torch.save({"x": 1}, f / "model.safetensors"), "not a safetensors file"),
    ("no weights", lambda f: (f / "model.safetensors").unlink(), "no such file"),
    ("no config", lambda f: (f / "config.json").unlink(), "no config.json; expected a folder"),
    ("half a config", lambda f: cut(f / "config.json"), "is not readable JSON"),
    ("newer", config(format=2, effformer="9.9"), "written by effformer 9.9 in format 2, this is"),
    ("newer transform", config(transforms=[{"kind": "folded"}]), "A newer effformer may have"),
    ("foreign family", config(family="sti"), "unknown model family 'sti'; did you mean 'sit'?"),
    ("other shapes", config(config={"dim": 96, "depth": 2, "heads": 2}), "does not fit sit-nano"),
]


@pytest.mark.parametrize("verb", ["show", "profile", "bench", "sample", "export", "compress"])
@pytest.mark.parametrize(
    ("change", "message"), [d[1:] for d in DAMAGES], ids=[d[0] for d in DAMAGES]
)
def test_damaged_models(
    verb: str, change: Callable[[Path], None], message: str, saved: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(saved, folder)
    change(folder)
    writes = verb in ("sample", "export", "compress")
    out = ["-o", str(tmp_path / "out.png")] if writes else []
    assert message in refusal(verb, str(folder), *out)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.skipif(sys.platform != "linux", reason="pipes of Linux")
def test_what_never_answers_is_not_read(saved: Path, tmp_path: Path) -> None:
    pipe, out = tmp_path / "pipe.safetensors", str(tmp_path / "new")
    os.mkfifo(pipe)
    (tmp_path / "run").mkdir()
    for name in ("run.json", "metrics.jsonl"):
        os.mkfifo(tmp_path / "run" / name)
    for words in (
        ("linearize", str(saved), "--data", str(pipe), "-o", out),
        ("compress", str(saved), "--scheme", "awq", "--data", str(pipe), "-o", out),
        ("train", "sit-nano", "-o", str(tmp_path / "run")),
        ("train", "--resume", str(tmp_path / "run")),
    ):
        assert "is a device, pipe or socket" in refusal(*words)
    with pytest.raises(FormatError, match="is a device, pipe or socket"):
        read_metrics(tmp_path / "run")


@pytest.mark.parametrize(
    "verb",
    ["build", "compress", "prune", "linearize", "export", "sample", "convert", "train"],
)
def test_targets_that_cannot_be_written(verb: str, saved: Path, tmp_path: Path) -> None:
    source = "sit-nano" if verb in ("build", "train") else str(saved)
    file = tmp_path / "file"
    file.write_text("mine")
    below = file / "below.png"  # a place that nobody can make, whoever runs the tests
    more = ["--data", "digits"] if verb == "linearize" else []
    assert "below" in refusal(verb, source, *more, "-o", str(below))
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    message = refusal(verb, source, *more, "-o", str(folder))
    assert "folder" in message
    assert fingerprint(tmp_path) == {"file": b"mine", "folder/notes.txt": b"mine"}


def test_a_model_is_not_replaced_by_its_own_product(saved: Path) -> None:
    before = fingerprint(saved)
    assert "dense weights would be lost" in refusal("compress", str(saved), "-o", str(saved))
    assert "whose weights would be lost" in refusal("prune", str(saved), "-o", str(saved))
    inside = str(saved / "model.safetensors")
    lies = refusal("convert", str(saved), "--to", "official", "-o", inside)
    assert "lies inside" in lies
    assert "no bundle.json" in refusal("export", str(saved), "-o", str(saved))
    assert fingerprint(saved) == before


def test_a_saved_model_says_itself_what_it_is(saved: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "x.safetensors")
    for words in (["-m", "dit-b"], ["--from", "diffusers"]):
        assert "leave --model and --from out" in refusal("convert", str(saved), *words, "-o", out)
    assert "training starts from a model's name" in refusal("train", str(saved), "-o", out)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--labels", "0-99999999999"), "at most 10000 pictures at once"),
        (("--labels", "5-1"), "the range is empty"),
        (("--labels", "10"), "label 10 is not one of the classes 0..9"),
        (("--sampler", "eulr"), "did you mean 'euler'"),
        (("--guidance", "nan"), "must be finite"),
        (("--threads", "100000"), "--threads"),
        (("--seed", "99999999999999999999"), "--seed"),
        (("--steps", "0"), "--steps"),
    ],
)
def test_sample_requests(words: tuple[str, ...], message: str, saved: Path, tmp_path: Path) -> None:
    assert message in refusal("sample", str(saved), *words, "-o", str(tmp_path / "s.png"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--set", "attn=null"), "sit-nano.attn: a model cannot be without it"),
        (("--set", "patch=0"), "sit-nano.patch must be at least 1, got 0"),
        (("--set", "name=1"), "unknown option 'name'; a model is named in front of its options"),
        (("--set", "attn.where=1"), "sit-nano.attn: unknown option 'where'"),
        (("--set", "depth=100000"), "sit-nano.depth must lie in [1, 4096], got 100000"),
        (("--set", "x" * 5000), "xxx ... xxx"),
        (("--set", "heads=5"), "width 48 is not divisible by 5 heads"),
        (("--set", "attn.causal=true"), "this model attends both ways"),
        (("--attn", "performer", "--set", "attn.causal=true"), "this model attends both ways"),
        (("--attn", "flow", "--set", "attn.kernel=tanh"), "attn.kernel: unknown value 'tanh'"),
        (("--block", "macaron", "--ffn", "softmax"), "unknown ffn 'softmax'"),
        (("--set", 'layers={"7": {"attn": "flow"}}'), "selects none of the 2 blocks"),
    ],
)
def test_impossible_models(words: tuple[str, ...], message: str) -> None:
    assert message in refusal("build", "sit-nano", *words)


def test_reports_are_refused_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def measured(*_: object, **__: object) -> None:
        raise AssertionError("measured before the name was checked")

    monkeypatch.setattr("effformer.profile.profile", measured)
    monkeypatch.setattr("effformer.profile.benchmark", measured)
    for verb in ("profile", "bench"):
        message = refusal(verb, "sit-nano", "-o", str(tmp_path / "cost.doc"))
        assert "must end in .json, .html or .txt" in message


def test_models_of_other_inputs_are_not_compared() -> None:
    message = refusal("bench", "sit-nano", "bert-tiny", "--runs", "1")
    assert "bench: bert-tiny takes tokens (1, " in message
    assert "sit-nano takes x (1, 4, 32, 32), t (1,), y (1,); compare models of equal" in message


def test_options_of_another_form(saved: Path, tmp_path: Path) -> None:
    words = ("export", str(saved), "-o", str(tmp_path / "m.onnx"))
    assert "--sampler, --steps means nothing" in refusal(*words, "--sampler", "x", "--steps", "1")
    assert "--opset means nothing" in refusal(*words, "--format", "bundle", "--opset", "18")
    assert "numbers from 1 to 1024" in refusal("bench", str(saved), "--threads", "9" * 5000)


@pytest.mark.skipif(os.name == "nt", reason="makes symbolic links")
def test_links_in_a_circle(saved: Path, tmp_path: Path) -> None:
    (loop := tmp_path / "loop").symlink_to(loop)
    for source, out in ((str(loop), "new"), (str(saved), str(loop)), (str(saved), str(loop / "x"))):
        refusal("compress", source, "-o", out)
    assert "loop" in refusal("convert", str(saved), "-o", str(loop))


def test_damaged_graphs(saved: Path, tmp_path: Path) -> None:
    graph = tmp_path / "m.onnx"
    invoke("export", str(saved), "--no-verify", "-o", str(graph))
    assert "tolerance must be positive" in refusal(
        "verify", str(graph), str(saved), "--tolerance", "nan"
    )
    assert "the graph takes 'x'" in refusal("verify", str(graph), "dit-nano")
    cut(graph)
    assert "truncated or not an ONNX file" in refusal("verify", str(graph), str(saved))
    assert "no bundle.json" in refusal("verify", str(saved))


def test_memory_that_does_not_suffice(monkeypatch: pytest.MonkeyPatch, saved: Path) -> None:
    def large(*_: object, **__: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to ...")

    monkeypatch.setattr("effformer.profile.profile", large)
    assert "not enough memory; the target holds what it held" in refusal("profile", str(saved))


@pytest.mark.parametrize(
    ("verb", "broken"),
    [
        ("compress", "effformer.io.save_pretrained"),
        ("prune", "effformer.io.save_pretrained"),
        ("export", "effformer.export.export_bundle"),
        ("convert", "effformer.io.save_weights"),
        ("sample", "effformer.export.run.write_image"),
    ],
)
def test_interruptions_leave_the_old_result(
    verb: str, broken: str, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / ("out.png" if verb == "sample" else "out")
    invoke(verb, str(saved), "-o", str(target))
    before = fingerprint(tmp_path)

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(broken, interrupted)
    result = invoke(verb, str(saved), "-o", str(target), code=130)
    assert "interrupted; the target holds what it held before" in result.stderr
    assert fingerprint(tmp_path) == before


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="sends POSIX signals")
def test_training_interrupted_by_ctrl_c_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    words = [
        "train", "sit-nano", "--set", "patch=4", "--steps", "600", "--batch", "8",
        "--save-every", "5", "--threads", "1", "-o",
    ]  # fmt: skip
    stopped = started(*words, str(tmp_path / "a"))
    deadline = time.monotonic() + 120
    while not list((tmp_path / "a").glob("checkpoints/*.safetensors")):
        assert stopped.poll() is None, stopped.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.002)
    stopped.send_signal(signal.SIGINT)
    _, said = stopped.communicate(timeout=60)
    assert stopped.returncode == 130, said
    assert "interrupted; the last checkpoint is intact, --resume goes on from it" in said
    assert "Traceback" not in said
    resumed = answer(*words, str(tmp_path / "a"), "--resume")
    assert 0 < resumed["resumed"] < 600
    invoke(*words, str(tmp_path / "b"))
    first, second = (effformer.load_model(tmp_path / run / "model") for run in "ab")
    for name, tensor in second.state_dict().items():
        assert torch.equal(tensor, first.state_dict()[name]), name


def test_every_verb_refuses_unknown_options() -> None:
    for name, _, _ in main._VERBS:
        result = CliRunner().invoke(main.app, [name, "--no-such-option"])
        assert result.exit_code == 2
        assert "no-such-option" in result.stderr


def test_fine_sizes_are_still_accepted(tmp_path: Path) -> None:
    assert answer("build", "sit-nano", *SMALL, "--set", "patch=8")["parameters"] > 0


VALUES = ("nan", "-1", "0", "1.5", "x", "[]", "{}", "null", "true", "1e999", "[[[]]]", "9" * 5000)
KEYS = (
    "depth", "dim", "heads", "patch", "input_size", "num_classes", "label_dropout", "attn", "ffn", "block",
    "layers", "attn.core", "attn.core.scale", "attn.bias", "nothing", "a.b.c",
)  # fmt: skip


@pytest.mark.parametrize("key", KEYS)
def test_values_of_every_kind_are_taken_or_refused_in_a_sentence(key: str) -> None:
    """An exit code of neither 0 nor 2 is a traceback: the guard lets faults of ours through."""
    codes = []
    for value in VALUES:
        result = CliRunner().invoke(main.app, ["build", "sit-nano", "--set", f"{key}={value}"])
        assert result.exit_code in (0, 2), f"{value}: {result.exception!r}"
        codes.append(result.exit_code)
    assert 2 in codes


@pytest.fixture(scope="session")
def strange(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Files and folders of every wrong kind."""
    folder = tmp_path_factory.mktemp("strange")
    contents = {
        "empty.safetensors": b"", "text.onnx": b"hello", "a.json": b'{"a": 1}', "deep.json": b"[" * 100_000,
        "json.safetensors": b'{"a": 1}', "cut.safetensors": b"\x40" + b"\0" * 7 + b"{", "binary.pt": b"\xff\xfe",
    }  # fmt: skip
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    torch.save([1, 2], folder / "list.pt")
    for name in ("folder", "model", "bundle"):
        (folder / name).mkdir()
    (folder / "model" / "config.json").write_bytes(contents["deep.json"])
    (folder / "bundle" / "bundle.json").write_bytes(contents["deep.json"])
    return [*sorted(folder.iterdir()), folder / "none"]


@pytest.mark.parametrize(
    "verb",
    [
        "show",
        "profile",
        "bench",
        "sample",
        "compress",
        "prune",
        "export",
        "verify",
        "convert",
        "train",
    ],
)
def test_files_of_every_wrong_kind(
    verb: str, strange: list[Path], saved: Path, tmp_path: Path
) -> None:
    out = str(tmp_path / "out.png")
    options = {
        "sample": ["-o", out], "compress": ["-o", out], "prune": ["-o", out],
        "export": ["-o", out], "train": ["-o", out],
        "verify": [str(saved)], "convert": ["-m", "sit-nano", "-o", out],
    }  # fmt: skip
    for path in strange:
        refusal(verb, str(path), *options.get(verb, []))
    assert list(tmp_path.iterdir()) == []


def test_what_python_raises_is_a_fault_of_ours(
    monkeypatch: pytest.MonkeyPatch, saved: Path
) -> None:
    def faulty(*_: object, **__: object) -> None:
        int("x")

    monkeypatch.setattr("effformer.profile.profile", faulty)
    result = CliRunner().invoke(main.app, ["profile", str(saved)])
    assert result.exit_code == 1
    assert isinstance(result.exception, ValueError)


@pytest.mark.skipif(os.name == "nt", reason="redirects as POSIX shells do")
@pytest.mark.parametrize(
    "redirected",
    ["", *(pytest.param(r, marks=pytest.mark.slow) for r in (" >&-", " 2>&-"))],
)
def test_terminals_that_cannot_print_a_character(redirected: str) -> None:
    """Nor anything at all."""
    command = f"'{sys.executable}' -m effformer.cli.main show 'flöw'{redirected}"
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        command, shell=True, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert redirected == " 2>&-" or "effformer: unknown name 'fl" in done.stderr
