"""Structured pruning as Torch-Pruning does it: scores, what stays, outputs of a ViT and of a BERT."""

from __future__ import annotations

from typing import Any

import torch
from effformer.compress import cut, importance, prune
from effformer.models import ViT
from harness import Golden
from torch import Tensor

import effformer
from effformer.calls import run


def check(golden: Golden) -> None:
    c = golden.config
    model, given = _bert(golden) if "vocab" in c else _vit(golden)
    _close(golden, model, given, "out.full")
    found = importance(model, "magnitude")
    by = {path: score / score.mean() for path, score in found.items()}
    depth = model.config.depth
    for i in range(depth):
        golden.assert_close(by[f"blocks.{i}.attn.part"], f"out.head_score.{i}")
        golden.assert_close(by[f"blocks.{i}.ffn.part"], f"out.ffn_score.{i}")
    shares = {"heads": 1 - c["head_ratio"], "channels": 1 - c["ffn_ratio"]}
    for case, more in c.get(
        "cases", {"local": {}, "globalheads": {"global_pruning": True}}
    ).items():
        if more.get("width_ratio"):
            golden.assert_close(by["width"], "out.width_score")
            shares = shares | {"width": 1 - more["width_ratio"]}
        if more.get("global_pruning"):
            kept = _pooled(model, by, c)
            small = cut(model, kept)
        else:
            small, report = prune(model, {"keep": shares, "round_to": 1})
            kept = {p.name: torch.tensor(p.kept) for p in report.parts}
            assert small.transforms == ()
        for i in range(depth):
            golden.assert_close(kept[f"blocks.{i}.attn.part"], f"out.heads.{case}.{i}")
            golden.assert_close(kept[f"blocks.{i}.ffn.part"], f"out.ffn.{case}.{i}")
        if "width" in kept:
            golden.assert_close(kept["width"], "out.width")
        _close(golden, small, given, f"out.y.{case}")


def _close(golden: Golden, model: Any, given: dict[str, Tensor], key: str) -> None:
    out = run(model, given, where="test")[0]
    if "mask" in given:  # we return nothing where there is no token
        golden = Golden(
            golden.name, golden.meta, {key: golden.tensor(key) * given["mask"][..., None]}
        )
    golden.assert_close(out, key)


def _vit(golden: Golden) -> tuple[Any, dict[str, Tensor]]:
    c, x = golden.config, golden.tensor("in.x")
    config = ViT.Config(
        dim=c["embed"], depth=c["depth"], heads=c["heads"], image_size=c["img"], patch=c["patch"],
        channels=x.shape[1], num_classes=c["classes"],
    ).replace(ffn={"ratio": float(c["mlp_ratio"])})  # fmt: skip
    model = ViT(config).eval()
    effformer.load_weights(model, golden.weights())
    return model, {"x": x}


def _bert(golden: Golden) -> tuple[Any, dict[str, Tensor]]:
    model = bert(golden, golden.config["hidden"], golden.config["ffn"])
    mask = golden.tensor("in.mask").bool()
    return model, {"tokens": golden.tensor("in.ids"), "mask": mask}


def bert(golden: Golden, dim: int, hidden: int) -> Any:
    """The BERT of a set, with its weights."""
    c, weights = golden.config, golden.weights()
    model = effformer.build_model(
        "bert-tiny", dim=dim, depth=c["layers"], heads=c["heads"], ffn={"hidden": hidden},
        pooler=False, vocab=len(weights["embeddings.word_embeddings.weight"]),
        context=len(weights["embeddings.position_embeddings.weight"]),
        segments=len(weights["embeddings.token_type_embeddings.weight"]),
    ).eval()  # fmt: skip
    effformer.load_weights(model, weights)
    return model


def _pooled(model: Any, by: dict[str, Tensor], c: dict[str, Any]) -> dict[str, Tensor]:
    """One threshold over all heads, and one over all neurons and, in this package, the mean scores of
    the channels of a head of every layer, which then stay.
    """
    depth = model.config.depth
    heads = [by[f"blocks.{i}.attn.part"] for i in range(depth)]
    neurons = [by[f"blocks.{i}.ffn.part"] for i in range(depth)]
    inside = [_inside(model, i) for i in range(depth)]
    pool = torch.cat([*neurons, *inside])
    kept = {}
    for name, scores, every, ratio in (
        ("attn", heads, torch.cat(heads), c["head_ratio"]),
        ("ffn", neurons, pool, c["ffn_ratio"]),
    ):
        gone = len(every) - int(len(every) * (1 - ratio))
        limit = every.sort().values[gone - 1]
        for i, score in enumerate(scores):
            kept[f"blocks.{i}.{name}.part"] = (score > limit).nonzero().flatten()
    return kept


def _inside(model: Any, block: int) -> Tensor:
    """Scores of the channels of a head, mean over the heads."""
    attn = model.blocks[block].attn.part
    squares = (
        attn.qkv.weight.detach().double().square().sum(dim=1).view(3, attn.heads, -1).sum(dim=0)
    )
    squares = squares + attn.proj.weight.detach().double().square().sum(dim=0).view(attn.heads, -1)
    return squares.mean(dim=0) / squares.mean()
