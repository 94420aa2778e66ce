"""Class-conditional MNIST, 28 x 28, by ``effformer train --recipe mnist``: what is recognised, and a picture.

    python benchmarks/mnist.py DIR RUN

reads the files of MNIST in DIR, and trains in RUN if nothing is there. Writes ``benchmarks/results/mnist.md``
and the picture of the README.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from effformer.export.run import write_image
from markdown import Row, write

from effformer.cli.drawing import draw, pixels
from effformer.cli.evaluate import quality_of
from effformer.profile import count_parameters, machine
from effformer.train import load_run, read_metrics
from effformer.train.recipes import MNIST

SAMPLES, COLUMNS = 500, 10
PICTURE = Path(__file__).parent.parent / "docs" / "images" / "mnist.png"


def trained(folder: str, run: Path) -> None:
    """Train if nobody has."""
    words = ["train", "--recipe", "mnist", "--data", folder, "--threads", "1", "-o", str(run)]
    if not (run / "run.json").is_file():
        subprocess.run([sys.executable, "-m", "effformer", *words], check=True)


def picture(run: Path) -> None:
    """Samples of every class, one class a row."""
    labels = [label for label in range(10) for _ in range(COLUMNS)]
    samples = draw(load_run(run)[0], labels, steps=MNIST.steps, guidance=MNIST.guidance, seed=0)
    write_image(PICTURE, pixels(samples), zoom=2, force=True)


def main(folder: str, run: Path) -> None:
    torch.set_num_threads(1)
    trained(folder, run)
    found = quality_of(run, folder, samples=SAMPLES, stage=lambda _: None)
    picture(run)
    model, step = load_run(run)
    config, steps = MNIST.config, step or MNIST.config.steps
    seconds = max(r["seconds"] for r in read_metrics(run) if r["step"] <= steps)
    cut = "" if steps == config.steps else f" of {config.steps:,}, after which it was stopped,"
    write(
        "mnist", "MNIST by the recipe mnist",
        [
            Row(what="recognised of the samples", value=f"{found.recognised:.1%}"),
            Row(what="recognised of real images that the judge has not seen", value=f"{found.judge:.1%}"),
            Row(what="Frechet distance of the samples", value=f"{found.distance:.1f}"),
            Row(what="Frechet distance of as many real images", value=f"{found.floor:.1f}"),
        ],
        machine(),
        [
            f"{MNIST.model} with patches of 4, 49 tokens, {count_parameters(model):,} parameters; {steps:,} steps{cut} of "
            f"{config.batch} on the 60,000 training images, seed 0; {seconds / 60:.0f} minutes of wall time on one "
            "thread, which other programs shared",
            f"{SAMPLES:,} samples, {found.how.replace(folder, 'mnist:DIR')}",
            "distances are those of `effformer evaluate`, not comparable with published FIDs",
            f"{PICTURE.name}: seed 0, one class a row, {COLUMNS} of each, none chosen",
        ],
    )  # fmt: skip


if __name__ == "__main__":
    main(f"mnist:{sys.argv[1]}", Path(sys.argv[2]))
