"""What is done with a whole model that has dynamic parts: sort its units, train its gates, tabulate
them over time, cut its parts ahead of sampling.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from effformer.arguments import checked
from effformer.blocks import Block, Branch, Joint
from effformer.calls import evaluating, takes
from effformer.checks import CapabilityError, check_shape, check_values, unknown
from effformer.context import Context, Ledger
from effformer.values import Natural, NonNegative, Portion, checker
from effformer.wrapped import bare, unwrapping

from .work import WorkTarget, write_work_loss

if TYPE_CHECKING:
    from effformer.train import Objective

__all__ = ["Frugal", "GateTable", "gate_tables", "prepare_widths", "sort_by_magnitude"]


@dataclass(frozen=True, slots=True)
class GateTable:
    """Which units run at which time; valid for every sample, label and half of a guided batch.

    Attributes:
        times: (T,) as the model counts them.
        active: path of a branch -> bool (T, U), True where a head or a group of channels runs.
    """

    times: Tensor
    active: Mapping[str, Tensor]

    @checked
    def fraction(self, path: str | None = None) -> Tensor:
        """Share of the units that run at each time, (T,): of one branch, or the mean of all.

        Raises:
            ValueError: there is no branch at the path.
        """
        if path is not None and path not in self.active:
            raise unknown("branch", path, list(self.active), where="GateTable.fraction")
        chosen = self.active.values() if path is None else [self.active[path]]
        return torch.stack([gate.float().mean(dim=1) for gate in chosen]).mean(dim=0)


@torch.no_grad()
@checked
@unwrapping
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
    check_values(times, where="gate_tables: times")
    found = list(_narrowed(model))
    embed = getattr(model, "time_embed", None)
    if not found or embed is None:
        raise CapabilityError(
            f"gate_tables: {getattr(model, 'name', type(model).__name__)} has no gates over time; "
            "build it with width='dynamic'"
        )
    weight = next(model.parameters())
    time = embed(times.to(weight.device), weight.dtype)
    active = {}
    with evaluating(model):
        for block, name in found:
            gate = block.width(name, Context(time=time))  # type: ignore[misc]
            if gate is not None:
                active[getattr(block, name).site.path] = (gate > 0).cpu()
    return GateTable(times, active)


@torch.no_grad()
@checked
@unwrapping
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
        if branch.site.path not in table.active:
            continue
        patterns = table.active[branch.site.path].unique(dim=0)
        branch.forms.limit = max(branch.forms.limit, len(patterns))
        for pattern in patterns:
            branch.forms.form(branch.part, pattern)
    return table


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Frugal:
    """Objective for `effformer.train.train`: a task, and the work that the model may do for it.

    ``task(dynamic model) + weight (mean executed share - target)^2``, and, for the first
    ``complete`` steps, ``task(complete model)`` on the same samples, times and noise.

    Attributes:
        task: the objective; it must hand the ledger to the model.
        target: wanted share of the dense work of all dynamic parts, or its course over training.
        weight: of the loss on the work; 1 in the paper, 2 in its code.
        complete: number of steps that train the complete model as well; 30,000 for XL in the paper,
            none for smaller models.

    Reference: Dynamic Diffusion Transformer, 2024, arXiv 2410.03456.
    """

    task: Objective
    target: float | WorkTarget
    weight: float = 1.0
    complete: int = 0

    def __post_init__(self) -> None:
        for name, hint in (
            ("task", Callable[..., Any]),
            ("target", Portion | WorkTarget),
            ("weight", NonNegative),
            ("complete", Natural),
        ):
            checker(hint)(getattr(self, name), f"Frugal.{name}")

    def __call__(
        self, model: nn.Module, batch: Any, generator: torch.Generator, ledger: Ledger
    ) -> Tensor:
        state = generator.get_state()
        value = self.task(model, batch, generator, ledger)
        if not ledger.shares:
            raise CapabilityError(
                "Frugal: no gate reported to the ledger, so that there is no work to save; build the "
                "model with width='dynamic' or tokens='dynamic'"
            )
        target = self.target if isinstance(self.target, (int, float)) else self.target(ledger.step)
        write_work_loss(ledger, target, weight=self.weight)
        if ledger.step < self.complete:
            if not takes(model, "complete"):
                raise CapabilityError(
                    f"Frugal: {type(model).__name__}.forward has no argument 'complete', so that it "
                    "cannot run with all of its work; choices: complete=0, or a model that hands "
                    "complete= to its blocks in the context"
                )
            generator.set_state(state)
            whole: Any = _Complete(model)
            value = value + self.task(whole, batch, generator, Ledger())
        return value


class _Complete:
    """A model called with all of its work."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.forward = bare(model).forward  # the names that it takes

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, complete=True, **kwargs)


@torch.no_grad()
@checked
@unwrapping
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
        part: Any = module.part if isinstance(module, Branch) else module
        if not isinstance(module, (Branch, Joint)) or not part.caps.width:
            continue
        if getattr(part, "joined", None) or getattr(part.config, "joined", None):
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
