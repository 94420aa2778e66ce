"""What `effformer demo` leaves behind: a summary, and a page with pictures, curves and numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from html import escape
from typing import TYPE_CHECKING, Any

from ..version import VERSION
from .demo_steps import ATTENTIONS, EDGE, GATE, RUNTIME, Demo

if TYPE_CHECKING:
    from effformer.profile.plots import Curves, Pareto

Table = tuple[Sequence[str], Sequence[Sequence[str]]]

__all__ = ["cost_rows", "page", "summary"]


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
        "measured": demo.measured,
        "seconds": {name: round(value, 3) for name, value in demo.seconds.items()},
        "seconds_total": round(sum(demo.seconds.values()), 3),
    }


def cost_rows(demo: Demo) -> Table:
    """Header and cells: every form with its size, time and quality."""
    first = demo.forms[0]
    rows = [
        (
            form.label,
            f"{form.macs / 1e6:.2f} M",
            f"{form.bytes / 1e3:,.0f} kB",
            f"{form.bytes / first.bytes:.2f}x",
            f"{form.milliseconds:.2f} ms",
            f"{form.milliseconds / first.milliseconds:.2f}x",
            "-" if form.recognised is None else f"{form.recognised:.1%}",
        )
        for form in demo.forms
    ]
    return ("form", "MACs", "file", "to softmax", "forward", "to softmax", "recognised"), rows


def pareto(demo: Demo) -> Pareto:
    """Time against size; a form that was not sampled computes what its torch twin does."""
    from ..profile.plots import Pareto

    points = tuple((f.label, f.milliseconds, f.bytes / 1e3) for f in demo.forms)
    return Pareto(points, "time of one forward / ms", "file / kB")


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
        "<p>MACs: multiply-adds of one forward of one sample. Forward: median time of 20 samples, "
        f"{escape(demo.measured)}.</p>",
        f'<div class="plot">{pareto(demo).svg()}</div>',
        "<h2>The same exchange on longer inputs</h2>",
        html_table(*_scaling(demo)),
        "<p>Multiply-adds of one forward of dit-b-2, counted without weights. With 16 tokens, as "
        "for these digits, the two attentions cost much the same; the difference comes with "
        "length.</p>",
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
