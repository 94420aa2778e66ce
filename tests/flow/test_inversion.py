"""Inversion of token maps: prefixes become exact one by one, segments, guidance, and metrics."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from closeness import assert_close
from effformer.compress import quantize
from torch import Tensor, nn

import effformer
from effformer.checks import CapabilityError
from effformer.flow import (
    Away,
    Contraction,
    Inversion,
    contractions,
    inversion_plan,
    invert,
)

NAMES = ("tarflow-tiny", "starflow-tiny")


def made(name: str = "tarflow-tiny", **options: Any) -> tuple[Any, Tensor, dict[str, Tensor]]:
    """A model in float64 that does something, latents and conditions."""
    torch.manual_seed(0)
    size = 6 if "tarflow" in name else 3
    model = effformer.build_model(name, **{"input_size": size} | options).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.03)
    given = model.example_inputs(2, generator=torch.Generator().manual_seed(0))
    return model, given.pop("x"), given


def depth(model: Any, z: Tensor) -> int:
    """Number of tokens that a map predicts."""
    return int(model.tokens(z).shape[1]) - int(model.flows[0].free)


@pytest.mark.parametrize("name", NAMES)
def test_every_way_ends_at_the_same_data(name: str) -> None:
    model, z, cond = made(name)
    tokens = depth(model, z)
    exact = invert(model, z, **cond)
    assert exact.iterations == ((1,) * tokens,) * 3
    ways = {
        "jacobi": Inversion(segment=None),
        "from zeros": Inversion(segment=None, start="zeros"),
        "segments": Inversion(segment=4),
        "ragged": Inversion(segment=7, start="zeros"),
        "stopping": Inversion(segment=5, tolerance=1e-12),
    }
    for title, way in ways.items():
        found = invert(model, z, way, **cond)
        assert_close(found.x, exact.x, rtol=1e-7, atol=1e-7, what=title)
        length = way.segment or tokens
        for counts in found.iterations:
            assert len(counts) == math.ceil(tokens / length)
            assert max(counts) <= length
    each = [Inversion(segment=None), Inversion(segment=3), Inversion()]
    assert_close(invert(model, z, each, **cond).x, exact.x, rtol=1e-7, atol=1e-7)
    # so few iterations that it is only near
    few = invert(model, z, Inversion(segment=None, iterations=2), **cond)
    assert few.iterations == ((2,),) * 3
    assert not torch.allclose(few.x, exact.x)


@pytest.mark.parametrize("start", ["latents", "zeros"])
def test_every_iteration_makes_one_more_token_exact(start: Any) -> None:
    model, z, cond = made(flows=(4,))
    exact = model.tokens(invert(model, z, **cond).x)
    for k in (1, 2, 5):
        way = Inversion(segment=None, iterations=k, start=start)
        found = model.tokens(invert(model, z, way, **cond).x)
        assert_close(found[:, : k + 1], exact[:, : k + 1], rtol=1e-9, atol=1e-9)
        assert not torch.allclose(found[:, k + 2 :], exact[:, k + 2 :])


def test_tolerances_and_bounds() -> None:
    model, z, cond = made(flows=(4,))
    once = invert(model, z, Inversion(segment=None, tolerance=1e9), **cond)
    assert once.iterations == ((1,),)
    for measure in ("absolute", "relative"):
        loose = Inversion(segment=None, tolerance=1e-3, measure=measure)
        assert 1 < invert(model, z, loose, **cond).iterations[0][0] < depth(model, z)
    bounded = invert(model, 3 * z, Inversion(segment=None, bound=1.5), **cond).x
    assert model.tokens(bounded)[:, 1:].abs().max() == 1.5
    assert model.tokens(invert(model, 3 * z, **cond).x)[:, 1:].abs().max() > 1.5


@pytest.mark.parametrize("rule", ["linear", "gaussian"])
def test_guidance_agrees_in_every_way(rule: Any) -> None:
    for name, weak in (("tarflow-tiny", {"y": None}), ("starflow-tiny", {"text": 0})):
        model, z, cond = made(name)
        weak = {k: v if v is None else torch.zeros_like(cond[k]) for k, v in weak.items()}
        plain = invert(model, z, **cond).x
        none = Away(scale=0.0, weak=weak, rule=rule)
        assert torch.equal(invert(model, z, guidance=none, **cond).x, plain)
        same = Away(scale=3.0, weak=cond, rule=rule)
        assert_close(invert(model, z, guidance=same, **cond).x, plain, rtol=1e-9, atol=1e-9)
        guide = Away(scale=1.0, weak=weak, rule=rule, rising=True)
        exact = invert(model, z, guidance=guide, **cond).x
        assert not torch.allclose(exact, plain)
        for way in (Inversion(segment=None), Inversion(segment=6)):
            found = invert(model, z, way, guidance=guide, **cond).x
            assert_close(found, exact, rtol=1e-6, atol=1e-6)


def test_a_temperature_weakens_a_model_without_labels() -> None:
    model, z, _ = made(num_classes=0)
    plain = invert(model, z).x
    for temperature, changes in ((1.0, False), (0.5, True)):
        guide = Away(scale=2.0, weak={"temperature": temperature})
        found = invert(model, z, guidance=guide).x
        assert torch.allclose(found, plain) != changes


class Pair:
    def __init__(self, mean: float, deviation: float) -> None:
        self.log_scale = torch.tensor([[[deviation]]], dtype=torch.float64).log()
        self.shift = torch.tensor([[[mean]]], dtype=torch.float64)


@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_the_gaussian_rule_is_the_product_of_gaussians(scale: float) -> None:
    """Where it exists; a wider conditional one is moved by the linear rule."""
    rule = Away(scale=scale, weak={"y": None}, rule="gaussian")
    own, weak = Pair(1.0, 0.5), Pair(-0.4, 0.8)
    log_scale, mean = rule.mix(own, weak, torch.ones(1))
    precision = (1 + scale) / 0.5**2 - scale / 0.8**2
    assert_close(log_scale.exp(), torch.full_like(mean, precision**-0.5), rtol=1e-9, atol=1e-9)
    expected = ((1 + scale) * 1.0 / 0.5**2 - scale * -0.4 / 0.8**2) / precision
    assert_close(mean, torch.full_like(mean, expected), rtol=1e-9, atol=1e-9)
    log_scale, mean = rule.mix(Pair(1.0, 0.9), weak, torch.ones(1))
    assert_close(log_scale.exp(), torch.full_like(mean, 0.9), rtol=1e-9, atol=1e-9)
    assert_close(mean, torch.full_like(mean, 1 + scale * 1.4), rtol=1e-9, atol=1e-9)


def test_the_linear_rule_moves_what_it_is_told_to() -> None:
    own, weak, one = Pair(1.0, 2.0), Pair(0.0, 1.0), torch.ones(1)
    for moves, log_scale, mean in (
        ("both", 3 * math.log(2), 3.0),
        ("scale", 3 * math.log(2), 1.0),
        ("shift", math.log(2), 3.0),
    ):
        rule = Away(scale=2.0, weak={"y": None}, moves=moves)  # type: ignore[arg-type]
        found = rule.mix(own, weak, one)
        assert [float(x) for x in found] == pytest.approx([log_scale, mean])
    rising = Away(scale=2.0, weak={"y": None}, rising=True)
    assert float(rising.mix(own, weak, 0.5 * one)[1]) == pytest.approx(2.0)


def test_metrics_rank_maps() -> None:
    """By what their last matrix and their scales let through; a map that does nothing is exact at once
    from its latents.
    """
    model, x, _ = made()
    before = contractions(model, x)
    with torch.no_grad():
        size = float(torch.linalg.matrix_norm(model.flows[1].proj_out.weight.chunk(2)[1], ord=2))
        model.flows[1].proj_out.weight.chunk(2)[1].mul_(3)
    after = contractions(model, x)
    assert after[0].rate == before[0].rate
    assert after[1].rate - before[1].rate > 1.9 * size  # and its shifts are others
    with torch.no_grad():
        for p in model.flows[0].proj_out.parameters():
            p.zero_()
    idle = contractions(model, x)[0]
    assert idle.from_latents == pytest.approx(0, abs=1e-6)
    assert idle.from_zeros == pytest.approx(0, abs=1e-6)
    assert idle.rate == 0


def test_metrics_read_matrices_in_whatever_form() -> None:
    model, x, _ = made("starflow-tiny", text_dim=None)
    plain = contractions(model, x)
    small, _ = quantize(model.float(), "int8", where="flows.*")
    assert type(small.flows[0].proj_out) is not type(model.flows[0].proj_out)
    for one, two in zip(plain, contractions(small, x.float()), strict=True):
        assert two.rate == pytest.approx(one.rate, rel=0.05)


def test_a_plan_gives_segments_to_the_slow_maps() -> None:
    found = (Contraction(0.1, 0.2, 5.0), Contraction(0.3, 0.2, 50.0), Contraction(0.2, 0.2, 7.0))
    plan = inversion_plan(found, tough=1, segment=8, iterations=6, elsewhere=4)
    assert [(one.segment, one.iterations, one.start) for one in plan] == [
        (None, 4, "latents"), (8, 6, "zeros"), (None, 4, "latents"),
    ]  # fmt: skip
    two = inversion_plan(found, tough=2)
    assert [one.segment for one in two] == [None, 32, 32]
    overflown = (*found, Contraction(math.nan, 1.0, math.nan))
    last = inversion_plan(overflown)[-1]
    assert (last.segment, last.start) == (32, "zeros")


def test_samples_that_overflow_are_told() -> None:
    model, z, cond = made()
    assert invert(model, z, **cond).finite.all()
    with torch.no_grad():
        model.flows[2].proj_out.weight.mul_(3000)
    found = invert(model, torch.cat([z[:1], 0 * z[:1]]), y=cond["y"][:1].expand(2))
    assert torch.equal(found.finite, found.x.isfinite().flatten(1).all(1))
    assert not found.finite[0]
    assert invert(model, z, Inversion(bound=3.0), **cond).finite.all()


def test_what_cannot_be_inverted_is_refused() -> None:
    model, z, cond = made()
    with pytest.raises(TypeError, match="Linear is not made of autoregressive maps of tokens"):
        invert(nn.Linear(2, 2), z)
    with pytest.raises(TypeError, match="contractions: Linear is not made of"):
        contractions(nn.Linear(2, 2), z)
    with pytest.raises(ValueError, match="2 inversions for a model of 3 maps"):
        invert(model, z, [Inversion()] * 2, **cond)
    with pytest.raises(ValueError, match=r"in training mode .* call eval\(\)"):
        invert(model.train(), z, **cond)
    model.eval()
    with pytest.raises(ValueError, match=r"x: expected shape \(B, 3, 6, 6\), got \(2, 3, 4, 6\)"):
        invert(model, z[:, :, :4], **cond)
    with pytest.raises(ValueError, match="invert: unknown condition 'label'"):
        invert(model, z, label=cond["y"])
    with pytest.raises(ValueError, match="invert: guidance: unknown condition 'text'"):
        invert(model, z, guidance=Away(scale=1.0, weak={"text": None}), **cond)
    with pytest.raises(ValueError, match="nothing makes the maps weaker; give weak"):
        Away(scale=1.0)
    with pytest.raises(ValueError, match="segment must be at least 1"):
        Inversion(segment=0)


def test_mixers_that_cannot_stream_are_inverted_all_tokens_at_once() -> None:
    model, z, cond = made(attn={"name": "differential"})
    x = invert(model, z, Inversion(segment=None), **cond).x
    assert_close(model(x, **cond).z, z, rtol=1e-7, atol=1e-7)
    with pytest.raises(CapabilityError, match=r"choices.*softmax"):
        invert(model, z, **cond)
