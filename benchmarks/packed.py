"""Packed against padded BERT, and ways to attend within the sequences of a packed row."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from markdown import Row, write
from torch import Tensor
from torch.nn import functional as F

from effformer.attention import Softmax
from effformer.build import build_model
from effformer.context import Context, Packing
from effformer.profile import Latency, interleave
from effformer.site import Site

THREADS = 2


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is measured; the small form only shows that the script runs."""

    model: str = "bert-base"
    batch: int = 16
    shortest: int = 16
    longest: int = 256
    runs: int = 7
    seeds: tuple[int, ...] = (0, 1)


SMALL = Sizes(model="bert-tiny", batch=3, shortest=2, longest=9, runs=1, seeds=(0,))


def ragged(sizes: Sizes, seed: int) -> Tensor:
    """A mask with uniform lengths; padded to the longest that is allowed."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(sizes.shortest, sizes.longest + 1, (sizes.batch,), generator=generator)
    return torch.arange(sizes.longest) < lengths[:, None]


def whole_model(sizes: Sizes) -> tuple[list[Row], Latency]:
    model = build_model(sizes.model).eval()
    rows = []
    for seed in sizes.seeds:
        mask = ragged(sizes, seed)
        tokens = torch.randint(0, model.config.vocab, mask.shape)
        with torch.inference_mode():
            packed, padded = (model(tokens, mask=mask, packed=p).hidden for p in (True, False))
        torch.testing.assert_close(packed, padded, rtol=1e-3, atol=1e-4)
        both = interleave(
            {
                "padded": lambda t=tokens, m=mask: model(t, mask=m),
                "packed": lambda t=tokens, m=mask: model(t, mask=m, packed=True),
            },
            warmup=1, runs=sizes.runs, threads=THREADS,
        )  # fmt: skip
        share = float(mask.float().mean())
        for name, row in both.rows.items():
            what = f"{sizes.model}, {share:.1%} of {mask.numel()} tokens are real: {name}"
            ratio = both.ratios[name] / share if name == "packed" else None
            aim = 1.1 if ratio else None
            rows.append(Row(what=what, **time(row), ratio=ratio, target=aim))
    return rows, both.rows["packed"]


def attentions(sizes: Sizes) -> list[Row]:
    """One layer's attention, between the projections."""
    config = build_model(sizes.model, depth=1).config
    heads, width = config.heads, config.dim // config.heads
    core, rows = Softmax(Softmax.Config(), Site(dim=config.dim, heads=heads)), []
    for title, batch, longest in (
        ("", sizes.batch, sizes.longest),
        ("many short sequences: ", 8 * sizes.batch, max(sizes.longest // 8, sizes.shortest)),
    ):
        shape = Sizes(batch=batch, shortest=2, longest=longest) if title else sizes
        mask = ragged(shape, 0)
        packing = Packing.from_mask(mask)
        qkv = torch.randn(1, sum(packing.lengths), 3, heads, width)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        full = packing.unpack(qkv).permute(2, 0, 3, 1, 4).unbind(0)
        calls: dict[str, Callable[[], Tensor]] = {
            "padded, masked": lambda full=full, mask=mask: core(*full, Context(mask=mask)),
            "packed, a sequence at a time (ours)": lambda a=(q, k, v), p=packing: core.packed(
                *a, Context(packing=p)
            ),
            "packed, four of similar length padded together": lambda a=(q, k, v, packing): buckets(
                *a, size=4
            ),
        }
        if mask.numel() <= 8192:
            calls["packed, one T x T mask"] = lambda a=(q, k, v, packing): one_mask(*a)
        wanted = packing.pack(calls["padded, masked"]().transpose(1, 2)).transpose(1, 2)
        for name, call in calls.items():
            if name.startswith("packed"):
                torch.testing.assert_close(call(), wanted, rtol=1e-3, atol=1e-4)
        found = interleave(calls, warmup=2, runs=3 * sizes.runs, threads=THREADS)
        rows += [
            Row(what=f"{title}attention alone, {n}", **time(r), ratio=found.ratios[n])
            for n, r in found.rows.items()
        ]
    return rows


def buckets(q: Tensor, k: Tensor, v: Tensor, packing: Packing, *, size: int) -> Tensor:
    """Sort by length, pad neighbours to the longest of them, mask, scatter back."""
    order = sorted(range(len(packing.lengths)), key=packing.lengths.__getitem__)
    starts = packing.offsets.tolist()
    out = torch.empty_like(v.transpose(1, 2)[0])
    for first in range(0, len(order), size):
        chosen = order[first : first + size]
        longest = max(packing.lengths[i] for i in chosen)
        place = torch.arange(longest)[None]
        real = place < torch.tensor([[packing.lengths[i]] for i in chosen])
        rows = torch.where(real, place + torch.tensor([[starts[i]] for i in chosen]), 0)
        batch = (x[0].transpose(0, 1)[rows].transpose(1, 2) for x in (q, k, v))
        mixed = F.scaled_dot_product_attention(*batch, attn_mask=real[:, None, None])
        out[rows[real]] = mixed.transpose(1, 2)[real]
    return out[None].transpose(1, 2)


def one_mask(q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
    """One attention over all tokens, block-diagonal by a mask."""
    sample = packing.samples
    return F.scaled_dot_product_attention(q, k, v, attn_mask=sample[:, None] == sample)


def time(row: Latency) -> dict[str, str]:
    return {
        "value": f"{1e3 * row.median:.4g} ms",
        "spread": f"{1e3 * row.p10:.4g} to {1e3 * row.p90:.4g}",
    }


def main(*, small: bool = False) -> None:
    sizes = SMALL if small else Sizes()
    rows, latency = whole_model(sizes)
    rows += attentions(sizes)
    notes = [
        f"batch {sizes.batch}, lengths uniform in {sizes.shortest}..{sizes.longest}, float32, eager; "
        "the model packs before its first block and unpacks behind its last",
        "ratio of the packed model: its time over the padded time, divided by the share of real "
        "tokens (1 = a padded token costs as much as a real one); outputs are compared first",
        "ratios of attention alone: against the padded, masked form of the same batch",
        "the CUDA form (one xformers kernel with a block-diagonal bias) is not measured here",
    ]
    write("packed", "Packed execution on the CPU", rows, latency.machine, notes, keep=not small)


if __name__ == "__main__":
    main(small="--small" in sys.argv[1:])
