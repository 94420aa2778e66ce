"""Two threads beside one busy program: is any token mixer slower than with one thread?

Threads that wait for each other at the end of every operator may spin or sleep. On a machine that is
shared, those that spin take the time of the one that they wait for.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median

import torch
from linear_cost import build, call
from markdown import Row, write

from effformer import registry
from effformer.build import list_attention
from effformer.profile import machine

AIM, RUNS, SECONDS = 1.1, 7, 1.0
TOKENS = {"n": 4096, "n log n": 4096}
QUADRATIC = 1024
SLEEPING = {"OMP_WAIT_POLICY": "PASSIVE"}


def names() -> list[str]:
    """Every mixer that is built on tokens alone."""
    return [n for n in list_attention() if registry.attention.get(n).caps.causal != "always"]


def once(name: str) -> tuple[float, float, float]:
    """Medians with one and with two threads, which take turns in this process, and of their ratio."""
    tokens = TOKENS.get(registry.attention.get(name).caps.cost, QUADRATIC)
    run = call(build(name, False, tokens), tokens)
    rounds: list[tuple[float, float]] = []
    with torch.inference_mode():
        run()
        start = time.perf_counter()
        while len(rounds) < RUNS and (len(rounds) < 2 or time.perf_counter() - start < SECONDS):
            rounds.append((timed(run, 1), timed(run, 2)))
    one, two = (median(column) for column in zip(*rounds, strict=True))
    return one, two, median(b / a for a, b in rounds)


def timed(run: Callable[[], object], threads: int) -> float:
    torch.set_num_threads(threads)
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def times(names: list[str], environment: dict[str, str]) -> dict[str, list[float]]:
    """What a process of its own finds for every mixer."""
    code = (
        "import json, sys, shared_threads as s\n"
        "print(json.dumps({n: s.once(n) for n in sys.argv[1:]}))"
    )
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "KMP_"))}
    done = subprocess.run(
        [sys.executable, "-c", code, *names], check=True, capture_output=True, text=True,
        cwd=os.path.dirname(os.path.abspath(__file__)), env=kept | environment,
    )  # fmt: skip
    found: dict[str, list[float]] = json.loads(done.stdout.splitlines()[-1])
    return found


@contextmanager
def neighbour() -> Iterator[None]:
    """One busy program on the machine."""
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        busy.kill()
        busy.wait()


def main() -> None:
    chosen = [word for word in sys.argv[1:] if not word.startswith("--")] or names()
    rows = []
    with neighbour():
        sleeping = times(chosen, SLEEPING)
        spinning = times(chosen, {})
    for name in chosen:
        for how, found in (("spin", spinning), ("sleep", sleeping)):
            one, two, ratio = found[name]
            rows.append(
                Row(
                    what=f"{name}, two threads that {how}",
                    value=f"{1e3 * one:.1f} to {1e3 * two:.1f} ms",
                    ratio=ratio, target=AIM if how == "sleep" else None,
                )
            )  # fmt: skip
    notes = [
        "one busy program beside it; 4 heads of 64, batch 1, 4,096 tokens, 1,024 where the work is quadratic; "
        "the core alone of multi-head attentions; value: one thread, then two; ratio: two over one",
        "sleep: OMP_WAIT_POLICY=PASSIVE, which the command line sets for itself, and programs that import torch set "
        "before they do",
    ]
    keep = len(chosen) == len(names())
    write("shared_threads", "Threads beside a busy program", rows, machine(), notes, keep=keep)


if __name__ == "__main__":
    main()
