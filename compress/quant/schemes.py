"""Named weight formats: how a (N, K) weight becomes a few plain tensors, and back.

``int8`` and ``int4`` are the row blocks of ONNX Runtime's MatMulNBits; ``nf4``, ``fp4``,
``int8-dynamic`` and ``llm-int8`` are the formats of bitsandbytes. All are rounded to nearest,
without data. Schemes that look at the inputs of a layer, or change them, stand in files of their own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from effformer import registry
from effformer.config import Config, Spec, resolve
from effformer.values import Count

from . import blockwise as bw
from .activations import quantize_rowwise
from .calibrate import Seen, Want

__all__ = [
    "FlatConfig",
    "FlatFourBit",
    "FourBitConfig",
    "Int8Dynamic",
    "Kernel",
    "LLMInt8",
    "MatMulBnb4",
    "MatMulNBits",
    "RowConfig",
    "RowScheme",
    "Scheme",
    "kernel_form",
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
    op: ClassVar[str] = "MatMulNBits"

    @property
    def inputs(self) -> tuple[Tensor | None, ...]:
        """Inputs behind the first, as the operator takes them."""
        zeros = None if self.zero_points is None else self.zero_points.flatten()
        return self.packed, self.scales.flatten(), zeros

    def attributes(self, accuracy_level: int) -> dict[str, Any]:
        """Attributes of the operator; level 0 computes in float32."""
        sizes = {"K": self.K, "N": self.N, "bits": self.bits, "block_size": self.block_size}
        return sizes | {"accuracy_level": accuracy_level}


@dataclass(frozen=True, slots=True)
class MatMulBnb4:
    """Inputs and attributes of ONNX Runtime's ``com.microsoft.MatMulBnb4`` for one weight.

    Attributes:
        quant_type: 0 for fp4, 1 for nf4.
        block_size: values per absmax in the flattened weight.
        packed: (ceil(N K / 2),) uint8, the first of two codes in the high half.
        absmax: (ceil(N K / block_size),) float32.
        K: input features.
        N: output features.
    """

    quant_type: int
    block_size: int
    packed: Tensor
    absmax: Tensor
    K: int
    N: int
    op: ClassVar[str] = "MatMulBnb4"

    @property
    def inputs(self) -> tuple[Tensor | None, ...]:
        """Inputs behind the first, as the operator takes them."""
        return self.packed, self.absmax

    def attributes(self, accuracy_level: int) -> dict[str, Any]:
        """Attributes of the operator, which knows no levels of accuracy."""
        sizes = {"K": self.K, "N": self.N, "block_size": self.block_size}
        return sizes | {"quant_type": self.quant_type}


Kernel = MatMulNBits | MatMulBnb4
"""A weight as an operator of ONNX Runtime takes it."""


class Scheme(ABC):
    """One format with its options.

    Attributes:
        name: name in the registry.
        bits: bits per code.
        by_row: every tensor has one entry per row of the weight, so that rows can be decoded alone.
        wants: statistics of the layer's inputs that `fit` reads.
        prepares: `prepare` changes the inputs of a layer.
        step: distance of the values that inputs are rounded to, relative to their range; 0: they are
            not. Two runtimes that round differently differ by such steps.
    """

    name: ClassVar[str]
    bits: int
    by_row: ClassVar[bool]
    wants: tuple[Want, ...] = ()
    prepares: bool = False
    step: float = 0.0

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

    def fit(self, weight: Tensor, seen: Seen | None) -> dict[str, Tensor]:
        """Round a weight for the inputs that its layer has seen; None: for any."""
        return self.encode(weight)

    def prepare(self, x: Tensor, tensors: Tensors) -> Tensor:
        """The inputs x (..., k) that `base` is multiplied with."""
        return x

    def base(self, tensors: Tensors, n: int, k: int) -> Tensor:
        """The float32 weight for prepared inputs."""
        return self.decode(tensors, n, k)

    def linear(self, x: Tensor, tensors: Tensors, n: int, k: int) -> Tensor:
        """The product of a layer that prepares its inputs: (..., k) -> (..., n)."""
        return F.linear(self.prepare(x, tensors), self.base(tensors, n, k).to(x.dtype))

    def macs(self, n: int, k: int) -> int:
        """Multiply-adds of one token in a (n, k) layer; decoding has none that scale with tokens."""
        return n * k

    def of_table(self) -> Scheme:
        """The scheme of an embedding, which has no inputs to look at or to change."""
        return self

    def kernel(self, tensors: Tensors, n: int, k: int) -> Kernel | None:
        """The weight for ONNX Runtime's kernel, which multiplies prepared inputs; None if this format
        or block size has no such form.
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
            "codes": ((n, -(-k * self._width // 8)), torch.uint8),
            "scales": ((n, blocks), torch.float32),
        }
        if not self.config.symmetric:
            out["zero_points"] = ((n, -(-blocks * self._width // 8)), torch.uint8)
        return out

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        block, symmetric = self.config.block, self.config.symmetric
        return self._packed(
            bw.quantize_rows(weight, bits=self.bits, block=block, symmetric=symmetric)
        )

    def _packed(self, rows: bw.RowBlocks) -> dict[str, Tensor]:
        """The tensors of `layout`."""
        narrow = self._width == 4
        codes = bw.pack_nibbles(rows.codes, high_first=False) if narrow else rows.codes
        out = {"codes": codes, "scales": rows.scales}
        if rows.zero_points is not None:
            out["zero_points"] = bw.pack_zero_points(rows.zero_points, bits=self._width)
        return out

    @property
    def _width(self) -> int:
        """Bits of a code in the file."""
        return 8 if self.bits > 4 else 4

    def decode(self, tensors: Tensors, n: int, k: int) -> Tensor:
        scales = tensors["scales"].float()
        zeros: Tensor | float = float(2 ** (self.bits - 1))
        if "zero_points" in tensors:
            zeros = _codes(tensors["zero_points"], scales.shape[1], self._width)
        values = _codes(tensors["codes"], k, self._width)
        return bw.dequantize_rows(values, scales, zeros, self.config.block)

    def kernel(self, tensors: Tensors, n: int, k: int) -> Kernel | None:
        zeros, scales = tensors.get("zero_points"), tensors["scales"]
        if zeros is None and self.bits != self._width:  # the kernel's own is that of its width
            middle = torch.full(scales.shape, 2 ** (self.bits - 1), dtype=torch.uint8)
            zeros = bw.pack_zero_points(middle.to(scales.device), bits=self._width)
        return kernel_form(self._width, self.config.block, tensors["codes"], scales, zeros, k)


def kernel_form(
    bits: int, block: int | None, codes: Tensor, scales: Tensor, zeros: Tensor | None, k: int
) -> MatMulNBits | None:
    """Row blocks of unsigned codes as the kernel takes them, None for a block size that it has not.

    Args:
        bits: 4 or 8.
        block: values per block, None for whole rows.
        codes: (N, ceil(K bits / 8)) uint8.
        scales: (N, ceil(K / block)).
        zeros: packed zero points, None for the middle of the codes.
        k: input features.
    """
    n, scales, block = len(codes), scales.float(), block or k
    if block >= k:  # one scale per row serves every block of the kernel
        block, blocks = KERNEL_BLOCKS[-1], -(-k // KERNEL_BLOCKS[-1])
        block = min(block, max(KERNEL_BLOCKS[0], 1 << (k - 1).bit_length()))
        scales = scales.expand(n, blocks).contiguous()
        if zeros is not None:
            zeros = _codes(zeros, 1, bits).to(torch.uint8).expand(n, blocks)
            zeros = bw.pack_zero_points(zeros.contiguous(), bits=bits)
    if block not in KERNEL_BLOCKS:
        return None
    packed = bw.pack_rows(_codes(codes, k, bits).to(torch.uint8), bits=bits, block=block)
    return MatMulNBits(bits, block, packed, scales, zeros, K=k, N=n)


def _codes(packed: Tensor, count: int, bits: int) -> Tensor:
    """Unpacked codes as floats."""
    if bits == 8:
        return packed.float()
    return bw.lookup_nibbles(packed, range(16), count, high_first=False)


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
    quant_type: ClassVar[int]

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
        codes = tensors["codes"].flatten()
        values = bw.lookup_nibbles(codes, self.table, n * k, high_first=True)
        return bw.dequantize_flat(values, self._absmax(tensors), self.config.block).view(n, k)

    def _absmax(self, tensors: Tensors) -> Tensor:
        if not self.config.double_quant:
            return tensors["absmax"].float()
        nested, offset = tensors["nested_absmax"].float(), tensors["offset"].float()
        return bw.dequantize_absmax(tensors["absmax"], nested, offset)

    def kernel(self, tensors: Tensors, n: int, k: int) -> Kernel | None:
        if self.config.block not in KERNEL_BLOCKS:
            return None
        codes, absmax = tensors["codes"].flatten(), self._absmax(tensors)
        return MatMulBnb4(self.quant_type, self.config.block, codes, absmax, K=k, N=n)


@registry.quantizer.register("nf4", paper="2305.14314")
class NF4(FlatFourBit):
    """4-bit quantiles of a normal distribution in flat blocks (bitsandbytes)."""

    name, table, quant_type = "nf4", bw.NF4, 1

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(FourBitConfig):
        """Knobs of `NF4`; see `FourBitConfig`."""


@registry.quantizer.register("fp4", paper="2305.14314")
class FP4(FlatFourBit):
    """4-bit floats in flat blocks (bitsandbytes)."""

    name, table, quant_type = "fp4", bw.FP4, 0

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
