"""HQQ: zero points by half-quadratic splitting, without data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from effformer import registry
from effformer.config import Config
from effformer.values import Count, Natural, Positive

from . import blockwise as bw
from .affine import cut
from .schemes import Layout, Scheme, Tensors

__all__ = ["HQQ", "HQQConfig", "solve"]


@dataclass(frozen=True, slots=True, kw_only=True)
class HQQConfig(Config):
    """Knobs of `HQQ`.

    Attributes:
        bits: bits per code; codes of 2 and 3 bits take 4 in the file.
        block: values per scale and zero point along a row, None for whole rows.
        steps: most steps of the solver; 0 rounds to nearest.
        power: p of the sparse norm ``|e|^p``.
        beta: weight of the quadratic term.
        round_zero: zero points begin at whole numbers.
    """

    bits: Literal[2, 3, 4, 8] = 4
    block: Count | None = 64
    steps: Natural = 20
    power: Positive = 0.7
    beta: Positive = 10.0
    round_zero: bool = False


def solve(rows: Tensor, config: HQQConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of groups (M, G) with their scale and zero point (M, 1): ``w ~ (code - zero) * scale``.

    From ``zero = -min / scale``, in turn: q = round(w / scale + zero), d = w - (q - zero) scale, e =
    sign(d) max(|d| - |d|^(p-1) / beta, 0), zero = mean(q - (w - e) / scale), until the mean of |d|
    over all groups does not fall.
    """
    top = 2**config.bits - 1
    low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
    wide = (high - low) > 1e-4
    inverse = torch.where(wide, top / (high - low), torch.ones_like(low)).clamp(max=2e4)
    zero = -low * inverse
    if config.round_zero:
        zero = zero.round()
    best = float("inf")
    for _ in range(config.steps):
        codes = (rows * inverse + zero).round().clamp(0, top)
        d = rows - (codes - zero) / inverse
        size = d.abs()
        kept = (size - size.pow(config.power - 1) / config.beta).clamp(min=0) * d.sign()
        zero = (codes - (rows - kept) * inverse).mean(1, keepdim=True)
        error = float(size.mean())
        if error >= best:
            break
        best = error
    codes = (rows * inverse + zero).round().clamp(0, top)
    return codes, 1.0 / inverse, zero


@registry.quantizer.register("hqq")
class HQQ(Scheme):
    """Row blocks with real zero points that make the error sparse, found without data.

    A block for which rounding to nearest has the smaller ``sum |d|^p`` keeps that.

    Reference: Half-Quadratic Quantization of Large Machine Learning Models, 2023 (mobiusml, no arXiv
        number).
    """

    name, by_row = "hqq", True
    config: HQQConfig

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(HQQConfig):
        """Knobs of `HQQ`; see `HQQConfig`."""

    def __init__(self, config: HQQConfig) -> None:
        super().__init__(config)
        self.bits = config.bits

    def layout(self, n: int, k: int) -> Layout:
        each = (n, -(-k // (self.config.block or k))), torch.float32
        size = k if self.bits > 4 else -(-k // 2)
        return {"codes": ((n, size), torch.uint8), "scales": each, "zeros": each}

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        k = weight.shape[1]
        block = min(self.config.block or k, k)
        full = k // block * block
        parts = [w for w in (weight[:, :full], weight[:, full:]) if w.numel()]
        solved = [self._solved(cut(w, block)) for w in parts]
        codes, scales, zeros = (torch.cat(x, dim=1) for x in zip(*solved, strict=True))
        codes = codes.to(torch.uint8)
        narrow = self.bits <= 4
        return {
            "codes": bw.pack_nibbles(codes, high_first=False) if narrow else codes,
            "scales": scales,
            "zeros": zeros,
        }

    def _solved(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes, scales and zero points of blocks (N, blocks, G), the better of two for each."""
        n, flat = rows.shape[0], rows.flatten(0, 1)
        found, plain = solve(flat, self.config), solve(flat, self.config.replace(steps=0))
        errors = [
            (flat - (codes - zero) * scale).abs().pow(self.config.power).sum(1, keepdim=True)
            for codes, scale, zero in (found, plain)
        ]
        worse = errors[0] > errors[1]
        codes, scale, zero = (torch.where(worse, b, a) for a, b in zip(found, plain, strict=True))
        return codes.view(n, -1), scale.view(n, -1), zero.view(n, -1)

    def decode(self, tensors: Tensors, n: int, k: int) -> Tensor:
        codes = tensors["codes"]
        values = codes.float()
        if self.bits <= 4:
            values = bw.lookup_nibbles(codes, range(16), k, high_first=False)
        scales, zeros = tensors["scales"].float(), tensors["zeros"].float()
        return bw.dequantize_rows(values, scales, zeros, self.config.block)
