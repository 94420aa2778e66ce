"""LMUFormer, dense and spiking: sizes, causality, prefixes, streams, layouts, export, bad input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import assert_close
from effformer.export import export_onnx
from effformer.models.lmuformer import PRESETS, SPIKING_PRESETS, LMUFormer

import effformer
from effformer import CapabilityError, FormatError
from effformer.io import read_weights
from effformer.nn.lif import LIF
from effformer.profile import profile

NAMES = ["lmuformer-tiny", "spiking-lmuformer-tiny"]
LAG = 5


def build(name: str, **overrides: Any) -> LMUFormer:
    """A small model whose norms have seen data, so that its neurons fire."""
    torch.manual_seed(1)
    model = effformer.build_model(name, **{"dim": 20, "channels": 6, **overrides})
    assert isinstance(model, LMUFormer)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            module.momentum = 1.0
    with torch.no_grad():
        model(clips(8))
    return model.eval()


def clips(batch: int = 2, frames: int = 30) -> torch.Tensor:
    return torch.randn(batch, frames, 6)


def streamed(model: LMUFormer, x: torch.Tensor, pieces: list[int]) -> torch.Tensor:
    state, outputs = model.init_state(x.shape[0]), []
    for piece in x.split(pieces, dim=1):
        out, state = model.step(piece, state)
        outputs.append(out)
    assert sum(o.shape[1] for o in outputs) == max(x.shape[1] - LAG, 0)
    return torch.cat([*outputs, model.finish(state)], dim=1)


@pytest.mark.parametrize(("name", "preset"), [*PRESETS.items(), *SPIKING_PRESETS.items()])
def test_parameters_of_the_published_sizes(name: str, preset: Any) -> None:
    with torch.device("meta"):
        model = effformer.build_model(name)
    if preset.params is not None:
        assert sum(p.numel() for p in model.parameters()) == preset.params


def test_parameters_and_work_by_part() -> None:
    model = effformer.build_model("lmuformer-speech")

    def count(module: torch.nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    assert count(model.embed) == 886_784
    assert count(model.blocks) == 726_017
    assert count(model.head) == 8_995
    spiking = effformer.build_model("spiking-lmuformer-speech")
    assert count(spiking.blocks) == 793_603
    work = profile(model)
    memory = model.blocks[0].attn.part.memory
    assert model.embed.macs(128) == 113_246_208
    maps = model.blocks[0].macs(128) - memory.macs(128)
    assert maps == 92_307_456
    # the head runs once on the mean, the memory is a convolution of 128 samples with 256 outputs
    assert work.total == 113_246_208 + maps + memory.macs(128) + 256 * 35
    assert memory.macs(128) == 128 * 128 * 256


def test_initial_values() -> None:
    model = effformer.build_model("lmuformer-speech")
    unit = model.blocks[0].attn.part
    for layer in (unit.write, unit.read, model.head):
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.15)
        assert not layer.bias.any()
    assert unit.proj.weight.std().item() == pytest.approx(256**-0.5 / 3**0.5, rel=0.05)


@pytest.mark.parametrize("name", NAMES)
def test_prefixes_and_means(name: str) -> None:
    model, x = build(name), clips()
    prefixes = model.prefix_logits(x)
    torch.testing.assert_close(prefixes[:, -1], model(x))
    h = model._features(x, effformer.Context())
    torch.testing.assert_close(model(x), model.head(h).mean(dim=1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        prefixes[:, 6], model.head(h[:, :7]).mean(dim=1), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_seen_beyond_five_frames(name: str) -> None:
    model, x = build(name), clips()
    changed = x.clone()
    changed[:, 20:] += 3
    before, after = model.prefix_logits(x), model.prefix_logits(changed)
    torch.testing.assert_close(after[:, : 20 - LAG], before[:, : 20 - LAG], rtol=0, atol=1e-6)
    assert not torch.allclose(after[:, 20 - LAG :], before[:, 20 - LAG :])


@pytest.mark.parametrize("pieces", [[1] * 30, [4, 1, 1, 20, 4], [30]])
@pytest.mark.parametrize("name", NAMES)
def test_a_stream_equals_the_clip(name: str, pieces: list[int]) -> None:
    model, x = build(name).double(), clips().double()  # no spike turns on a rounding error
    expected = model.prefix_logits(x)
    assert_close(streamed(model, x, pieces), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("frames", [1, 2, 5, 6])
@pytest.mark.parametrize("name", NAMES)
def test_clips_shorter_than_the_lag(name: str, frames: int) -> None:
    model, x = build(name).double(), clips(2, frames).double()
    out = streamed(model, x, [1] * frames)
    assert_close(out, model.prefix_logits(x), rtol=1e-9, atol=1e-10)


def test_spikes_of_a_stream_are_the_same_bits() -> None:
    model, x = build("spiking-lmuformer-tiny").double(), clips().double()
    assert isinstance(model.head_lif, LIF)
    seen: list[torch.Tensor] = []
    model.head_lif.register_forward_hook(lambda _, args, out: seen.append(out[0]))
    model(x)
    streamed(model, x, [1] * 30)
    assert 0.01 < seen[0].mean() < 0.99
    assert torch.equal(torch.cat(seen[1:], dim=1), seen[0])


@pytest.mark.parametrize("name", NAMES)
def test_states_are_values_of_constant_size(name: str) -> None:
    model, x = build(name), clips(1)
    _, early = model.step(x[:, :10], model.init_state(1))
    once, late = model.step(x[:, 10:], early)
    again, _ = model.step(x[:, 10:], early)
    torch.testing.assert_close(once, again, rtol=0, atol=0)
    first, second = (
        [t.shape for t in torch.utils._pytree.tree_leaves(s) if torch.is_tensor(t)]
        for s in (early, late)
    )
    assert first == second


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_learns(name: str) -> None:
    model = build(name).train()
    model(clips(16, 60)).square().sum().backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # a bias before a batch norm moves its mean only
    assert not silent


def test_other_mixers_stream_in_it() -> None:
    model = build("lmuformer-tiny", attn="flow", block="prenorm", ffn="mlp", heads=2)
    x = clips()
    expected = model.prefix_logits(x)
    torch.testing.assert_close(streamed(model, x, [3] * 10), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(CapabilityError, match="is not causal"):
        build("lmuformer-tiny", attn="relative")


@pytest.mark.parametrize("name", NAMES)
def test_layouts_both_ways(name: str, tmp_path: Path) -> None:
    model = build(name)
    path = effformer.save_weights(model, tmp_path / "official.safetensors", layout="official")
    state = read_weights(path)
    dim, order = 20, model.blocks[0].attn.part.memory.order
    assert state["block.0.attn.lmu.A"].shape == (order, order)
    assert state["block.0.attn.lmu.H"].shape == (order, model.config.frames)
    assert state["block.0.attn.lmu.fft_H"].shape == (order, model.config.frames + 1)
    assert state["block.1.mlp.fc1_conv.weight"].shape == (4 * dim, dim, 1)
    other = effformer.build_model(name, dim=20, channels=6).eval()
    wrapped = {f"module.{k}": v for k, v in state.items()}
    assert effformer.load_weights(other, wrapped).layout == "official"
    x = clips()
    torch.testing.assert_close(other(x), model(x), rtol=0, atol=0)
    bare = {k: v for k, v in state.items() if not k.endswith(("fft_H", "num_batches_tracked"))}
    assert not effformer.load_weights(other, bare).missing
    del state["head.bias"]
    with pytest.raises(FormatError, match=r"missing: head\.bias"):
        effformer.load_weights(other, state)


@pytest.mark.parametrize("name", NAMES)
def test_saving_and_loading(name: str, tmp_path: Path) -> None:
    model, x = build(name), clips()
    again = effformer.load_model(effformer.save_pretrained(model, tmp_path / "m"))
    assert again.config == model.config
    torch.testing.assert_close(again(x), model(x), rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_exports_for_any_number_of_frames(name: str, tmp_path: Path) -> None:
    model = build(name, depth=1)
    report = export_onnx(model, tmp_path / "m.onnx")
    assert report.parity is not None
    assert report.parity.passed
    assert len({str(case.shapes) for case in report.parity.cases}) >= 3


def test_bad_input() -> None:
    model = build("lmuformer-tiny")
    with pytest.raises(ValueError, match=r"x: expected shape \(B, N, 6\), got \(2, 30, 7\)"):
        model(torch.randn(2, 30, 7))
    with pytest.raises(ValueError, match="expected at least one frame"):
        model.prefix_logits(clips(2, 0))
    with pytest.raises(ValueError, match=r"step: expected shape \(B, N, 6\)"):
        model.step(torch.randn(2, 6), model.init_state(2))
    with pytest.raises(ValueError, match="finish needs at least one frame; call step before"):
        model.finish(model.init_state(2))
    with pytest.raises(ValueError, match=r"batch norms need whole clips in training; call eval"):
        model.train().step(clips(), model.init_state(2))
    with pytest.raises(ValueError, match="frames must be at least 1, got 0"):
        effformer.build_model("lmuformer-tiny", frames=0)
    with pytest.raises(ValueError, match="'chanels'; did you mean 'channels'"):
        effformer.build_model("lmuformer-tiny", chanels=3)
