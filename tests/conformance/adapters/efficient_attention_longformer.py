"""Longformer's self-attention: windows, global tokens of each sample, padding."""

from __future__ import annotations

import torch
from harness import Golden

from effformer.attention import Longformer
from effformer.context import Context
from effformer.site import Site


def check(golden: Golden) -> None:
    c, x = golden.config, golden.tensor("in.x")
    valid, marks = golden.tensor("in.valid").bool(), golden.tensor("in.global").bool()
    local, marked = _part(golden, marked=False), _part(golden, marked=True)
    golden.assert_close(local(x), "out.local")
    golden.assert_close(local(x, Context(mask=valid)), "out.local_masked")
    golden.assert_close(marked(x, marks=marks), "out.global")
    golden.assert_close(marked(x, Context(mask=valid), marks=marks), "out.global_masked")
    golden.assert_close(marked(x, marks=torch.zeros_like(marks)), "out.local")
    assert local.reach == c["one_sided"]


def _part(golden: Golden, *, marked: bool) -> Longformer:
    c, w = golden.config, golden.weights()
    config = Longformer.Config(window=c["attention_window"], marked=marked)
    part = Longformer(config, Site(dim=c["dim"], heads=c["heads"])).eval()
    state = {"proj.weight": torch.eye(c["dim"]), "proj.bias": torch.zeros(c["dim"])}
    for kind in ("weight", "bias"):
        state[f"qkv.{kind}"] = torch.cat([w[f"{x}.{kind}"] for x in ("query", "key", "value")])
        if marked:
            state[f"q_global.{kind}"] = w[f"query_global.{kind}"]
            state[f"kv_global.{kind}"] = torch.cat(
                [w[f"{x}_global.{kind}"] for x in ("key", "value")]
            )
    part.load_state_dict(state)
    return part
