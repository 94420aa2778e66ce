"""Token merging: matchings, weighted means, schedules, and a vision transformer that merges."""

from __future__ import annotations

import ast
import re
from dataclasses import replace
from typing import Any

import torch
from effformer.models import ViT
from effformer.models.vit import Prefix
from harness import Golden

import effformer
from effformer.context import Tap
from effformer.nn.merging import Matching, match_every, match_tokens, merge_schedule


def check(golden: Golden) -> None:
    cases = [c for c in golden.config if "vit" not in c]
    for i, config in enumerate(cases):
        _check_matching(_part(golden, f"c{i}."), config)
    if golden.keys("kth."):
        _check_every(_part(golden, "kth."))
    _check_schedules(golden)
    for config in golden.config:
        if "vit" in config:
            _check_vit(_part(golden, "vit."), config["vit"])


def _part(golden: Golden, start: str) -> Golden:
    mine = {k.removeprefix(start): v for k, v in golden.tensors.items() if k.startswith(start)}
    assert mine, start
    return replace(golden, name=f"{golden.name} {start}", tensors=mine)


def _check_matching(golden: Golden, c: dict[str, Any]) -> None:
    metric, x, sizes = (golden.tensor(f"in.{n}") for n in ("metric", "x", "size"))
    front = int(c["class_token"]) + int(c["distill_token"])
    matching = match_tokens(metric, c["r_requested"], front=front)
    assert metric.shape[1] - matching.count == c["r_effective"]
    one, known = torch.ones_like(sizes)[..., 0], sizes[..., 0]
    golden.assert_close(matching.merge(x), "out.merged_mean")
    golden.assert_close(matching.merge(x, known), "out.merged_wavg")
    golden.assert_close(matching.sizes(x, known)[..., None], "out.size")
    golden.assert_close(matching.merge(x, one), "out.merged_wavg_unit")
    golden.assert_close(matching.sizes(x)[..., None], "out.size_unit")
    golden.assert_close(matching.source(), "out.source")
    if "out.unmerged" in golden.tensors:
        golden.assert_close(matching.unmerge(golden.tensor("out.merged_wavg")), "out.unmerged")


def _check_every(golden: Golden) -> None:
    metric, merged = golden.tensor("in.metric"), golden.tensor("out.merged")
    matching = match_every(metric, metric.shape[1] // merged.shape[1])
    golden.assert_close(matching.merge(golden.tensor("in.x")), "out.merged")
    golden.assert_close(matching.unmerge(merged), "out.unmerged")


def _check_schedules(golden: Golden) -> None:
    """The arguments stand in a note: ``parse_r.0..3 = (12,16), (12,(8,-1)), (6,[3,2])``."""
    keys = golden.keys("parse_r.")
    note = next(n for n in golden.meta["notes"] if n.startswith("parse_r"))
    calls = ast.literal_eval(f"[{re.sub(r'^.*?=', '', note)}]")
    assert len(calls) == len(keys)
    for i, (depth, r) in enumerate(calls):
        mean, slope = r if isinstance(r, tuple) else (r, 0.0)
        chosen = tuple(mean) if isinstance(mean, list) else mean
        golden.assert_close(torch.tensor(merge_schedule(chosen, depth, slope)), f"parse_r.{i}")


def _check_vit(golden: Golden, c: dict[str, Any]) -> None:
    x, weights = golden.tensor("in.x"), golden.weights()
    r, slope = c["r_per_layer"], 0.0
    if isinstance(r, list) and len(r) == 2 and c["depth"] != 2:
        r, slope = r
    config = ViT.Config(
        dim=c["embed_dim"], depth=c["depth"], heads=c["heads"], image_size=c["img"],
        patch=c["patch"], channels=x.shape[1], num_classes=len(weights["head.bias"]),
        prefix=Prefix(class_token="cls_token" in weights),
    ).replace(ffn={"ratio": float(c["mlp_ratio"])})  # fmt: skip
    model = ViT(config).eval()
    effformer.load_weights(model, weights)
    with torch.no_grad():
        golden.assert_close(model(x), "out.logits_plain")
    for key in golden.keys("out.logits_tome_prop"):
        mark = key.removeprefix("out.logits_tome_")
        tokens = {"name": "tome", "r": r, "inflection": slope, "proportional": mark == "prop1"}
        merged = ViT(config.replace(tokens=tokens)).eval()
        effformer.load_weights(merged, weights)  # nothing new to learn
        tap = Tap(keep=("blocks.*.tokens.*",))
        with torch.no_grad():
            golden.assert_close(merged(x, tap=tap), key)
        source = _source(tap, golden.tensor(f"out.source_{mark}").shape[2])
        golden.assert_close(source, f"out.source_{mark}")
        sizes = [v for k, v in tap.seen.items() if k.endswith(".sizes")][-1]
        golden.assert_close(sizes[..., None], f"out.final_size_{mark}")


def _source(tap: Tap, tokens: int) -> torch.Tensor:
    """Which patches each last token came from, from the merges of all blocks."""
    source = torch.eye(tokens)[None]
    for place, groups in tap.seen.items():
        if place.endswith(".groups"):
            step = Matching(groups, int(groups.max()) + 1).source().to(source)
            source = step @ source
    return source
