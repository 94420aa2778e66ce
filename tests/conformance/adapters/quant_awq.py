"""AWQ: searched factors, clipping and rounding of the official code."""

from __future__ import annotations

from collections.abc import Callable

import torch
from effformer.compress.quant import affine, awq
from effformer.compress.quant.calibrate import Seen
from harness import Golden
from torch import Tensor
from torch.nn import functional as F

# The search is done in float64: its twenty losses differ in the third digit, ties in the rounding of
# weights are those of float32.


def check(golden: Golden) -> None:
    weights = {k.removesuffix(".weight").split(".")[-1]: w for k, w in golden.weights().items()}
    scheme = _scheme(golden)
    for names, key, whole in (
        (("q_proj", "k_proj", "v_proj"), "in.hidden", _attention(golden)),
        (("gate_proj", "up_proj"), "in.mlp", _gated),
        (("o_proj",), "in.o_proj", F.linear),
        (("down_proj",), "in.down_proj", F.linear),
    ):
        _check_search(golden, scheme, weights, names, golden.tensor(key), whole)
    _check_rounding(golden, scheme, weights["down_proj"])
    _check_clipping(golden, scheme, weights["down_proj"])


def _scheme(golden: Golden) -> awq.AWQ:
    config = golden.config
    golden.only("clip_grid", awq._STEPS, why="bounds are steps of a twentieth")
    golden.only("max_shrink", 0.5, why="blocks keep half of their range")
    inner = affine.Affine.Config(bits=config["bits"], block=config["group"], anchored=False)
    return awq.AWQ(awq.AWQ.Config(scheme=inner, steps=config["n_grid"]))


def _attention(golden: Golden) -> Callable[..., Tensor]:
    heads, proj = golden.config["heads"], golden.tensor("w.self_attn.o_proj.weight")

    def run(x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = [F.linear(x, w).unflatten(-1, (heads, -1)).transpose(1, 2) for w in (q, k, v)]
        mixed = F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2)
        return F.linear(mixed, proj.to(x))

    return run


def _gated(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def _check_search(
    golden: Golden,
    scheme: awq.AWQ,
    weights: dict[str, Tensor],
    names: tuple[str, ...],
    x: Tensor,
    whole: Callable[..., Tensor],
) -> None:
    key = "+".join(names)
    rest = (weights["down_proj"],) if whole is _gated else ()
    own = [weights[name] for name in names]
    exact = _run(whole, x, [*own, *rest])
    history = []

    def loss(s: Tensor) -> float:
        rounded = [scheme._nearest(w * s) / s for w in own]
        history.append(float((_run(whole, x, [*rounded, *rest]) - exact).square().mean()))
        return history[-1]

    seen = Seen(x.shape[-1], ["mean", "second"])
    seen.add(x)
    found, index = awq.search(seen.mean, loss, golden.config["n_grid"])
    golden.assert_close(found, f"out.scales.{key}", rtol=1e-5)
    assert index == int(golden.tensor(f"out.best_ratio.{key}"))
    golden.assert_close(torch.tensor(history).double(), f"out.history.{key}", rtol=1e-4)
    if len(names) == 1:  # judged on its own output: the layer's own search, from second moments
        golden.assert_close(scheme.scale(own[0], seen), f"out.scales.{key}", rtol=1e-5)


def _run(whole: Callable[..., Tensor], x: Tensor, weights: list[Tensor]) -> Tensor:
    return whole(x.double(), *(w.double() for w in weights))


def _check_rounding(golden: Golden, scheme: awq.AWQ, weight: Tensor) -> None:
    config = scheme.inner.config
    rows = affine.cut(weight, config.block)
    scale, zero = affine.grid(rows, config)
    golden.assert_close(scale.squeeze(-1), "out.qscale.down_proj", rtol=1e-6)
    golden.assert_close(zero.squeeze(-1), "out.qzero.down_proj", rtol=0, atol=0)
    golden.assert_close(scheme._nearest(weight), "out.quant.down_proj", rtol=1e-5)


def _check_clipping(golden: Golden, scheme: awq.AWQ, weight: Tensor) -> None:
    s, block = golden.tensor("out.scales.down_proj"), golden.config["group"]
    seen = Seen(len(s), ["second"])
    seen.add(golden.tensor("in.down_proj") / s)
    assert seen.second is not None
    scaled = weight * s
    bound = awq.clip(scaled, seen.second, block, scheme._nearest)
    golden.assert_close(bound[..., None], "out.clip_max.down_proj", rtol=1e-5)
    rounded = scheme._nearest(awq.clamped(scaled, bound, block)) / s
    golden.assert_close(rounded, "out.down_awq", rtol=1e-5)
