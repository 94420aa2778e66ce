"""A small classifier that judges generated images.

In training it sees real images only; it knows nothing of the generative model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from effformer.arguments import Shape, checked
from effformer.values import Count, Seed

from ..calls import bind, device_of, evaluating, half_of, match
from .datasets import Dataset, load_data, placed
from .loop import TrainConfig, train
from .objectives import Classification, check_logits

__all__ = ["Classifier", "accuracy", "confusion", "train_classifier"]

RECIPE = TrainConfig(steps=300, batch=64, lr=3e-3, warmup=20, weight_decay=0.05, ema=0.99)


@checked
def accuracy(model: nn.Module, data: Dataset, *, batch: Count = 500) -> float:
    """Share of a data set that a classifier gets right, in [0, 1].

    Args:
        model: gives logits (B, classes); gets every tensor but the target that it takes by name,
            ``x`` as its first argument. Used in evaluation mode.
        data: named tensors with classes.
        batch: samples per forward pass, about.
    """
    hits = 0
    for logits, target in _answers(model, data, batch, "accuracy"):
        check_logits(logits, target, where="accuracy")
        hits += int((logits.argmax(1) == target).sum())
    return hits / len(data)


@checked
def confusion(model: nn.Module, data: Dataset, *, batch: Count = 500) -> Tensor:
    """What a classifier takes the samples of each class for: counts (classes, classes) int64, true
    classes as rows.

    Args:
        model: as in `accuracy`.
        data: named tensors with classes.
        batch: samples per forward pass, about.

    Raises:
        ValueError: the model tells apart another number of classes than the data have.
    """
    classes = len(data.classes)
    counts = torch.zeros(classes, classes, dtype=torch.int64)
    for logits, target in _answers(model, data, batch, "confusion"):
        if isinstance(logits, Tensor) and logits.dim() == 2 and logits.shape[1] != classes:
            raise ValueError(
                f"confusion: the model tells {logits.shape[1]} classes apart, {data.name!r} has {classes}"
            )
        check_logits(logits, target, where="confusion")
        pairs = target.cpu() * classes + logits.argmax(1).cpu()
        counts += torch.bincount(pairs, minlength=classes**2).view(classes, classes)
    return counts


def _answers(
    model: nn.Module, data: Dataset, batch: int, where: str
) -> Iterator[tuple[Any, Tensor]]:
    """What a model returns, and the classes (B,) that it should tell; batch after batch."""
    device, half = device_of(model), half_of(model)
    with evaluating(model), torch.inference_mode():
        for rows in torch.arange(len(data)).chunk(max(1, len(data) // batch)):
            given = placed(data.rows(rows), device, half)
            target = given.pop(data.target)
            yield match(model, given, where=where)(model), target


Pictures = Annotated[Tensor, Shape("(B, C, H, W)")]
Labels = Annotated[Tensor, Shape("(B,)", whole=True)]


@dataclass(frozen=True, slots=True, eq=False)
class Classifier:
    """A trained judge of images.

    Attributes:
        network: maps images (B, C, H, W) in [-1, 1] to logits (B, classes).
        accuracy: share of held-out real images that it recognises.
    """

    network: nn.Module
    accuracy: float

    @checked
    def predict(self, samples: Pictures) -> Tensor:
        """Classes (B,) of samples (B, C, H, W), clamped to [-1, 1] as in an image file."""
        call = bind(self.network, samples.clamp(-1, 1), where="Classifier.predict")
        with torch.inference_mode():
            logits: Tensor = call(self.network)
        return logits.argmax(1)

    @checked
    def features(self, samples: Pictures) -> Tensor:
        """What the last linear layer of the network sees (B, D), for
        `effformer.flow.frechet_distance`.

        Args:
            samples: (B, C, H, W), clamped to [-1, 1].

        Raises:
            ValueError: the network has no linear layer.
        """
        linears = [m for m in self.network.modules() if isinstance(m, nn.Linear)]
        if not linears:
            raise ValueError("Classifier.features: the network has no linear layer")
        seen: list[Tensor] = []
        hook = linears[-1].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        with hook:
            self.predict(samples)
        return seen[-1].flatten(1)

    @checked
    def recognised(self, samples: Pictures, labels: Labels) -> float:
        """Share of samples that are taken for the class that they were asked to be, in [0, 1].

        Args:
            samples: (B, C, H, W) in [-1, 1].
            labels: (B,) int64.

        Raises:
            ValueError: the labels do not fit the samples.
        """
        return (self.predict(samples) == labels).double().mean().item()


@checked
def train_classifier(
    data: Dataset | None = None, *, seed: Seed = 0, config: TrainConfig = RECIPE
) -> Classifier:
    """Train a small convolutional network on 9/10 of a data set and test it on the rest.

    Takes a few seconds for the digits on two CPU cores, and is deterministic.

    Args:
        data: real images; None means the packaged digits.
        seed: of the split, the initial weights and the order of the data.
        config: how it is trained; its seed is replaced.

    Example:
        >>> from effformer.train import train_classifier
        >>> train_classifier().accuracy > 0.97
        True
    """
    data = load_data("digits") if data is None else data
    learned, held_out = data.split(0.1, seed=seed)
    with torch.random.fork_rng([]):
        torch.default_generator.manual_seed(seed)
        network = _network(data["x"].shape[1], len(data.classes))
    objective = Classification(smoothing=0.05, target=data.target)
    train(network, learned, objective, config.replace(seed=seed), progress=False)
    network.eval()
    return Classifier(network, accuracy(network, held_out))


def _network(channels: int, classes: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveMaxPool2d(4),
        nn.Flatten(),
        nn.Linear(64 * 16, 128),
        nn.ReLU(),
        nn.Linear(128, classes),
    )
