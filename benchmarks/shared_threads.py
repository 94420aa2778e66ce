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
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median

import torch
from linear_cost import build, call
from markdown import Row, write

from effformer import registry
from effformer.build import list_attention
from effformer.profile import machine

AIM, RUNS, SECONDS = 1.1, 7, 1.5
TOKENS = {"n": 4096, "n log n": 4096}
QUADRATIC = 1024
SLEEPING = {"OMP_WAIT_POLICY": "PASSIVE"}


def names() -> list[str]:
    """Every mixer that is built on tokens alone."""
    return [n for n in list_attention() if registry.attention.get(n).caps.causal != "always"]


def once(name: str, threads: int) -> float:
    """Median time in this process."""
    torch.set_num_threads(threads)
    tokens = TOKENS.get(registry.attention.get(name).caps.cost, QUADRATIC)
    run = call(build(name, False, tokens), tokens)
    times = []
    with torch.inference_mode():
        run()
        start = time.perf_counter()
        while len(times) < RUNS and (len(times) < 3 or time.perf_counter() - start < SECONDS):
            began = time.perf_counter()
            run()
            times.append(time.perf_counter() - began)
    return median(times)


def times(names: list[str], threads: int, environment: dict[str, str]) -> dict[str, float]:
    """Medians of a process of its own."""
    code = (
        "import json, sys, shared_threads as s\n"
        "print(json.dumps({n: s.once(n, int(sys.argv[1])) for n in sys.argv[2:]}))"
    )
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "KMP_"))}
    done = subprocess.run(
        [sys.executable, "-c", code, str(threads), *names], check=True, capture_output=True, text=True,
        cwd=os.path.dirname(os.path.abspath(__file__)), env=kept | environment,
    )  # fmt: skip
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
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
        one = times(chosen, 1, {})
        spinning = times(chosen, 2, {})
        sleeping = times(chosen, 2, SLEEPING)
    for name in chosen:
        for how, found in (("spin", spinning), ("sleep", sleeping)):
            aim = AIM if how == "sleep" else None
            rows.append(
                Row(
                    what=f"{name}, two threads that {how}",
                    value=f"{1e3 * one[name]:.1f} to {1e3 * found[name]:.1f} ms",
                    ratio=found[name] / one[name], target=aim,
                )
            )  # fmt: skip
            print(f"{name:<24} {how:<6} {found[name] / one[name]:.2f}", flush=True)
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
