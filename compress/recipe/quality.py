"""How good a changed model is, in one number."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import nn

from effformer.calls import evaluating, outputs
from effformer.checks import CapabilityError

from ..report import relative_error
from ..samples import calls

__all__ = ["Quality", "metric_of"]

Quality = Literal["accuracy", "agreement", "error"]
"""Share of right classes, share of the dense model's classes, or relative error of the output."""


def metric_of(
    name: Quality, dense: nn.Module, data: Any, samples: Any
) -> tuple[Callable[[nn.Module], float], Literal["high", "low"]]:
    """A metric of models, and which values are good.

    Args:
        name: which.
        dense: the model that others are held against.
        data: what models are called with.
        samples: named tensors of which that was made; with labels ``y`` for "accuracy".

    Raises:
        ValueError: no data, or no labels.
        CapabilityError: outputs that are no classes.
    """
    if data is None:
        raise ValueError(f"recipe: quality {name!r} is measured on data; give some")
    given = list(calls(dense, data, where="recipe: data"))
    with evaluating(dense):
        expected = [call.run(dense)[0] for call in given]
    if name == "error":

        def error(model: nn.Module) -> float:
            return relative_error([outputs(call(model))[0] for call in given], expected)

        return error, "low"
    if not all(y.dim() == 2 for y in expected):
        raise CapabilityError(f"recipe: quality {name!r} needs outputs (B, classes)")
    labelled = isinstance(samples, Mapping) and "y" in samples
    if name == "accuracy" and not labelled:
        raise ValueError("recipe: quality 'accuracy' needs data with labels y")
    wanted = samples["y"] if name == "accuracy" else torch.cat(expected).argmax(-1)

    def share(model: nn.Module) -> float:
        found = torch.cat([outputs(call(model))[0] for call in given]).argmax(-1)
        return float((found == wanted.to(found.device)).float().mean())

    return share, "high"
