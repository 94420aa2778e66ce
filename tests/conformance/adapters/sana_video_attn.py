"""SANA-Video: linear attention with rotary positions in the numerator, values and gradients."""

from __future__ import annotations

from typing import Any

from effformer.models.layouts.sana import ATTENTION
from harness import Golden

import effformer
from effformer.attention import Attention, Sana
from effformer.context import Context, Rope
from effformer.site import NormRule, Site


def check(golden: Golden) -> None:
    for case, c in golden.config.items():
        _check_case(golden, case, c)


def _check_case(golden: Golden, case: str, c: dict[str, Any]) -> None:
    mixer = _build(golden, case, c)
    x = golden.tensor(f"in.{case}.x").clone().requires_grad_()
    cos, sin = (golden.tensor(f"in.{case}.{name}")[0, :, 0] for name in ("cos", "sin"))
    out = mixer(x, Context(rope=Rope(cos, sin, interleaved=True)))
    golden.assert_close(out, f"out.{case}")
    (out * golden.tensor(f"in.{case}.cotangent")).sum().backward()
    grads = {name: p.grad for name, p in mixer.named_parameters() if p.grad is not None}
    found = ATTENTION.from_ours(grads, None) | {"x": x.grad}
    keys = golden.keys(f"grad.{case}.")
    assert keys
    for key in keys:
        golden.assert_close(found[key.removeprefix(f"grad.{case}.")], key)


def _build(golden: Golden, case: str, c: dict[str, Any]) -> Attention:
    golden.only("qk_norm", None, "rms_norm_across_heads", why="SANA has no other", among=c)
    config = Attention.Config(
        core=Sana.Config(eps=c["den_eps"]),
        qkv_bias=c["bias"],
        qk_norm="across-heads" if c["qk_norm"] else False,
        head_dim=c["head_dim"],
    )
    dim = golden.tensor(f"in.{case}.x").shape[-1]
    site = Site(dim=dim, heads=c["heads"], norm=NormRule(kind="rms", eps=c["norm_eps"]))
    mixer = Attention(config, site).eval()
    effformer.load_weights(mixer, golden.weights(f"{case}."), ATTENTION)
    return mixer
