"""Bundles of several forms: the runner takes the fastest, remembers it, and believes no other machine."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from effformer.export import BundleReport, choice, export_bundle
from effformer.export.run import Bundle, BundleError, main
from typer.testing import CliRunner

from effformer.cli.main import app

from .networks import Flow
from .test_run import _with

FORMS: Any = ("float32", "dynamic-uint8", "static-int8")
SIZES: dict[str, Any] = {
    "shape": (1, 8, 8),
    "num_classes": 3,
    "null_label": 3,
    "convention": "effformer",
}


@pytest.fixture(scope="module")
def made(flow: Flow, tmp_path_factory: pytest.TempPathFactory) -> BundleReport:
    folder = tmp_path_factory.mktemp("forms") / "bundle"
    return export_bundle(
        flow, folder, quantize=FORMS, session={"threads": 1, "arena": False}, steps=3, **SIZES
    )


@pytest.fixture
def folder(made: BundleReport, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made.folder, tmp_path / "bundle"))


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Timings that were made; the second form is by far the fastest."""
    found: list[int] = []
    order = count()

    def least(call: Callable[[], Any]) -> float:
        call()
        found.append(next(order))
        return (0.4, 0.1, 0.39)[found[-1] % 3]

    monkeypatch.setattr(choice, "_least", least)
    return found


def test_what_a_bundle_of_several_forms_holds(made: BundleReport) -> None:
    facts = json.loads((made.folder / "bundle.json").read_text())
    assert [*facts["forms"]] == [*FORMS]
    assert facts["graphs"]["velocity"] == "velocity.onnx"
    files = {own["velocity"] for own in facts["forms"].values()}
    assert files == {"velocity.onnx", "velocity.dynamic-uint8.onnx", "velocity.static-int8.onnx"}
    assert {*facts["files"]} >= files
    assert facts["session"]["threads"] == 1
    assert not (made.folder / "choice.json").exists()
    assert {*made.forms} == {*FORMS[1:]}
    assert all(0 < error < 0.2 for error in made.forms.values())
    assert made.to_dict()["forms"] == made.forms
    assert made.quantized is None
    assert made.parity is not None
    assert made.parity.max_rel <= 1e-4


def test_every_form_runs_and_agrees_with_the_record(made: BundleReport) -> None:
    exact = Bundle(made.folder, form="float32").sample([0, 2], seed=1)
    for form in FORMS:
        bundle = Bundle(made.folder, form=form)
        assert (bundle.form, bundle.choice) == (form, None)
        error = bundle.self_test()
        assert (error <= 1e-4) == (form == "float32")
        difference = np.abs(bundle.sample([0, 2], seed=1) - exact).max()
        assert (difference == 0) == (form == "float32")
        assert difference < 0.2 * np.abs(exact).max()
    with pytest.raises(BundleError, match="unknown form 'int9'; forms of the bundle: float32, dyn"):
        Bundle(made.folder, form="int9")


def test_the_fastest_form_is_taken_and_remembered(folder: Path, timed: list[int]) -> None:
    bundle = Bundle(folder)
    assert len(timed) == 3
    assert bundle.form == "dynamic-uint8"
    assert bundle.graphs["velocity"] == "velocity.dynamic-uint8.onnx"
    for words in ("4 times as fast as float32 here", "static-int8 takes 390 ms", "remembered in"):
        assert words in bundle.which()
    assert bundle.self_test() > 0
    again = Bundle(folder)
    assert again.choice == bundle.choice
    assert len(timed) == 3  # nothing was timed anew
    assert Bundle(folder, threads=2).form == "dynamic-uint8"  # another place
    assert len(timed) == 6


def test_a_form_that_is_hardly_faster_is_not_taken(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = iter((1.0, 0.96, 0.97))
    monkeypatch.setattr(choice, "_least", lambda call: next(times))
    bundle = Bundle(folder)
    assert bundle.form == "float32"
    assert "no other form is faster by 5 % here" in bundle.which()


def changed(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda facts: facts | changes


def elsewhere(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda facts: facts | {"place": facts["place"] | changes}


@pytest.mark.parametrize(
    "change",
    [
        elsewhere(cpu="another"), elsewhere(flags="avx2 avx512_vnni"), elsewhere(onnxruntime="0.1"),
        elsewhere(cores=99), elsewhere(bundle="x"), changed(form="int4"), changed(form=["x"]),
        changed(times={}), changed(times={"float32": 1.0}), changed(out=[]), changed(place=None),
        changed(times={form: float("nan") for form in FORMS}), changed(times=dict.fromkeys(FORMS, "x")),
        lambda facts: [1], lambda facts: "[" * 50_000, lambda facts: "x" * 10**6,
    ],
)  # fmt: skip
def test_what_another_machine_has_found_is_not_believed(
    change: Callable[[Any], Any], folder: Path, timed: list[int]
) -> None:
    known = Bundle(folder).choice
    place = folder / "choice.json"
    made = change(json.loads(place.read_text()))
    place.write_text(made if isinstance(made, str) else json.dumps(made))
    assert Bundle(folder).choice == known
    assert len(timed) == 6
    Bundle(folder)
    assert len(timed) == 6


def test_a_folder_that_cannot_be_written_and_links(
    folder: Path, timed: list[int], tmp_path: Path
) -> None:
    (folder / "choice.json").mkdir()
    bundle = Bundle(folder)
    assert bundle.form == "dynamic-uint8"
    assert "not remembered: " in bundle.which()
    assert "cannot be written" in bundle.which()
    assert len(timed) == 3
    assert sorted(p.name for p in folder.glob("*.part")) == []
    (folder / "choice.json").rmdir()
    mine = tmp_path / "mine.json"
    mine.write_text("mine")
    (folder / "choice.json").symlink_to(mine)
    assert Bundle(folder).form == "dynamic-uint8"
    assert mine.read_text() == "mine"


def test_forms_that_do_not_run_or_do_not_agree_are_out(
    made: BundleReport, timed: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(9)
    other = export_bundle(Flow(), tmp_path / "other", verify=False, **SIZES).folder
    wrong = (other / "velocity.onnx").read_bytes()
    a = _with(made, tmp_path / "a", "velocity.dynamic-uint8.onnx", wrong)
    bundle = Bundle(a)
    assert bundle.form == "static-int8"  # the second that was timed
    assert "dynamic-uint8 is out: " in bundle.which()
    assert "velocity in dynamic-uint8 differs by" in bundle.which()
    b = _with(made, tmp_path / "b", "velocity.dynamic-uint8.onnx", b"no graph")
    assert "cannot load it" in Bundle(b).which()
    c = _with(made, tmp_path / "c", "self_test.npy", (other / "self_test.npy").read_bytes())
    assert main([str(c), "--labels", "0", "--out", str(tmp_path / "s.png")]) == 2
    assert "none of its forms runs here; float32: " in capsys.readouterr().err
    assert not (tmp_path / "s.png").exists()


def test_options_of_the_runtime_are_set(made: BundleReport, bundle: BundleReport) -> None:
    def options(opened: Bundle) -> Mapping[str, Any]:
        found = opened._velocity.get_session_options()
        names = ("intra_op.allow_spinning", "set_denormal_as_zero", "x64quantprecision")
        entries = {name: found.get_session_config_entry(f"session.{name}") for name in names}
        return entries | {
            "threads": found.intra_op_num_threads,
            "arena": found.enable_cpu_mem_arena,
        }

    own = options(Bundle(made.folder, form="static-int8"))
    assert own == {
        "intra_op.allow_spinning": "0", "set_denormal_as_zero": "0", "x64quantprecision": "1",
        "threads": 1, "arena": False,
    }  # fmt: skip
    plain = options(Bundle(bundle.folder, threads=2))
    assert (plain["threads"], plain["arena"]) == (2, True)


def test_numbers_are_flushed_only_by_who_has_the_process(
    made: BundleReport, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[str] = []

    def session(path: str, options: Any, providers: list[str]) -> None:
        found.append(options.get_session_config_entry("session.set_denormal_as_zero"))
        raise RuntimeError("seen")

    monkeypatch.setattr("onnxruntime.InferenceSession", session)
    for alone in (False, True):
        with pytest.raises(BundleError, match="cannot load it"):
            Bundle(made.folder, form="float32", alone=alone)
    assert found == ["0", "1"]


def test_the_folder_alone_says_which(folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(folder / "run.py"), "--which"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "remembered in choice.json" in done.stdout
    found = json.loads((folder / "choice.json").read_text())
    assert done.stdout.split(": ", 1)[1].startswith(found["form"])
    verified = CliRunner().invoke(app, ["verify", str(folder), "--json"])
    assert json.loads(verified.stdout)["form"] in FORMS
    assert main([str(folder), "--which", "--form", "static-int8"]) == 0


def test_what_is_refused(flow: Flow, tmp_path: Path) -> None:
    for wrong, why in (
        ({"quantize": ()}, "expected one form or several, each once"),
        ({"quantize": ("float32", "float32")}, "each once"),
        ({"quantize": ("static", "static-int8")}, "each once"),
        ({"quantize": ("float32", "int9")}, "unknown form 'int9'"),
        ({"max_error": 0.1}, "max_error is that of a quantized graph"),
        ({"session": {"thread": 1}}, "unknown option 'thread'; did you mean 'threads'"),
        ({"session": {"threads": 0}}, "threads must be 1..1024 or None, got 0"),
        ({"session": {"spinning": 1}}, "spinning must be True or False, got 1"),
    ):
        with pytest.raises(ValueError, match=why):
            export_bundle(flow, tmp_path / "b", **wrong, **SIZES)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_forms_of_a_bundle_with_a_cache(tmp_path: Path) -> None:
    from cached_models import awake

    model = awake(std=0.2, channels=1, num_classes=10)
    forms: Any = ("float32", "static-int8", "dynamic-int7")
    report = export_bundle(
        model, tmp_path / "b", cache="newton", quantize=forms, convention="sit", max_error=0.05
    )
    facts = json.loads((report.folder / "bundle.json").read_text())
    assert facts["forms"]["static-int8"]["light"] == "light.static-int8.onnx"
    assert [own["narrow"] for own in facts["forms"].values()] == [False, False, True]
    for form in forms:
        Bundle(report.folder, form=form).self_test()
    export_bundle(model, tmp_path / "b", convention="sit", verify=False)  # in place of all that
    assert not (tmp_path / "b" / "light.static-int8.onnx").exists()
