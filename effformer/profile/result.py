"""What one forward of a model costs, and how that reads."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from effformer.arguments import checked
from effformer.values import Natural

from .crosscheck import Row
from .formulas import CONVENTION
from .html import profile_section, report_page
from .memory import Memory
from .parts import PART_LABELS
from .save import PROFILE, Saved
from .tables import amount, size, table
from .tree import tree_text

__all__ = ["Profile"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile(Saved):
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

    KIND = PROFILE

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

    @checked
    def tree(self, depth: Natural = 4) -> str:
        """Modules with their MACs and shares as indented text, down to ``depth`` levels."""
        return tree_text(self.by_module, self.name, depth)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self) | {"flops": self.flops, "inputs": [list(s) for s in self.inputs]}

    def _body(self) -> str:
        return profile_section(self)

    def _rows(self) -> list[dict[str, Any]]:
        """Modules, children included."""
        total = self.total or 1
        return [
            {"module": path or self.name, "macs": macs, "share": macs / total}
            for path, macs in self.by_module.items()
        ]

    def _page(self) -> str:
        return report_page([self])

    def __str__(self) -> str:
        """Everything, for a terminal."""
        p = self
        total = p.total or 1
        lines = [f"{p.name}: {p.total:,} MACs ({amount(p.flops)}FLOPs), {p.params:,} parameters"]
        if p.executed is not None and p.executed != p.total:
            lines.append(
                f"executed: {p.executed:,} MACs ({p.executed / total:.1%} of the dense work)"
            )
        lines.append(
            f"inputs: {', '.join(str(shape) for shape in p.inputs)}; trainable: {p.trainable:,}"
        )
        if p.memory is not None:
            saved = "" if p.memory.saved is None else f", {size(p.memory.saved)} saved for backward"
            lines.append(
                f"activations: {size(p.memory.peak)} at the peak{saved}; "
                f"weights {size(p.memory.weights)} ({p.memory.method})"
            )
        parts = ((PART_LABELS[k], f"{n:,}", f"{n / total:.1%}") for k, n in p.by_part.items())
        lines += ["", table(("part", "MACs", "share"), parts), "", p.tree(), ""]
        ops = ((op, str(p.calls.get(op, "")), f"{n:,}") for op, n in p.by_op.items())
        lines += [table(("operator", "calls", "MACs"), ops), ""]
        lines.append(
            f"elementwise: {amount(sum(p.elements.values()))} elements, 0 MACs by convention"
        )
        listed = ", ".join(f"{op} x {n}" for op, n in p.uncounted.items())
        lines.append(f"uncounted: {listed or 'nothing'}")
        lines += [f"note: {note}" for note in p.notes]
        lines.append(f"convention: {p.convention}")
        if p.cross_check:
            lines += ["", "\n".join(str(row) for row in p.cross_check)]
        return "\n".join(lines)
