"""Named weight formats: how a (N, K) weight becomes a few plain tensors, and back.

``int8`` and ``int4`` are the row blocks of ONNX Runtime's MatMulNBits; ``nf4``, ``fp4``,
``int8-dynamic`` and ``llm-int8`` are the formats of bitsandbytes. All are rounded to nearest,
without data.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from effformer import registry
from effformer.config import Config, Spec, resolve
from effformer.values import Count

from . import blockwise as bw
from .activations import quantize_rowwise

__all__ = [
    "FlatConfig",
    "FlatFourBit",
    "FourBitConfig",
    "Int8Dynamic",
    "LLMInt8",
    "MatMulNBits",
    "RowConfig",
    "RowScheme",
    "Scheme",
    "make_scheme",
]

KERNEL_BLOCKS = (16, 32, 64, 128, 256)
"""Block sizes that ONNX Runtime's CPU kernel computes with."""

Tensors = Mapping[str, Tensor]
Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]


@dataclass(frozen=True, slots=True)
class MatMulNBits:
    """Inputs and attributes of ONNX Runtime's ``com.microsoft.MatMulNBits`` for one weight.

    Attributes:
        bits: 4 or 8.
        block_size: values per block along K.
        packed: (N, ceil(K / block_size), block_size * bits / 8) uint8.
        scales: (N, ceil(K / block_size)) float32.
        zero_points: (N, ceil(ceil(K / block_size) * bits / 8)) uint8, None if symmetric.
        K: input features.
        N: output features.
    """

    bits: int
    block_size: int
    packed: Tensor
    scales: Tensor
    zero_points: Tensor | None
    K: int
    N: int


class Scheme(ABC):
    """One format with its options.

    Attributes:
        name: name in the registry.
        bits: bits per code.
        by_row: every tensor has one entry per row of the weight, so that rows can be decoded alone.
    """

    name: ClassVar[str]
    bits: ClassVar[int]
    by_row: ClassVar[bool]

    def __init__(self, config: Any) -> None:
        self.config = config

    @abstractmethod
    def layout(self, n: int, k: int) -> Layout:
        """Shape and dtype of every tensor of a (n, k) weight, by name."""

    @abstractmethod
    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        """Round a finite (N, K) weight to the tensors of `layout`."""

    @abstractmethod
    def decode(self, tensors: Tensors, n: int, k: int) -> Tensor:
        """The (n, k) float32 weight that the tensors stand for."""

    def to_matmul_nbits(self, tensors: Tensors, n: int, k: int) -> MatMulNBits | None:
        """The same weight for ONNX Runtime's kernel, None if this format or block size has no such
        form.
        """
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class RowConfig(Config):
    """Knobs of the row formats.

    Attributes:
        block: values per scale along a row, None for one scale per row. Smaller is more exact and
            larger in bytes.
        symmetric: no zero points; False fits blocks whose values lie on one side of 0.
    """

    block: Count | None
    symmetric: bool = True


class RowScheme(Scheme):
    """Integer codes in row blocks: ``w = (code - zero_point) * scale``; see
    `blockwise.quantize_rows`.
    """

    by_row = True
    config: RowConfig

    def layout(self, n: int, k: int) -> Layout:
        blocks = -(-k // (self.config.block or k))
        out: Layout = {
            "codes": ((n, -(-k * self.bits // 8)), torch.uint8),
            "scales": ((n, blocks), torch.float32),
        }
        if not self.config.symmetric:
            out["zero_points"] = ((n, -(-blocks * self.bits // 8)), torch.uint8)
        return out

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        block, symmetric = self.config.block, self.config.symmetric
        rows = bw.quantize_rows(weight, bits=self.bits, block=block, symmetric=symmetric)
        narrow = self.bits == 4
        codes = bw.pack_nibbles(rows.codes, high_first=False) if narrow else rows.codes
        out = {"codes": codes, "scales": rows.scales}
        if rows.zero_points is not None:
            out["zero_points"] = bw.pack_zero_points(rows.zero_points, bits=self.bits)
        return out

    def decode(self, tensors: Tensors, n: int, k: int) -> Tensor:
        scales = tensors["scales"].float()
        zeros: Tensor | float = float(2 ** (self.bits - 1))
        if "zero_points" in tensors:
            zeros = self._values(tensors["zero_points"], scales.shape[1])
        values = self._values(tensors["codes"], k)
        return bw.dequantize_rows(values, scales, zeros, self.config.block)

    def _values(self, packed: Tensor, count: int) -> Tensor:
        if self.bits == 8:
            return packed.float()
        return bw.lookup_nibbles(packed, range(16), count, high_first=False)

    def to_matmul_nbits(self, tensors: Tensors, n: int, k: int) -> MatMulNBits | None:
        scales, zeros = tensors["scales"].float(), tensors.get("zero_points")
        block = self.config.block or k
        if block >= k:  # one scale per row serves every block of the kernel
            block, blocks = KERNEL_BLOCKS[-1], -(-k // KERNEL_BLOCKS[-1])
            block = min(block, max(KERNEL_BLOCKS[0], 1 << (k - 1).bit_length()))
            scales = scales.expand(n, blocks).contiguous()
            if zeros is not None:
                zeros = self._values(zeros, 1).to(torch.uint8).expand(n, blocks)
                zeros = bw.pack_zero_points(zeros.contiguous(), bits=self.bits)
        if block not in KERNEL_BLOCKS:
            return None
        codes = self._values(tensors["codes"], k).to(torch.uint8)
        packed = bw.pack_rows(codes, bits=self.bits, block=block)
        return MatMulNBits(self.bits, block, packed, scales, zeros, K=k, N=n)


@registry.quantizer.register("int8")
class Int8(RowScheme):
    """8-bit integers in row blocks, as ONNX Runtime's MatMulNBits stores them."""

    name, bits = "int8", 8

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(RowConfig):
        """Knobs of `Int8`; see `RowConfig`. At 8 bit one scale per row is exact enough, and
        smallest.
        """

        block: Count | None = None


@registry.quantizer.register("int4")
class Int4(RowScheme):
    """4-bit integers in row blocks, as ONNX Runtime's MatMulNBits stores them."""

    name, bits = "int4", 4

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(RowConfig):
        """Knobs of `Int4`; see `RowConfig`."""

        block: Count | None = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class FlatConfig(Config):
    """Knobs of the flat formats.

    Attributes:
        block: values per absmax in the row-major flattened weight.
    """

    block: Count = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class FourBitConfig(FlatConfig):
    """Knobs of nf4 and fp4.

    Attributes:
        double_quant: store the absmax values in 8 bit too (0.127 instead of 0.5 extra bits per
            weight at block 64).
    """

    double_quant: bool = True


class FlatFourBit(Scheme):
    """4-bit table look-up in flat blocks: ``w = table[code] * absmax``."""

    bits = 4
    by_row = False
    config: FourBitConfig
    table: ClassVar[tuple[float, ...]]

    def layout(self, n: int, k: int) -> Layout:
        blocks = -(-n * k // self.config.block)
        codes: Layout = {"codes": ((-(-n * k // 2), 1), torch.uint8)}
        if not self.config.double_quant:
            return codes | {"absmax": ((blocks,), torch.float32)}
        return codes | {
            "absmax": ((blocks,), torch.uint8),
            "nested_absmax": ((-(-blocks // bw.NESTED_BLOCK),), torch.float32),
            "offset": ((1,), torch.float32),
        }

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        codes, absmax = bw.quantize_flat_4bit(weight, self.table, self.config.block)
        if not self.config.double_quant:
            return {"codes": codes, "absmax": absmax}
        names = ("absmax", "nested_absmax", "offset")
        return {"codes": codes} | dict(zip(names, bw.quantize_absmax(absmax), strict=True))

    def decode(self, tensors: Tensors, n: int, k: int) -> Tensor:
        absmax = tensors["absmax"]
        if self.config.double_quant:
            nested, offset = tensors["nested_absmax"].float(), tensors["offset"].float()
            absmax = bw.dequantize_absmax(absmax, nested, offset)
        codes = tensors["codes"].flatten()
        values = bw.lookup_nibbles(codes, self.table, n * k, high_first=True)
        return bw.dequantize_flat(values, absmax.float(), self.config.block).view(n, k)


@registry.quantizer.register("nf4", paper="2305.14314")
class NF4(FlatFourBit):
    """4-bit quantiles of a normal distribution in flat blocks (bitsandbytes)."""

    name, table = "nf4", bw.NF4

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(FourBitConfig):
        """Knobs of `NF4`; see `FourBitConfig`."""


@registry.quantizer.register("fp4", paper="2305.14314")
class FP4(FlatFourBit):
    """4-bit floats in flat blocks (bitsandbytes)."""

    name, table = "fp4", bw.FP4

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(FourBitConfig):
        """Knobs of `FP4`; see `FourBitConfig`."""


@registry.quantizer.register("int8-dynamic", paper="2110.02861")
class Int8Dynamic(Scheme):
    """8-bit dynamic map in flat blocks (bitsandbytes' blockwise int8): finer near zero than
    integers.
    """

    name, bits, by_row = "int8-dynamic", 8, False
    config: FlatConfig

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(FlatConfig):
        """Knobs of `Int8Dynamic`; see `FlatConfig`."""

        block: Count = 128

    def layout(self, n: int, k: int) -> Layout:
        absmax = ((-(-n * k // self.config.block),), torch.float32)
        return {"codes": ((n, k), torch.uint8), "absmax": absmax}

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        codes, absmax = bw.quantize_flat_8bit(weight, self.config.block)
        return {"codes": codes, "absmax": absmax}

    def decode(self, tensors: Tensors, n: int, k: int) -> Tensor:
        codes = tensors["codes"]
        table = torch.tensor(bw.DYNAMIC, dtype=torch.float32, device=codes.device)
        values = table.index_select(0, codes.flatten().int())
        absmax = tensors["absmax"].float()
        return bw.dequantize_flat(values, absmax, self.config.block).view(n, k)


@registry.quantizer.register("llm-int8", paper="2208.07339")
class LLMInt8(Scheme):
    """Symmetric int8 with one scale per output row, ``w = code * absmax / 127`` (LLM.int8,
    bitsandbytes).

    Weights are rounded to float16 first, as bitsandbytes does. As in its CPU layer activations stay
    float; the activation quantizer with outlier columns is `activations.quantize_rowwise`.
    """

    name, bits, by_row = "llm-int8", 8, True

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(Config):
        """`LLMInt8` has no knobs."""

    def layout(self, n: int, k: int) -> Layout:
        return {"codes": ((n, k), torch.int8), "absmax": ((n,), torch.float32)}

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        rows = quantize_rowwise(weight.half())
        return {"codes": rows.codes, "absmax": rows.absmax}

    def decode(self, tensors: Tensors, n: int, k: int) -> Tensor:
        return tensors["codes"].float().mul_((tensors["absmax"].float() * (1.0 / 127.0))[:, None])


def make_scheme(spec: Spec, *, where: str = "scheme") -> Scheme:
    """A scheme from its name ("int8"), a dict ({"name": "int8", "block": 32}) or a Config.

    Raises:
        ValueError: unknown scheme or option; the nearest known one is suggested.
        TypeError: none of the accepted forms.
    """
    scheme: Scheme = resolve("quantizer", spec, where=where).build()
    return scheme
