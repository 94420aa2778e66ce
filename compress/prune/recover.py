"""What the layers behind lost units are given, so that less is lost: no gradients, one pass of data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ..plan import Group, Member
from .statistics import observed

if TYPE_CHECKING:
    from effformer.train import Objective

__all__ = ["Recovery", "compensated"]

Recovery = Literal["none", "bias", "least-squares"]
_RIDGE = 1e-4


def compensated(
    model: nn.Module,
    groups: Mapping[str, Group],
    kept: Mapping[str, Tensor],
    found: list[Any],
    how: Recovery,
    objective: Objective | None = None,
) -> dict[str, tuple[Tensor, Tensor | None]]:
    """New weights and biases of the layers that read lost units; the columns of those are still there.

    - "bias": ``b + W_lost mean(h_lost)``.
    - "least-squares": the W and b over the kept columns whose outputs are nearest to those of all, over
      the rows of the data, with a ridge of 1e-4 of the mean square.

    Args:
        model: the whole model.
        groups: the groups by path.
        kept: the units that stay.
        found: batches.
        how: as above.
        objective: what calls the model; None: batches are its arguments.

    Returns:
        Path of a linear layer -> its weight and bias. Layers without a bias keep none; only
        "least-squares" helps there.
    """
    losing: dict[str, list[tuple[Member, Tensor]]] = {}
    modules = dict(model.named_modules())
    for path, units in kept.items():
        group = groups[path]
        if group.kind not in ("heads", "channels") or len(units) == group.units:
            continue
        for member in group.outgoing:
            if isinstance(modules[member.module], nn.Linear):
                losing.setdefault(member.module, []).append((member, units))
    gram, where = how == "least-squares", "prune: data"
    seen = observed(model, found, losing, gram=gram, where=where, objective=objective)
    out = {}
    for path, members in losing.items():
        layer: Any = modules[path]
        stays = torch.ones(layer.in_features, dtype=torch.bool)
        for member, units in members:
            stays &= (member.owner < 0) | torch.isin(member.owner, units)
        solve = _refitted if how == "least-squares" else _shifted
        out[path] = solve(layer, stays.to(layer.weight.device), seen[path])
    return out


def _shifted(layer: Any, stays: Tensor, seen: Any) -> tuple[Tensor, Tensor | None]:
    weight = layer.weight.detach()
    if layer.bias is None:
        return weight, None
    lost = weight[:, ~stays].double() @ seen.mean[~stays]
    return weight, (layer.bias.detach().double() + lost).to(weight.dtype)


def _refitted(layer: Any, stays: Tensor, seen: Any) -> tuple[Tensor, Tensor | None]:
    weight = layer.weight.detach().double()
    mean = seen.mean if layer.bias is not None else torch.zeros_like(seen.mean)
    spread = seen.products / seen.count - torch.outer(mean, mean)
    inner = spread[stays][:, stays]
    ridge = _RIDGE * inner.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    # around the present weights, so that channels that say nothing of the lost ones keep theirs
    change = weight[:, ~stays] @ spread[~stays][:, stays]
    inner = inner + ridge * torch.eye(len(inner), dtype=inner.dtype, device=inner.device)
    new = weight.clone()
    new[:, stays] += torch.linalg.solve(inner, change.T).T
    if layer.bias is None:
        return new.to(layer.weight.dtype), None
    bias = layer.bias.detach().double() + weight @ mean - new[:, stays] @ mean[stays]
    return new.to(layer.weight.dtype), bias.to(layer.weight.dtype)
