"""DiT-DH: vectors for every token, two widths, initial zeros, shifted flows, layouts, other parts, bad input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from effformer.export import export_onnx
from effformer.models import DiTDH
from torch import Tensor

import effformer
from effformer.cache import cached
from effformer.checks import CapabilityError
from effformer.flow import FlowMatching, Guidance, TimeGrid, adapt, sample


def awake(**options: Any) -> DiTDH:
    """A small model with nothing at zero."""
    torch.manual_seed(0)
    model = effformer.build_model("ditdh-nano", num_classes=10, **options)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.1)
    assert isinstance(model, DiTDH)
    return model.eval()


def inputs(model: DiTDH, batch: int = 2) -> dict[str, Tensor]:
    return model.example_inputs(batch, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_the_head_is_modulated_for_every_token() -> None:
    model = awake()
    x, t, y = inputs(model).values()
    each = model.encode(x, t, y)
    assert each.shape == (2, 64, 96)
    out = model(x, t, y)
    assert torch.equal(model.velocity(x, t, each), out)
    mods: list[Any] = []
    wide = model.blocks[-1]
    wide.modulation.register_forward_hook(lambda _, args, made: mods.append(made))
    nearby = model.velocity(x + 0.1, t, each)  # what the encoder made serves again
    assert [m.shape for m in mods[0]] == [(2, 64, 96)] * 6
    assert not torch.allclose(nearby, out, atol=1e-3)
    wide.attn.part.proj.weight.zero_()  # tokens do not meet
    changed = each.clone()
    changed[:, 9] += 1
    found = (model.velocity(x, t, changed) - model.velocity(x, t, each)).abs().amax(dim=1)
    assert (found.flatten(1) > 1e-4).nonzero().tolist() == [[0, 9], [1, 9]]


@torch.no_grad()
def test_a_fresh_model_predicts_nothing() -> None:
    model = effformer.build_model("ditdh-nano")
    assert not model(**inputs(model)).any()


def test_every_parameter_learns() -> None:
    model = awake().train()
    given = inputs(model)
    data = torch.randn_like(given["x"])
    FlowMatching(FlowMatching.Config())(adapt(model), data, y=given["y"]).loss.backward()
    idle = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert idle == {"pos_embed", "time_embed.frequencies"}


@torch.no_grad()
def test_samples_of_other_grids_and_guidance() -> None:
    model = awake()
    grid = TimeGrid.uniform(3).shifted(2.83)
    noise, y = torch.randn(2, 4, 6, 10), torch.tensor([1, 2])
    out = sample(adapt(model), noise, grid=grid, guidance=Guidance(1.3, {"y": 10}), y=y).x
    assert out.shape == noise.shape


@torch.no_grad()
def test_caching_stays_within_one_width() -> None:
    model, y = awake(), torch.tensor([1])
    noise = torch.randn(1, 4, 8, 8)
    exact = sample(adapt(model), noise, steps=10, y=y).x
    field = cached(adapt(model), {"name": "reuse", "every": 2}, blocks=slice(0, 2))
    assert not torch.equal(sample(field, noise, steps=10, y=y).x, exact)
    with pytest.raises(CapabilityError, match=r"turn tokens \(1, 64, 48\) into \(1, 64, 96\)"):
        sample(cached(adapt(model), "reuse"), noise, steps=10, y=y)


def test_saved_and_published_files_come_back(tmp_path: Path) -> None:
    model, other = awake(), effformer.build_model("ditdh-nano", num_classes=10).eval()
    given = inputs(model)
    expected = model(**given)
    again = effformer.load_model(effformer.save_pretrained(model, tmp_path / "m"))
    assert torch.equal(again(**given), expected)
    effformer.load_weights(other, model.LAYOUTS[0].from_ours(model.state_dict(), model.config))
    assert torch.equal(other(**given), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"attn": "flow", "layers": {"-1": {"attn": "softmax"}}},
        {"tokens": "dynamic"},
        {"tokens": "tome", "rope": None},
        {"width": "dynamic"},
        {"layers": {"2": {"ffn": "mlp", "block": {"name": "parallel"}}}},
    ],
    ids=str,
)
@torch.no_grad()
def test_other_parts_in_both_widths(options: dict[str, Any]) -> None:
    model = awake(**options)
    given = inputs(model, 3)
    out = model(**given)
    for i in range(3):
        alone = model(**{k: x[i : i + 1] for k, x in given.items()})
        torch.testing.assert_close(alone, out[i : i + 1], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_exports_for_other_sizes(tmp_path: Path) -> None:
    report = export_onnx(awake(), tmp_path / "m.onnx")
    assert report.parity is not None
    assert report.parity.passed


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="wide_depth=4 blocks are more than all, depth=3"):
        effformer.build_model("ditdh-nano", wide_depth=4)
    with pytest.raises(ValueError, match="kind 'mixed' differs by layer"):
        effformer.build_model("ditdh-nano", rope={"kind": "mixed"})
    with pytest.raises((TypeError, ValueError), match="learn_sigma"):
        effformer.build_model("ditdh-nano", learn_sigma=True)
    model = awake()
    given = inputs(model)
    with pytest.raises(ValueError, match=r"x: expected shape \(B, 4, H, W\)"):
        model(**given | {"x": torch.zeros(2, 3, 8, 8)})
    with pytest.raises(ValueError, match=r"cond has shape \(2, 7, 96\)"):
        model.velocity(given["x"], given["t"], torch.zeros(2, 7, 96))
