"""Token mixers and attention cores: importing this package registers them."""

from __future__ import annotations

from .base import Core, CoreConfig, Mixer, Streaming
from .differential import Differential
from .flow import Flow
from .linear import Linear
from .multihead import Attention
from .nystrom import Nystrom
from .relative import Relative
from .softmax import Softmax
from .topk import TopK

__all__ = [
    "Attention",
    "Core",
    "CoreConfig",
    "Differential",
    "Flow",
    "Linear",
    "Mixer",
    "Nystrom",
    "Relative",
    "Softmax",
    "Streaming",
    "TopK",
]
