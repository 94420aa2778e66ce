"""Forward passes of this version beside those of an earlier one, processes taking turns.

python benchmarks/versions.py REVISION
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median, quantiles

from markdown import Row, write

from effformer.profile import machine

ROOT = Path(__file__).resolve().parent.parent
MODELS, ROUNDS, CALLS = ("dit-b", "vit-b-16"), 5, 7
CHILD = """
import json, sys, time, torch
import effformer
torch.set_num_threads(1)
model = effformer.build_model(sys.argv[1]).eval()
inputs = model.example_inputs()
times = []
with torch.inference_mode():
    for i in range(int(sys.argv[2]) + 2):
        start = time.process_time()
        model(**inputs)
        times.append(time.process_time() - start)
print(json.dumps(sorted(times[2:])[len(times[2:]) // 2]))
"""


def linked(source: Path, target: Path) -> Path:
    """The folders of a checkout as the package that they install as."""
    package = target / "effformer"
    package.mkdir(parents=True)
    for item in (source / "effformer").iterdir():
        (package / item.name).symlink_to(item)
    for name in ("models", "compress", "export"):
        (package / name).symlink_to(source / name)
    return target


def seconds(tree: Path, model: str) -> float:
    """Median CPU time of a forward in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, model, str(CALLS)],
        env={"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "PATH": ""},
        capture_output=True, text=True, check=True, cwd=tree,
    )  # fmt: skip
    return float(json.loads(done.stdout))


def main(revision: str) -> None:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        old = Path(folder) / "checkout"
        subprocess.run(
            ["git", "worktree", "add", "--detach", "--quiet", str(old), revision],
            cwd=ROOT,
            check=True,
        )
        try:
            trees = {
                "before": linked(old, Path(folder) / "before"),
                "now": linked(ROOT, Path(folder) / "now"),
            }
            for model in MODELS:
                found = [
                    {n: seconds(tree, model) for n, tree in trees.items()} for _ in range(ROUNDS)
                ]
                ratios = [turn["now"] / turn["before"] for turn in found]
                cuts = quantiles(ratios, n=10, method="inclusive")
                rows.append(
                    Row(
                        what=f"{model}, batch 1",
                        value=" to ".join(
                            f"{1e3 * median(turn[name] for turn in found):.4g} ms" for name in trees
                        ),
                        spread=f"{cuts[0]:.3f} to {cuts[-1]:.3f}",
                        ratio=median(ratios),
                        target=1.0,
                    )
                )
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(old)], cwd=ROOT, check=True)
    notes = [
        f"before: revision {revision}; every number is the median of {CALLS} calls in a process of its "
        f"own, {ROUNDS} rounds in turns; spread is that of the ratio",
        "float32, eager, no gradients; time is CPU time of one thread",
    ]
    write("versions", "This version beside an earlier one", rows, machine(), notes)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python benchmarks/versions.py REVISION")
    main(sys.argv[1])
