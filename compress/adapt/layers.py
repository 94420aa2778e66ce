"""Layers with a low-rank change beside their weight."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effformer.checks import CapabilityError
from effformer.nn.cut import twin

from ..quant import QuantLinear

__all__ = ["Adapted", "adapted", "plain"]


class Adapted(nn.Module):
    """What every adapted layer has beside what its class has: ``y = f(x) + s B(A(drop(x)))``.

    ``lora_A`` and ``lora_B`` are its children, so that keys are those of peft behind the path of the
    layer, and the keys of the layer itself stay.

    Attributes:
        lora_scale: s = alpha / rank, or alpha / sqrt(rank).
        strength: further factor of s, 1 as trained, 0 for the layer without its change.
    """

    lora_A: nn.Module
    lora_B: nn.Module
    lora_drop: nn.Module
    lora_scale: float
    strength: float

    def change(self) -> Tensor:
        """The change of the weight, in its shape: ``s B A``."""
        a, b = (layer.get_parameter("weight") for layer in (self.lora_A, self.lora_B))
        delta = b.flatten(1) @ a.flatten(1)
        return (self.lora_scale * self.strength) * delta.view(b.shape[0], *a.shape[1:])

    def beside(self, x: Tensor) -> Tensor:
        """What the change adds to the outputs."""
        out: Tensor = self.lora_B(self.lora_A(self.lora_drop(x)))
        return (self.lora_scale * self.strength) * out


class LoRALinear(nn.Linear, Adapted):
    """A linear layer with a change; with ``lora_magnitude_vector`` m (DoRA) its weight is ``m (W + s B A)
    / ||W + s B A||``, rows at the lengths m. The norm gets no gradient.
    """

    def forward(self, input: Tensor) -> Tensor:
        magnitude = self._parameters.get("lora_magnitude_vector")
        if magnitude is None:
            return F.linear(input, self.weight, self.bias) + self.beside(input)
        length = (self.weight + self.change()).norm(dim=1).detach()
        out = F.linear(input, self.weight) + self.beside(input)
        out = out * (magnitude / length)
        return out if self.bias is None else out + self.bias


class LoRAConv2d(nn.Conv2d, Adapted):
    """A convolution with a change: A is a convolution like it to ``rank`` channels, B one of 1x1."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + self.beside(input)


class LoRAQuantLinear(QuantLinear, Adapted):
    """A packed linear layer with a change in floating point, which alone is trained."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.beside(x)

    def to_dense(self) -> nn.Linear:
        """A linear layer with the decoded weight and the same change."""
        dense = super().to_dense()
        dense.__class__ = LoRALinear
        for name in ("lora_A", "lora_B", "lora_drop"):
            setattr(dense, name, getattr(self, name))
        other = cast(Any, dense)
        other.lora_scale, other.strength = self.lora_scale, self.strength
        return dense


KINDS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: LoRALinear, nn.Conv2d: LoRAConv2d, QuantLinear: LoRAQuantLinear,
}  # fmt: skip


def adapted(
    layer: nn.Module, rank: int, scale: float, *, dora: bool, dropout: float, where: str
) -> nn.Module:
    """The layer with a change that is zero: A drawn as linear layers are, B = 0.

    Args:
        layer: a linear layer, a packed one, or a convolution.
        rank: of the change.
        scale: s.
        dora: with magnitudes.
        dropout: of the inputs of A, in training.
        where: path of the layer, for messages.

    Raises:
        CapabilityError: magnitudes of another layer than a dense linear one, or groups of channels that
            do not divide the rank.
    """
    if dora and type(layer) is not nn.Linear:
        raise CapabilityError(
            f"adapt: {where}: kind 'dora' changes dense linear layers, this is a "
            f"{type(layer).__name__}; kind 'lora' would do, or where= without it"
        )
    new: Any = twin(layer)
    new.__class__ = KINDS[type(layer)]
    if isinstance(layer, nn.Conv2d):
        if layer.groups != 1:
            raise CapabilityError(
                f"adapt: {where}: a convolution in {layer.groups} groups has no low-rank change; leave it "
                "out with where="
            )
        a: nn.Module = nn.Conv2d(
            layer.in_channels, rank, layer.kernel_size, layer.stride, layer.padding,  # type: ignore[arg-type]
            layer.dilation, bias=False,  # type: ignore[arg-type]
        )  # fmt: skip
        b: nn.Module = nn.Conv2d(rank, layer.out_channels, 1, bias=False)
    else:
        linear = cast(nn.Linear, layer)
        a = nn.Linear(linear.in_features, rank, bias=False)
        b = nn.Linear(rank, linear.out_features, bias=False)
    weight: Tensor = layer.weight  # type: ignore[assignment]
    nn.init.kaiming_uniform_(a.get_parameter("weight"), a=math.sqrt(5))
    nn.init.zeros_(b.get_parameter("weight"))
    new.lora_A, new.lora_B = a.to(weight), b.to(weight)
    new.lora_drop = nn.Dropout(dropout) if dropout else nn.Identity()
    new.lora_scale, new.strength = scale, 1.0
    if dora:
        with torch.no_grad():
            new.lora_magnitude_vector = nn.Parameter(weight.norm(dim=1))
    return new


def plain(layer: Adapted, change: Tensor | None) -> nn.Module:
    """The layer with its change inside its weight, or (None) without it.

    Raises:
        CapabilityError: a packed weight cannot take the change up.
    """
    if isinstance(layer, QuantLinear) and change is not None:
        raise CapabilityError(
            "merge: a packed weight cannot take a change up without rounding it again; "
            "merge(dequantize(model)) gives dense layers, which quantize packs again"
        )
    new: Any = twin(layer)
    new.__class__ = next(base for base in type(layer).__mro__ if base in KINDS)
    for name in [name for name in new._modules if name.startswith("lora_")]:
        del new._modules[name]
    magnitude = new._parameters.pop("lora_magnitude_vector", None)
    if change is not None:
        weight = cast(nn.Parameter, layer.weight)
        with torch.no_grad():
            # added in float32 at least, rounded once
            wide = torch.promote_types(weight.dtype, torch.float32)
            total = weight.to(wide) + change.to(wide)
            if magnitude is not None:
                total = total * (magnitude.to(wide) / total.norm(dim=1))[:, None]
        new.weight = nn.Parameter(total.to(weight.dtype), requires_grad=weight.requires_grad)
    return new
