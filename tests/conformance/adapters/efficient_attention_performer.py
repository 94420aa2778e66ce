"""Performer: features, orthogonal rows, both kernels, the causal forms and a whole layer."""

from __future__ import annotations

from typing import Any

import torch
from harness import Golden

from effformer.attention import Attention, Core, Efficient, Performer
from effformer.attention.performer import orthogonal_rows
from effformer.config import resolve
from effformer.context import Context
from effformer.site import Site


def check(golden: Golden) -> None:
    c = golden.config
    data = golden.tensor("in.features.data")
    softmax, relu = _core(golden), _core(golden, kernel="relu", eps=c["relu_feature_eps"])
    golden.assert_close(softmax.query_features(data), "out.features.query")
    golden.assert_close(softmax.key_features(data), "out.features.key")
    golden.assert_close(relu.key_features(data), "out.features.relu")
    golden.assert_close(orthogonal_rows(golden.tensor("in.ortho.gaussian")), "out.ortho.rows")
    memory = Context(memory=torch.empty(c["batch"], c["s"], 1))
    _check_core(golden, softmax, "core", "out.core_softmax", memory)
    _check_core(golden, relu, "core", "out.core_relu", memory)
    _check_core(
        golden, Efficient(Efficient.Config(), softmax.site), "core", "out.core_noproj", memory
    )
    leaking = _core(golden, causal=True, stabilizer="global")
    _check_core(golden, leaking, "causal", "out.core_causal_softmax", Context())
    relu = _core(golden, causal=True, kernel="relu", eps=c["relu_feature_eps"])
    _check_core(golden, relu, "causal", "out.core_causal_relu", Context())
    _check_layer(golden)


def _config(golden: Golden, **options: Any) -> Performer.Config:
    c = golden.config
    options = {"eps": c["softmax_feature_eps"], **options}
    return Performer.Config(features=c["nb_features"], causal_eps=c["causal_eps"], **options)


def _core(golden: Golden, **options: Any) -> Performer:
    c = golden.config
    site = Site(dim=c["heads"] * c["dim_head"], heads=c["heads"])
    core = Performer(_config(golden, **options), site)
    rows = golden.weights("softmax.fast_attention.")["projection_matrix"]
    core.load_state_dict({"projection": rows})
    return core


def _check_core(golden: Golden, core: Core, case: str, key: str, ctx: Context) -> None:
    q, k, v = (golden.tensor(x) for x in ("in.features.data", f"in.{case}.k", f"in.{case}.v"))
    golden.assert_close(core(q, k, v, ctx), key)


def _check_layer(golden: Golden) -> None:
    c, w = golden.config, golden.weights("softmax.")
    config = resolve("attention", _config(golden)).replace(
        head_dim=c["dim_head"], qkv_bias="to_q.bias" in w, proj_bias="to_out.bias" in w
    )
    part = Attention(config, Site(dim=c["dim"], heads=c["heads"])).eval()
    state = {"core.projection": w["fast_attention.projection_matrix"]}
    state |= {
        f"qkv.{kind}": torch.cat([w[f"to_{x}.{kind}"] for x in "qkv"])
        for kind in ("weight", "bias")
        if f"to_q.{kind}" in w
    }
    state |= {f"proj.{k.removeprefix('to_out.')}": w[k] for k in w if k.startswith("to_out.")}
    part.load_state_dict(state)
    x = golden.tensor("in.softmax.x").requires_grad_()
    out = part(x)
    golden.assert_close(out, "out.softmax")
    (grad,) = torch.autograd.grad(out, x, golden.tensor("in.softmax.cotangent"))
    golden.assert_close(grad, "grad.softmax.x")
