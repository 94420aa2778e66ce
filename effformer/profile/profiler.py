"""`profile`: what one forward of a model costs, counted without doing it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from effformer.calls import Call, Inputs, bind, evaluating, takes
from effformer.context import Ledger

from .attribution import Costs
from .counter import Counter
from .crosscheck import Row, compare_counters
from .fake import Run, on_fake, on_real, visible_operators
from .formulas import CONVENTION
from .memory import Memory, MemoryTracker, activation_memory

__all__ = ["Profile", "Progress", "profile"]

Progress = Callable[[str], None]
"""Called with the name of each stage as it begins."""

_FAKE_FAILURES = (RuntimeError, NotImplementedError, TypeError)


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """The cost of one forward. MACs are dense: dynamic parts count as if nothing were skipped.

    ``sum(by_op.values()) == sum(by_part.values()) == by_module[""] == total``.

    Attributes:
        name: name of the model.
        inputs: shapes of the tensors that went in.
        total: multiply-adds.
        executed: multiply-adds that the model executes, by the fractions in its `Ledger`; equals
            ``total`` for a model without dynamic parts; None if the fractions need arithmetic and
            the model has no weights.
        by_module: module path -> MACs, children included, in execution order.
        by_part: part of a transformer -> MACs.
        by_block: numbered block -> part -> MACs.
        by_op: operator -> MACs; ``"formula: Flow"`` is the difference between a core's formula and
            its operators.
        calls: operator -> number of calls, for counted operators.
        elements: elementwise operator -> elements handled, 0 MACs each.
        uncounted: operator without a formula -> number of calls.
        params: number of parameters, shared ones once, quantized ones as the weights they stand
            for.
        trainable: parameters with ``requires_grad``.
        memory: activation memory, or None if it was not asked for.
        convention: what counts as one.
        notes: what a reader of the numbers must know.
        cross_check: comparison with other counters, empty if it was not asked for.
    """

    name: str
    inputs: tuple[tuple[int, ...], ...]
    total: int
    executed: int | None
    by_module: dict[str, int]
    by_part: dict[str, int]
    by_block: dict[str, dict[str, int]]
    by_op: dict[str, int]
    calls: dict[str, int]
    elements: dict[str, int]
    uncounted: dict[str, int]
    params: int
    trainable: int
    memory: Memory | None
    convention: str = CONVENTION
    notes: tuple[str, ...] = ()
    cross_check: tuple[Row, ...] = ()

    @property
    def flops(self) -> int:
        """Floating-point operations, 2 x MACs."""
        return 2 * self.total

    def tree(self, depth: int = 4) -> str:
        """Modules with their MACs and shares as indented text, down to ``depth`` levels."""
        from .report import tree_text

        return tree_text(self, depth)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        from .report import profile_dict

        return profile_dict(self)

    def save(self, path: str | Path) -> None:
        """Write the profile; the suffix decides: .json, .html (one self-contained page) or .txt.

        Raises:
            ValueError: another suffix.
            OSError: the file cannot be written; what was there before is intact.
        """
        from .report import save_report

        save_report(path, profiles=[self])

    def __str__(self) -> str:
        from .report import profile_text

        return profile_text(self)


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
        TypeError: inputs that the model does not accept.

    Example:
        >>> profile(torch.nn.Linear(8, 4), (torch.zeros(2, 8),)).total
        64
    """
    call = bind(model, inputs, where="profile")
    say = progress or _silent
    model = getattr(model, "_orig_mod", model)  # a compiled module hides its operators
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
        params=_parameters(model),
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        memory=usage,
        notes=tuple(notes),
        cross_check=rows,
    )


def _parameters(model: nn.Module) -> int:
    """Parameters, those of packed weights (modules with a ``scheme`` and a ``shape``) included."""
    packed = (getattr(m, "shape", (0,)) for m in model.modules() if hasattr(m, "scheme"))
    return sum(p.numel() for p in model.parameters()) + sum(prod(shape) for shape in packed)


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
