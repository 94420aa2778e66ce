"""BCT: tiles of a tensor in n-bit integers with a power-of-two scale each, and tables of functions of such
codes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from effformer import registry
from effformer.config import Config
from effformer.values import Count

from . import blockwise as bw
from .schemes import Layout, Scheme, Tensors

__all__ = ["BCT", "exp_table", "gelu_table", "shifted", "unshifted"]


def shifted(x: Tensor, tile: tuple[int, int], bits: int) -> tuple[Tensor, Tensor]:
    """Codes and shifts of a matrix in tiles.

    Per tile ``s = floor(log2((2^(bits-1) - 1) / max|x|))``, 0 for a tile of zeros, and ``q =
    clip(round(x 2^s))``, halves to even.

    Args:
        x: (R, C).
        tile: rows and columns of a tile; the last ones may be smaller.
        bits: of a code.

    Returns:
        (R, C) codes as floats, and (tiles, tiles) int32 shifts.
    """
    rows, columns = x.shape
    tiles = _tiles(x.float(), tile)
    top = tiles.abs().amax((1, 3))
    exact = (2 ** (bits - 1) - 1) / torch.where(top == 0, torch.ones_like(top), top).double()
    shift = torch.where(top == 0, torch.zeros_like(exact), exact.log2().floor()).int()
    power = torch.exp2(shift.float())[:, None, :, None]
    codes = (tiles * power).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return codes.flatten(2).flatten(0, 1)[:rows, :columns], shift


def unshifted(codes: Tensor, shift: Tensor, tile: tuple[int, int]) -> Tensor:
    """``q 2^-s`` of codes (R, C) as floats."""
    rows, columns = codes.shape
    scale = torch.exp2(-shift.float())
    wide = scale.repeat_interleave(tile[0], dim=0)[:rows]
    return codes * wide.repeat_interleave(tile[1], dim=1)[:, :columns]


def _tiles(x: Tensor, tile: tuple[int, int]) -> Tensor:
    filled = F.pad(x, (0, -x.shape[1] % tile[1], 0, -x.shape[0] % tile[0]))
    return filled.unflatten(1, (-1, tile[1])).unflatten(0, (-1, tile[0]))


def _table(shift: int) -> Tensor:
    """Values of the 256 codes -128..127 at a shift, float32."""
    return torch.arange(-128, 128, dtype=torch.float64) * 2.0**-shift


def gelu_table(shift: int) -> Tensor:
    """GELU of every 8-bit code at a shift: (256,) float32, entry ``code + 128``."""
    return F.gelu(_table(shift)).float()


def exp_table(shift: int) -> Tensor:
    """Exp of every 8-bit code at a shift, those above 0 as 0: what softmax needs behind the row's
    maximum. (256,) float32, entry ``code + 128``.
    """
    return _table(shift).clamp(max=0).exp().float()


@registry.quantizer.register("bct", paper="2304.01483")
class BCT(Scheme):
    """Tiles of n-bit integers with power-of-two scales: dividing by a scale is a shift of bits.

    4 bits in tiles of 64 x 64 are 4.002 bits per weight. Power-of-two scales lose up to a bit: at 4 bits
    the formats with real scales are nearer.

    Differs from the paper: its text is not public beyond the abstract; tiles and rounding are those that
    it suggests. Biases and intermediate results other than the inputs of layers stay in floating point.

    Reference: Blockwise Compression of Transformer-based Models without Retraining, 2023, arXiv
        2304.01483.
    """

    name, by_row = "bct", False
    config: BCT.Config

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(Config):
        """Knobs of `BCT`.

        Attributes:
            bits: bits per code.
            rows: rows of a tile.
            columns: columns of a tile.
            inputs: "int8" rounds the inputs of layers as well, in tiles of one token.
        """

        bits: Literal[4, 8] = 4
        rows: Count = 64
        columns: Count = 64
        inputs: Literal["float", "int8"] = "float"

    def __init__(self, config: BCT.Config) -> None:
        super().__init__(config)
        self.bits = config.bits
        self.prepares = config.inputs == "int8"
        self.step = 1.0 / 64 if self.prepares else 0.0

    @property
    def _tile(self) -> tuple[int, int]:
        return self.config.rows, self.config.columns

    def layout(self, n: int, k: int) -> Layout:
        narrow = self.bits == 4
        tiles = -(-n // self.config.rows), -(-k // self.config.columns)
        codes = ((n, -(-k // 2) if narrow else k), torch.uint8 if narrow else torch.int8)
        return {"codes": codes, "shifts": (tiles, torch.int8)}

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        codes, shift = shifted(weight, self._tile, self.bits)
        if self.bits == 8:
            packed = codes.to(torch.int8)
        else:
            packed = bw.pack_nibbles((codes + 8).to(torch.uint8), high_first=False, pad=8)
        return {"codes": packed, "shifts": shift.clamp(-126, 126).to(torch.int8)}

    def decode(self, tensors: Tensors, n: int, k: int) -> Tensor:
        codes = tensors["codes"]
        if self.bits == 8:
            values = codes.float()
        else:
            values = bw.lookup_nibbles(codes, range(-8, 8), k, high_first=False)
        return unshifted(values, tensors["shifts"], self._tile)

    def prepare(self, x: Tensor, tensors: Tensors) -> Tensor:
        if not self.prepares:
            return x
        rows, tile = x.flatten(0, -2), (1, self.config.columns)
        return unshifted(*shifted(rows, tile, 8), tile).to(x.dtype).view_as(x)

    def of_table(self) -> Scheme:
        return type(self)(self.config.replace(inputs="float"))
