"""Heads pruned by transformers' own ``prune_heads``: outputs, and the weights that stay."""

from __future__ import annotations

import torch
from effformer.compress import cut
from harness import Golden, load_adapter
from torch import Tensor

from effformer.calls import run


def check(golden: Golden) -> None:
    c = golden.config
    model = load_adapter("prune_tp").bert(golden, c["hidden"], c["ffn"])
    mask = golden.tensor("in.mask").bool()
    given = {"tokens": golden.tensor("in.ids"), "mask": mask}
    kept = {
        f"blocks.{i}.attn.part": [h for h in range(c["heads"]) if h not in pruned]
        for i, pruned in c["pruned_heads"].items()
    }
    small = cut(model, kept)
    assert small.transforms == ()
    for one, key in ((model, "out.full"), (small, "out.y")):
        valid = golden.tensor(key) * mask[..., None]
        expected = Golden(golden.name, golden.meta, {key: valid})
        expected.assert_close(run(one, given, where="test")[0], key)
    for key in golden.keys("p."):
        golden.assert_close(_ours(small, key), key)


def _ours(model: torch.nn.Module, key: str) -> Tensor:
    """Our tensor of an official key: query, key and value are thirds of one matrix."""
    _, _, _, layer, _, where, name, kind = key.split(".")
    attn = model.get_submodule(f"blocks.{layer}.attn.part")
    if where == "output":
        return attn.proj.get_parameter(kind)
    third = ("query", "key", "value").index(name)
    return attn.qkv.get_parameter(kind).chunk(3)[third]
