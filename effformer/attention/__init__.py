"""Token mixers and attention cores: importing this package registers them."""

from __future__ import annotations

from .base import Core, CoreConfig, Mixer, Streaming
from .flow import Flow
from .linear import Linear
from .multihead import Attention
from .softmax import Softmax

__all__ = [
    "Attention",
    "Core",
    "CoreConfig",
    "Flow",
    "Linear",
    "Mixer",
    "Softmax",
    "Streaming",
]
