"""Small models of all families whose blocks are cached, and what they are called with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import effformer

__all__ = ["FAMILIES", "awake", "given"]

TEXT = {"text_length": 5, "text_dim": 8, "pooled_dim": 6}
FAMILIES = [
    "sit-nano",
    "dit-nano",
    "lightningdit-nano",
    "joint-dit-nano",
    "mmdit-nano",
    "flux-tiny",
]


def awake(
    name: str = "sit-nano", dtype: torch.dtype = torch.float32, std: float = 0.05, **options: Any
) -> Any:
    """A model whose blocks do something, and whose answer is small enough to be integrated."""
    text = TEXT if name in FAMILIES[3:] else {}
    text = text | {"depth": 2, "doubles": 1} if name == "flux-tiny" else {}
    model = effformer.build_model(name, input_size=8, **text, **options).to(dtype).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * std)
    return model


def given(model: Any, batch: int = 2) -> tuple[Tensor, dict[str, Tensor]]:
    inputs = model.example_inputs(batch, generator=torch.Generator().manual_seed(2))
    x = inputs.pop("x")
    del inputs["t"]
    return x, inputs
