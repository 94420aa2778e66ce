"""What is done with a whole model that has dynamic parts: sort its units, tabulate its gates over
time, cut its parts ahead of sampling.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from .blocks import Block, Branch
from .checks import CapabilityError, check_shape
from .context import Context

__all__ = ["GateTable", "gate_tables", "prepare_widths", "sort_by_magnitude"]


@dataclass(frozen=True, slots=True)
class GateTable:
    """Which units run at which time; valid for every sample, label and half of a guided batch.

    Attributes:
        times: (T,) as the model counts them.
        active: path of a branch -> bool (T, U), True where a head or a group of channels runs.
    """

    times: Tensor
    active: Mapping[str, Tensor]

    def fraction(self, path: str | None = None) -> Tensor:
        """Share of the units that run at each time, (T,): of one branch, or the mean of all."""
        chosen = self.active.values() if path is None else [self.active[path]]
        return torch.stack([gate.float().mean(dim=1) for gate in chosen]).mean(dim=0)


@torch.no_grad()
def gate_tables(model: nn.Module, times: Tensor) -> GateTable:
    """Evaluate the gates of a model with ``width="dynamic"`` over a grid of times.

    Args:
        model: a model with a ``time_embed`` (the DiT family); its evaluation mode is meant.
        times: (T,) as the model counts them.

    Raises:
        CapabilityError: the model has no dynamic width.
        ValueError: the times are not a vector.

    Reference: Dynamic Diffusion Transformer, 2024, arXiv 2410.03456.

    Example:
        >>> import torch
        >>> model = effformer.build_model("dydit-nano")
        >>> effformer.gate_tables(model, torch.arange(0, 1000, 250)).fraction()
        tensor([1., 1., 1., 1.])
    """
    check_shape(times, "(T,)", (None,), where="gate_tables: times")
    found = list(_narrowed(model))
    embed = getattr(model, "time_embed", None)
    if not found or embed is None:
        raise CapabilityError(
            f"gate_tables: {getattr(model, 'name', type(model).__name__)} has no gates over time; "
            "build it with width='dynamic'"
        )
    weight = next(model.parameters())
    time = embed(times.to(weight.device), weight.dtype)
    active, training = {}, model.training
    model.eval()
    try:
        for block, name in found:
            gate = block.width(name, Context(time=time))  # type: ignore[misc]
            if gate is not None:
                active[getattr(block, name).site.path] = (gate > 0).cpu()
    finally:
        model.train(training)
    return GateTable(times, active)


@torch.no_grad()
def prepare_widths(model: nn.Module, times: Tensor) -> GateTable:
    """Cut every part to the units that run at some time of a sampler's grid, ahead of sampling.

    Without it parts are cut when a pattern first occurs. The forms are kept until a weight changes
    and take memory for each different pattern.

    Args:
        model: a model with ``width="dynamic"``, in evaluation mode.
        times: (T,) as the model counts them.

    Returns:
        The gates at these times.

    Raises:
        CapabilityError: the model has no dynamic width.
    """
    table = gate_tables(model, times)
    for block, name in _narrowed(model):
        branch: Branch = getattr(block, name)
        patterns = table.active[branch.site.path].unique(dim=0)
        branch.forms.limit = max(branch.forms.limit, len(patterns))
        for pattern in patterns:
            branch.forms.form(branch.part, pattern)
    return table


@torch.no_grad()
def sort_by_magnitude(model: nn.Module) -> None:
    """Reorder the heads of every attention and the hidden channels of every FFN in place, the
    largest first, so that what dynamic width never switches off is what matters most.

    The magnitude of a head or channel is the norm of its weights before and behind it. The function
    of the model stays the same; gates that were trained before would no longer fit.

    Args:
        model: any model made of blocks.

    Reference: Dynamic Diffusion Transformer, 2024, arXiv 2410.03456, section on its fine-tuning;
        the released code leaves this step out.
    """
    for module in model.modules():
        if not isinstance(module, Branch) or not module.part.caps.width:  # type: ignore[union-attr]
            continue
        part: Any = module.part
        if getattr(part.config, "joined", None) is not None:
            continue
        order = part.magnitudes().argsort(descending=True, stable=True)
        moved = part.select(order)
        values = {name: attrgetter(name)(moved) for name, _ in part.named_parameters()}
        values |= {name: attrgetter(name)(moved) for name, _ in part.named_buffers()}
        for name, value in values.items():
            attrgetter(name)(part).copy_(value)


def _narrowed(model: nn.Module) -> Iterator[tuple[Block, str]]:
    """Every branch below a part in the slot "width": its block and its name there."""
    for module in model.modules():
        if isinstance(module, Block) and module.width is not None:
            yield from ((module, name) for name in module.order)
