"""Blocks: ordered lists of residual branches. Importing this package registers them."""

from __future__ import annotations

from effformer.site import Layer, Needs

from .adaln import AdaLNSingle, AdaLNZero
from .base import Block, Branch, init_states
from .dynamic import DynamicTokens, DynamicWidth
from .expert import ExpertAdaLN
from .flowtransformer import FlowTransformerDecoder, FlowTransformerEncoder
from .gated import Gated
from .iterate import Iterate
from .joint import Joint
from .lmu import LMUBlock, SpikingLMUBlock
from .macaron import Macaron
from .parallel import Parallel, ParallelBranches
from .postnorm import PostNorm
from .prenorm import PreNorm
from .respost import ResPost
from .slots import TokenPart, WidthPart
from .stack import (
    BackboneConfig,
    StackConfig,
    build_stack,
    head_width,
    layer_pattern,
    resolve_layers,
)
from .tome import ToMe

__all__ = [
    "AdaLNSingle",
    "AdaLNZero",
    "BackboneConfig",
    "Block",
    "Branch",
    "DynamicTokens",
    "DynamicWidth",
    "ExpertAdaLN",
    "FlowTransformerDecoder",
    "FlowTransformerEncoder",
    "Gated",
    "Iterate",
    "Joint",
    "LMUBlock",
    "Layer",
    "Macaron",
    "Needs",
    "Parallel",
    "ParallelBranches",
    "PostNorm",
    "PreNorm",
    "ResPost",
    "SpikingLMUBlock",
    "StackConfig",
    "ToMe",
    "TokenPart",
    "WidthPart",
    "build_stack",
    "head_width",
    "init_states",
    "layer_pattern",
    "resolve_layers",
]
