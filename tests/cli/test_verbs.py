"""Every verb: what it prints, as text and as JSON, and what it says to bad input."""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from closeness import assert_close
from safetensors.torch import save_file
from typer.testing import CliRunner
from web_package import package

import effformer
from effformer.cli import common, main
from effformer.cli.forms import FORMS
from effformer.values import QUIET

from .running import SMALL, answer, invoke, refusal


@pytest.mark.parametrize("verb", [name for name, _, _ in main._VERBS])
def test_help_says_what_and_shows_an_example(verb: str) -> None:
    text = invoke(verb, "--help").stdout
    assert "--json" in text
    assert verb == "doctor" or f"effformer {verb}" in text.replace("\n", " ")


def test_version() -> None:
    assert invoke("--version").stdout.strip() == effformer.__version__


def test_unknown_verbs_and_options_are_named() -> None:
    assert "build" in refusal("bulid")
    assert "--attn" in refusal("build", "sit-nano", "--atn", "flow")


def test_list() -> None:
    names = {e["name"] for e in answer("list", "attention", "--causal", "--mask", "key")}
    assert {"softmax", "flow", "linear"} <= names
    assert "flow" not in {e["name"] for e in answer("list", "core", "--mask", "full")}
    assert all(e["kind"] == "model" for e in answer("list", "models", "--like", "sit*"))
    assert "flow" in invoke("list").stdout
    assert "did you mean 'attention'" in refusal("list", "atention")
    assert "'key', 'full'" in refusal("list", "core", "--mask", "keys")


@pytest.mark.parametrize("old", ["objective", "objectives"])
def test_list_reads_the_old_name_of_losses(old: str) -> None:
    done = invoke("list", old, "--json")
    assert "now listed as 'loss" in done.stderr
    assert json.loads(done.stdout) == answer("list", "losses")
    assert {"flow-matching", "pseudo-huber"} <= {e["name"] for e in json.loads(done.stdout)}


def test_show(saved: Path) -> None:
    (flow,) = answer("show", "flow")
    assert flow["config"]["eps"] == 1e-6
    assert flow["paper"] == "2202.06258"
    (delta,) = answer("show", "gated-delta")
    assert delta["heads"]["short_conv"] == 4
    (model,) = answer("show", "DiT-B/2")
    assert model["parameters"] == effformer.registry.model.get("dit-b").facts["params"]
    assert model["layouts"] == ["effformer", "official", "diffusers"]
    (own,) = answer("show", str(saved))
    assert own["config"]["attn"]["core"]["name"] == "flow"
    assert "flow" in invoke("show", "flow").stdout
    assert "did you mean 'flow'" in refusal("show", "flwo")


def test_build_overrides(saved: Path) -> None:
    data = answer(
        "build", "dit-nano", "--attn", "flow", "--set", "attn.eps=1e-5", "--ffn", "swiglu",
        "--set", "depth=3", "--set", 'layers={"0": {"attn": "softmax"}}', "--block", "macaron",
    )  # fmt: skip
    assert data["config"]["attn"]["core"]["eps"] == 1e-5
    assert data["config"]["ffn"]["name"] == "swiglu"
    assert data["config"]["depth"] == 3
    assert effformer.load_model(saved).config.num_classes == 10


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("dit-bb",), "unknown model 'dit-bb'; did you mean"),
        (("sit-nano", "--attn", "flwo"), "did you mean 'flow'"),
        (("sit-nano", "--set", "deptth=3"), "did you mean 'depth'"),
        (("sit-nano", "--set", "depth=deep"), "expected int, got 'deep'"),
        (("sit-nano", "--set", "depth"), "write KEY=VALUE"),
        (("sit-nano", "--set", "depth=2", "--set", "depth.x=2"), "already has the value 2"),
        (("sit-nano", "--set", "dim=50"), "dim"),
        (("sit-nano", "--weights", "missing.safetensors"), "no such file"),
        (("folder/that/is/not/there",), "no such folder"),
    ],
)
def test_build_refuses(words: tuple[str, ...], message: str) -> None:
    assert message in refusal("build", *words)


def test_build_keeps_other_folders(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("x")
    assert "holds other files" in refusal("build", "sit-nano", "-o", str(tmp_path))
    assert (tmp_path / "precious.txt").read_text() == "x"
    file = tmp_path / "file"
    file.write_text("x")
    assert "is a file" in refusal("build", "sit-nano", "-o", str(file))


def test_foreign_weights_are_read_as_data(tmp_path: Path) -> None:
    evil = tmp_path / "evil.pt"
    torch.save({"x": print}, evil)
    assert "pickled objects" in refusal("build", "sit-nano", "--weights", str(evil))
    truncated = tmp_path / "short.safetensors"
    truncated.write_bytes(b"\x08\0\0\0")
    assert "truncated" in refusal("build", "sit-nano", "--weights", str(truncated))


def test_saved_models_are_checked(saved: Path, tmp_path: Path) -> None:
    assert "its parts are fixed" in refusal("profile", str(saved), "--attn", "softmax")
    assert "no config.json" in refusal("show", str(tmp_path))
    newer = tmp_path / "newer"
    newer.mkdir()
    config = json.loads((saved / "config.json").read_text())
    (newer / "config.json").write_text(json.dumps(config | {"format": 99}))
    assert "pip install -U effformer" in refusal("show", str(newer))


def test_profile(tmp_path: Path) -> None:
    page = tmp_path / "cost.html"
    data = answer("profile", "sit-nano", *SMALL, "--batch", "2", "--latency", "-o", str(page))
    assert data["total"] > 0
    assert data["latency"]["median"] > 0
    assert "<html" in page.read_text()
    assert "MACs" in invoke("profile", "sit-nano", *SMALL).stdout
    wrong = refusal("profile", "sit-nano", *SMALL, "-o", str(tmp_path / "cost.doc"))
    assert "must end in .json, .html or .txt" in wrong


def test_bench(tmp_path: Path) -> None:
    small = "sit-nano:input_size=8,channels=1"
    page = tmp_path / "bench.json"
    words = [small, f"{small},attn=flow", "--runs", "2", "--warmup", "1", "--rounds", "1"]
    data = answer("bench", *words, "--threads", "1", "-o", str(page))
    assert data["rows"][0]["ratio"] == 1.0
    # two models, not two forms of one
    assert all(row["error"] is None for row in data["rows"])
    assert json.loads(page.read_text())["rows"] == data["rows"]
    assert "did you mean 'flow'" in refusal("bench", "sit-nano:attn=flwo")
    assert "should be greater" in refusal("bench", small, "--runs", "0")
    assert "did you mean 'onnx'" in refusal("bench", small, "--forms", "onxx")
    assert "--threads 1,x: numbers" in refusal("bench", small, "--threads", "1,x")
    assert "one model by name" in refusal("bench", small, small, "--attn", "flow")
    assert "leave one out" in refusal("bench", f"{small},attn=flow", "--attn", "sana")
    assert "write KEY=A,B" in refusal("bench", small, "--sweep", "input_size=8")
    assert "did you mean 'flow'" in refusal("bench", small, "--attn", "softmax,flwo")


@pytest.mark.slow
def test_bench_over_a_size(tmp_path: Path) -> None:
    page, few = tmp_path / "curves.html", ["--runs", "1", "--warmup", "1", "--rounds", "1"]
    words = ["sit-nano:channels=1", "--attn", "softmax,flow", "--sweep", "input_size=16,8"]
    data = answer("bench", *words, *few, "--threads", "1", "-o", str(page))
    assert data["option"] == "input_size"
    assert [one["value"] for one in data["found"]] == [8, 16]
    assert [[row["name"] for row in one["rows"]] for one in data["found"]] == [
        ["softmax", "flow"]
    ] * 2
    macs = [one["rows"][0]["profile"]["total"] for one in data["found"]]
    assert macs[1] > 3 * macs[0]
    assert "<svg" in page.read_text()


@pytest.mark.slow
def test_forms_of_a_model(tmp_path: Path) -> None:
    saved, page, graph = (tmp_path / name for name in ("model", "forms.html", "model.onnx"))
    model = effformer.build_model("sit-nano", input_size=8)
    torch.nn.init.normal_(model.final.linear.weight)  # zero until it is trained
    effformer.save_pretrained(model, saved)
    page = tmp_path / "graph.json"
    invoke("export", str(saved), "-o", str(graph), "--report", str(page))
    boxes = {row["module"]: row for row in json.loads(page.read_text())["boxes"]}
    assert boxes["blocks.0.ffn.part.fc1"]["onnx"]["bytes"] > 0
    few = ["--runs", "2", "--warmup", "1", "--rounds", "1"]
    data = answer("bench", str(saved), "--forms", "all", "--threads", "1,2", *few, "-o", str(page))
    rows = {row["name"].rpartition(" ")[2]: row for row in data["rows"]}
    assert list(rows) == list(FORMS)
    assert all([t["latency"]["threads"] for t in row["times"]] == [1, 2] for row in rows.values())
    assert rows["eager"]["error"] == 0.0
    assert max(rows[form]["error"] for form in ("optimized", "compiled", "onnx")) < 1e-4
    assert 1e-4 < rows["onnx-int8"]["error"] < rows["onnx-int4"]["error"] < 1
    assert rows["onnx-int8"]["bytes"] < rows["onnx"]["bytes"]
    assert 1e-4 < rows["onnx-static"]["error"] < 1
    assert "Side by side" in page.read_text()
    text = invoke("bench", str(saved), str(graph), *few, "--threads", "1").stdout
    for words in ("fastest with 1 thread: ", "smallest: ", "next: effformer "):
        assert words in text
    assert "name the model that was exported" in refusal("bench", str(graph), *few)


def test_show_bundles_and_graphs(tmp_path: Path, saved: Path) -> None:
    invoke("export", str(saved), "--no-verify", "-o", str(tmp_path / "bundle"))
    (bundle,) = answer("show", str(tmp_path / "bundle"))
    assert (bundle["kind"], bundle["name"], bundle["shape"]) == ("bundle", "sit-nano", [1, 8, 8])
    (graph,) = answer("show", str(tmp_path / "bundle" / "velocity.onnx"))
    assert graph["kind"] == "graph"
    assert graph["inputs"]["y"] == "int64 (batch)"
    assert "operators" in invoke("show", str(tmp_path / "bundle" / "velocity.onnx")).stdout
    (tmp_path / "no.onnx").write_text("no")
    assert "not an ONNX file" in refusal("show", str(tmp_path / "no.onnx"))


def test_sites(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    small = ["sit-nano", *SMALL, "--set", "depth=1", "--target", "web", "-o", "site"]
    assert "npm install onnxruntime-web" in refusal("export", *small)
    wan = refusal("export", "wan-tiny", "--target", "web", "-o", "site")  # whatever is installed
    assert wan == refusal("export", "wan-tiny", "-o", "bundle")
    runtime = ["--runtime", str(package(tmp_path / "package"))]
    assert "means nothing to --format bundle" in refusal("export", "sit-nano", *runtime, "-o", "b")
    assert "means nothing to --format onnx" in refusal("export", *small[:-1], "x.onnx", *runtime)
    assert "choose --target web" in refusal("export", "sit-nano", "--target", "wep", "-o", "b")
    said = refusal("export", "vit-nano", "--target", "web", *runtime, "-o", "site")
    assert "draws pictures of classes, which vit-nano does not" in said
    assert not Path("site").exists()
    data = answer("export", *small, *runtime, "--quantize", "int4", "--steps", "3")
    assert (data["folder"], data["runtime"]) == ("site", "onnxruntime-web 1.30.0")
    assert data["parity"]["path"] == data["quantized"]["path"] == str(Path("site/velocity.onnx"))
    assert {path.name for path in tmp_path.iterdir()} == {"package", "site"}
    assert "site: agrees with its record" in invoke("verify", "site").stdout
    Path("site/mine.txt").touch()
    assert "also holds mine.txt" in refusal("export", *small, *runtime)


def test_what_was_trained_is_sampled_and_exported(tmp_path: Path) -> None:
    """A DiT learns our velocity here, not the noise that published ones predict."""
    run, bundle = str(tmp_path / "run"), str(tmp_path / "bundle")
    small = ["--set", "patch=1", "--set", "depth=1", "--set", "dim=24"]
    words = [
        "--steps",
        "50",
        "--batch",
        "32",
        "--lr",
        "5e-3",
        "--warmup",
        "5",
        "--train",
        "ema=0.9",
    ]
    invoke("train", "dit-nano", *small, *words, "-o", run)
    model = str(tmp_path / "run" / "model")

    def drawn(source: str, *options: str) -> tuple[dict[str, Any], torch.Tensor]:
        file = tmp_path / "drawn.npy"
        facts = answer("sample", source, *options, "-o", str(file))
        return facts, torch.from_numpy(np.load(file))

    facts, samples = drawn(model)
    assert (facts["steps"], facts["guidance"], facts["sampler"]) == (10, 2.0, "euler")
    assert 0.3 < samples.std() < 1.5  # 0.75 in the data, 279 if it were taken for noise
    assert answer("show", model)[0]["trained"]["convention"]["prediction"] == "velocity"
    own = {"sampler": "heun", "steps": 3, "guidance": 1.5}
    options = [word for key, value in own.items() for word in (f"--{key}", str(value))]
    invoke("export", model, *options, "-o", bundle)
    facts, exported = drawn(bundle)
    assert own.items() <= facts.items()
    assert_close(exported, drawn(model, *options)[1], rtol=1e-4, atol=1e-4)
    facts, exported = drawn(bundle, "--steps", "2", "--seed", "1")
    assert (facts["steps"], facts["guidance"], facts["sampler"]) == (2, 1.5, "heun")
    assert_close(
        exported, drawn(model, *options, "--steps", "2", "--seed", "1")[1], rtol=1e-4, atol=1e-4
    )
    done = invoke("convert", model, "--to", "official", "-o", str(tmp_path / "dit.safetensors"))
    assert "the weights predict the velocity, t = 0 noise, t = 1 data; who reads the official" in (
        " ".join(done.stderr.split())
    )


@pytest.mark.slow
def test_the_error_of_a_quantized_graph_is_its_own(saved: Path, tmp_path: Path) -> None:
    file, plain = str(tmp_path / "m.onnx"), str(tmp_path / "plain.onnx")
    model = effformer.load_model(saved)
    with torch.no_grad():
        for p in filter(lambda p: p.requires_grad, model.parameters()):
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    folder = str(effformer.save_pretrained(model, tmp_path / "model"))
    exact = answer("export", folder, "-o", plain)["parity"]["max_rel"]
    data = answer("export", folder, "--quantize", "int4", "-o", file)
    assert data["parity"]["max_rel"] > 100 * exact
    assert data["parity"]["path"] == file


def test_compress(saved: Path, tmp_path: Path) -> None:
    small, page = tmp_path / "nf4", tmp_path / "report.html"
    words = ("compress", str(saved), "--scheme", "nf4", "--report", str(page))
    data = answer(*words, "-o", str(small))
    assert data["ratio"] < 1
    assert "<b>qkv <i>Linear → QuantLinear</i></b>" in page.read_text(encoding="utf-8")
    page.write_text("<p>mine</p>")
    assert "did not write as breakdown" in refusal(*words, "-o", str(tmp_path / "other"))
    assert "--report x.png: must end in" in refusal(*words[:-1], "x.png", "-o", "x")
    assert "--report does not go with --for" in refusal(*words[:2], *words[4:], "--for", "size=0.5")
    assert effformer.load_model(small).transforms
    again = refusal("compress", str(small), "-o", str(tmp_path / "twice"))
    assert "already quantized" in again
    assert "Add --out" in refusal("compress", str(saved))
    where = refusal("compress", str(saved), "--where", "blokcs.*", "-o", str(tmp_path / "x"))
    assert "matches no module" in where
    assert "did you mean" in refusal("compress", str(saved), "--scheme", "nf5", "-o", "x")


def test_linearize(saved: Path, tmp_path: Path) -> None:
    softmax, flow, run = (tmp_path / name for name in ("softmax", "flow", "run"))
    invoke("build", "sit-nano", *SMALL, "-o", str(softmax))
    words = ("--data", "digits", "--steps", "2", "--whole", "1", "--batch", "4", "--run", str(run))
    data = answer("linearize", str(softmax), *words, "--set", "attn.eps=1e-5", "-o", str(flow))
    assert {one["after"] for one in data["layers"]} == {"flow"}
    assert effformer.load_model(flow).config.at("attn.core.eps") == 1e-5
    other = (*words[:-1], str(tmp_path / "other"), "--attn", "sana", "-o", str(tmp_path / "sana"))
    assert "effformer bench" in invoke("linearize", str(softmax), *other).stdout
    out = ("-o", str(tmp_path / "x"))
    assert "a different run" in refusal("linearize", str(softmax), *words, "--attn", "sana", *out)
    assert "no softmax attention" in refusal("linearize", str(saved), *words, *out)
    assert "all pairs of tokens" in refusal(
        "linearize", str(softmax), *words, "--attn", "topk", *out
    )
    assert "--data" in refusal("linearize", str(softmax), *out)
    assert "Add --out" in refusal("linearize", str(softmax), *words)
    assert "whose weights would be lost" in refusal(
        "linearize", str(softmax), *words, "-o", str(softmax)
    )
    assert not (tmp_path / "x").exists()


def test_prune(saved: Path, tmp_path: Path) -> None:
    half = tmp_path / "half"
    data = answer("prune", str(saved), "--keep", "0.5", "-o", str(half))
    assert data["params_ratio"] < 1
    assert effformer.load_model(half).config.ffn.hidden < effformer.load_model(
        saved
    ).config.ffn.width(48)
    words = ("--scheme", "activation", "--data", "digits", "--samples", "32", "--units", "channels")
    text = invoke("prune", str(saved), "--params", "0.8", *words, "-o", str(tmp_path / "p")).stdout
    assert "relative output error" in text
    out = ("-o", str(tmp_path / "x"))
    assert "cannot be met" in refusal("prune", str(saved), "--macs", "0.01", *out)
    assert "got keep and macs" in refusal(
        "prune", str(saved), "--macs", "0.5", "--keep", "0.5", *out
    )
    assert "matches no module" in refusal("prune", str(saved), "--where", "blokcs.*", *out)
    assert "'magnitude'" in refusal("prune", str(saved), "--scheme", "magnitud", *out)
    assert "is measured on data=" in refusal("prune", str(saved), "--scheme", "taylor", *out)
    assert "Add --out" in refusal("prune", str(saved))
    assert not (tmp_path / "x").exists()


def test_compress_looks_at_data(saved: Path, tmp_path: Path) -> None:
    scheme = ("compress", str(saved), "--scheme", "gptq", "--set", "block=16")
    data = answer(*scheme, "--data", "sampler", "--samples", "2", "-o", str(tmp_path / "drawn"))
    assert "gptq" in {layer["scheme"] for layer in data["layers"]}
    file = tmp_path / "inputs.safetensors"
    model = effformer.load_model(saved)
    save_file({k: x.contiguous() for k, x in model.example_inputs(4).items()}, file)
    data = answer(*scheme, "--data", str(file), "-o", str(tmp_path / "filed"))
    assert data["output_error"] < 1
    out = ("-o", str(tmp_path / "x"))
    assert "give data=" in refusal(*scheme, *out)
    assert "no readable safetensors file" in refusal(*scheme, "--data", "none.safetensors", *out)
    assert "missing a required argument: 't'" in refusal(*scheme, "--data", "digits", *out)
    assert not (tmp_path / "x").exists()


def test_convert(tmp_path: Path) -> None:
    folder, there = tmp_path / "dit", tmp_path / "official.safetensors"
    invoke("build", "dit-nano", "-o", str(folder))
    assert answer("convert", str(folder), "--to", "official", "-o", str(there))["to"] == "official"
    back = tmp_path / "back.safetensors"
    data = answer("convert", str(there), "--model", "dit-nano", "-o", str(back))
    assert data["from"] == "official"
    assert "add --model" in refusal("convert", str(there), "-o", str(back))
    unknown = refusal("convert", str(folder), "--to", "offical", "-o", str(back))
    assert "did you mean 'official'" in unknown


def test_doctor() -> None:
    data = answer("doctor")
    assert set(data["self_test"].values()) == {"ok"}
    assert data["softmax_backends"][:2] == ["sdpa", "reference"]
    assert "torch" in invoke("doctor").stdout


def test_doctor_says_when_spinning_hurts(monkeypatch: pytest.MonkeyPatch) -> None:
    verb = importlib.import_module("effformer.cli.doctor")
    asked: list[tuple[str, dict[str, str]]] = []
    seconds = {"spin": "0.5"}

    def answered(command: list[str], environment: dict[str, str]) -> str:
        asked.append((command[-1], environment))
        sleeps = environment.get("OMP_WAIT_POLICY") == "PASSIVE"
        return "0.02" if sleeps else "0.03" if command[-1] == "1" else seconds["spin"]

    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    monkeypatch.setattr(verb, "_answer", answered)
    place = verb._beside_another(2)
    assert place == {"one": 0.03, "spin": 0.5, "sleep": 0.02}
    assert [count for count, _ in asked] == ["1", "2", "2"]
    assert "OMP_WAIT_POLICY" not in asked[1][1]  # as a program that says nothing
    assert "spinning hurts here" in " ".join(verb._told(place))
    assert "does not hurt" in " ".join(verb._told(place | {"spin": 0.02}))
    assert "one thread" in " ".join(verb._told(None))


def test_threads_of_the_command_line_sleep_when_they_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = importlib.import_module("effformer.cli.main")
    seen: list[str | None] = []
    monkeypatch.setattr(entry, "app", lambda: seen.append(os.environ.get("OMP_WAIT_POLICY")))
    for name in QUIET:
        monkeypatch.setenv(name, "")  # what is there is put back afterwards
        monkeypatch.delenv(name)
    entry.main()
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")  # who says otherwise is heard
    entry.main()
    assert seen == ["PASSIVE", "ACTIVE"]


def test_interruptions_say_what_is_intact(monkeypatch: pytest.MonkeyPatch, saved: Path) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("effformer.io.save_pretrained", interrupted)
    result = invoke("build", "sit-nano", "-o", str(saved), code=130)
    assert "interrupted; the target holds what it held before" in result.stderr
    assert effformer.load_model(saved).config.num_classes == 10


def test_unexpected_errors_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("effformer.build.build_model", broken)
    result = CliRunner().invoke(main.app, ["build", "sit-nano"])
    assert result.exit_code == 1
    assert isinstance(result.exception, RuntimeError)


def test_traceback_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(common.TRACEBACK, "1")
    result = CliRunner().invoke(main.app, ["build", "dit-bb"])
    assert isinstance(result.exception, ValueError)


@pytest.mark.parametrize(
    ("pairs", "made"),
    [
        (["a=1", "b=x", "c=true", "d=null"], {"a": 1, "b": "x", "c": True, "d": None}),
        (["attn=flow", "attn.eps=1e-5"], {"attn": {"name": "flow", "eps": 1e-5}}),
        (["attn.eps=1e-5", "attn=flow"], {"attn": {"name": "flow", "eps": 1e-5}}),
        (["a.b.c=[1, 2]"], {"a": {"b": {"c": [1, 2]}}}),
        (["x=a=b"], {"x": "a=b"}),
    ],
)
def test_overrides(pairs: list[str], made: dict[str, Any]) -> None:
    assert common.overrides(pairs=pairs) == made


def test_convert_writes_and_reads_shards(tmp_path: Path) -> None:
    folder = tmp_path / "dit"
    invoke("build", "dit-nano", "-o", str(folder))
    there, back = tmp_path / "w.safetensors.index.json", tmp_path / "ours.safetensors"
    words = ("--to", "official", "--shard", "0.0002")
    assert answer("convert", str(folder), *words, "-o", str(there))["to"] == "official"
    shards = sorted(tmp_path.glob("w-*.safetensors"))
    assert len(shards) > 2
    (shown,) = answer("show", str(there))
    size = sum(p.numel() for p in effformer.build_model("dit-nano").parameters())
    assert (shown["kind"], shown["parameters"]) == ("weights", size)
    assert shown["numbers"] == {"float32": size}
    assert "dit (official)" in shown["may be"]
    assert answer("convert", str(there), "-m", "dit-nano", "-o", str(back))["from"] == "official"
    expected = effformer.load_model(folder).state_dict()
    found = effformer.io.read_weights(back)
    assert all(torch.equal(found[key], x) for key, x in expected.items())
    needs = refusal("convert", str(folder), *words, "-o", str(tmp_path / "x.safetensors"))
    assert "shards have an index; name it x.safetensors.index.json" in needs
    shards[0].unlink()
    for words in (("show",), ("convert", "-m", "dit-nano", "-o", str(back), "--force")):
        said = refusal(words[0], str(there), *words[1:])
        assert "which is missing; copy all shards beside it" in said


@pytest.mark.slow
def test_bundles_of_texts_and_of_streams(saved: Path, tmp_path: Path) -> None:
    encoder, stream = tmp_path / "bert", tmp_path / "lmu"
    sizes = ("--set", "dim=16", "--set", "heads=2", "--set", "vocab=96", "--set", "context=32")
    invoke("build", "bert-tiny", *sizes, "-o", str(encoder))
    invoke("build", "lmu-sequence-tiny", "-o", str(stream))
    vocabulary = str(Path(__file__).parents[1] / "saved/texts")
    words = ("export", str(encoder), "--tokenizer", vocabulary)
    data = answer(*words, "--quantize", "dynamic", "-o", str(tmp_path / "texts"))
    assert data["kind"] == "texts"
    assert data["quantized"]["quantized"] > 0
    assert (
        "the runner differs by" in invoke("export", str(stream), "-o", str(tmp_path / "s")).stdout
    )
    for place, kind in (("texts", "texts"), ("s", "streams")):
        assert answer("verify", str(tmp_path / place))["kind"] == kind
        assert "## Latency" in invoke("card", str(tmp_path / place), "--latency").stdout
    out = ("-o", str(tmp_path / "x"))
    assert "--steps means nothing to a bundle of texts" in refusal(*words, "--steps", "2", *out)
    streams = refusal("export", str(stream), "--quantize", "int8", *out)
    assert "--quantize means nothing to a bundle of streams" in streams
    assert "takes no tokens and mask" in refusal(
        "export", str(saved), "--tokenizer", vocabulary, *out
    )
    assert "--tokenizer means nothing to --format onnx" in refusal(
        "export", str(encoder), "--tokenizer", vocabulary, "-o", str(tmp_path / "x.onnx")
    )
    assert "is a bundle of texts" in refusal(
        "sample", str(tmp_path / "texts"), "--labels", "1", "-o", str(tmp_path / "x.png")
    )
    assert not (tmp_path / "x").exists()
