"""Start-up: ``effformer --help``, and what ``import effformer`` adds to ``import torch``."""

from __future__ import annotations

import subprocess
import sys
import time
from statistics import median, quantiles

from markdown import Row, write

from effformer.profile import machine

RUNS = 9


def wall(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - start


def main() -> None:
    commands = {
        "help": [sys.executable, "-m", "effformer.cli.main", "--help"],
        "torch": [sys.executable, "-c", "import torch"],
        "both": [sys.executable, "-c", "import torch, effformer; effformer.build_model"],
        "models": [sys.executable, "-c", "import torch, effformer; effformer.list_models()"],
    }
    times: dict[str, list[float]] = {name: [] for name in commands}
    for command in commands.values():
        wall(command)
    for _ in range(RUNS):
        for name, command in commands.items():
            times[name].append(wall(command))
    added = [b - a for a, b in zip(times["torch"], times["both"], strict=True)]
    listed = [b - a for a, b in zip(times["torch"], times["models"], strict=True)]

    def row(what: str, values: list[float], target: float | None) -> Row:
        deciles = quantiles(values, n=10)
        spread = f"{deciles[0]:.2f} to {deciles[-1]:.2f}"
        middle = median(values)
        return Row(what=what, value=f"{middle:.3f} s", spread=spread, ratio=middle, target=target)

    rows = [
        row("effformer --help (seconds)", times["help"], 0.5),
        row("import effformer, beyond import torch (seconds)", added, 0.3),
        row("the same, and every model registered (seconds)", listed, None),
    ]
    notes = ["wall time of whole processes; the ratio column holds seconds"]
    write("startup", "Start-up time", rows, machine(), notes)


if __name__ == "__main__":
    main()
