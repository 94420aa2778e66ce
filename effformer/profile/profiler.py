"""`profile`: what one forward of a model costs, counted without doing it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from math import prod

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from effformer.arguments import checked
from effformer.calls import Call, Inputs, bind, check_parts, evaluating, running, takes
from effformer.context import Ledger
from effformer.wrapped import unwrapping

from .attribution import Costs
from .counter import Counter
from .crosscheck import Row, compare_counters
from .fake import Run, on_fake, on_real, visible_operators
from .memory import Memory, MemoryTracker, activation_memory
from .result import Profile

__all__ = ["Progress", "profile"]

Progress = Callable[[str], None]
"""Called with the name of each stage as it begins."""

_FAKE_FAILURES = (RuntimeError, NotImplementedError, TypeError)


@checked
@unwrapping
def profile(
    model: nn.Module,
    inputs: Inputs | None = None,
    *,
    cross_check: bool = False,
    memory: bool = True,
    progress: Progress | None = None,
) -> Profile:
    """Count the multiply-adds, parameters and activation memory of one forward in evaluation mode.

    The model runs on fake tensors: every operator is seen with its shapes, nothing is computed, so
    the largest models are counted in a second, also when their parameters are on the meta device.
    Where fake tensors do not suffice (data-dependent shapes, foreign kernels) the model runs on the
    real ones, and ``notes`` says so.

    Args:
        model: any module.
        inputs: named tensors (dict), positional arguments (tuple), one tensor, or None for
            ``model.example_inputs()``; batch as given.
        cross_check: compare with fvcore and torch's counter; fvcore really runs the model.
        memory: also measure activation memory.
        progress: called with the name of each stage.

    Raises:
        TypeError: no module, or inputs that it does not accept.
        CapabilityError: TorchScript, whose operators have no modules.

    Example:
        >>> profile(torch.nn.Linear(8, 4), (torch.zeros(2, 8),)).total
        64
    """
    check_parts(model, where="profile")
    call = bind(model, inputs, where="profile")
    say = progress or _silent
    notes: list[str] = []
    with evaluating(model), visible_operators():
        say("counting operators")
        counter, usage, ledger = _run(model, call, memory, notes)
        costs = Costs(counter, _known(ledger, counter, notes))
        executed = _executed(model, call, costs, ledger, notes)
        rows: tuple[Row, ...] = ()
        if cross_check:
            say("comparing with other counters")
            rows = compare_counters(model, call, costs)
    _note_corrections(counter, notes)
    return Profile(
        name=getattr(model, "name", type(model).__name__),
        inputs=tuple(tuple(x.shape) for x in call.leaves),
        total=costs.total,
        executed=executed,
        by_module=costs.by_module(),
        by_part=costs.by_part(),
        by_block=costs.by_block(),
        by_op=costs.by_op(),
        calls=costs.calls("counted"),
        elements=costs.elements(),
        uncounted=costs.calls("unknown"),
        params=count_parameters(model),
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        memory=usage,
        notes=tuple(notes),
        cross_check=rows,
    )


@checked
def count_parameters(model: nn.Module) -> int:
    """Parameters, those of packed weights (modules with a ``scheme`` and a ``shape``) included; tied
    ones count once.
    """
    packed = {
        next((id(x) for x in m.buffers()), id(m)): getattr(m, "shape", (0,))
        for m in model.modules()
        if hasattr(m, "scheme")
    }
    dense = sum(p.numel() for p in model.parameters())
    return dense + sum(prod(shape) for shape in packed.values())


def _silent(stage: str) -> None:
    pass


def _run(
    model: nn.Module, inputs: Call, memory: bool, notes: list[str]
) -> tuple[Counter, Memory | None, Ledger]:
    """Count on fake tensors if possible, else on real ones."""
    try:
        with on_fake(model, inputs) as run:
            return _watch(run, memory, "fake tensors (nothing was computed)")
    except _FAKE_FAILURES as error:
        if any(p.is_meta for p in model.parameters()):
            with running(model, inputs):
                raise
        reason = f"{type(error).__name__}: {error}".split("\n")[0]
    counted = _watch(on_real(model, inputs), memory, "real tensors")
    notes.append(f"counted on real tensors, because fake ones failed ({reason})")
    return counted


def _watch(run: Run, memory: bool, method: str) -> tuple[Counter, Memory | None, Ledger]:
    ledger = Ledger()
    more = {"ledger": ledger} if takes(run.model, "ledger") else {}
    tracker, counter = MemoryTracker(run.own), Counter(run.model)
    with torch.no_grad(), tracker if memory else nullcontext(), counter:
        run.call(**more)
    usage = activation_memory(run, peak=tracker.peak, method=method) if memory else None
    return counter, usage, ledger


def _known(ledger: Ledger, counter: Counter, notes: list[str]) -> dict[str, int | None]:
    """Paths in the ledger that are modules of the model, with their dense work if they know it."""
    for path in ledger.executed:
        if path not in counter.paths:
            notes.append(f"the ledger names {path!r}, which is no module that ran; it is ignored")
    return {
        path: round(ledger.shares[path].cost) * len(fraction) if path in ledger.shares else None
        for path, fraction in ledger.executed.items()
        if path in counter.paths
    }


def _executed(
    model: nn.Module,
    inputs: Call,
    costs: Costs,
    ledger: Ledger,
    notes: list[str],
) -> int | None:
    """MACs after what dynamic parts skip, which depends on values: fake tensors cannot tell."""
    if not ledger.executed:
        return costs.total
    if any(p.is_meta for p in model.parameters()):
        notes.append("executed work depends on values, and a model on the meta device has none")
        return None
    if any(isinstance(f, FakeTensor) for f in ledger.executed.values()):
        ledger = Ledger()
        with torch.no_grad():
            on_real(model, inputs).call(ledger=ledger)
    return costs.executed({path: float(f.double().mean()) for path, f in ledger.executed.items()})


def _note_corrections(counter: Counter, notes: list[str]) -> None:
    """Say where a formula, not the operators, decided."""
    sums: dict[str, list[int]] = {}
    for (_, name), difference in counter.corrections.items():
        sums.setdefault(name, []).append(difference)
    for name, differences in sums.items():
        notes.append(
            f"{name}: the closed formula counts {sum(differences):+,} MACs against the operators "
            f"of {len(differences)} layers (see the convention)"
        )
