"""IFactFormer and FactFormer: published sizes, weights, other grids, rollout, bad input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from effformer.export import export_onnx
from effformer.models import FactFormer, IFactFormer
from effformer.models.factformer import PRESETS, GridOperator
from torch import Tensor, nn

import effformer
from effformer.checks import CapabilityError
from effformer.nn.embeddings import FourierPositions

SMALL: dict[str, Any] = {"dim": 24, "heads": 2, "attn": {"head_dim": 6}}


def build(name: str = "ifactformer-tiny", **overrides: Any) -> GridOperator:
    torch.manual_seed(0)
    model = effformer.build_model(name, **{**SMALL, **overrides})
    assert isinstance(model, GridOperator)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p), alpha=0.1)
    return model.eval()


def fields(model: GridOperator, *grid: int, batch: int = 2) -> Tensor:
    config = model.config
    return torch.randn(batch, config.window, config.channels, *(grid or config.grid))


@pytest.mark.parametrize("name", ["ifactformer-m", "ifactformer-o"])
def test_published_parameter_counts(name: str) -> None:
    with torch.device("meta"):
        model = effformer.build_model(name)
        shallow = effformer.build_model(name, block={"times": 1})
    counts = [sum(p.numel() for p in m.parameters()) for m in (model, shallow)]
    assert counts == [PRESETS[name].params] * 2
    assert sum(p.numel() for p in model.parameters() if not p.requires_grad) == 144
    assert model.config.block.times == 10


@pytest.mark.parametrize("name", [n for n in PRESETS if n.startswith("factformer")])
def test_factformer_tasks_build(name: str) -> None:
    with torch.device("meta"):
        model = effformer.build_model(name)
    axes = {b.attn.part.axes[0].width for b in model.blocks}  # type: ignore[union-attr]
    config = model.config
    assert axes == {config.attn.head_dim * config.attn.multiplier}
    assert config.attn.multiplier == len(config.grid)


@pytest.mark.parametrize("grid", [(7,), (6, 5), (3, 4, 5), (2, 3, 2, 3)])
@pytest.mark.parametrize("attn", ["factorized-parallel", "factorized-chained"])
def test_any_number_of_axes(grid: tuple[int, ...], attn: str) -> None:
    model = build(grid=grid, attn={"name": attn, "head_dim": 6})
    x = fields(model)
    out = model(x)
    assert out.shape == (2, 1, 1, *grid)
    out.square().sum().backward()
    silent = [n for n, p in model.named_parameters() if p.requires_grad and not p.grad.any()]  # type: ignore[union-attr]
    assert not silent


def test_other_grids_and_coordinates() -> None:
    model = build(lengths=(1.0, 3.0))
    x = fields(model, 9, 13)
    out = model(x)
    assert out.shape == (2, 1, 1, 9, 13)
    given = (torch.linspace(0, 1, 9), torch.linspace(0, 3, 13))
    torch.testing.assert_close(model(x, given), out, rtol=1e-4, atol=1e-5)
    stretched = (given[0], given[1] * 2)
    assert not torch.allclose(model(x, stretched), out, atol=1e-3)


@pytest.mark.parametrize("name", ["ifactformer-tiny", "factformer-tiny"])
def test_increments_are_added_to_the_last_frame(name: str) -> None:
    model, plain = build(name, increment=True), build(name)
    x = fields(model, 6, 5)
    torch.testing.assert_close(model(x), x[:, -1:] + plain(x))
    assert model.rollout(x, 3).shape == (2, 3, 1, 6, 5)


def test_samples_and_layers() -> None:
    model = build(depth=2)
    x = fields(model, batch=3)
    whole = model(x)
    for i in range(3):
        torch.testing.assert_close(model(x[i : i + 1])[0], whole[i], rtol=1e-4, atol=1e-5)
    tables = [p.frequencies for p in model.positions if isinstance(p, FourierPositions)]
    assert len(tables) == 2
    assert not torch.equal(tables[0], tables[1])


@pytest.mark.parametrize(
    ("name", "window", "per_call"),
    [("ifactformer-tiny", 1, 1), ("ifactformer-tiny", 3, 1), ("factformer-tiny", 4, 2)],
)
def test_rollout_feeds_predictions_back(name: str, window: int, per_call: int) -> None:
    model = build(name, window=window)
    x = fields(model, 6, 5)
    frames = [*x.unbind(1)]
    while len(frames) < window + 5:
        frames += model(torch.stack(frames[-window:], dim=1)).unbind(1)
    expected = torch.stack(frames[window : window + 5], dim=1)
    assert model(x).shape[1] == per_call
    torch.testing.assert_close(model.rollout(x, 5), expected)
    assert model.rollout(x, 1).shape[1] == 1


def test_factformer_frames_differ_by_their_time() -> None:
    model = build("factformer-tiny")
    assert isinstance(model, FactFormer)
    x = fields(model, 6, 6)
    out = model(x)
    model.times.data[1, 0] += 3.0
    again = model(x)
    torch.testing.assert_close(again[:, 0], out[:, 0])
    assert not torch.allclose(again[:, 1], out[:, 1])


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("iterated", [True, False])
def test_official_keys_both_ways(depth: int, iterated: bool, tmp_path: Path) -> None:
    block = {} if iterated else {"block": "prenorm"}
    model, other = (
        build(depth=depth, grid=(5, 4, 3), channels=3, window=2, **block) for _ in range(2)
    )
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    path = effformer.save_weights(model, tmp_path / "m.safetensors", layout="official")
    report = effformer.load_weights(other, path)
    assert report.layout == "official"
    assert not report.missing
    for key, value in model.state_dict().items():
        torch.testing.assert_close(other.state_dict()[key], value, rtol=0, atol=0)
    official = effformer.io.read_weights(path)
    assert official["simple_to_out.1.weight"].shape == (12, 24, 1)
    assert official["to_in.2.weight"].shape == (24, 12, 2, 1)
    table = official[f"encoder.layers.{depth - 1}.1.low_rank_kernel_z.pos_emb.inv_freq"]
    torch.testing.assert_close(table, 10_000 ** (-torch.arange(9) / 9))


def test_saves_and_loads(tmp_path: Path) -> None:
    model = build()
    effformer.save_pretrained(model, tmp_path / "model")
    again = effformer.load_model(tmp_path / "model")
    x = fields(model, 7, 8)
    torch.testing.assert_close(again.eval()(x), model(x), rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ifactformer-tiny", "factformer-tiny"])
def test_exports_at_other_grids(name: str, tmp_path: Path) -> None:
    model = build(name)
    # kernels near zero are normalised: on four cells rounding grows a thousandfold
    report = export_onnx(
        model, tmp_path / "m.onnx", (fields(model, 6, 8),), dynamic=model.dynamic_axes(),
        tolerance=1e-3,
    )  # fmt: skip
    assert report.parity is not None
    assert len(report.parity.cases) >= 3
    assert report.parity.passed


def test_parts_can_be_swapped() -> None:
    for changes in ({"attn": "softmax"}, {"attn": "flow", "ffn": "swiglu"}, {"block": "postnorm"}):
        model = build(**changes)
        assert model(fields(model, 5, 6)).shape == (2, 1, 1, 5, 6)
    with pytest.raises(CapabilityError, match=r"'macaron' cannot do without an FFN"):
        build(block="macaron")
    wide = build(block={"name": "iterate", "body": "macaron"}, ffn="mlp")
    assert wide(fields(wide, 5, 6)).isfinite().all()


def test_learns_a_field() -> None:
    """A few steps on one pair halve the error: the near-zero kernels of the start do learn."""
    torch.manual_seed(0)
    model = effformer.build_model("ifactformer-tiny", **SMALL)
    x = torch.randn(2, 1, 1, 8, 8)
    y = x.roll(1, -1) - 0.5 * x.roll(1, -2)
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=3e-3), []
    for _ in range(60):
        loss = nn.functional.mse_loss(model(x), y) / y.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_bad_input_and_configs() -> None:
    model = build()
    with pytest.raises(
        ValueError, match=r"x: expected shape \(B, 1, 1, n_1, n_2\), got \(2, 1, 8, 8\)"
    ):
        model(torch.zeros(2, 1, 8, 8))
    with pytest.raises(
        ValueError, match=r"coords: expected one \(n,\) tensor for every axis of \(8, 6\)"
    ):
        model(torch.zeros(1, 1, 1, 8, 6), (torch.zeros(8), torch.zeros(8)))
    with pytest.raises(ValueError, match=r"rollout: steps must be at least 1, got 0"):
        model.rollout(torch.zeros(1, 1, 1, 8, 8), 0)
    with pytest.raises(ValueError, match=r"reads 1 fields and predicts 2"):
        build(out_channels=2).rollout(torch.zeros(1, 1, 1, 8, 8), 3)
    with pytest.raises(ValueError, match=r"divisible by channels, got dim=24, channels=5"):
        build(channels=5)
    with pytest.raises(
        ValueError, match=r"lengths: one for every axis of grid \(16, 16\), got \(1.0,\)"
    ):
        build(lengths=(1.0,))
    with pytest.raises(ValueError, match=r"grid\[1\] must be at least 1, got 0"):
        build(grid=(4, 0))
    with pytest.raises(ValueError, match=r"window must be at least 1, got 0"):
        build(window=0)
    with pytest.raises(ValueError, match=r"out_channels must be at least 1, got 0"):
        build(out_channels=0)
    with pytest.raises(ValueError, match=r"increment: 2 fields cannot be added to 1 channels"):
        build(out_channels=2, increment=True)
    with pytest.raises(ValueError, match=r"steps must be at least 1, got 0"):
        build("factformer-tiny", steps=0)
    with pytest.raises(ValueError, match=r"latent width 36 .* is not divisible by 8"):
        build("factformer-tiny", latent_ratio=1.5)
    with pytest.raises(ValueError, match=r"axes=2, but the grid of this model has 3"):
        build(grid=(2, 2, 2), attn={"axes": 2})
    assert isinstance(model, IFactFormer)
