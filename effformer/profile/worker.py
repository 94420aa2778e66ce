"""The process in which `effformer.profile.benchmark` times one candidate: a job as JSON on stdin, an
answer as JSON on stdout.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import torch

from effformer.calls import outputs
from effformer.checks import is_refusal

from .latency import timed
from .machine import machine
from .memory import rss_peak

__all__ = ["main"]


def main() -> None:
    """Answer one job; what libraries print goes to stderr."""
    job = json.load(sys.stdin)
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    try:
        answer = _timed(job)
    except (ValueError, TypeError, ImportError) as error:
        if not is_refusal(error):
            raise
        answer = {"refused": str(error)}
    with answers:
        json.dump(answer, answers)


def _timed(job: dict[str, Any]) -> dict[str, Any]:
    """Load a candidate and time its calls."""
    torch.set_num_threads(job["threads"])
    empty = rss_peak(reset=True)
    call = _load(job["load"], job["options"])
    with torch.no_grad():
        for _ in range(job["warmup"]):
            call()
        if job["outputs"]:
            _keep(call(), job["outputs"])
        waited, cpu, began = _waited(), process_time(), perf_counter()
        samples = [timed(call) for _ in range(job["runs"])]
        wall = perf_counter() - began
        cpu, after = process_time() - cpu, _waited()
    share = 0.0
    if waited is not None and after is not None:
        share = (after - waited) / (wall * job["threads"])
    elif job["threads"] == 1:  # one thread that never waits uses all of its time
        share = max(0.0, 1 - cpu / wall)
    facts = {name: getattr(machine(), name) for name in machine().__slots__}
    return {
        "samples": samples, "waited": share, "machine": facts,
        "memory": rss_peak() - empty,
    }  # fmt: skip


def _load(name: str, options: dict[str, Any]) -> Callable[[], Any]:
    module, _, function = name.partition(":")
    made: Callable[[], Any] = getattr(importlib.import_module(module), function)(**options)
    return made


def _waited() -> float | None:
    """Seconds for which threads of this process were ready and had no processor; None if the system
    does not tell.
    """
    try:
        parts = [p.read_text().split() for p in Path("/proc/self/task").glob("*/schedstat")]
    except OSError:
        return None
    return sum(int(p[1]) for p in parts) / 1e9 if parts else None


def _keep(made: Any, path: str) -> None:
    """Write the numbers of an output."""
    from safetensors.torch import save_file

    found = {str(i): x.detach().cpu().contiguous() for i, x in enumerate(outputs(made))}
    save_file(found, path)


if __name__ == "__main__":
    main()
