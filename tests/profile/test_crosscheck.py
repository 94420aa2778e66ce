from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effformer import build_model
from effformer.profile import profile


def rows(model: nn.Module, inputs=None):
    p = profile(model, inputs, memory=False, cross_check=True)
    for row in p.cross_check:
        assert row.total is not None, row.error
        assert row.difference == row.total - p.total
        assert row.difference == row.unexplained + sum(e.macs for e in row.explanations)
    return p, *p.cross_check


@pytest.mark.parametrize("core", ["softmax", "linear", "flow"])
def test_everything_is_explained_for_dit(core: str) -> None:
    model = build_model("dit-nano", attn=core)
    p, by_torch, by_fvcore = rows(model)
    assert by_torch.unexplained == by_fvcore.unexplained == 0
    config = model.config
    norms = 4 * (2 * config.depth + 1) * (config.input_size // config.patch) ** 2 * config.dim
    missing = p.by_part["attn"] if core == "softmax" else 0
    assert by_torch.difference == -missing
    assert by_fvcore.difference == norms - missing


def test_unfused_attention_is_seen_by_both() -> None:
    model = build_model("dit-nano", attn={"name": "softmax", "backend": "reference"})
    _, by_torch, by_fvcore = rows(model)
    assert by_torch.difference == 0
    assert {e.reason.split(":")[0] for e in by_fvcore.explanations} == {"layer_norm"}


def test_timm_vit_and_torch_encoder() -> None:
    for model, shape in (
        (timm.create_model("vit_tiny_patch16_224", depth=2), (1, 3, 224, 224)),
        (nn.TransformerEncoderLayer(16, 4, batch_first=True), (2, 5, 16)),
    ):
        _, by_torch, by_fvcore = rows(model, torch.randn(*shape))
        assert by_torch.unexplained == by_fvcore.unexplained == 0


class Odd(nn.Module):
    """Operators that the counters treat in their own way."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.gn = nn.GroupNorm(2, 4, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.gn(self.bn(self.conv(x)))
        x = F.interpolate(x, scale_factor=2.0)
        x = torch.einsum("bchw->bhwc", x)
        y = torch.einsum("bhwc,bhwd->bcd", x, x)
        return torch.baddbmm(y, y, y) + F.adaptive_avg_pool2d(x, 1).mean()


def test_odd_operators_are_explained() -> None:
    p, by_torch, by_fvcore = rows(Odd(), torch.randn(2, 3, 11, 11))
    assert by_torch.difference == by_torch.unexplained == 0
    assert by_fvcore.unexplained == 0
    assert p.by_op["aten::baddbmm"] == 2 * 4 * 4 * 4
    words = " ".join(e.reason for e in by_fvcore.explanations)
    for word in ("batch_norm", "group_norm", "einsum without a product", "baddbmm", "upsample"):
        assert word in words


def test_a_module_that_is_not_called_as_a_core_counts_by_operators() -> None:
    class Squared(nn.Module):
        def forward(self, q: Tensor) -> Tensor:
            return q @ q.transpose(-2, -1)

        def macs(self, n: int, m: int | None = None, *, heads: int, head_dim: int) -> int:
            return 1

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.core = Squared()

        def forward(self, x: Tensor) -> Tensor:
            return self.core(x)

    p, by_torch, by_fvcore = rows(Around(), torch.randn(1, 2, 3, 5))
    assert p.total == 2 * 3 * 3 * 5
    assert by_torch.difference == by_fvcore.difference == 0


def test_what_nothing_explains_is_flagged(monkeypatch) -> None:
    from torch.utils import flop_counter

    wrong = {**flop_counter.flop_registry, torch.ops.aten.addmm: lambda *_, **__: 2 * 7}
    monkeypatch.setattr(flop_counter, "flop_registry", wrong)
    _, by_torch, _ = rows(nn.Linear(4, 4), torch.zeros(2, 4))
    assert by_torch.difference == by_torch.unexplained == 7 - 32
    full = profile(nn.Linear(4, 4), (torch.zeros(2, 4),), cross_check=True)
    assert "-25  UNEXPLAINED" in str(full)


def test_failures_of_other_counters_are_rows() -> None:
    with torch.device("meta"):
        model = build_model("dit-nano")
    by_torch, by_fvcore = profile(model, cross_check=True).cross_check
    assert by_torch.total is not None
    assert by_fvcore.total is None
    assert "meta device" in by_fvcore.error
    assert "failed" in str(profile(model, cross_check=True))
