"""What transformers of an image and a text share: knobs, the pooled text, checks, example inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from effformer.blocks import BackboneConfig, Joint
from effformer.checks import CapabilityError, check_mask, check_shape
from effformer.config import Config, part
from effformer.context import Packing
from effformer.values import Count

__all__ = [
    "PooledEmbedding",
    "TwoStreamConfig",
    "check_inputs",
    "example_inputs",
    "open_axes",
    "packed_text",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class TwoStreamConfig(BackboneConfig):
    """Knobs that the families share, beside `BackboneConfig`.

    Attributes:
        input_size: side of the example image; other sizes are accepted.
        channels: input channels.
        patch: patch side.
        text_dim: width of a text token.
        text_length: number of text tokens of the example; other numbers are accepted.
        pooled_dim: width of the pooled text, None if there is none.
    """

    block: Config = part("block", Joint.Config())
    input_size: Count = 16
    channels: Count = 4
    patch: Count = 2
    text_dim: Count = 32
    text_length: Count = 8
    pooled_dim: Count | None = 32

    def check(self) -> None:
        if self.input_size % self.patch:
            raise ValueError(f"input_size {self.input_size} is not divisible by patch {self.patch}")
        if self.dim % 4:
            raise ValueError(f"dim must be divisible by 4 for 2-D positions, got {self.dim}")


class PooledEmbedding(nn.Sequential):
    """``W2 silu(W1 x + b1) + b2`` of the pooled text.

    Args:
        width: width of the pooled text.
        dim: width of the conditioning.
    """

    ROLES: ClassVar[Mapping[str, str]] = {"": "t_mlp"}

    def __init__(self, width: int, dim: int) -> None:
        super().__init__(nn.Linear(width, dim), nn.SiLU(), nn.Linear(dim, dim))


def check_inputs(
    config: TwoStreamConfig,
    x: Tensor,
    t: Tensor,
    text: Tensor,
    pooled: Tensor | None,
    mask: Tensor | None,
    *,
    where: str,
) -> None:
    """Refuse inputs of a shape that the model cannot take.

    Raises:
        ValueError: a shape does not fit.
        TypeError: the mask is not bool.
        CapabilityError: pooled text for a model without.
    """
    batch = x.shape[0]
    shapes = [
        ("x", x, f"(B, {config.channels}, H, W)", (None, config.channels, None, None)),
        ("t", t, "(B,)", (batch,)),
        ("text", text, f"(B, L, {config.text_dim})", (batch, None, config.text_dim)),
    ]
    if pooled is not None:
        if config.pooled_dim is None:
            raise CapabilityError(f"{where}: built without pooled text; pooled_dim is None")
        width = config.pooled_dim
        shapes.append(("pooled", pooled, f"(B, {width})", (batch, width)))
    if mask is not None:
        check_mask(mask, where=f"{where}: text_mask")
        shapes.append(("text_mask", mask, "(B, L)", (batch, text.shape[1])))
    for name, value, shown, shape in shapes:
        check_shape(value, shown, shape, where=f"{where}: {name}")
    if x.shape[2] % config.patch or x.shape[3] % config.patch:
        raise ValueError(f"{where}: {tuple(x.shape[2:])} is not divisible by patch {config.patch}")


def packed_text(
    y: Tensor, mask: Tensor | None, packed: bool, *, where: str
) -> tuple[Tensor, Tensor | None, Packing | None]:
    """The text (B, L, D), its key mask (B, L) and how it is packed: as it is, or real tokens only.

    Raises:
        ValueError: ``packed`` without a mask.
    """
    if not packed:
        return y, mask, None
    if mask is None:
        raise ValueError(f"{where}: packed=True needs text_mask")
    packing = Packing.from_mask(mask)
    return packing.pack(y), None, packing


def example_inputs(
    config: TwoStreamConfig,
    like: Tensor,
    batch: int,
    *,
    scale: float = 1.0,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """Noise, times and texts.

    Args:
        config: sizes.
        like: gives dtype and device.
        batch: number of samples.
        scale: time lies in [0, scale].
        generator: source of randomness.
    """

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=like.dtype, device=like.device, generator=generator)

    side = config.input_size
    inputs = {
        "x": drawn(batch, config.channels, side, side),
        "t": drawn(batch).sigmoid() * scale,
        "text": drawn(batch, config.text_length, config.text_dim),
    }
    if config.pooled_dim is not None:
        inputs["pooled"] = drawn(batch, config.pooled_dim)
    return inputs


def open_axes(config: TwoStreamConfig) -> dict[str, dict[int, str]]:
    """Axes of the inputs that may vary at run time."""
    axes = {
        "x": {0: "batch", 2: "height", 3: "width"},
        "t": {0: "batch"},
        "text": {0: "batch", 1: "words"},
        "text_mask": {0: "batch", 1: "words"},
    }
    return axes if config.pooled_dim is None else axes | {"pooled": {0: "batch"}}
