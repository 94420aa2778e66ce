"""Flow-Attention against softmax attention and against its two unavoidable matrix products."""

from __future__ import annotations

import torch
import torch._inductor.config
from markdown import Row, write
from torch.nn import functional as F

from effformer.attention import Flow
from effformer.profile import Latency, interleave, peak_rss
from effformer.site import Site

HEADS, WIDTH, TOKENS, THREADS, RUNS = 12, 64, 4096, 2, 21


def heads(tokens: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(1, HEADS, tokens, WIDTH, generator=generator) for _ in range(3))


def core(*, causal: bool = False) -> Flow:
    return Flow(Flow.Config(causal=causal), Site(dim=HEADS * WIDTH, heads=HEADS)).eval()


def run_once(tokens: int, causal: bool) -> None:
    """Called in a fresh process, which measures its memory."""
    with torch.inference_mode():
        core(causal=causal)(*heads(tokens))


def time(latency: Latency) -> tuple[str, str]:
    return f"{1e3 * latency.median:.2f} ms", f"{1e3 * latency.p10:.2f} to {1e3 * latency.p90:.2f}"


def main() -> None:
    # compiler processes that still start up would take a core from what is timed
    torch._inductor.config.compile_threads = 1
    q, k, v = heads(TOKENS)
    flow = core()
    compiled = torch.compile(flow)
    fast = interleave(
        {
            "two products": lambda: q @ (k.transpose(-2, -1) @ v),
            "flow, eager": lambda: flow(q, k, v),
            "flow, compiled": lambda: compiled(q, k, v),
        },
        warmup=5, runs=RUNS, threads=THREADS,
    )  # fmt: skip
    slow = interleave(
        {
            "softmax (torch SDPA)": lambda: F.scaled_dot_product_attention(q, k, v),
            "flow, eager": lambda: flow(q, k, v),
        },
        warmup=2, runs=9, threads=THREADS,
    )  # fmt: skip
    aims = {"flow, eager": 3.0, "flow, compiled": 2.0}
    rows = [
        Row(what=n, value=time(r)[0], spread=time(r)[1],
            ratio=fast.ratios[n] if n in aims else None, target=aims.get(n))
        for n, r in fast.rows.items()
    ]  # fmt: skip
    for name, row in slow.rows.items():
        ratio = slow.ratios[name] if name.startswith("flow") else None
        value, spread = time(row)
        what = f"{name}, against softmax" if ratio else name
        rows.append(
            Row(what=what, value=value, spread=spread, ratio=ratio, target=ratio and 1 / 20)
        )
    for causal in (False, True):
        sizes = (4096, 8192, 16384)
        used = {n: peak_rss(run_once, n, causal) / 2**20 for n in sizes}
        form = "causal" if causal else "both ways"
        rows.append(
            Row(
                what=f"memory at 16,384 tokens, {form} (inputs included), in GiB",
                value=", ".join(f"{n}: {m:.0f} MiB" for n, m in used.items()),
                ratio=used[16384] / 1024,
                target=1.0,
            )
        )
        rows.append(
            Row(
                what=f"memory growth per doubling, {form}",
                value=f"{used[8192] / used[4096]:.2f}, {used[16384] / used[8192]:.2f}",
                ratio=used[16384] / used[8192],
                target=2.5,
            )
        )
    notes = [
        f"{HEADS} heads of {WIDTH}, {TOKENS} tokens, batch 1, float32; ratios against the two "
        "products `q (k^T v)`, or against softmax where the row says so",
        "memory is the growth of the resident set of a fresh process, queries, keys and values included",
    ]
    write(
        "flow_attention", "Flow-Attention on the CPU", rows, slow.rows["flow, eager"].machine, notes
    )


if __name__ == "__main__":
    main()
