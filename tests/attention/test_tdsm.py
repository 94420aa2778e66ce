"""TDSM: widths of groups, permutations, the slow form, models with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import assert_close
from effformer.export import export_onnx
from effformer.models.layouts.relactrl import EXPERT
from torch import Tensor, nn

import effformer
from effformer.attention import Attention, Softmax
from effformer.attention.reference_efficient import tdsm_reference
from effformer.attention.tdsm import TDSM, Shuffle, group_widths, reshuffle
from effformer.checks import CapabilityError
from effformer.context import Context
from effformer.profile import Counter
from effformer.site import Site

DIM, TOKENS = 24, 12


def build(tokens: int | None = TOKENS, dim: int = DIM, **options: Any) -> TDSM:
    config = TDSM.Config.from_dict({"groups": 2, "heads": 2, **options})
    part = TDSM(config, Site(dim=dim, heads=3, length=tokens, path="m"))
    for parameter in part.parameters():
        nn.init.normal_(parameter, std=0.3)
    return part.eval()


@pytest.mark.parametrize(
    ("dim", "groups", "widths"),
    [
        (1152, 2, [576] * 2),
        (1152, 4, [288] * 4),
        (1152, 6, [192] * 6),
        (192, 4, [32, 32, 64, 64]),
        (192, 6, [32] * 6),
        (224, 6, [32] * 5 + [64]),
        (64, 1, [64]),
    ],
)
def test_published_widths(dim: int, groups: int, widths: list[int]) -> None:
    assert list(group_widths(dim, groups)) == widths


def test_every_possible_width_ends_with_a_fitting_sum() -> None:
    for dim in range(8, 129, 8):
        for groups in range(1, dim // 8 + 1):
            widths = group_widths(dim, groups, 8)
            assert sum(widths) == dim
            assert len(widths) == groups
            assert all(w > 0 and w % 8 == 0 for w in widths)


@pytest.mark.parametrize(("dim", "groups"), [(160, 6), (200, 2), (16, 1)])
def test_impossible_widths_are_an_error_instead_of_a_hang(dim: int, groups: int) -> None:
    with pytest.raises(
        ValueError, match=rf"width {dim} cannot be cut into {groups} groups of multiples of 32"
    ):
        group_widths(dim, groups)
    with pytest.raises(ValueError, match="groups and unit are at least 1"):
        group_widths(dim, 0)


def test_default_unit_is_the_published_one_or_the_largest_that_fits() -> None:
    def widths(dim: int, **options: Any) -> tuple[int, ...]:
        return TDSM(TDSM.Config(**options), Site(dim=dim)).widths

    assert widths(192) == group_widths(192, 4, 32)
    assert widths(48) == group_widths(48, 4, 8) == (8, 8, 16, 16)
    assert widths(24) == group_widths(24, 4, 4)
    with pytest.raises(ValueError, match="width 12 cannot be cut into 4 groups"):
        widths(12)
    with pytest.raises(ValueError, match="widths 2, 4 for 4 heads; every width must be divisible"):
        widths(6, groups=2, unit=2)


def _dense(linear: Any, x: Tensor) -> Tensor:
    return x @ linear.weight.T + linear.bias


def _attend(expert: Any, x: Tensor) -> Tensor:
    """Attention of (n, d) tokens, head by head."""
    q, k, v = _dense(expert.qkv, x).chunk(3, -1)
    heads = []
    for a, b, c in zip(*(y.chunk(expert.heads, -1) for y in (q, k, v)), strict=True):
        heads.append((a @ b.T * a.shape[1] ** -0.5).softmax(-1) @ c)
    return _dense(expert.proj, torch.cat(heads, -1))


def test_equals_the_slow_form_forward_and_backward() -> None:
    part = build(unit=4, groups=3).double()
    x = torch.randn(2, TOKENS, DIM, dtype=torch.float64, requires_grad=True)
    shuffle = Shuffle.draw(part.widths, TOKENS, torch.Generator().manual_seed(5))
    part.use(shuffle)
    slow = torch.stack(
        [
            tdsm_reference(
                sample, shuffle, part.widths, 4, lambda i, s: _attend(part.experts[i], s)
            )
            for sample in x
        ]
    )
    torch.testing.assert_close(part(x), slow)
    weight = torch.randn_like(slow)
    given = [x, *part.parameters()]
    torch.testing.assert_close(
        torch.autograd.grad((part(x) * weight).sum(), given),
        torch.autograd.grad((slow * weight).sum(), given),
    )


class _Same(nn.Module):
    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        return x


@pytest.mark.parametrize("seed", range(5))
def test_unshuffling_undoes_every_permutation(seed: int) -> None:
    part = build(groups=3, unit=8)
    part.experts = nn.ModuleList(_Same() for _ in part.widths)
    part.use(Shuffle.draw(part.widths, TOKENS, torch.Generator().manual_seed(seed)))
    x = torch.randn(2, TOKENS, DIM)
    torch.testing.assert_close(part(x), x, rtol=0, atol=0)


def test_segments_are_cut_from_the_shuffled_scalars() -> None:
    """Without shuffling, and with one group, the segments are runs of tokens."""
    part = build(groups=1, segments=4)
    part.use(Shuffle(torch.arange(DIM), (torch.arange(TOKENS * DIM),)))
    x = torch.randn(1, TOKENS, DIM)
    expected = torch.cat([part.experts[0](piece) for piece in x.split(3, dim=1)], dim=1)
    assert_close(part(x), expected, rtol=1e-5, atol=1e-6)


def test_default_permutations_are_a_matter_of_config_and_layer() -> None:
    first, again = (build(seed=3) for _ in range(2))
    again.load_state_dict(first.state_dict())
    x = torch.randn(2, TOKENS, DIM)
    torch.manual_seed(99)
    torch.testing.assert_close(again(x), first(x), rtol=0, atol=0)
    torch.testing.assert_close(first(x), first.train()(x), rtol=0, atol=0)
    site = Site(dim=DIM, length=TOKENS)
    assert not torch.equal(first.order, build(seed=4).order)
    layers = [TDSM(TDSM.Config(), Site(dim=DIM, length=TOKENS, layer=i)) for i in (0, 1)]
    assert not torch.equal(layers[0].order, layers[1].order)
    assert torch.equal(layers[0].order, TDSM(TDSM.Config(), site).order)
    assert not [key for key in first.state_dict() if "order" in key or "inverse" in key]


def test_other_numbers_of_tokens_have_their_own_permutations() -> None:
    kept, free = build(), build(tokens=None)
    free.load_state_dict(kept.state_dict())
    for n in (TOKENS, 8, TOKENS):
        x = torch.randn(2, n, DIM)
        torch.testing.assert_close(kept(x), free(x), rtol=0, atol=0)
    assert free.order is None


def test_reshuffle_needs_no_global_state() -> None:
    model = nn.Sequential(build(), build())
    x, outs = torch.randn(1, TOKENS, DIM), []
    for seed in (1, 2, 1):
        reshuffle(model, torch.Generator().manual_seed(seed))
        outs.append(model(x))
    torch.testing.assert_close(outs[0], outs[2], rtol=0, atol=0)
    assert not torch.allclose(outs[0], outs[1], atol=1e-3)
    assert not torch.equal(model[0].order, model[1].order)
    with pytest.raises(ValueError, match="m has no number of tokens; give tokens="):
        reshuffle(build(tokens=None))
    with pytest.raises(ValueError, match="has no 'tdsm' mixer"):
        reshuffle(nn.Linear(2, 2))


def test_the_inverse_is_exact_where_float32_is_not() -> None:
    from effformer.attention.tdsm import _inverse

    order = torch.arange(2**24 + 9).flip(0)
    assert torch.equal(order[_inverse(order)], torch.arange(2**24 + 9))
    assert not torch.equal(torch.arange(2**24 + 9).float().long(), torch.arange(2**24 + 9))


def test_wrong_permutations_are_refused() -> None:
    part = build()
    good = part.drawn(TOKENS)
    twice = torch.zeros(DIM, dtype=torch.int64)
    with pytest.raises(ValueError, match="channels is not a permutation of 24 numbers"):
        part.use(Shuffle(twice, good.elements))
    with pytest.raises(ValueError, match="1 element permutations for 2 groups"):
        part.use(Shuffle(good.channels, good.elements[:1]))
    with pytest.raises(ValueError, match=r"elements\[1\] is not a permutation"):
        part.use(Shuffle(good.channels, (good.elements[0], good.elements[1][:-1])))


def test_tokens_that_cannot_be_cut_are_refused() -> None:
    with pytest.raises(ValueError, match=r"m: 10 tokens cannot be cut into 4 equal segments"):
        build()(torch.randn(1, 10, DIM))
    with pytest.raises(CapabilityError, match=r"which 17 tokens are not; choices: softmax, flow"):
        effformer.build_model("vit-nano", attn="tdsm")
    with pytest.raises(ValueError, match="no order; use causal=False"):
        TDSM.Config(core=Softmax.Config(causal=True))
    with pytest.raises(ValueError, match="heads must be at least 1, got 0"):
        TDSM.Config(heads=0)
    with pytest.raises(ValueError, match="keeps the width of tokens, 24"):
        TDSM(TDSM.Config(), Site(dim=DIM, out_dim=8))
    with pytest.raises(CapabilityError, match="m: this attention cannot honour cross=True"):
        build()(torch.randn(1, TOKENS, DIM), Context(memory=torch.randn(1, 3, DIM)))


def test_samples_are_independent_and_work_is_as_declared() -> None:
    part, x = build(), torch.randn(3, TOKENS, DIM)
    whole = part(x)
    for i in range(3):
        torch.testing.assert_close(part(x[i : i + 1]), whole[i : i + 1])
    with Counter(part) as counter:
        part(x)
    assert sum(tally.macs for tally in counter.rows.values()) == 3 * part.macs(TOKENS)
    projections = sum(4 * TOKENS * w * w for w in part.widths)
    assert part.macs(TOKENS) == projections + TOKENS**2 * DIM * 2 // 4


def test_any_core_attends_inside_segments() -> None:
    flow = build(core="flow")
    assert not torch.allclose(flow(torch.ones(1, TOKENS, DIM)), torch.zeros(1, TOKENS, DIM))
    out = build(core={"name": "linformer", "projected": 2})(torch.randn(2, TOKENS, DIM))
    assert out.shape == (2, TOKENS, DIM)


def test_exports_with_constant_permutations(tmp_path: Path) -> None:
    part, x = build(), torch.randn(2, TOKENS, DIM)
    axes = {"x": {0: "batch"}}
    report = export_onnx(part, tmp_path / "a.onnx", (x,), dynamic=axes)
    assert report.parity is not None
    assert report.parity.passed
    with pytest.raises(Exception, match="there are none for 8 tokens; build it with tokens=8"):
        export_onnx(part, tmp_path / "b.onnx", (x[:, :8],), dynamic=axes)


def test_in_a_diffusion_transformer() -> None:
    model = effformer.build_model("dit-nano", attn="tdsm", input_size=8, num_classes=10)
    assert isinstance(model.blocks[0].attn.part, TDSM)
    assert model.blocks[0].attn.part.length == 16
    out = model(**model.example_inputs(2))
    assert out.shape == (2, 8, 8, 8)
    reshuffle(model, torch.Generator().manual_seed(0))
    with torch.device("meta"):
        shapes = effformer.build_model("dit-nano", attn={"name": "tdsm", "groups": 2})
    assert shapes.config.attn.groups == 2


def test_official_names_of_one_group() -> None:
    part = build(groups=1)
    official = EXPERT.from_ours(part.state_dict(), None)
    assert set(official) == {f"attn.{n}.{k}" for n in ("qkv", "proj") for k in ("weight", "bias")}
    assert isinstance(part.experts[0], Attention)
    effformer.load_weights(build(groups=1), official, EXPERT)
