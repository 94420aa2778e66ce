"""Reformer's LSH attention of two packages: buckets and outputs for the stored rotations."""

from __future__ import annotations

from typing import Any

import torch
from harness import Golden

from effformer.attention import Reformer
from effformer.context import Context
from effformer.site import Site


def check(golden: Golden) -> None:
    x, mask = golden.tensor("in.x"), golden.tensor("in.mask").bool()
    for case, causal, valid in (
        ("bidirectional", False, None),
        ("causal", True, None),
        ("masked", False, mask),
    ):
        part = _layer(golden, causal=causal)
        q = part.qk(x).unflatten(-1, (part.heads, part.head_dim)).transpose(1, 2)
        golden.assert_close(part.hash(q, valid), f"out.{case}.buckets")
        golden.assert_close(part(x, Context(mask=valid)), f"out.{case}")
    one = _layer(golden, causal=True, chunk=golden.config["n"])
    golden.assert_close(one(x), "out.one_chunk_causal")
    _check_core(golden, "core")
    _check_core(golden, "core_causal", causal=True)
    _check_core(golden, "core_same_bucket_only", across=False)
    _check_core(golden, "core_no_duplicates", once=True)


def _layer(golden: Golden, *, causal: bool, chunk: int | None = None) -> Reformer:
    c = golden.config
    config = Reformer.Config(
        chunk=chunk or c["chunk_length"],
        rounds=c["num_hashes"],
        buckets=c["num_buckets"],
        head_dim=c["head_dim"],
        causal=causal,
        compat="transformers",
    )
    inner = c["heads"] * c["head_dim"]
    part = Reformer(config, Site(dim=c["dim"], heads=c["heads"], out_dim=inner)).eval()
    weights = golden.weights()
    part.load_state_dict(
        {
            "qk.weight": weights["query_key.weight"],
            "v.weight": weights["value.weight"],
            "rotations": golden.tensor("in.rotations"),
            "proj.weight": torch.eye(inner),
            "proj.bias": torch.zeros(inner),
        }
    )
    return part


def _check_core(golden: Golden, case: str, **options: Any) -> None:
    q, v, rotations = (golden.tensor(f"in.{case}.{x}") for x in ("qk", "v", "rotations"))
    config = Reformer.Config(
        chunk=golden.config["chunk_length"],
        rounds=rotations.shape[2],
        buckets=2 * rotations.shape[3],
        compat="reformer-pytorch",
        **options,
    )
    part = Reformer(config, Site(dim=q.shape[2], heads=1))
    part.rotations.copy_(rotations)
    golden.assert_close(part.hash(q[:, None]).flatten(1), f"out.{case}.buckets")
    golden.assert_close(part.attend(q[:, None], v[:, None])[:, 0], f"out.{case}")
