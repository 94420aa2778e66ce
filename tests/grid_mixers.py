"""What the tests of the linear attentions of images share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effformer.site import Site


def make(kind: Any, *, site: dict[str, Any] | None = None, std: float = 0.4, **knobs: Any) -> Any:
    """A mixer in double precision with weights away from their start."""
    part = kind(
        kind.Config(**knobs), Site(**{"dim": 16, "heads": 2, "path": "here", **(site or {})})
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in part.parameters():
            p.copy_(torch.empty(p.shape, dtype=torch.float64).normal_(std=std, generator=generator))
    return part.double()


def cells(grid: tuple[int, ...], batch: int = 1, *, front: int = 0, dim: int = 16) -> Tensor:
    torch.manual_seed(2)
    n = front + int(torch.tensor(grid).prod())
    return torch.randn(batch, n, dim, dtype=torch.float64)


def close(found: Tensor, expected: Tensor, largest: float | None = None) -> None:
    """Equal but for rounding of numbers as large as ``largest``, None: as the largest expected."""
    scale = float(expected.detach().abs().max()) if largest is None else largest
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10 * scale)
