"""Blockwise rounding and packing in plain torch, bit-exact with two families of formats.

- **Flat blocks** (bitsandbytes: nf4, fp4, dynamic int8): a tensor is read row-major as one vector
  and cut into blocks, which may cross rows; ``x ~ table[code] * absmax[block]``; two 4-bit codes
  share a byte, the first in the high half.
- **Row blocks** (ONNX Runtime's MatMulNBits: int4, int8): each row of a (N, K) weight is cut along
  K; ``w ~ (code - zero_point[block]) * scale[block]``; two 4-bit codes share a byte, the first in
  the low half.

The functions take and return tensors only; `schemes` gives them names and options.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "DYNAMIC",
    "FP4",
    "NF4",
    "RowBlocks",
    "dequantize_absmax",
    "dequantize_flat",
    "dequantize_rows",
    "lookup_nibbles",
    "pack_nibbles",
    "pack_rows",
    "pack_zero_points",
    "quantize_absmax",
    "quantize_flat_4bit",
    "quantize_flat_8bit",
    "quantize_rows",
    "unpack_nibbles",
]

NESTED_BLOCK = 256
"""Block size of the second level of double quantization."""

NF4: tuple[float, ...] = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022833334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""NormalFloat-4: quantiles of a normal distribution (QLoRA, 2023, arXiv 2305.14314)."""

FP4: tuple[float, ...] = tuple(
    sign * m / 12 for sign in (1.0, -1.0) for m in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
)
"""4-bit float: sign (bit 3), 2 exponent bits, 1 mantissa bit, divided by its largest value."""

# Codes of FP4 by rising value. Both zeros have a place: values just above 0 take -0 (code 8), as
# bitsandbytes does.
_FP4_ORDER = (11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3)

_SMALLEST = 1e-38  # absmax is raised to this before division, so that 1 / absmax is finite


def _dynamic_map() -> tuple[float, ...]:
    # Decade i of 7 has 2^i fractions, the centres of 2^i equal parts of [0.1, 1]; rounded to float32
    # where the package rounds, because the format is defined by the rounded values. torch.linspace
    # rounds as its instruction set does, so its products are fused here in float64.
    values = [torch.tensor([0.0, 1.0])]
    start, end = torch.tensor([0.1, 1.0]).double()
    for i in range(7):
        step = ((end - start).float() / 2**i).double()
        place = torch.arange(2**i + 1, dtype=torch.float64, device="cpu")
        rising, falling = start + step * place, end - step * (2**i - place)
        edges = torch.where(place < (2**i + 1) // 2, rising, falling).float()
        centres = (edges[:-1] + edges[1:]) / 2.0
        values += [10 ** (i - 6) * centres, -(10 ** (i - 6)) * centres]
    return tuple(torch.cat(values).sort().values.tolist())


DYNAMIC: tuple[float, ...] = _dynamic_map()
"""Signed dynamic 8-bit map, 256 values from -0.993 to 1, finer near 0 (8-Bit Approximations, 2015,
arXiv 1511.04561).
"""


class RowBlocks(NamedTuple):
    """A (N, K) weight in row blocks.

    Attributes:
        codes: (N, K) uint8.
        scales: (N, ceil(K / block)) float32; negative where the largest magnitude of a symmetric
            block is positive.
        zero_points: (N, ceil(K / block)) uint8, None if symmetric (the middle of the range, 8 or
            128).
    """

    codes: Tensor
    scales: Tensor
    zero_points: Tensor | None


def pack_nibbles(codes: Tensor, *, high_first: bool, pad: int = 0) -> Tensor:
    """Two 4-bit codes per byte along the last axis: (..., n) -> (..., ceil(n / 2)) uint8.

    Args:
        codes: values in 0..15, uint8.
        high_first: the first of a pair goes to the high half (bitsandbytes) or to the low half
            (ONNX Runtime).
        pad: code that fills the last byte if n is odd.
    """
    pairs = F.pad(codes, (0, codes.shape[-1] % 2), value=pad).unflatten(-1, (-1, 2))
    first, second = pairs.unbind(-1)
    high, low = (first, second) if high_first else (second, first)
    return (high << 4) | low


def unpack_nibbles(packed: Tensor, n: int, *, high_first: bool) -> Tensor:
    """Inverse of `pack_nibbles`: (..., ceil(n / 2)) -> (..., n) uint8."""
    high, low = packed >> 4, packed & 15
    pairs = (high, low) if high_first else (low, high)
    return torch.stack(pairs, dim=-1).flatten(-2)[..., :n]


def lookup_nibbles(
    packed: Tensor, table: Sequence[float] | range, n: int, *, high_first: bool
) -> Tensor:
    """``table[code]`` of packed codes: (..., ceil(n / 2)) uint8 -> (..., n) float32.

    One look-up per byte: the byte selects a pair of values, fetched as one 64-bit word (4 times
    faster on a CPU than two look-ups). Export takes the plain form, because ONNX has no
    reinterpretation of bits.
    """
    values = torch.tensor(table, dtype=torch.float32, device=packed.device)
    high, low = values.repeat_interleave(16), values.repeat(16)
    pairs = torch.stack((high, low) if high_first else (low, high), dim=-1)
    index = packed.flatten().int()
    if torch.compiler.is_exporting():
        out = pairs.index_select(0, index)
    else:
        out = pairs.view(torch.int64).flatten().index_select(0, index).view(torch.float32)
    return out.view(*packed.shape[:-1], -1)[..., :n]


def _blocks(x: Tensor, block: int) -> Tensor:
    flat = x.reshape(-1).float()
    return F.pad(flat, (0, -flat.numel() % block)).unflatten(0, (-1, block))


def quantize_flat_4bit(x: Tensor, table: Sequence[float], block: int) -> tuple[Tensor, Tensor]:
    """Nearest code of ``x / absmax`` in flat blocks.

    Args:
        x: any shape, n values, finite.
        table: `NF4` or `FP4`.
        block: values per block; the last block may be shorter.

    Returns:
        (ceil(n / 2), 1) uint8 packed codes, and (ceil(n / block),) float32 absmax.
    """
    n, rows = x.numel(), _blocks(x, block)
    absmax = rows.abs().amax(dim=1)
    scaled = rows * (1.0 / absmax.clamp(min=_SMALLEST))[:, None]
    if n % block:  # bitsandbytes divides in a short last block, and stores the raised absmax
        absmax = torch.cat([absmax[:-1], absmax[-1:].clamp(min=_SMALLEST)])
        scaled = torch.cat([scaled[:-1], rows[-1:] / absmax[-1]])
    values = torch.tensor(table, dtype=torch.float32, device=x.device)
    order = torch.arange(16) if table is NF4 else torch.tensor(_FP4_ORDER)
    order = order.to(device=x.device)
    values = values[order]
    midpoints = (values[:-1] + values[1:]) / 2
    codes = order.to(torch.uint8)[torch.bucketize(scaled.clamp(-1, 1).flatten()[:n], midpoints)]
    middle = int(
        order[torch.bucketize(torch.zeros(()), midpoints.cpu())]
    )  # the code of 0 fills an odd end
    return pack_nibbles(codes, high_first=True, pad=middle).unsqueeze(1), absmax


@functools.cache
def _dynamic_bins() -> Tensor:
    # bitsandbytes rounds x / absmax to one of 65536 bins and takes the code nearest to the centre
    # of the bin.
    table = torch.tensor(DYNAMIC)
    centres = -1.0 + (2.0 * torch.arange(65536, dtype=torch.float32)) / 65535
    return torch.bucketize(centres, 0.5 * (table[:-1] + table[1:])).to(torch.uint8)


def quantize_flat_8bit(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Codes of the signed dynamic map in flat blocks, as bitsandbytes' CPU kernel rounds them.

    Differs from exact nearest where ``x / absmax`` is within 1.5e-5 of the middle between two
    values.

    Args:
        x: any shape, finite.
        block: values per block.

    Returns:
        uint8 codes of x's shape, and (ceil(n / block),) float32 absmax.
    """
    rows = _blocks(x, block)
    absmax = rows.abs().amax(dim=1)
    scaled = (rows * (1.0 / absmax.clamp(min=_SMALLEST))[:, None]).clamp(-1, 1)
    bins = ((scaled + 1.0) * 0.5 * 65535 + 0.5).to(torch.int32)
    codes = _dynamic_bins().to(x.device)[bins]
    codes = torch.where(absmax[:, None] == 0, codes.new_zeros(()), codes)
    return codes.flatten()[: x.numel()].view(x.shape), absmax


def dequantize_flat(values: Tensor, absmax: Tensor, block: int) -> Tensor:
    """Multiply table values by the absmax of their flat block, in place: (n,) float32 -> (n,)."""
    full = values.numel() // block * block
    if full:
        values[:full].unflatten(0, (-1, block)).mul_(absmax[: full // block, None])
    if full < values.numel():
        values[full:].mul_(absmax[-1])
    return values


def quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Double quantization: ``absmax - mean`` in the dynamic 8-bit map with blocks of 256.

    Returns:
        uint8 codes (blocks,), float32 nested absmax (ceil(blocks / 256),), float32 mean (1,).
    """
    offset = absmax.mean()
    codes, nested = quantize_flat_8bit(absmax - offset, NESTED_BLOCK)
    return codes, nested, offset[None]


def dequantize_absmax(codes: Tensor, nested: Tensor, offset: Tensor) -> Tensor:
    """Inverse of `quantize_absmax`."""
    table = torch.tensor(DYNAMIC, dtype=torch.float32, device=codes.device)
    return dequantize_flat(table[codes.int()], nested, NESTED_BLOCK) + offset


def _round_half_away(x: Tensor) -> Tensor:
    whole = x.trunc()
    return whole + ((x - whole).abs() >= 0.5) * x.sign()


def quantize_rows(
    weight: Tensor, *, bits: int, block: int | None, symmetric: bool = True
) -> RowBlocks:
    """Round a weight in row blocks, as ONNX Runtime's MatMulNBits quantizer does.

    Symmetric, with v the signed value of largest magnitude: ``scale = -v / 2^(bits-1)``, so that v
    takes the lowest code. Asymmetric, on a range that contains 0: ``scale = (max - min) / (2^bits -
    1)``, ``zero = round(-min / scale)``. In both, ``code = clip(round(w / scale + zero))``; halves
    round away from zero.

    Args:
        weight: (N, K), finite.
        bits: 4 or 8.
        block: values per block, None for whole rows; the last block of a row may be shorter.
        symmetric: no stored zero point.
    """
    k = weight.shape[1]
    block = min(block or k, k)
    rows = F.pad(weight.float(), (0, -k % block)).unflatten(1, (-1, block))
    low, high, top, middle = rows.amin(-1), rows.amax(-1), 2**bits - 1, 2 ** (bits - 1)
    if symmetric:
        scales = -torch.where(high.abs() > low.abs(), high, low) / middle
        zeros = torch.full_like(scales, middle)
    else:
        low, high = low.clamp(max=0), high.clamp(min=0)
        scales = (high - low) / top
        zeros = _round_half_away((-low / scales).nan_to_num(0.0).clamp(0, top))
    inverse = torch.where((1.0 / scales).isfinite(), 1.0 / scales, torch.zeros_like(scales))
    scaled = rows * inverse[..., None] + zeros[..., None]
    codes = _round_half_away(scaled).clamp(0, top).to(torch.uint8).flatten(1)[:, :k]
    return RowBlocks(codes.contiguous(), scales, None if symmetric else zeros.to(torch.uint8))


def dequantize_rows(
    values: Tensor, scales: Tensor, zeros: Tensor | float, block: int | None
) -> Tensor:
    """``(code - zero) * scale`` block by block, in place.

    Args:
        values: (N, K) float32 codes.
        scales: (N, ceil(K / block)).
        zeros: float zero points of the same shape, or one number for all.
        block: values per block, None for whole rows.
    """
    k = values.shape[1]
    block = min(block or k, k)
    full = k // block * block
    shared = zeros if isinstance(zeros, float) else None
    for part, cut in (
        (values[:, :full].unflatten(1, (-1, block)), slice(0, k // block)),
        (values[:, full:].unsqueeze(1), slice(k // block, None)),
    ):
        if part.numel():
            part.sub_(shared if shared is not None else zeros[:, cut, None])  # type: ignore[index]
            part.mul_(scales[:, cut, None])
    return values


def pack_rows(codes: Tensor, *, bits: int, block: int) -> Tensor:
    """MatMulNBits layout: (N, K) uint8 codes -> (N, ceil(K / block), ceil(block * bits / 8)); the
    tail is code 0.
    """
    rows = F.pad(codes, (0, -codes.shape[1] % block)).unflatten(1, (-1, block))
    return rows if bits == 8 else pack_nibbles(rows, high_first=False)


def pack_zero_points(zero_points: Tensor, *, bits: int) -> Tensor:
    """MatMulNBits layout: (N, blocks) uint8 -> (N, ceil(blocks * bits / 8)); a missing partner is
    8.
    """
    return zero_points if bits == 8 else pack_nibbles(zero_points, high_first=False, pad=8)
