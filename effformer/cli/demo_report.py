"""What `effformer demo` leaves behind: a summary, and a page with pictures, curves and numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from html import escape
from typing import TYPE_CHECKING, Any

from ..version import VERSION
from .demo_steps import ATTENTIONS, EDGE, GATE, LONGER, RUNTIME, Demo

if TYPE_CHECKING:
    from effformer.profile.plots import Curves, Pareto

Table = tuple[Sequence[str], Sequence[Sequence[str]]]

__all__ = ["cost_rows", "page", "summary", "verdicts"]


def summary(demo: Demo) -> dict[str, Any]:
    """Everything as plain JSON values."""
    return {
        "effformer": VERSION,
        "passed": demo.passed,
        "gate": GATE,
        "seed": demo.seed,
        "samples": len(demo.labels),
        "steps": demo.recipe.steps,
        "guidance": demo.recipe.guidance,
        "judge_accuracy": demo.judge.accuracy,
        "recognised": {form.label: form.recognised for form in demo.gated},
        "forms": [asdict(form) for form in demo.forms],
        "loss": {attn: records[-1]["loss"] for attn, records in demo.losses.items()},
        "parity": {name: report.max_rel for name, report in demo.parity.items()},
        "scaling": [{"tokens": n, "softmax": s, "flow": f} for n, s, f in demo.scaling],
        "mixing": demo.mixing,
        "longer": None if demo.longer is None else demo.longer.to_dict(),
        "verdict": verdicts(demo),
        "measured": demo.measured,
        "seconds": {name: round(value, 3) for name, value in demo.seconds.items()},
        "seconds_total": round(sum(demo.seconds.values()), 3),
    }


def cost_rows(demo: Demo) -> Table:
    """Header and cells: every form with its size, times and quality."""
    first, threads = demo.forms[0], list(demo.forms[0].milliseconds)
    rows = [
        (
            form.label,
            f"{form.macs / 1e6:.2f} M",
            f"{form.bytes / 1e3:,.0f} kB",
            f"{form.bytes / first.bytes:.2f}x",
            *(f"{form.milliseconds[n]:.2f} ms" for n in threads),
            f"{form.milliseconds[threads[0]] / first.milliseconds[threads[0]]:.2f}x",
            "-" if form.recognised is None else f"{form.recognised:.1%}",
        )
        for form in demo.forms
    ]
    times = (_on(n) for n in threads)
    return ("form", "MACs", "file", "to softmax", *times, "to softmax", "recognised"), rows


def _on(threads: int) -> str:
    return f"{threads} thread{'s' * (threads > 1)}"


def verdicts(demo: Demo) -> list[str]:
    """What is fastest and smallest on this machine, why the attention decides little here, and from
    where on it does.
    """
    said = []
    for n in demo.forms[0].milliseconds:
        best = min(demo.forms, key=lambda form: form.milliseconds[n])
        said.append(f"fastest with {_on(n)}: {best.label} ({best.milliseconds[n]:.2f} ms)")
    small = min(demo.forms, key=lambda form: form.bytes)
    said.append(f"smallest: {small.label} ({small.bytes / 1e3:,.0f} kB)")
    said.append(
        f"with 16 tokens they meet in {demo.mixing:.1%} of the multiply-adds, the others are projections, "
        "FFNs and modulation: another attention has nothing to save here, and what it computes beside "
        "costs time; packed weights save bytes, and are unpacked for every call"
    )
    if demo.longer is None:
        return said
    lengths = " and ".join(f"{n:,.0f}" for n in demo.longer.found)
    return [*said, *(f"{LONGER} on {lengths} tokens: {v}" for v in demo.longer.verdicts())]


def pareto(demo: Demo) -> Pareto:
    """Time against size; a form that was not sampled computes what its torch twin does."""
    from ..profile.plots import Pareto

    threads = next(iter(demo.forms[0].milliseconds))
    points = tuple((f.label, f.milliseconds[threads], f.bytes / 1e3) for f in demo.forms)
    return Pareto(points, f"time of one forward / ms, {_on(threads)}", "file / kB")


def page(demo: Demo) -> str:
    """The report, one self-contained HTML document."""
    from ..notebook import html_table
    from ..profile.html import gallery
    from ..profile.html import page as document

    recipe = demo.recipe
    body = [
        "<h1>effformer demo</h1>",
        "<p>Two rectified-flow transformers that differ in nothing but <code>attn=</code>, trained "
        "on real handwritten digits on this machine; then measured, quantized, exported, and run "
        "without torch.</p>",
        _tiles(demo),
        "<h2>Samples</h2>",
        f"<p>One class per row; {recipe.steps} Euler steps, guidance {recipe.guidance:g}. A "
        "convolutional network that saw real digits only "
        f"({demo.judge.accuracy:.1%} on held-out ones) judges {len(demo.labels)} samples of each "
        "form.</p>",
        gallery((grid.file, grid.title, grid.note) for grid in demo.grids),
        "<h2>Training</h2>",
        f'<div class="plot">{_losses(demo).svg()}</div>',
        "<h2>What each form costs</h2>",
        html_table(*cost_rows(demo)),
        f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in verdicts(demo))}</ul>",
        "<p>MACs: multiply-adds of one forward of one sample. Times: median of one forward of 20 "
        f"samples, {escape(demo.measured)}.</p>",
        f'<div class="plot">{pareto(demo).svg()}</div>',
        "<h2>The same exchange on longer inputs</h2>",
        *_longer(demo),
        html_table(*_scaling(demo)),
        "<p>Multiply-adds of one forward of dit-b-2, counted without weights.</p>",
        "<h2>Export, verified</h2>",
        html_table(*_parity(demo)),
        "<p>ONNX Runtime against torch at shapes other than the traced one, relative to the "
        "largest output.</p>",
        "<h2>Where the time went</h2>",
        html_table(("step", "seconds"), [(n, f"{s:.1f}") for n, s in demo.seconds.items()]),
        f"<p>effformer {VERSION}, seed {demo.seed}. The bundle in <code>bundle/</code> samples "
        "with numpy and onnxruntime alone: <code>python bundle/run.py --labels 0,1,2 --out "
        "samples.png</code></p>",
    ]
    return document("effformer demo", "\n".join(body), "demo report")


def _tiles(demo: Demo) -> str:
    from ..profile.html import tiles

    edge, dense = demo.form(EDGE, RUNTIME), demo.form("flow")
    shown = [(f"{demo.form(a).recognised:.1%}", f"recognised, attn={a}") for a in ATTENTIONS]
    shown += [
        (f"{edge.recognised:.1%}", "recognised, int8 edge bundle"),
        (f"{edge.bytes / dense.bytes:.2f}x", "int8 graph by fp32 model"),
        (f"{max(r.max_rel for r in demo.parity.values()):.0e}", "largest export error"),
        (f"{sum(demo.seconds.values()):.0f} s", "for all of this"),
    ]
    return tiles(shown)


def _longer(demo: Demo) -> list[str]:
    """Curves and times of an untrained model with more tokens."""
    from ..notebook import html_table

    if demo.longer is None:
        return []
    one = next(iter(demo.longer.found.values()))
    threads = [latency.threads for latency, _ in one.rows[0].times]
    header = (
        "attention",
        *(f"{n:,.0f} tokens, {_on(t)}" for n in demo.longer.found for t in threads),
    )
    rows = [
        (name, *(
            f"{1e3 * latency.median:.4g} ms ({ratio:.2f}x)"
            for found in demo.longer.found.values() for latency, ratio in found.rows[i].times
        ))
        for i, name in enumerate(demo.longer.names)
    ]  # fmt: skip
    return [
        f"<p>{LONGER} with drawn weights, in brackets the time over that of softmax; {escape(one.how)}.</p>",
        html_table(header, rows),
        f'<div class="plot">{demo.longer.curves().svg()}</div>',
    ]


def _scaling(demo: Demo) -> Table:
    rows = [
        (f"{n:,} tokens", f"{soft / 1e9:.1f} G", f"{flow / 1e9:.1f} G", f"{flow / soft:.2f}x")
        for n, soft, flow in demo.scaling
    ]
    return ("dit-b-2", "attn=softmax", "attn=flow", "ratio"), rows


def _parity(demo: Demo) -> Table:
    rows = []
    for name, report in demo.parity.items():
        shapes = ", ".join("x".join(map(str, case.shapes["x"])) for case in report.cases)
        rows.append((name, shapes, f"{report.max_rel:.1e}", f"{report.tolerance:.0e}"))
    return ("form", "shapes of x", "difference", "allowed"), rows


def _losses(demo: Demo) -> Curves:
    """Loss over steps."""
    from ..profile.plots import Curves

    lines = {
        f"attn={name}": [(r["step"], r["loss"]) for r in records]
        for name, records in demo.losses.items()
    }
    return Curves(lines, "step", "squared error of the velocity")
