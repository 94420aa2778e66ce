"""Gated linear attention against causal softmax attention and against token loops: training and
ONNX Runtime.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from cpu_time import Turns, take_turns
from effformer.export import Session, export_onnx
from markdown import Row, write
from torch import Tensor, nn
from torch.nn import functional as F

from effformer.attention.gated_scan import gated_scan

HEADS, WIDTH = 12, 64
TRAINED, SERVED, LOOPED, RUNS = (1024, 8192), (256, 512, 1024, 2048, 4096), 1024, 3
SMALL = ((64, 128), (16, 32), 32, 1)
AIMS = {1024: 2.5, 8192: 0.5}
LOOP_AIM = 0.2


class Softmax(nn.Module):
    """Causal softmax attention."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class GatedDelta(nn.Module):
    """The gated delta rule, or gated linear attention if the decay has channels."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor | None = None
    ) -> Tensor:
        return gated_scan(q, k, v, decay, beta, delta=beta is not None)[0]


def inputs(tokens: int, rule: str) -> dict[str, Tensor]:
    """Arguments as projections leave them: (B, N, H, K) in memory."""
    draws = torch.Generator().manual_seed(0)
    q, k, v, g = torch.randn(4, 1, tokens, HEADS, WIDTH, generator=draws).transpose(2, 3).unbind(0)
    named = {"q": q, "k": F.normalize(k, dim=-1), "v": v}
    decay = F.logsigmoid(g + 3)
    if rule == "gla":
        return named | {"decay": decay}
    if rule == "gated-delta":
        return named | {"decay": decay[..., 0], "beta": g[..., 1].sigmoid()}
    return named


def loop(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor) -> Tensor:
    """The gated delta rule as the papers write it, token by token."""
    state, outputs = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1]), []
    for t in range(q.shape[2]):
        state = state * decay[:, :, t, None, None].exp()
        read = (state * k[:, :, t, :, None]).sum(dim=-2)
        written = (v[:, :, t] - read) * beta[:, :, t, None]
        state = state + k[:, :, t, :, None] * written[:, :, None]
        outputs.append((state * q[:, :, t, :, None]).sum(dim=-2) * WIDTH**-0.5)
    return torch.stack(outputs, dim=2)


def their_loop() -> Callable[..., Tensor] | None:
    """The naive form of fla, if it is installed."""
    try:
        found = import_module("fla.ops.gated_delta_rule.naive").naive_recurrent_gated_delta_rule
    except ImportError:
        return None

    def run(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor) -> Tensor:
        q, k, v, decay, beta = (x.transpose(1, 2) for x in (q, k, v, decay, beta))
        out: Tensor = found(q=q, k=k, v=v, g=decay, beta=beta)[0]
        return out.transpose(1, 2)

    return run


def training(function: Callable[..., Tensor], tokens: int, rule: str) -> Callable[[], Any]:
    """Forward and backward."""
    given = {n: x.clone().requires_grad_() for n, x in inputs(tokens, rule).items()}

    def run() -> tuple[Tensor, ...]:
        out = function(**given)
        return torch.autograd.grad(out, list(given.values()), torch.ones_like(out))

    return run


def rows_of(turns: Turns, where: str, aims: dict[str, float]) -> list[Row]:
    first = next(iter(turns.seconds))
    return [
        Row(
            what=f"{where}: {name}", value=turns.median(name), spread=turns.spread(name),
            ratio=None if name == first else turns.ratio(name), target=aims.get(name),
        )
        for name in turns.seconds
    ]  # fmt: skip


def served(runs: int, lengths: tuple[int, ...]) -> list[Row]:
    """The node of ONNX Runtime against causal softmax there."""
    rows, folder = [], Path(tempfile.mkdtemp())
    sessions = {}
    for name, model in (
        ("softmax", Softmax()),
        ("gated-delta", GatedDelta()),
        ("gla", GatedDelta()),
    ):
        given = inputs(33, name)
        axes = {n: {2: "tokens"} for n in given}
        path = folder / f"{name}.onnx"
        export_onnx(model, path, given, dynamic=axes, verify=False)
        sessions[name] = Session(path, threads=1)
    for tokens in lengths:
        calls = {
            name: partial(s.run, {n: x.contiguous() for n, x in inputs(tokens, name).items()})
            for name, s in sessions.items()
        }
        aims = {"gated-delta": 1.0, "gla": 1.0} if tokens >= 512 else {}
        rows += rows_of(take_turns(calls, runs=runs), f"ONNX Runtime, {tokens} tokens", aims)
    return rows


def main(*, small: bool = False) -> None:
    trained, lengths, looped, runs = SMALL if small else (TRAINED, SERVED, LOOPED, RUNS)
    rows = []
    for tokens in trained:
        calls = {
            "softmax (torch SDPA)": training(Softmax(), tokens, "softmax"),
            "gated-delta": training(GatedDelta(), tokens, "gated-delta"),
            "gla": training(GatedDelta(), tokens, "gla"),
        }
        turns = take_turns(calls, runs=runs, gradients=True)
        aims = {"gated-delta": AIMS[tokens]} if tokens in AIMS else {}
        rows += rows_of(turns, f"training, {tokens} tokens", aims)
    peers = {"token loop of the papers": loop}
    if (theirs := their_loop()) is not None:
        peers["naive form of fla"] = theirs
    for name, function in peers.items():
        for phase in ("forward", "training"):
            turns = take_turns(
                {
                    n: training(f, looped, "gated-delta")
                    if phase == "training"
                    else partial(f, **inputs(looped, "gated-delta"))
                    for n, f in ((name, function), ("gated-delta", GatedDelta()))
                },
                runs=runs, gradients=phase == "training",
            )  # fmt: skip
            rows += rows_of(turns, f"{phase}, {looped} tokens", {"gated-delta": LOOP_AIM})
    rows += served(runs, lengths)
    notes = [
        f"{HEADS} heads of {WIDTH}, batch 1, float32; a ratio is against the row without one above it",
        "training is forward and backward, in chunks of 64 tokens, eager",
        "time is CPU time of one thread, so that other work on the machine counts for little",
    ]
    if theirs is None:
        notes.append("fla was not installed, so that its naive form is missing")
    write(
        "gated_linear",
        "Gated linear attention on the CPU",
        rows,
        turns.machine,
        notes,
        keep=not small,
    )


if __name__ == "__main__":
    main(small="--small" in sys.argv[1:])
