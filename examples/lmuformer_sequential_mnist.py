"""LMUFormer reads digits row by row: trained on whole images in parallel, then streamed.

Every row of an image is one frame. The model is trained on all rows at once, must recognise most of
the test images, and then reads them again one row at a time with a state of constant size: the
predictions must be the same. The picture shows how soon a digit is recognised; the embedding looks
five rows ahead, so the answer for row t is there when row t + 5 has been read.

    python examples/lmuformer_sequential_mnist.py                  # the packaged digits, 8 rows
    python examples/lmuformer_sequential_mnist.py --data DIR       # IDX files, for instance MNIST
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from effformer.models import LMUFormer
from torch import Tensor, nn

import effformer
from effformer.io import atomic_path
from effformer.train import Classification, Dataset, TrainConfig, load_data, train

REQUIRED = 0.95
"""Share of the test images that must be recognised."""


class Rows(nn.Module):
    """Images (B, C, H, W) as sequences of H rows for a model of frames (B, H, C W)."""

    def __init__(self, model: LMUFormer) -> None:
        super().__init__()
        self.model = model
        self.config = model.config

    def forward(self, images: Tensor) -> Tensor:
        """Class logits."""
        return self.model(rows(images))


def rows(images: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H, C W)."""
    return images.transpose(1, 2).flatten(2)


def read(source: str) -> tuple[Dataset, Dataset]:
    """Training and test images; a data set without a test part is cut."""
    data = load_data(source)
    if source == "digits":
        return data.split(0.2, seed=0)
    return data, load_data(source, part="test")


def build(data: Dataset, *, seed: int = 0) -> LMUFormer:
    """A small model for the rows of the images; its memory spans the image."""
    _, channels, height, width = data["x"].shape
    torch.manual_seed(seed)
    model = effformer.build_model(
        "lmuformer-tiny", dim=64, depth=1, channels=channels * width, frames=height,
        num_classes=len(data.classes), attn={"theta": float(height)},
    )  # fmt: skip
    assert isinstance(model, LMUFormer)
    return model


def fit(model: LMUFormer, data: Dataset, steps: int, *, seed: int = 0) -> None:
    """Train in parallel over all rows."""
    config = TrainConfig(
        steps=steps, batch=64, lr=3e-3, warmup=steps // 10, weight_decay=0.01, ema=None, seed=seed
    )
    train(Rows(model), data, Classification(smoothing=0.05), config)
    model.eval()


def parallel(model: LMUFormer, data: Dataset, batch: int = 500) -> Tensor:
    """Logits (B, classes) of whole images."""
    with torch.inference_mode():
        return torch.cat([model(rows(images)) for images in data["x"].split(batch)])


def streamed(model: LMUFormer, data: Dataset, batch: int = 500) -> Tensor:
    """Logits (B, H, classes) for every row: the same images, fed one row at a time."""
    everything = []
    with torch.inference_mode():
        for images in data["x"].split(batch):
            state, logits = model.init_state(len(images)), []
            for row in rows(images).split(1, dim=1):
                ready, state = model.step(row, state)
                logits.append(ready)
            logits.append(model.finish(state))
            everything.append(torch.cat(logits, dim=1))
    return torch.cat(everything)


def picture(path: Path, share: Tensor, image: Tensor) -> None:
    """Accuracy over the rows, beside a digit lying on its side."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4), layout="constrained")
    height = len(share)
    axes.imshow(
        image.mean(0).T.flip(0).numpy(), cmap="gray_r", alpha=0.25, aspect="auto",
        extent=(0.5, height + 0.5, 0, 100),
    )  # fmt: skip
    axes.plot(range(1, height + 1), (100 * share).numpy(), marker="o", color="tab:blue")
    axes.set(
        xlabel="row (five more have been read)",
        ylabel="recognised, %",
        ylim=(0, 100),
        title="row by row",
    )
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Run everything; returns the numbers that are asserted."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", default="digits", help="a folder of IDX files, or 'digits'")
    parser.add_argument("--out", type=Path, default=Path("lmuformer_rows.png"), help="picture")
    parser.add_argument("--steps", type=int, default=1200, help="optimizer steps")
    options: Any = parser.parse_args(argv)
    began = time.perf_counter()
    learned, tested = read(options.data)
    model = build(learned)
    fit(model, learned, options.steps)
    whole = parallel(model, tested)
    accuracy = (whole.argmax(1) == tested["y"]).double().mean().item()
    print(f"trained on {len(learned):,} images in {time.perf_counter() - began:.0f} s")
    print(f"whole images: {accuracy:.2%} of {len(tested):,} test images recognised")
    prefixes = streamed(model, tested)
    agree = (prefixes[:, -1].argmax(1) == whole.argmax(1)).double().mean().item()
    share = (prefixes.argmax(2) == tested["y"][:, None]).double().mean(0)
    print(f"row by row:   {agree:.2%} of the predictions are the same")
    print("recognised by row, %: " + " ".join(f"{100 * s:.0f}" for s in share.tolist()))
    picture(options.out, share, tested["x"][0])
    assert accuracy >= REQUIRED, f"{accuracy:.2%} recognised, fewer than {REQUIRED:.0%}"
    assert agree == 1, f"only {agree:.2%} of the streamed predictions are those of whole images"
    return {"accuracy": accuracy, "agree": agree, "seconds": time.perf_counter() - began}


if __name__ == "__main__":
    main()
