"""Symmetric integers for weights, and for inputs at run time: W8A8, W4A4 and torchao's formats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from effformer import registry
from effformer.config import Config
from effformer.values import Count, Portion

from . import blockwise as bw
from .calibrate import Seen
from .schemes import Kernel, Layout, Scheme, Tensors, kernel_form

__all__ = ["W4A4", "W8A8", "Symmetric", "SymmetricConfig", "TorchaoInt4", "TorchaoInt8", "codes_of"]


def codes_of(x: Tensor, block: int | None, steps: float, bits: int) -> tuple[Tensor, Tensor]:
    """Codes (..., K) as floats and scales (..., blocks) of rows: ``scale = max|x| / steps`` per block,
    ``code = clip(round(x * (1 / scale)))``, halves to even.
    """
    k = x.shape[-1]
    block = min(block or k, k)
    rows = F.pad(x, (0, -k % block)).unflatten(-1, (-1, block))
    scale = rows.abs().amax(-1, keepdim=True) / steps
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    top = 2 ** (bits - 1)
    codes = (rows * (1.0 / scale)).round().clamp(-top, top - 1)
    return codes.flatten(-2)[..., :k], scale.squeeze(-1)


@dataclass(frozen=True, slots=True, kw_only=True)
class SymmetricConfig(Config):
    """Knobs of the symmetric formats.

    Attributes:
        block: values per scale along a row, of weights and of inputs; None for whole rows.
        inputs: "float" leaves the inputs of a layer as they are; "dynamic" rounds every token by its
            own range, "static" all by one range of calibration data.
        range: of static inputs: all that was seen, a percentile of it, or the range of least KL
            divergence.
        percentile: share of the values inside, for "percentile".
    """

    block: Count | None = None
    inputs: Literal["float", "dynamic", "static"] = "dynamic"
    range: Literal["minmax", "percentile", "entropy"] = "percentile"
    percentile: Portion = 0.9999


class Symmetric(Scheme):
    """``w = code * scale`` in row blocks, codes from ``-2^(bits-1)``; inputs rounded as well.

    Products of rounded inputs are computed in floating point.
    """

    by_row = True
    config: SymmetricConfig
    steps: ClassVar[float]

    def __init__(self, config: SymmetricConfig) -> None:
        super().__init__(config)
        self.prepares = config.inputs != "float"
        self.step = 1.0 / self.steps if self.prepares else 0.0
        self.wants = ("range", "peak") if config.inputs == "static" else ()

    def layout(self, n: int, k: int) -> Layout:
        narrow = self.bits == 4
        out: Layout = {
            "codes": ((n, -(-k // 2) if narrow else k), torch.uint8 if narrow else torch.int8),
            "scales": ((n, -(-k // (self.config.block or k))), torch.float32),
        }
        if self.config.inputs == "static":
            out |= {"input_scale": ((1,), torch.float32), "input_zero": ((1,), torch.float32)}
        return out

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        return self.fit(weight, None)

    def fit(self, weight: Tensor, seen: Seen | None) -> dict[str, Tensor]:
        codes, scales = codes_of(weight.float(), self.config.block, self.steps, self.bits)
        if self.bits == 4:
            packed = bw.pack_nibbles((codes + 8).to(torch.uint8), high_first=False, pad=8)
        else:
            packed = codes.to(torch.int8)
        out = {"codes": packed, "scales": scales}
        if self.config.inputs == "static":
            low, high = self._bounds(seen)
            scale = (high - low) / 255
            zero = round(-low / scale) if scale else 0  # a scale of 0: leave the inputs alone
            out |= {"input_scale": torch.tensor([scale]), "input_zero": torch.tensor([float(zero)])}
        return out

    def _bounds(self, seen: Seen | None) -> tuple[float, float]:
        if seen is None:
            return 0.0, 0.0
        if seen.histogram is not None:
            return seen.histogram.range(self.config.range, 100 * self.config.percentile)
        assert seen.peak is not None
        top = float(seen.peak.max())
        return -top, top

    def decode(self, tensors: Tensors, n: int, k: int) -> Tensor:
        codes = tensors["codes"]
        if self.bits == 4:
            values = bw.lookup_nibbles(codes, range(-8, 8), k, high_first=False)
        else:
            values = codes.float()
        return bw.dequantize_rows(values, tensors["scales"].float(), 0.0, self.config.block)

    def prepare(self, x: Tensor, tensors: Tensors) -> Tensor:
        if self.config.inputs == "float":
            return x
        wide = x.float()
        if self.config.inputs == "static":
            scale, zero = tensors["input_scale"].float(), tensors["input_zero"].float()
            step = torch.where(scale == 0, torch.ones_like(scale), scale)
            codes = ((wide / step).round() + zero).clamp(0, 255)
            return torch.where(scale == 0, wide, (codes - zero) * step).to(x.dtype)
        codes, scales = codes_of(wide, self.config.block, self.steps, self.bits)
        k = x.shape[-1]
        spread = scales.repeat_interleave(min(self.config.block or k, k), dim=-1)[..., :k]
        return (codes * spread).to(x.dtype)

    def of_table(self) -> Scheme:
        return type(self)(self.config.replace(inputs="float"))

    def kernel(self, tensors: Tensors, n: int, k: int) -> Kernel | None:
        codes = tensors["codes"]
        if self.bits == 8:
            codes = (codes.int() + 128).to(torch.uint8)
        return kernel_form(self.bits, self.config.block, codes, tensors["scales"], None, k)


@registry.quantizer.register("w8a8", paper="2211.10438")
class W8A8(Symmetric):
    """int8 weights and inputs, one scale per row of the weight and per token (or for all tokens), as
    SmoothQuant computes them: ``scale = max|w| / 127``.
    """

    name, bits, steps = "w8a8", 8, 127.0

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(SymmetricConfig):
        """Knobs of `W8A8`; see `SymmetricConfig`."""


@registry.quantizer.register("w4a4", paper="2411.05007")
class W4A4(Symmetric):
    """4-bit weights and inputs with a scale per block of both: ``scale = max|w| / 7``; what SVDQuant
    and rotation are made for.
    """

    name, bits, steps = "w4a4", 4, 7.0

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(SymmetricConfig):
        """Knobs of `W4A4`; see `SymmetricConfig`."""

        block: Count | None = 64

        def check(self) -> None:
            if self.inputs == "static":
                raise ValueError("inputs of 4 bits have a range per token; 'dynamic' or 'float'")


@registry.quantizer.register("torchao-int8")
class TorchaoInt8(Symmetric):
    """torchao's int8 weights, ``scale = max|w| / 127.5`` per row; with ``inputs="dynamic"`` its dynamic
    int8 activations.
    """

    name, bits, steps = "torchao-int8", 8, 127.5

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(SymmetricConfig):
        """Knobs of `TorchaoInt8`; see `SymmetricConfig`."""

        inputs: Literal["float", "dynamic", "static"] = "float"


@registry.quantizer.register("torchao-int4")
class TorchaoInt4(Symmetric):
    """torchao's 4-bit weights in groups, ``scale = max|w| / 7.5``."""

    name, bits, steps = "torchao-int4", 4, 7.5

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(SymmetricConfig):
        """Knobs of `TorchaoInt4`; see `SymmetricConfig`."""

        block: Count | None = 128
        inputs: Literal["float", "dynamic"] = "float"
