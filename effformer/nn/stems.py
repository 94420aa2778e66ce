"""Convolutional stems that turn an image into a feature map before patching."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import nn

from effformer.checks import need
from effformer.config import Config
from effformer.values import Count

__all__ = ["Stem", "build_stem"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stem(Config):
    """Which convolutional network stands before the patches of a hybrid vision transformer.

    Attributes:
        kind: "resnetv2" (BiT: weight-standardised, group norm), "resnet-d" (batch norm, deep stem)
            or "conv" (three strided convolutions to the token width, without a projection behind).
        layers: blocks per stage of a ResNet; empty: its first convolution and pooling only.
    """

    kind: Literal["resnetv2", "resnet-d", "conv"] = "resnetv2"
    layers: tuple[Count, ...] = ()

    @property
    def stride(self) -> int:
        """Pixels per cell of the feature map."""
        return 16 if self.kind == "conv" else 4 * 2 ** max(len(self.layers) - 1, 0)

    @property
    def projected(self) -> bool:
        """A patch projection follows."""
        return self.kind != "conv"

    def width(self, dim: int) -> int:
        """Channels of the feature map, for tokens of width ``dim``."""
        if self.kind == "conv":
            return dim
        return 256 * 2 ** (len(self.layers) - 1) if self.layers else 64

    def check(self) -> None:
        if (self.kind == "conv") == bool(self.layers) and self.kind != "resnetv2":
            raise ValueError(f"stem {self.kind!r}: layers={self.layers} does not fit this kind")
        if len(self.layers) > 4:
            raise ValueError(f"stem: layers must be at most four numbers, got {self.layers}")


def build_stem(config: Stem, channels: int, dim: int) -> nn.Module:
    """Build a stem from timm's convolutional networks.

    Args:
        config: which one.
        channels: input channels.
        dim: token width.

    Returns:
        A module (B, channels, H, W) -> (B, width, H / stride, W / stride).

    Raises:
        MissingExtra: timm is not installed.

    Reference: Big Transfer (BiT), 2019, arXiv 1912.11370 ("resnetv2"); Bag of Tricks for Image
    Classification, 2018, arXiv 1812.01187 ("resnet-d"); MobileCLIP, 2023, arXiv 2311.17049
    ("conv").
    """
    if config.kind == "resnetv2":
        return _resnetv2(config.layers, channels)
    if config.kind == "resnet-d":
        return _resnet_d(config.layers, channels)
    hybrid = need("timm.models.vision_transformer_hybrid")
    stem: nn.Module = hybrid.ConvStem(
        in_chans=channels, channels=(dim // 4, dim // 4, dim), stride=(4, 2, 2),
        kernel_size=(4, 2, 2), padding=0, act_layer=nn.GELU,
    )  # fmt: skip
    return stem


def _resnetv2(layers: tuple[int, ...], channels: int) -> nn.Module:
    resnetv2, parts = need("timm.models.resnetv2"), need("timm.layers")
    options = {
        "preact": False, "stem_type": "same", "conv_layer": partial(parts.StdConv2dSame, eps=1e-8),
    }  # fmt: skip
    if not layers:
        stem: nn.Module = resnetv2.create_resnetv2_stem(channels, **options)
        return stem
    net: nn.Module = resnetv2.ResNetV2(
        layers=layers, num_classes=0, global_pool="", in_chans=channels, **options
    )
    return net


def _resnet_d(layers: tuple[int, ...], channels: int) -> nn.Module:
    resnet = need("timm.models.resnet")
    net = resnet.ResNet(
        resnet.Bottleneck, (*layers, *[1] * (4 - len(layers))), in_chans=channels, num_classes=0,
        stem_width=32, stem_type="deep", avg_down=True,
    )  # fmt: skip
    names = ["conv1", "bn1", "act1", "maxpool", *(f"layer{i + 1}" for i in range(len(layers)))]
    return nn.Sequential(OrderedDict((name, getattr(net, name)) for name in names))
