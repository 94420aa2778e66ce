"""What a training is measured by while it runs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ..calls import half_of
from ..context import Ledger
from ..values import Checked, Count, Seed
from .classifier import accuracy
from .datasets import Dataset, placed
from .objectives import Classification, Objective

__all__ = ["Validation"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Validation(Checked):
    """The loss, and of a classifier the accuracy, on data that were held out, for ``train(..., evaluate=Validation(...))``.

    Randomness (times, noise, dropped labels) is the same every time, so that two numbers differ by
    the weights alone.

    Attributes:
        data: samples that the training does not see, for instance from `Dataset.split`.
        objective: the loss that is trained.
        batch: samples at a time.
        most: samples that are looked at, the first ones.
        seed: of the objective's random numbers.
    """

    data: Dataset
    objective: Objective
    batch: Count = 128
    most: Count = 1024
    seed: Seed = 0

    def __call__(self, model: nn.Module, step: int) -> dict[str, float]:
        """``{"val_loss": mean over the samples}``, and ``"val_accuracy"``, in [0, 1], if the objective is
        `Classification`.
        """
        device, half = next(model.parameters()).device, half_of(model)
        generator = torch.Generator().manual_seed(self.seed)
        count, total = min(len(self.data), self.most), 0.0
        for rows in torch.arange(count).split(self.batch):
            batch = placed(self.data.rows(rows), device, half)
            loss = self.objective(model, batch, generator, Ledger(step=step))
            total += loss.item() * len(rows)
        found = {"val_loss": total / count}
        if isinstance(self.objective, Classification):
            seen = self.data.subset(torch.arange(count))
            found["val_accuracy"] = accuracy(model, seen, batch=self.batch)
        return found
