"""Axis views of token mixers."""

from __future__ import annotations

from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor

import effformer
from effformer.attention import Attention, Axes, Lines, Mixer
from effformer.attention.reference import axes_reference
from effformer.build import list_attention
from effformer.checks import CapabilityError
from effformer.config import resolve
from effformer.context import EMPTY, Context, Ledger, Packing, Rope, Stream, Tap
from effformer.nn.positions import grid_positions
from effformer.profile import profile
from effformer.site import Site

DIM, HEADS = 24, 3
SITE = Site(dim=DIM, heads=HEADS, path="here")
GRID = (2, 3, 4)
CASES = [(GRID, over) for over in ("t", "h", "w", "th", "tw", "hw", "thw")]
CASES += [((3, 4), "h"), ((3, 4), "w"), ((3, 4), "hw"), ((5,), "w")]
OPTIONS: dict[str, dict[str, Any]] = {
    "linformer": {"tokens": 30, "projected": 5},
    "longformer": {"window": 2, "global_tokens": 1},
    "nystrom": {"landmarks": 2, "conv": 3},
    "reformer": {"chunk": 3, "rounds": 2, "buckets": 4},
    "tdsm": {"segments": 1, "tokens": 2},
    "topk": {"keep": 2},
}


def make(over: str, mixer: str = "softmax", site: Site = SITE, **options: Any) -> Axes:
    inner = {"name": mixer, **OPTIONS.get(mixer, {}), **options}
    config = resolve("attention", {"name": "axes", "over": over, "mixer": inner})
    part = Axes(config, site)  # type: ignore[arg-type]
    for p in part.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return part.eval()


def tokens(grid: tuple[int, ...] = GRID, front: int = 0, batch: int = 2) -> Tensor:
    return torch.randn(batch, front + prod(grid), DIM, dtype=torch.float64)


@pytest.mark.parametrize(("grid", "over"), CASES)
@pytest.mark.parametrize("front", [0, 2])
def test_equals_the_definition(grid: tuple[int, ...], over: str, front: int) -> None:
    part = make(over).double()
    x = tokens(grid, front).requires_grad_()
    fast = part(x, Context(grid=grid))
    slow = torch.stack(
        [axes_reference(lambda s: part.mixer(s[None])[0], row, grid, over, front) for row in x]
    )
    torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-12)
    weight = torch.randn_like(fast)
    values = [x, *part.parameters()]
    ours = torch.autograd.grad((fast * weight).sum(), values)
    theirs = torch.autograd.grad((slow * weight).sum(), values)
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("mixer", list_attention(axes=""))
def test_any_mixer_sees_nothing_but_its_line(mixer: str) -> None:
    part, x = make("t", mixer), tokens().float()
    out = part(x, Context(grid=GRID)).unflatten(1, GRID)
    assert out.std() > 0
    changed = x.unflatten(1, GRID).clone()
    changed[:, :, 1, 2] *= -9  # enough to change what fires
    after = part(changed.flatten(1, 3), Context(grid=GRID)).unflatten(1, GRID)
    same = torch.ones(3, 4, dtype=torch.bool)
    same[1, 2] = False
    torch.testing.assert_close(after[:, :, same], out[:, :, same], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(after[:, :, 1, 2], out[:, :, 1, 2])


def test_full_grid_is_the_mixer_itself() -> None:
    part, x = make("thw").double(), tokens(front=1)
    torch.testing.assert_close(part(x, Context(grid=GRID)), part.mixer(x))


def test_a_grid_mixer_gets_the_grid_of_its_lines() -> None:
    part, x = make("th", "relative").double(), tokens()
    frames = x.unflatten(1, GRID).permute(0, 3, 1, 2, 4).reshape(8, 6, DIM)
    mixed = part.mixer(frames, Context(grid=(2, 3)))
    mixed = mixed.reshape(2, 4, 2, 3, DIM).permute(0, 2, 3, 1, 4).flatten(1, 3)
    torch.testing.assert_close(part(x, Context(grid=GRID)), mixed)


@pytest.mark.parametrize("front", [0, 1])
@pytest.mark.parametrize("over", ["t", "hw", "w"])
def test_padded_frames_change_nothing(over: str, front: int) -> None:
    part, x = make(over).double(), tokens((3, 2, 2), front)
    mask = torch.ones(2, front + 12, dtype=torch.bool)
    mask[0, front + 8 :] = False
    short = part(x[:1, : front + 8], Context(grid=(2, 2, 2)))
    out = part(x, Context(grid=(3, 2, 2), mask=mask))
    torch.testing.assert_close(out[:1, : front + 8], short)
    other = torch.where(mask[..., None], x, torch.randn_like(x))
    again = part(other, Context(grid=(3, 2, 2), mask=mask))
    torch.testing.assert_close(again[mask], out[mask])
    assert out.isfinite().all()


@pytest.mark.parametrize("shape", ["(N, K)", "(H, N, K)", "(B, 1, N, K)"])
def test_rotary_tables_turn_every_token_by_its_own_angle(shape: str) -> None:
    part, x = make("h").double(), tokens(front=1)
    angles = torch.randn(2, HEADS, 25, DIM // HEADS // 2, dtype=torch.float64)
    angles = {"(N, K)": angles[0, 0], "(H, N, K)": angles[0], "(B, 1, N, K)": angles[:, :1]}[shape]
    cos, sin = angles.cos().repeat_interleave(2, -1), angles.sin().repeat_interleave(2, -1)
    seen: dict[str, Tensor] = {}
    for name, rope in (("plain", None), ("turned", Rope(cos, sin, interleaved=True))):
        tap = Tap(keep=("here.q",))
        part(x, Context(grid=GRID, rope=rope, tap=tap))
        q = tap.seen["here.q"]  # (B lines, H, 1 + 3, K)
        seen[name] = Lines(GRID, "h", 1).unfold(q.transpose(1, 2))
    pairs = torch.view_as_complex(seen["plain"].unflatten(-1, (-1, 2)).contiguous())
    whole = angles.expand(2, HEADS, -1, -1).transpose(1, 2)
    expected = torch.view_as_real(pairs * torch.polar(torch.ones_like(whole), whole)).flatten(-2)
    torch.testing.assert_close(seen["turned"], expected)


def test_causal_order_is_that_of_the_grid() -> None:
    for over in ("t", "h", "w", "th", "tw", "hw"):
        part, x = make(over, causal=True).double(), tokens()
        out = part(x, Context(grid=GRID))
        changed = x.clone()
        changed[:, 11:] += 1
        after = part(changed, Context(grid=GRID))
        torch.testing.assert_close(after[:, :11], out[:, :11])


class Half(Mixer):
    """Reports for every sample what its first channel says."""

    def forward(self, x: Tensor, ctx: Context = EMPTY) -> Tensor:
        assert ctx.ledger is not None
        assert ctx.ledger.step == 3
        assert ctx.cond is not None
        ctx.ledger.work("here", x[:, :, 0].mean(dim=1), 7.0)
        ctx.ledger.choose("here", x[..., :3], 5.0)
        ctx.ledger.loss("here/budget", x.new_tensor(2.0))
        return x + ctx.cond[:, None]

    def macs(self, n: int, m: int | None = None, *, grid: tuple[int, ...] | None = None) -> int:
        return n


def test_reports_and_conditioning_are_those_of_samples() -> None:
    part, x = make("h"), tokens().requires_grad_()
    cond = torch.randn(2, DIM, dtype=torch.float64)
    part.mixer = Half(Attention.Config(), SITE)
    ledger = Ledger(step=3)
    ledger.loss("here/budget", x.new_tensor(1.0))
    out = part(x, Context(grid=GRID, ledger=ledger, cond=cond))
    torch.testing.assert_close(out, x + cond[:, None])
    torch.testing.assert_close(ledger.executed["here"], x[..., 0].mean(dim=1))
    torch.testing.assert_close(ledger.choices["here"].gate, x[..., :3])
    assert ledger.choices["here"].cost == 5.0
    assert ledger.shares["here"].cost == 8 * 7.0
    assert float(ledger.total_loss()) == 3.0
    ledger.shares["here"].fraction.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad[..., 0], torch.full_like(x[..., 0], 1 / 24))
    assert part.macs(24, grid=GRID) == 8 * 3


def test_what_lines_cost_comes_from_the_place_or_the_call() -> None:
    site = Site(dim=DIM, heads=HEADS, length=25, grid=GRID)
    part, inner = make("h", site=site), Attention(Attention.Config(), SITE)
    assert part.macs(25) == 8 * inner.macs(4)
    assert part.macs(24, grid=(1, 6, 4)) == 4 * inner.macs(6)
    assert part.mixer.site.length == 4
    assert part.mixer.site.grid == (3,)
    fixed = make("h", "linformer", site=site, tokens=None)
    assert fixed.mixer.core.key.shape[0] == 4  # type: ignore[union-attr, operator]
    with pytest.raises(CapabilityError, match=r"needs the layout of the tokens, ctx\.grid"):
        make("h").macs(24)


def test_profiler_counts_lines() -> None:
    model = effformer.build_model("dit-nano", input_size=8, axes="hw")
    report = profile(model, model.example_inputs())
    dense = profile(effformer.build_model("dit-nano", input_size=8), model.example_inputs())
    lines, whole = 2 * 16 * 4 * 48, 2 * 16 * 16 * 48
    assert dense.total - report.total == 2 * (whole - lines)
    for block in model.blocks:
        ours = report.by_module[f"blocks.{block.site.layer}.attn.part"]
        assert ours == block.attn.part.macs(16, grid=(4, 4))


@pytest.mark.parametrize(
    ("ctx", "message"),
    [
        (
            Context(),
            "here: 'axes' needs the layout of the tokens, ctx.grid; choices that do not: .*flow",
        ),
        (Context(grid=(4, 6)), r"here: over='t', but the grid \(4, 6\) has only axes h, w"),
        (Context(grid=GRID, memory=torch.zeros(2, 3, DIM)), "cannot honour cross=True; choices"),
        (
            Context(grid=GRID, mask=torch.ones(2, 1, 24, 24, dtype=torch.bool)),
            "cannot honour mask=full; choices",
        ),
        (
            Context(grid=GRID, packing=Packing.from_mask(torch.ones(2, 24, dtype=torch.bool))),
            "cannot honour packed=True",
        ),
    ],
)
def test_contexts_that_do_not_fit_lines_are_refused(ctx: Context, message: str) -> None:
    with pytest.raises(CapabilityError, match=message):
        make("t")(tokens().float(), ctx)


def test_masks_need_a_mixer_that_takes_them() -> None:
    ctx = Context(grid=GRID, mask=torch.ones(2, 24, dtype=torch.bool))
    with pytest.raises(CapabilityError, match="cannot honour mask=key; choices"):
        make("hw", "relative")(tokens().float(), ctx)


def test_tokens_must_fill_the_grid() -> None:
    with pytest.raises(ValueError, match=r"here: 24 tokens do not fill the grid \(5, 5\)"):
        make("h")(tokens().float(), Context(grid=(5, 5)))


@pytest.mark.parametrize("over", ["", "x", "wh", "tt", "hw "])
def test_bad_axes(over: str) -> None:
    with pytest.raises(ValueError, match="over names axes of the grid, t, h and w, each once"):
        Axes.Config(over=over)


@pytest.mark.parametrize(
    ("attn", "message"),
    [
        (
            {"name": "axes", "over": "t"},
            r"attn: 'axes of softmax' needs a token grid with axes t, and here it has h, w; choices",
        ),
        (
            {"name": "axes", "over": "h", "mixer": "relative"},
            r"attn\.mixer: 'relative' needs a token grid with axes h, w, and here it has w; choices",
        ),
        (
            {"name": "axes", "over": "h", "mixer": "lmu"},
            r"attn\.mixer: 'lmu' needs causal order, but this model attends both ways; choices: .*flow",
        ),
        (
            {"name": "axes", "over": "h", "mixer": {"name": "flow", "causal": True}},
            r"attn\.mixer: 'flow' has causal=True, but this model attends both ways; choices",
        ),
    ],
)
def test_mixers_that_do_not_fit_lines_are_refused_when_the_model_is_built(
    attn: dict[str, Any], message: str
) -> None:
    with pytest.raises(CapabilityError, match=message):
        effformer.build_model("dit-nano", attn=attn)


def test_capabilities_follow_from_the_mixer() -> None:
    flow, relative = (make("t" + w, m).caps for m, w in (("flow", ""), ("relative", "h")))
    assert (flow.mask, flow.causal, flow.rope, flow.cost) == ("key", "optional", True, "n")
    assert (relative.mask, relative.causal, relative.axes) == ("none", "never", "th")
    assert make("t").caps.rope
    assert not any((flow.cross, flow.packed, flow.streaming, flow.order_free))


def test_streams_are_refused() -> None:
    model = effformer.build_model("dit-nano", input_size=8, axes="hw")
    ctx = Context(cond=torch.zeros(2, 48), grid=(4, 4), stream=Stream({}))
    with pytest.raises(CapabilityError, match="this token mixer cannot stream"):
        model.blocks[0](torch.zeros(2, 16, 48), ctx)


def test_a_view_goes_around_the_present_mixer() -> None:
    base = resolve("attention", {"name": "flow", "qkv_bias": False, "eps": 1e-3})
    view = resolve("attention", {"name": "axes", "over": "h"}, base)
    assert view == Axes.Config(over="h", mixer=base)
    linear = resolve("attention", {"name": "axes", "over": "h", "mixer": "linear"}, base)
    assert linear.mixer == resolve("attention", "linear", base)  # type: ignore[attr-defined]
    assert not linear.mixer.qkv_bias  # type: ignore[attr-defined]
    assert resolve("attention", {"over": "w"}, view) == Axes.Config(over="w", mixer=base)
    assert resolve("attention", view.to_dict(), resolve("attention", "softmax")) == view


def test_relative_positions_do_not_see_time() -> None:
    relative = make("thw", "relative").double()
    one = make("hw", "relative").double()
    one.load_state_dict(relative.state_dict())
    frame = tokens((3, 4))
    still = frame.repeat(1, 3, 1)  # three equal frames: attention cannot tell them apart
    out = relative(still, Context(grid=(3, 3, 4)))
    torch.testing.assert_close(out, one(frame, Context(grid=(3, 4))).repeat(1, 3, 1))


def test_attention_without_output_projection() -> None:
    config = Attention.Config(proj=False)
    bare, whole = Attention(config, SITE).double(), Attention(Attention.Config(), SITE).double()
    bare.load_state_dict({k: v for k, v in whole.state_dict().items() if not k.startswith("proj")})
    x = tokens()
    torch.testing.assert_close(whole.proj(bare(x)), whole(x))
    assert whole.macs(24) - bare.macs(24) == 24 * DIM * DIM
    with pytest.raises(ValueError, match="proj=False needs heads that are together as wide"):
        Attention(config.replace(head_dim=4), SITE)


def test_coordinates_of_the_line_reach_the_mixer() -> None:
    part, x = make("tw", "factorized-parallel").double(), tokens()
    coords = tuple(torch.rand(n, dtype=torch.float64) for n in GRID)
    out = part(x, Context(grid=GRID, positions=grid_positions(coords))).unflatten(1, GRID)
    rows = x.unflatten(1, GRID)[:, :, 1].flatten(1, 2)
    alone = part.mixer(rows, Context(grid=(2, 4), positions=grid_positions((coords[0], coords[2]))))
    torch.testing.assert_close(out[:, :, 1].flatten(1, 2), alone)
