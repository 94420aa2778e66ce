"""Knobs of the heads around a core."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from effformer.config import Config
from effformer.values import Count, Natural, Positive

from .outputs import OutputGate
from .projections import AdaptiveProjections

__all__ = ["HeadsConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadsConfig(Config):
    """Knobs of `Heads`.

    Attributes:
        qkv_bias: the input projections have biases.
        proj_bias: the output projection has a bias.
        proj: there is an output projection; without one the heads side by side are the output.
        qk_norm: queries and keys are normalised before the core (and before rotary embedding), per
            head (True) or over all heads together ("across-heads"); of which kind, the model says.
        qk_norm_eps: epsilon of these norms; None means that of the model's norms.
        heads: number of heads here; None means that of the model. They are as wide as the model's.
        head_dim: width K of a query or key; None means the model's dim / heads.
        value_dim: width V of a value, for cores that take another one; None means K.
        kv_heads: number of key and value heads, each shared by heads / kv_heads query heads
            (grouped-query attention); None means one per query head.
        qk_heads: number of query and key heads, each shared by heads / qk_heads value heads
            (grouped values), for cores that keep a state for every value head; None means one per
            value head.
        short_conv: taps of a causal depth-wise convolution with SiLU over queries, keys and values; 0 for
            none.
        short_conv_bias: the convolution has a bias.
        gate: what becomes of the heads' outputs before the output projection: "head" or "element"
            for sigmoid gates, an `OutputGate`, or None for nothing.
        projections: learners in place of the projections' matrices, which then have the biases of
            the learners; None: plain matrices.
    """

    qkv_bias: bool = True
    proj_bias: bool = True
    proj: bool = True
    qk_norm: bool | Literal["across-heads"] = False
    qk_norm_eps: Positive | None = None
    heads: Count | None = None
    head_dim: Count | None = None
    value_dim: Count | None = None
    kv_heads: Count | None = None
    qk_heads: Count | None = None
    short_conv: Natural = 0
    short_conv_bias: bool = False
    gate: OutputGate | Literal["head", "element"] | None = None
    projections: AdaptiveProjections | None = None

    def check(self) -> None:
        object.__setattr__(self, "gate", _gate(self.gate))
        if self.kv_heads is not None and self.qk_heads is not None:
            raise ValueError("attention: give kv_heads or qk_heads, not both")
        if self.projections is not None and not self.proj:
            raise ValueError("attention: projections has an output projection; proj must be True")
        if self.projections is not None and (self.short_conv or self.qk_heads is not None):
            raise ValueError("attention: projections goes with neither short_conv nor qk_heads")

    @property
    def joined(self) -> str | None:
        """Why heads cannot be taken apart one by one, None if they can."""
        if self.kv_heads is not None or self.qk_heads is not None:
            return "lets heads share keys (kv_heads=None and qk_heads=None would do)"
        return self.inseparable

    @property
    def inseparable(self) -> str | None:
        """Why not even heads that share no keys can be taken apart, None if they can."""
        if self.qk_norm == "across-heads":
            return "lets heads share a norm (qk_norm=True or False would do)"
        if isinstance(self.gate, OutputGate) and self.gate.norm == "groups":
            return "lets heads share a norm (gate with norm 'head' or 'none' would do)"
        if self.projections is not None:
            return "lets heads share learners (projections=None would do)"
        if not self.proj:
            return "has heads that are the output (proj=True would do)"
        return None

    def head_count(self, heads: int) -> int:
        """Number of heads in a model of ``heads`` heads."""
        return self.heads or heads

    def head_width(self, dim: int, heads: int) -> int:
        """Width K of a query or key in a model of ``heads`` heads."""
        return self.head_dim or dim // heads


def _gate(given: Any) -> OutputGate | None:
    """A gate by its short name, as a dict or as it is."""
    if isinstance(given, str):
        return OutputGate.from_dict({"per": given}, where="gate")
    return OutputGate.from_dict(given, where="gate") if isinstance(given, Mapping) else given
