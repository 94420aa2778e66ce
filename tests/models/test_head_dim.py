"""Heads of a width of their own under rotary positions: the tables are made for them, or refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import effformer
from effformer.checks import CapabilityError

HEADS, WIDE = 2, 8
VIT: dict[str, Any] = {
    "positions": {"absolute": False, "rope": {}}, "prefix": {"class_token": False},
    "head": {"pool": "avg"},
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "lightningdit-nano": {"num_classes": 4, "input_size": 4},
    "vit-nano": VIT,
}
VIEWS: dict[str, dict[str, Any]] = {
    "full": {"attn": {"head_dim": WIDE}},
    "rows": {"attn": {"name": "axes", "over": "w", "mixer": {"head_dim": WIDE}}},
    "columns": {"attn": {"name": "axes", "over": "h", "mixer": {"head_dim": WIDE}}},
    "schedule": {"attn": {"head_dim": WIDE}, "axes": "h"},
}


def turned(x: Tensor, row: int, column: int, base: float) -> Tensor:
    """One head, pair by pair: the first half of the pairs turns with the row."""
    out = []
    quarter = len(x) // 4
    for i in range(len(x) // 2):
        angle = torch.tensor((row, column)[i // quarter] * base ** (-(i % quarter) / quarter))
        a, b = x[2 * i], x[2 * i + 1]
        out += [a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()]
    return torch.stack(out)


def slow(attention: Any, h: Tensor, columns: int, view: str, base: float) -> Tensor:
    """Token by token; a view sees its own line."""
    q, k, v = (h @ attention.qkv.weight.T + attention.qkv.bias).chunk(3, dim=-1)
    places = [divmod(n, columns) for n in range(h.shape[1])]
    out = []
    for sample in range(h.shape[0]):
        rows = []
        for n, (row, column) in enumerate(places):
            same = {
                "full": range(len(places)),
                "rows": [m for m, place in enumerate(places) if place[0] == row],
            }.get(view, [m for m, place in enumerate(places) if place[1] == column])
            heads = []
            for j in range(HEADS):
                part = slice(j * WIDE, (j + 1) * WIDE)
                query = turned(q[sample, n, part], row, column, base)
                keys = torch.stack([turned(k[sample, m, part], *places[m], base) for m in same])
                weight = (keys @ query / WIDE**0.5).softmax(dim=0)
                heads.append(weight @ v[sample, list(same), part])
            rows.append(torch.cat(heads))
        out.append(torch.stack(rows))
    return torch.stack(out) @ attention.proj.weight.T + attention.proj.bias


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("name", FAMILIES)
def test_tables_are_made_for_the_heads(name: str, view: str) -> None:
    torch.manual_seed(0)
    model: Any = effformer.build_model(name, depth=1, **FAMILIES[name], **VIEWS[view]).double()
    seen: dict[str, Any] = {}

    def keep(module: Any, given: Any, out: Any) -> None:
        seen["given"] = given

    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    mixer = model.blocks[0].attn.part
    handle = mixer.register_forward_hook(keep)
    model(**model.example_inputs(2))
    handle.remove()
    ctx = seen["given"][1]
    attention = next(m for m in mixer.modules() if hasattr(m, "qkv"))
    assert model.rope.head_dim == WIDE != model.config.dim // HEADS
    assert ctx.rope.cos.shape == (16, WIDE)
    h = torch.randn(2, 16, model.config.dim, dtype=torch.float64, requires_grad=True)
    out = mixer(h, ctx)
    base = 10000.0 if name == "lightningdit-nano" else 100.0
    expected = slow(attention, h, 4, view, base)
    # tables are computed in float32
    size = float(expected.detach().abs().max())
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6 * size)
    probe = torch.randn_like(expected)
    (grad,) = torch.autograd.grad((out * probe).sum(), h)
    (same,) = torch.autograd.grad((expected * probe).sum(), h)
    torch.testing.assert_close(grad, same, rtol=1e-6, atol=1e-6 * float(same.abs().max()))


@pytest.mark.parametrize("name", FAMILIES)
def test_layers_keep_the_width_or_are_refused(name: str) -> None:
    options = {**FAMILIES[name], "attn": {"head_dim": WIDE}}
    mixed: Any = effformer.build_model(name, **options, layers={"1": {"attn": "flow"}})
    assert mixed.blocks[1].attn.part.head_dim == WIDE
    assert mixed(**mixed.example_inputs(1)) is not None
    for attn in ({"head_dim": 12}, {"name": "axes", "over": "h", "mixer": {"head_dim": 12}}):
        with pytest.raises(
            CapabilityError, match=r"heads of width 12, .* made for 8 \(head_dim=8 wo"
        ):
            effformer.build_model(name, **options, layers={"0": {"attn": attn}})
    with pytest.raises(
        CapabilityError, match=r"heads of width 8, .* made for 24 \(head_dim=24 wou"
    ):
        effformer.build_model(name, **FAMILIES[name], layers={"0": {"attn": {"head_dim": 8}}})
    with pytest.raises(
        CapabilityError, match=r"cannot apply rotary embedding; choices: .*flow"
    ) as e:
        effformer.build_model(name, **options, layers={"1": {"attn": "gla"}})
    for able in str(e.value).partition("choices: ")[2].split(", "):
        assert effformer.build_model(name, **options, layers={"1": {"attn": able}})
    with pytest.raises(ValueError, match=r"heads of width 6; the width must be divisible by 4"):
        effformer.build_model(name, **FAMILIES[name], attn={"head_dim": 6})


def test_weights_of_such_heads_carry_their_tables() -> None:
    model: Any = effformer.build_model(
        "lightningdit-nano", **FAMILIES["lightningdit-nano"], attn={"head_dim": WIDE}
    )
    official = model.LAYOUTS[0].from_ours(model.state_dict(), model.config)
    assert official["feat_rope.freqs_cos"].shape == (16, WIDE)
    assert effformer.load_weights(model, official).layout == "official"
