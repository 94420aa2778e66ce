"""Position-wise networks: importing this package registers them."""

from __future__ import annotations

from .acm import ACM
from .base import FFN, FFNConfig, InnerConfig
from .conv_channel import ConvChannel, SpikingConvChannel
from .gated import GEGLU, SwiGLU
from .glumbconv import GLUMBConv
from .mlp import MLP
from .moe import MoE

__all__ = [
    "ACM",
    "FFN",
    "GEGLU",
    "MLP",
    "ConvChannel",
    "FFNConfig",
    "GLUMBConv",
    "InnerConfig",
    "MoE",
    "SpikingConvChannel",
    "SwiGLU",
]
