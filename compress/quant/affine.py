"""Integers between the ends of a block: the grid that GPTQ and AWQ round to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from effformer import registry
from effformer.values import Count

from . import blockwise as bw
from .schemes import RowConfig, RowScheme

__all__ = ["Affine", "AffineConfig", "cut", "grid", "rounded", "rowwise"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AffineConfig(RowConfig):
    """Knobs of the grid.

    Attributes:
        bits: bits per code; codes of 2 and 3 bits take 4 in the file.
        anchored: the range of an asymmetric block is made to contain 0. Without it blocks of one sign
            have finer steps, but the zero point of most of them lies outside of the codes.
    """

    bits: Literal[2, 3, 4, 8] = 4
    block: Count | None = 64
    symmetric: bool = False
    anchored: bool = True

    def check(self) -> None:
        if self.block is not None and self.block < 1:
            raise ValueError(f"block must be at least 1, got {self.block}")


def cut(weight: Tensor, block: int | None) -> Tensor:
    """(N, K) -> (N, blocks, block) float32; a short last block repeats its last value."""
    k = weight.shape[1]
    block = min(block or k, k)
    rows = F.pad(weight.float()[None], (0, -k % block), mode="replicate")[0]
    return rows.unflatten(1, (-1, block))


def grid(rows: Tensor, config: AffineConfig) -> tuple[Tensor, Tensor]:
    """Scale and zero point of blocks (..., G), each (..., 1), ``w ~ (code - zero) * scale``.

    Symmetric: ``scale = 2 max|w| / (2^bits - 1)``, ``zero = 2^(bits - 1)``. Asymmetric: ``scale =
    (max - min) / (2^bits - 1)``, ``zero = clip(round(-min / scale))``, halves to even.
    """
    top = 2**config.bits - 1
    if config.symmetric:
        size = rows.abs().amax(-1, keepdim=True)
        scale = 2 * torch.where(size == 0, torch.ones_like(size), size) / top
        return scale, torch.full_like(scale, 2 ** (config.bits - 1))
    low, high = rows.amin(-1, keepdim=True), rows.amax(-1, keepdim=True)
    if config.anchored:
        low, high = low.clamp(max=0), high.clamp(min=0)
    scale = (high - low).clamp(min=1e-5 if not config.anchored else 0.0) / top
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return scale, (-torch.round(low / scale)).clamp(0, top)


def rounded(rows: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Codes of values on a grid, as floats."""
    return (torch.round(rows / scale) + zero).clamp(0, 2**bits - 1)


def rowwise(codes: Tensor, scale: Tensor, zero: Tensor | None, k: int) -> bw.RowBlocks:
    """Codes (N, blocks, G), scale and zero (N, blocks, 1) as row blocks of K columns."""
    flat = codes.flatten(1)[:, :k].to(torch.uint8).contiguous()
    zeros = None if zero is None else zero.squeeze(-1).to(torch.uint8)
    return bw.RowBlocks(flat, scale.squeeze(-1), zeros)


@registry.quantizer.register("affine")
class Affine(RowScheme):
    """Integers of 2 to 8 bits between the ends of row blocks, rounded to nearest without data: the
    yardstick of GPTQ and AWQ.

    Blocks of 16 to 256 export as ONNX Runtime's MatMulNBits.
    """

    name = "affine"
    config: AffineConfig

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(AffineConfig):
        """Knobs of `Affine`; see `AffineConfig`."""

    def __init__(self, config: AffineConfig) -> None:
        super().__init__(config)
        self.bits = config.bits

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        rows = cut(weight, self.config.block)
        scale, zero = grid(rows, self.config)
        codes = rounded(rows, scale, zero, self.bits)
        return self._packed(
            rowwise(codes, scale, None if self.config.symmetric else zero, weight.shape[1])
        )
