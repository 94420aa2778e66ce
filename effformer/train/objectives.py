"""What the loop minimises: a function of model, batch and randomness."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from effformer.arguments import Shape
from effformer.values import Chance, Checked, Fraction, Natural

from ..calls import accepted, match, takes
from ..checks import CapabilityError, check_ids, unknown
from ..config import Config, part
from ..context import Ledger
from ..flow.conventions import (
    FlowConvention,
    Trained,
    adapt,
    get_convention,
    recorded,
    trained_of,
)
from ..flow.losses import FlowMatching
from ..nn.precision import widened
from .datasets import Dataset

__all__ = ["Augmented", "Batch", "Classification", "Generation", "Objective", "trained_by"]


Batch = dict[str, Tensor]
"""What one forward pass sees: the named tensors of a `Dataset`, (B, ...) each."""


class Objective(Protocol):
    """What the training loop minimises: ``(model, batch, generator, ledger) -> loss``; a plain
    function fits.

    The loop adds ``ledger.total_loss()`` to the result. Everything random must come from
    ``generator``, which the loop seeds per step: this makes an interrupted run repeat exactly.

    An objective that decides what a generator predicts has a method ``trained(model, data)``, which
    returns it (`effformer.flow.Trained`); one that adds to another objective calls that ``task``.
    """

    def __call__(
        self, model: nn.Module, batch: Batch, generator: torch.Generator, ledger: Ledger
    ) -> Tensor:
        """Return the loss, a scalar that is a mean over the batch."""


_LOGITS = Shape("(B, classes)")


def check_logits(logits: Any, target: Tensor, *, where: str) -> None:
    """Refuse what a classifier cannot have returned.

    Args:
        logits: what it did return.
        target: (B,) classes of the samples; read on the CPU only.
        where: the public entry point that was called.

    Raises:
        TypeError: no real numbers, or classes that are no whole ones.
        ValueError: another shape than (B, classes), or a class that it does not know.
    """
    sizes = _LOGITS.sizes(logits, f"{where}: the model's output")
    if target.shape != (sizes["B"],):
        raise ValueError(
            f"{where}: the model returns {tuple(logits.shape)} for targets {tuple(target.shape)}; "
            "expected (B, classes) for (B,)"
        )
    check_ids(target, sizes["classes"], where=f"{where}: target")


@dataclass(frozen=True, slots=True, kw_only=True)
class Classification(Checked):
    """Cross entropy of a model that returns logits (B, classes).

    The model gets every other tensor of the batch that it takes by name, ``x`` as its first
    argument whatever that is called, and the ledger if it takes one.

    Attributes:
        smoothing: share of the target that is spread evenly over all classes, in [0, 1).
        target: name of the classes (B,) int64 in the batch.
    """

    smoothing: Chance = 0.0
    target: str = "y"

    def __call__(
        self, model: nn.Module, batch: Batch, generator: torch.Generator, ledger: Ledger
    ) -> Tensor:
        if self.target not in batch:
            raise unknown("tensor", self.target, list(batch), where="Classification: target")
        others = {name: x for name, x in batch.items() if name != self.target}
        call = match(model, others, where="Classification")
        target = batch[self.target]
        logits = call(model, ledger=ledger) if takes(model, "ledger") else call(model)
        check_logits(logits, target, where="Classification")
        return nn.functional.cross_entropy(widened(logits), target, label_smoothing=self.smoothing)


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation(Config):
    """A conditional flow: a loss of `effformer.flow` on the data ``x`` of a batch. Every other tensor
    that the model takes by name is a condition; ``noise``, if there is any, is what ``x`` was
    generated from (reflow).

    Calls ``model(x_t, t, y=labels, drop=dropped, ledger=ledger)`` of a model of classes, whose
    labels are ``y``. Dropping labels in training is what gives a model its unconditional
    prediction, which classifier-free guidance needs.

    Attributes:
        loss: a registered flow loss: name, dict or config.
        label_drop: probability of replacing a label by the null class, in [0, 1); means nothing to
            a model without labels.
        convention: how the network is told the time and writes its velocity, or the name of it
            ("sd3"), to train published weights on; None: as the loss does, in our time.

    Reference: Flow Straight and Fast: Learning to Generate and Transfer Data with Rectified Flow,
    2022, arXiv 2209.03003; Classifier-Free Diffusion Guidance, 2022, arXiv 2207.12598.
    """

    loss: Config = part("loss", FlowMatching.Config())
    label_drop: Chance = 0.1
    convention: FlowConvention | None = field(default=None, metadata={"short": get_convention})

    def check(self) -> None:
        if self.convention is None:
            return
        own = getattr(self.loss.build(), "convention", None)
        if own is None or (own.prediction, own.path) != ("velocity", self.convention.path):
            raise ValueError(
                f"Generation: convention {self.convention} needs a loss of velocities on its path, "
                f"{self.loss.entry.name!r} trains {own or 'something else'}; convention=None would do"
            )

    def __call__(
        self, model: nn.Module, batch: Batch, generator: torch.Generator, ledger: Ledger
    ) -> Tensor:
        if "x" not in batch:
            raise unknown("tensor", "x", list(batch), where="Generation: data")
        data = batch["x"]
        others = {name: x for name, x in batch.items() if name not in ("x", "noise")}
        cond = accepted(model, {**others, "ledger": ledger})
        dropped = self._dropped(len(data), generator, data.device) if "y" in cond else None
        cond |= accepted(model, {"drop": dropped})
        if dropped is not None and "drop" not in cond:
            raise CapabilityError(
                f"Generation: {type(model).__name__}.forward has no argument 'drop', so that no "
                f"label can be dropped; choices: label_drop=0, not {self.label_drop}"
            )
        pairs = {"noise": batch["noise"]} if "noise" in batch else {}
        network = model if self.convention is None else adapt(model, self.convention)
        loss: Tensor = self.loss.build()(network, data, generator=generator, **pairs, **cond).loss
        return loss

    def trained(self, model: nn.Module, data: Dataset) -> Trained | None:
        """What a model trained with this objective predicts; None if the loss does not say it."""
        loss = self.loss.build()
        own: FlowConvention | None = getattr(loss, "convention", None)
        convention = own if self.convention is None else self.convention
        if convention is None:
            return None
        labelled = "y" in data.tensors and takes(model, "y")
        return Trained(
            convention=convention,
            null=labelled and self.label_drop > 0,
            steps=getattr(loss, "steps", None),
            value_range=data.value_range,
            classes=tuple(data.classes) if labelled else (),
        )

    def _dropped(
        self, samples: int, generator: torch.Generator, device: torch.device
    ) -> Tensor | None:
        """Whose labels are dropped, (B,) bool."""
        if self.label_drop == 0:
            return None
        chance = torch.rand(samples, generator=generator, device=generator.device)
        return (chance < self.label_drop).to(device)


@dataclass(frozen=True, slots=True, kw_only=True)
class Augmented(Checked):
    """Another objective on images ``x`` (B, C, H, W) that are changed at random, each in its own way.

    Attributes:
        task: the objective.
        flip: probability of mirroring an image left to right; not for digits or letters.
        shift: most pixels by which an image moves in both directions; its edge is repeated.
    """

    task: Objective
    flip: Fraction = 0.0
    shift: Natural = 0

    def __call__(
        self, model: nn.Module, batch: Batch, generator: torch.Generator, ledger: Ledger
    ) -> Tensor:
        x = batch.get("x")
        if x is None or x.dim() != 4:
            found = "none" if x is None else tuple(x.shape)
            raise ValueError(f"Augmented: changes images x (B, C, H, W), the data have {found}")
        mirrored = torch.rand(len(x), generator=generator) < self.flip
        if self.shift >= min(x.shape[2:]):
            raise ValueError(
                f"Augmented: shift must be below the side of the images, {min(x.shape[2:])}, got "
                f"{self.shift}"
            )
        x = torch.where(mirrored.to(x.device)[:, None, None, None], x.flip(-1), x)
        if self.shift:
            x = _shifted(x, self.shift, generator)
        return self.task(model, {**batch, "x": x}, generator, ledger)


def _shifted(x: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Images moved by up to ``most`` pixels, each by its own random number of rows and columns."""
    (batch, _, height, width), wide = x.shape, nn.functional.pad(x, (most,) * 4, mode="replicate")
    down, right = torch.randint(2 * most + 1, (2, batch), generator=generator).to(x.device)
    rows = down[:, None] + torch.arange(height, device=x.device)
    columns = right[:, None] + torch.arange(width, device=x.device)
    index = torch.arange(batch, device=x.device)[:, None, None]
    return wide.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)


def trained_by(objective: Objective, model: nn.Module, data: Dataset) -> Trained | None:
    """What a model will have been trained to predict, None if the objective does not decide it.

    Raises:
        ValueError: the weights of the model were trained to predict something else.
    """
    inner: object = objective
    while not hasattr(inner, "trained") and hasattr(inner, "task"):
        inner = inner.task
    if not hasattr(inner, "trained"):
        return None
    made: Trained | None = inner.trained(model, data)
    before = None if recorded(model) is None else trained_of(model)
    if made is not None and before is not None and made.convention != before.convention:
        raise ValueError(
            f"train: the weights of {getattr(model, 'name', type(model).__name__)} were trained to "
            f"predict {before.convention}, the objective trains {made.convention}; choose an "
            "objective for the former (Generation(convention=...) trains any velocity), or set "
            "model.trained = None to begin anew from these weights"
        )
    return made
