"""What the loop minimises: a function of model, batch and randomness."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from effformer.ledger import takes_ledger

from ..config import Config, part, resolve
from ..context import Ledger
from ..flow.losses import FlowMatching

__all__ = ["Batch", "Classification", "Generation", "Objective"]


@dataclass(frozen=True, slots=True)
class Batch:
    """What one forward pass sees.

    Attributes:
        x: (B, C, H, W) float32 images in [-1, 1].
        y: (B,) int64 labels.
    """

    x: Tensor
    y: Tensor


class Objective(Protocol):
    """What the training loop minimises: ``(model, batch, generator, ledger) -> loss``; a plain
    function fits.

    The loop adds ``ledger.total_loss()`` to the result. Everything random must come from
    ``generator``, which the loop seeds per step: this makes an interrupted run repeat exactly.
    """

    def __call__(
        self, model: nn.Module, batch: Batch, generator: torch.Generator, ledger: Ledger
    ) -> Tensor:
        """Return the loss, a scalar that is a mean over the batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Classification:
    """Cross entropy of ``model(x)``, which returns logits (B, classes); a model that takes a ledger
    gets it.

    Attributes:
        smoothing: share of the target that is spread evenly over all classes, in [0, 1).
    """

    smoothing: float = 0.0

    def __call__(
        self, model: nn.Module, batch: Batch, generator: torch.Generator, ledger: Ledger
    ) -> Tensor:
        logits = model(batch.x, ledger=ledger) if takes_ledger(model) else model(batch.x)
        return nn.functional.cross_entropy(logits, batch.y, label_smoothing=self.smoothing)


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation(Config):
    """A class-conditional flow: a loss of `effformer.flow` with labels, some of which are
    dropped.

    Calls ``model(x_t, t, y=labels, drop=dropped, ledger=ledger)``. Dropping labels in training is
    what gives a model its unconditional prediction, which classifier-free guidance needs.

    Attributes:
        loss: a registered flow loss: name, dict or config.
        label_drop: probability of replacing a label by the null class, in [0, 1).

    Reference: Flow Straight and Fast: Learning to Generate and Transfer Data with Rectified Flow,
    2022, arXiv 2209.03003; Classifier-Free Diffusion Guidance, 2022, arXiv 2207.12598.
    """

    loss: Config = part("loss", FlowMatching.Config())
    label_drop: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.label_drop < 1:
            raise ValueError(f"Generation: label_drop must lie in [0, 1), got {self.label_drop}")
        object.__setattr__(self, "loss", resolve("loss", self.loss, where="Generation.loss"))

    def __call__(
        self, model: nn.Module, batch: Batch, generator: torch.Generator, ledger: Ledger
    ) -> Tensor:
        dropped = None
        if self.label_drop > 0:
            chance = torch.rand(len(batch.y), generator=generator, device=generator.device)
            dropped = (chance < self.label_drop).to(batch.y.device)
        flow = self.loss.build()
        out = flow(model, batch.x, generator=generator, y=batch.y, drop=dropped, ledger=ledger)
        loss: Tensor = out.loss
        return loss
