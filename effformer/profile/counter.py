"""Count multiply-adds by watching every operator that runs, module by module."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from effformer.arguments import checked

from .fake import visible_operators
from .operators import Kind, elements, kind, macs, name

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

    Works on any device, on meta and on fake tensors. Inside an attention core (a module with
    ``macs(n, m, *, heads, head_dim)``) the core's closed formula decides, and its difference to the
    operators is kept in ``corrections``. The formulas of larger parts are kept in ``formulas``, for
    parts that report skipped work.

    Backward operators are attributed to the root module, ``""``.

    Args:
        model: the module whose children name the rows.

    Attributes:
        model: the module.
        rows: (module path, operator name) -> `Tally`; operators that only move data are left out.
        corrections: (path of a core, class name) -> formula minus operators, where they differ.
        formulas: path -> batch and dense multiply-adds of one sample, for every call of a part.
        paths: paths of the modules that ran, in order.

    Example:
        >>> model = torch.nn.Linear(8, 4)
        >>> with Counter(model) as counter:
        ...     _ = model(torch.randn(2, 8))
        >>> counter.total
        64
    """

    supports_higher_order_operators = True

    @checked
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.rows: dict[tuple[str, str], Tally] = {}
        self.corrections: dict[tuple[str, str], int] = {}
        self.formulas: dict[str, list[tuple[int, Callable[[], int]]]] = {}
        self.paths: dict[str, None] = {"": None}
        self.total = 0
        self.model = model
        self._stack: list[_Frame] = []
        self._exits = ExitStack()

    def __enter__(self) -> Self:
        self._exits.enter_context(visible_operators())
        for path, module in self.model.named_modules():
            enter = module.register_forward_pre_hook(partial(self._enter_module, path))
            leave = module.register_forward_hook(
                self._leave_module, with_kwargs=True, always_call=True
            )
            self._exits.callback(enter.remove)
            self._exits.callback(leave.remove)
        super().__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._exits.close()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        what = kind(func)
        if what == "unknown" and isinstance(func, torch._ops.OpOverload):
            # composite operators reach this place whole in inference mode
            super().__enter__()  # not ``with self``, whose end removes the hooks
            try:
                parts = func.decompose(*args, **kwargs)
            finally:
                super().__exit__(None, None, None)
            if parts is not NotImplemented:
                return parts
        out = func(*args, **kwargs)
        if what == "moved":
            return out
        path = self._stack[-1].path if self._stack else ""
        tally = self.rows.setdefault((path, name(func)), Tally(what))
        tally.calls += 1
        if what == "counted":
            count = macs(func, args, kwargs, out)
            tally.macs += count
            self.total += count
        elif what == "elementwise":
            tally.elements += elements(args, out)
        return out

    def _enter_module(self, path: str, module: nn.Module, args: Any) -> None:
        names = path.split(".")
        for depth in range(len(names)):  # containers such as ModuleList are never called themselves
            self.paths[".".join(names[: depth + 1])] = None
        self._stack.append(_Frame(path, self.total))

    def _leave_module(self, module: nn.Module, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        frame = self._stack.pop()
        formula = getattr(module, "macs", None)
        if out is None or not callable(formula):  # None after an error
            return
        context = _context(args, kwargs)
        if getattr(context, "packing", None) is not None:
            return
        known = inspect.signature(formula).parameters
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        dims = [x.dim() for x in tensors]
        if "heads" in known and dims[:3] == [4, 4, 4]:  # q, k, v
            (batch, _, n, width), m = tensors[0].shape, tensors[1].shape[2]
            heads = tensors[2].shape[1]  # queries and keys may be shared by values
            dense = batch * formula(n, m, heads=heads, head_dim=width)
            difference = dense - (self.total - frame.before)
            if difference:
                key = (frame.path, type(module).__name__)
                self.corrections[key] = self.corrections.get(key, 0) + difference
                self.total += difference
        elif "heads" not in known and "n" in known and dims[:1] == [3]:
            batch, n = tensors[0].shape[:2]
            memory = getattr(context, "memory", None) if "m" in known else None
            sizes = (n,) if memory is None else (n, _tokens(memory))
            layout = {"grid": getattr(context, "grid", None)} if "grid" in known else {}
            one = partial(formula, *sizes, **layout)
            self.formulas.setdefault(frame.path, []).append((batch, one))


def _tokens(memory: Tensor | tuple[Tensor, ...]) -> int | tuple[int, ...]:
    """Number of tokens of a memory, or of each of several."""
    if isinstance(memory, tuple):
        return tuple(one.shape[1] for one in memory)
    return memory.shape[1]


def _context(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The `Context` among the arguments of a part, or None."""
    return next((v for v in (*args, *kwargs.values()) if hasattr(v, "packing")), None)
