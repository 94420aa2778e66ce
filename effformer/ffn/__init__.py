"""Position-wise networks: importing this package registers them."""

from __future__ import annotations

from .base import FFN, FFNConfig
from .gated import GEGLU, SwiGLU
from .mlp import MLP

__all__ = ["FFN", "GEGLU", "MLP", "FFNConfig", "SwiGLU"]
