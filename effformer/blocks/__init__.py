"""Blocks: ordered lists of residual branches. Importing this package registers them."""

from __future__ import annotations

from .adaln import AdaLNZero
from .base import Block, Branch
from .flowtransformer import FlowTransformerDecoder, FlowTransformerEncoder
from .macaron import Macaron
from .parallel import Parallel, ParallelBranches
from .postnorm import PostNorm
from .prenorm import PreNorm
from .respost import ResPost
from .stack import BackboneConfig, Needs, StackConfig, build_stack

__all__ = [
    "AdaLNZero",
    "BackboneConfig",
    "Block",
    "Branch",
    "FlowTransformerDecoder",
    "FlowTransformerEncoder",
    "Macaron",
    "Needs",
    "Parallel",
    "ParallelBranches",
    "PostNorm",
    "PreNorm",
    "ResPost",
    "StackConfig",
    "build_stack",
]
