"""What heads project beside queries, keys and values: inputs that a core asks for, and the gate of
their outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effformer.config import Config
from effformer.nn.activations import ACTIVATIONS
from effformer.nn.cut import cut_linear, put, twin
from effformer.values import Count, Positive

__all__ = ["HeadOutput", "Input", "OutputGate", "cut_input", "make_input"]


@dataclass(frozen=True, slots=True)
class Input:
    """A further input of a core, projected from the tokens: (B, heads, N, width).

    Attributes:
        width: numbers per head and token.
        rank: width of a bottleneck in the projection, None for one matrix.
        bias: the projection has a bias.
    """

    width: int = 1
    rank: int | None = None
    bias: bool = False


def make_input(dim: int, out: int, *, rank: int | None, bias: bool) -> nn.Module:
    """A projection to ``out`` numbers per token, in one matrix or in two."""
    if rank is None:
        return nn.Linear(dim, out, bias=bias)
    return nn.Sequential(nn.Linear(dim, rank, bias=False), nn.Linear(rank, out, bias=bias))


def cut_input(module: nn.Module, rows: Tensor) -> nn.Module:
    """The projection to some of its numbers."""
    if isinstance(module, nn.Linear):
        return cut_linear(module, rows=rows)
    small = twin(module)
    small._modules["1"] = cut_linear(module[1], rows=rows)  # type: ignore[index]
    return small


def input_rows(module: nn.Module) -> int:
    """How many numbers such a projection makes."""
    last = module if isinstance(module, nn.Linear) else module[1]  # type: ignore[index]
    return int(last.out_features)


def input_macs(module: nn.Module) -> int:
    """Multiply-adds of such a projection for one token."""
    linears = [m for m in module.modules() if isinstance(m, nn.Linear)]
    return sum(m.in_features * m.out_features for m in linears)


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputGate(Config):
    """Knobs of `HeadOutput`.

    Attributes:
        per: a gate for every "element" of the heads' outputs, one for every "head", or "none".
        act: of the gate.
        rank: width of a bottleneck in the gate's projection, "head" for that of a head's output;
            None for one matrix.
        bias: the gate's projection has a bias.
        norm: RMS norm over each "head" (one weight for all of them), over "groups" of heads, or
            "none".
        groups: number of groups.
        eps: epsilon of the norm.
        first: the gate comes before the norm (Mamba-2).
    """

    per: Literal["element", "head", "none"] = "element"
    act: Literal["sigmoid", "silu", "identity"] = "sigmoid"
    rank: Count | Literal["head"] | None = None
    bias: bool = False
    norm: Literal["head", "groups", "none"] = "none"
    groups: Count = 1
    eps: Positive = 1e-5
    first: bool = False


class HeadOutput(nn.Module):
    """``norm(o) * act(W x)`` of the heads' outputs o (B, H, N, V), or ``norm(o * act(W x))``.

    Args:
        config: the knobs.
        dim: width of the tokens.
        heads: number of heads.
        width: V.

    Raises:
        ValueError: the groups do not divide the heads.

    Reference: Gated Attention for Large Language Models: Non-linearity, Sparsity, and
    Attention-Sink-Free, 2025, arXiv 2505.06708 (sigmoid gates of softmax attention); Retentive
    Network: A Successor to Transformer for Large Language Models, 2023, arXiv 2307.08621 (norm
    and gate).
    """

    def __init__(self, config: OutputGate, dim: int, heads: int, width: int) -> None:
        super().__init__()
        self.config, self.heads = config, heads
        if config.norm == "groups" and heads % config.groups:
            raise ValueError(f"gate: {heads} heads do not divide into {config.groups} groups")
        if config.per != "none":
            out = heads * (width if config.per == "element" else 1)
            rank = width if config.rank == "head" else config.rank
            self.proj = make_input(dim, out, rank=rank, bias=config.bias)
        if config.norm != "none":
            self.weight = nn.Parameter(
                torch.ones(width * (heads if config.norm == "groups" else 1))
            )

    def forward(self, out: Tensor, x: Tensor) -> Tensor:
        """Outputs (B, H, N, V) and the tokens (B, N, D) that the gate reads."""
        if self.config.first:
            return self._normed(self._gated(out, x))
        return self._gated(self._normed(out), x)

    def _gated(self, out: Tensor, x: Tensor) -> Tensor:
        if self.config.per == "none":
            return out
        gate = self.proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        act = self.config.act
        return out * (torch.sigmoid(gate) if act == "sigmoid" else ACTIVATIONS[act](gate))

    def _normed(self, out: Tensor) -> Tensor:
        if self.config.norm == "none":
            return out
        eps, width, weight = self.config.eps, out.shape[-1], self.weight.to(out.dtype)
        if self.config.norm == "head":
            return F.rms_norm(out, (width,), weight, eps)
        groups = self.config.groups
        joined = out.transpose(1, 2).unflatten(2, (groups, -1)).flatten(3)
        joined = F.rms_norm(joined, (joined.shape[-1],), None, eps).flatten(2) * weight
        return joined.unflatten(-1, (self.heads, width)).transpose(1, 2)

    def select(self, heads: Tensor, width: int) -> HeadOutput:
        """The outputs of some heads (int64 indices)."""
        small = twin(self)
        small.heads = len(heads)
        if self.config.per != "none":
            rows = heads if self.config.per == "head" else spread(heads, width)
            small.proj = cut_input(self.proj, rows)
        if self.config.norm == "groups":
            put(small, "weight", self.weight.index_select(0, spread(heads, width)))
        return small

    def macs(self, n: int) -> int:
        """Dense multiply-adds of n tokens."""
        return 0 if self.config.per == "none" else n * input_macs(self.proj)


def spread(units: Tensor, width: int) -> Tensor:
    """Rows of units that have ``width`` rows each."""
    return (units[:, None] * width + torch.arange(width, device=units.device)).flatten()
