"""Small models with nothing at zero, and what they are called with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import effformer


def woken(name: str, **options: Any) -> Any:
    """A model of a preset, every parameter moved by a tenth, always in the same way."""
    torch.manual_seed(0)
    model = effformer.build_model(name, **options)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model.eval()


def inputs(model: Any, batch: int = 2, **changes: Any) -> dict[str, Tensor]:
    """Its example inputs, always the same, with changes."""
    given = model.example_inputs(batch, generator=torch.Generator().manual_seed(1))
    return {**given, **changes}
