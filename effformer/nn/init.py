"""Initialisations named after what they do."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from .gates import GateLinear

__all__ = ["truncated_normal_linears", "xavier_linears"]


def xavier_linears(module: nn.Module) -> None:
    """Xavier-uniform weights and zero biases for every `nn.Linear` below ``module``; gates start
    their own way.
    """
    for child in _linears(module):
        nn.init.xavier_uniform_(child.weight)
        if child.bias is not None:
            nn.init.zeros_(child.bias)


def truncated_normal_linears(module: nn.Module, std: float = 0.02) -> None:
    """Weights from a normal cut at 2 (in absolute value) and zero biases for every `nn.Linear`
    below ``module``; gates start their own way.
    """
    for child in _linears(module):
        nn.init.trunc_normal_(child.weight, std=std)
        if child.bias is not None:
            nn.init.zeros_(child.bias)


def _linears(module: nn.Module) -> Iterator[nn.Linear]:
    for child in module.modules():
        if isinstance(child, GateLinear):
            child.reset_parameters()
        elif isinstance(child, nn.Linear):
            yield child
