"""Two streams that are one row to all but the modulation."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import effformer
from effformer.blocks import ExpertAdaLN, PreNorm
from effformer.checks import CapabilityError
from effformer.context import Context, Packing, Stream
from effformer.nn.rope import GridRope
from effformer.site import Site


def build(**site: int) -> ExpertAdaLN:
    torch.manual_seed(0)
    parts = {"attn": effformer.config.resolve("attention", "softmax")}
    parts["ffn"] = effformer.config.resolve("ffn", "mlp")
    block = ExpertAdaLN(ExpertAdaLN.Config(), Site(dim=24, heads=2, **site), **parts)
    with torch.no_grad():
        for p in block.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return block.eval()


@torch.no_grad()
def test_without_conditions_it_is_a_block_of_one_stream_on_the_row() -> None:
    block = build()
    row = PreNorm(
        PreNorm.Config(), block.site, attn=block.attn.part.config, ffn=block.ffn.part.config
    ).eval()
    row.load_state_dict(block.state_dict())
    x, y = torch.randn(2, 7, 24), torch.randn(2, 3, 24)
    expected = row(torch.cat([y, x], dim=1))
    torch.testing.assert_close(torch.cat(block(x, y)[::-1], dim=1), expected, rtol=0, atol=0)


@torch.no_grad()
def test_each_stream_has_vectors_masks_and_places_of_its_own() -> None:
    block = build(cond_dim=5)
    x, y, cond = torch.randn(2, 6, 24), torch.randn(2, 3, 24), torch.randn(2, 5)
    table = GridRope(GridRope.Config(), 12, heads=2, depth=1, axes=1)
    (rope,) = table(torch.arange(6.0).view(1, 6, 1), like=x)
    video, wording = Context(cond=cond, rope=rope), Context(cond=cond)
    out_x, out_y = block(x, y, video, wording)
    turned_x, turned_y = block(x, y.flip(1), video, wording)  # y is a set, x is not
    torch.testing.assert_close(turned_x, out_x, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(turned_y, out_y.flip(1), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(block(x.flip(1), y, video, wording)[0].flip(1), out_x, atol=1e-3)
    mask = torch.tensor([[True, True, False]] * 2)
    short = block(x, y[:, :2], video, wording)
    masked = block(x, y, video, Context(cond=cond, mask=mask))
    torch.testing.assert_close(masked[0], short[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(masked[1][:, :2], short[1], rtol=1e-4, atol=1e-5)
    torch.nn.init.zeros_(block.y_modulation.linear.weight)
    torch.nn.init.zeros_(block.y_modulation.linear.bias)
    closed = block(x, y, video, wording)
    assert torch.equal(closed[1], y)
    assert not torch.allclose(closed[0], x)


def test_what_two_streams_cannot_honour_is_refused() -> None:
    block, x = build(cond_dim=5), torch.randn(2, 4, 24)
    ctx, mask = Context(cond=torch.randn(2, 5)), torch.ones(2, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"y_ctx\.cond is None"):
        block(x, x, ctx)
    with pytest.raises(CapabilityError, match=r"packed=True; choices that can: joint"):
        block(x, x, ctx, replace(ctx, packing=Packing.from_mask(mask)))
    with pytest.raises(CapabilityError, match=r"key mask \(B, N\)"):
        block(x, x, replace(ctx, mask=mask[:, None]), ctx)
    with pytest.raises(CapabilityError, match=r"do not take ctx\.stream"):
        block(x, x, replace(ctx, stream=Stream({})), ctx)
