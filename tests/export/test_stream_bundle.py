"""Bundles that read step by step: outputs of whole sequences, states, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from closeness import assert_close
from effformer.export import export_stream_bundle, open_bundle, read_graph
from effformer.export.pictures import BundleError
from effformer.export.streams import StreamBundle
from torch import nn

from effformer import build_model
from effformer.checks import CapabilityError

GPT = {"dim": 12, "heads": 2, "depth": 1, "vocab": 24, "context": 40}


def model(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    built = build_model(name, **options).eval()
    for p in built.parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=0.3)
    return built


@pytest.fixture(scope="module")
def linear(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    network = model("flowformer-gpt-nano", **GPT, attn="linear")
    folder = tmp_path_factory.mktemp("streams") / "bundle"
    assert export_stream_bundle(network, folder).error < 1e-4
    return network, folder


def test_steps_give_what_the_whole_gives_at_every_batch(linear: tuple[nn.Module, Path]) -> None:
    network, folder = linear
    opened = open_bundle(folder, 1)
    assert isinstance(opened, StreamBundle)
    tokens = torch.randint(0, 24, (3, 40))
    with torch.no_grad():
        expected = network(tokens)
    made, state = opened.read(tokens.numpy())
    assert_close(torch.from_numpy(made), expected, rtol=1e-4, atol=1e-5)
    assert state.position == 40
    one, middle = opened.read(tokens[:1, :17].numpy())
    again, _ = opened.read(tokens[:1, 17:].numpy(), middle)
    assert_close(
        torch.from_numpy(np.concatenate([one, again], 1)), expected[:1], rtol=1e-4, atol=1e-5
    )
    branch, _ = opened.step(tokens[:1, 17].numpy(), middle)  # a state is a value
    assert_close(torch.from_numpy(branch), expected[:1, 17], rtol=1e-4, atol=1e-5)
    with pytest.raises(BundleError, match="have at most 40 steps"):
        opened.step(tokens[:, 0].numpy(), state)


def test_a_step_costs_the_same_at_every_position(linear: tuple[nn.Module, Path]) -> None:
    """The graph has no length: all of its inputs have constant sizes but the batch."""
    _, folder = linear
    graph = read_graph(folder / "step.onnx")
    shapes = {v.name: v.shape for v in (*graph.inputs, *graph.outputs)}
    size = shapes["state"][1]
    assert shapes == {
        "tokens": ("batch", 1), "position": (), "state": ("batch", size),
        "output": ("batch", 24), "next_state": ("batch", size),
    }  # fmt: skip
    facts = json.loads((folder / "bundle.json").read_text())
    assert [v["name"] for v in (*facts["inputs"], *facts["outputs"])] == [*shapes]
    assert sum(count for count, _ in facts["start"]) == size


@pytest.mark.parametrize(
    ("name", "options"),
    [
        pytest.param("lmu-sequence-tiny", {}, marks=pytest.mark.slow),
        pytest.param("flowformer-gpt-nano", GPT, marks=pytest.mark.slow),
        pytest.param("flowformer-gpt-nano", GPT | {"attn": "performer"}, marks=pytest.mark.slow),
        pytest.param("flowformer-gpt-nano", GPT | {"attn": "lmu"}, marks=pytest.mark.slow),
        pytest.param("flowformer-gpt-nano", GPT | {"attn": "kda", "depth": 3}, marks=pytest.mark.slow),
        pytest.param("spiking-lmu-psmnist", {"hidden": 16, "memory": 12}, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_other_mixers_and_inputs(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    network = model(name, **options)
    assert export_stream_bundle(network, tmp_path / "b").error < 1e-4
    opened, whole = StreamBundle(tmp_path / "b"), network.example_inputs(1)
    x = next(iter(whole.values()))[:, :30]
    with torch.no_grad():
        expected = network(x) if "gpt" in name else network.prefix_logits(x)
    assert_close(torch.from_numpy(opened.read(x.numpy())[0]), expected, rtol=1e-4, atol=1e-5)
    assert opened.self_test() < 1e-4


def test_the_runner_needs_numpy_and_onnxruntime_alone(
    linear: tuple[nn.Module, Path], tmp_path: Path
) -> None:
    network, folder = linear
    code = (
        "import sys, runpy\n"
        "for name in ('torch', 'effformer'): sys.modules[name] = None\n"
        "sys.argv = ['run.py', '--tokens', '1,2,3', '--more', '4']\n"
        f"runpy.run_path({str(folder / 'run.py')!r}, run_name='__main__')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=tmp_path, capture_output=True, text=True
    )
    tokens = [1, 2, 3]
    with torch.no_grad():
        for _ in range(5):
            tokens.append(int(network(torch.tensor([tokens]))[0, -1].argmax()))
    assert done.stdout.strip() == ",".join(map(str, tokens[3:]))


def test_what_does_not_stream_is_refused(tmp_path: Path) -> None:
    for name, options, error, said in (
        ("vit-nano", {}, ValueError, "vit-nano does not stream; such models have"),
        ("flowformer-gpt-nano", GPT | {"attn": "softmax"}, CapabilityError, "grows with the sequence"),
        ("lmuformer-tiny", {}, CapabilityError, "lmuformer-tiny has a state that grows"),
    ):  # fmt: skip
        with pytest.raises(error, match=said):
            export_stream_bundle(model(name, **options), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_requests_that_cannot_be_served(linear: tuple[nn.Module, Path]) -> None:
    opened = StreamBundle(linear[1])
    state = opened.start(2)
    for wrong, said in (
        (np.zeros(2), "expected ids of tokens in 1 axes"), (np.array([0, 24]), r"lie in 0\.\.23"),
        (np.array([[1, 2]]), "expected ids"), (np.array([1]), "expected a state of 1 sequences"),
    ):  # fmt: skip
        with pytest.raises(BundleError, match=said):
            opened.step(wrong, state)
    with pytest.raises(BundleError, match="number of sequences must be"):
        opened.start(0)
