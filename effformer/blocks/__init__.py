"""Blocks: ordered lists of residual branches. Importing this package registers them."""

from __future__ import annotations

from .adaln import AdaLNZero
from .base import Block, Branch
from .macaron import Macaron
from .prenorm import PreNorm
from .stack import BackboneConfig, Needs, build_stack

__all__ = [
    "AdaLNZero",
    "BackboneConfig",
    "Block",
    "Branch",
    "Macaron",
    "Needs",
    "PreNorm",
    "build_stack",
]
