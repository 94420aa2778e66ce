"""Count multiply-adds by watching every operator that runs, module by module."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode

from .fake import visible_operators
from .operators import Kind, elements, kind, macs

__all__ = ["Counter", "Tally"]


@dataclass(slots=True)
class Tally:
    """What one operator did inside one module (its children excluded).

    Attributes:
        kind: class of the operator, see `effformer.profile.operators`.
        calls: number of calls.
        macs: multiply-adds.
        elements: elements handled, for elementwise operators.
    """

    kind: Kind
    calls: int = 0
    macs: int = 0
    elements: int = 0


@dataclass(slots=True)
class _Frame:
    path: str
    before: int


class Counter(TorchDispatchMode):
    """Context manager that counts the operators of a model as they run, forward and backward.

    Works on any device, on meta and on fake tensors. Two corrections make the count follow the convention of closed
    formulas: inside an attention core (a module with ``macs(n, m, *, heads, head_dim)``) the core's own formula
    decides, and its difference to the operators is kept in ``corrections``; dense formulas of larger parts are kept
    in ``formulas`` and used for parts that report skipped work.

    Backward operators are attributed to the root module, ``""``.

    Args:
        model: the module whose children name the rows.

    Attributes:
        rows: (module path, operator name) -> `Tally`.
        corrections: (path of a core, class name) -> formula minus operators, zero differences left out.
        formulas: path -> dense multiply-adds by the part's own formula, batch included.
        paths: paths of the modules that ran, in order.

    Example:
        >>> model = torch.nn.Linear(8, 4)
        >>> with Counter(model) as counter:
        ...     _ = model(torch.randn(2, 8))
        >>> counter.total
        64
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.rows: dict[tuple[str, str], Tally] = {}
        self.corrections: dict[tuple[str, str], int] = {}
        self.formulas: dict[str, int] = {}
        self.paths: dict[str, None] = {"": None}
        self.total = 0
        self._names = {id(module): path for path, module in model.named_modules()}
        self._stack: list[_Frame] = []
        self._exits = ExitStack()

    def __enter__(self) -> Self:
        self._exits.enter_context(visible_operators())
        enter = register_module_forward_pre_hook(self._enter_module)
        leave = register_module_forward_hook(self._leave_module, with_kwargs=True, always_call=True)
        self._exits.callback(enter.remove)
        self._exits.callback(leave.remove)
        super().__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._exits.close()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        what = kind(func)
        if what == "unknown":
            # composite operators reach this place whole in inference mode
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        out = func(*args, **kwargs)
        path = self._stack[-1].path if self._stack else ""
        tally = self.rows.setdefault((path, func._schema.name), Tally(what))
        tally.calls += 1
        if what == "counted":
            count = macs(func, args, kwargs, out)
            tally.macs += count
            self.total += count
        elif what == "elementwise":
            tally.elements += elements(args, out)
        return out

    def _enter_module(self, module: nn.Module, args: Any) -> None:
        path = self._names.get(id(module))
        if path is None:  # made on the fly: its work belongs to its caller
            path = self._stack[-1].path if self._stack else ""
        for i, letter in enumerate(path):  # containers such as ModuleList are never called themselves
            if letter == ".":
                self.paths[path[:i]] = None
        self.paths[path] = None
        self._stack.append(_Frame(path, self.total))

    def _leave_module(self, module: nn.Module, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        frame = self._stack.pop()
        formula = getattr(module, "macs", None)
        if not callable(formula) or out is None:
            return
        values = [*args, *(v for k, v in kwargs.items() if k != "ctx")]
        tensors = [v for v in values if isinstance(v, Tensor)]
        if not tensors or getattr(_context(args, kwargs), "packing", None) is not None:
            return
        if tensors[0].dim() == 4 and "heads" in inspect.signature(formula).parameters:
            dense = _core_macs(formula, tensors)
            difference = dense - (self.total - frame.before)
            if difference:
                key = (frame.path, type(module).__name__)
                self.corrections[key] = self.corrections.get(key, 0) + difference
                self.total += difference
        elif tensors[0].dim() == 3:
            dense = _part_macs(formula, tensors[0], _context(args, kwargs))
            self.formulas[frame.path] = self.formulas.get(frame.path, 0) + dense


def _context(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The `Context` among the arguments of a part, or None."""
    return next((v for v in (*args, *kwargs.values()) if hasattr(v, "packing")), None)


def _core_macs(formula: Callable[..., int], tensors: list[Tensor]) -> int:
    q, k = tensors[:2]
    batch, heads, n, width = q.shape
    return int(batch * formula(n, k.shape[2], heads=heads, head_dim=width))


def _part_macs(formula: Callable[..., int], x: Tensor, ctx: Any) -> int:
    batch, n = x.shape[:2]
    memory = getattr(ctx, "memory", None)
    if memory is None or "m" not in inspect.signature(formula).parameters:
        return int(batch * formula(n))
    return int(batch * formula(n, memory.shape[1]))
