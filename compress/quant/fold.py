"""Where the inputs of linear layers can be divided by a factor without any work: in the norm or the
modulation that makes them.

A model is run once, and every use of such a tensor is seen. It can be divided if linear layers, and
nothing else, read it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from effformer.calls import Call, evaluating, outputs

__all__ = ["Point", "points"]

_SUMS = ("add", "__add__", "__radd__")
_PRODUCTS = ("mul", "__mul__", "__rmul__")


class _Rows(NamedTuple):
    """Outputs of a linear layer of the conditioning, from one to another."""

    layer: nn.Linear
    start: int
    stop: int


@dataclass(eq=False)
class Point:
    """A tensor that linear layers read, and what makes it.

    Attributes:
        readers: the layers.
        norm: an affine norm whose output it is; or
        scale: rows of a modulation in ``n (1 + scale) + shift``, and
        shift: rows of the shift, None without one.
    """

    readers: list[nn.Linear] = field(default_factory=list)
    norm: nn.Module | None = None
    scale: _Rows | None = None
    shift: _Rows | None = None
    sound: bool = True

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What `divide` changes."""
        own = (p for m in self.makers for p in m.parameters(recurse=False))
        return list(dict.fromkeys(own))

    @property
    def makers(self) -> list[nn.Module]:
        """The modules that hold them."""
        if self.norm is not None:
            return [self.norm]
        return [rows.layer for rows in (self.scale, self.shift) if rows is not None]

    @torch.no_grad()
    def divide(self, s: Tensor) -> None:
        """Divide the tensor by s (K,), in place of what makes it.

        Affine norm: ``gain / s``, ``bias / s``. Modulation: ``W_shift / s``, ``b_shift / s``, ``W_scale
        / s``, ``b_scale = (b_scale + 1) / s - 1``.
        """
        if self.norm is not None:
            for p in self.parameters:
                p.div_(s.to(p))
            return
        for rows, one in ((self.scale, 1.0), (self.shift, 0.0)):
            if rows is not None:
                part = slice(rows.start, rows.stop)
                rows.layer.weight[part] /= s[:, None].to(rows.layer.weight)
                bias = rows.layer.bias[part]
                bias.copy_((bias + one) / s.to(bias) - one)


class _Trace(TorchFunctionMode):
    """Follows outputs of norms and of linear layers through a forward pass.

    Args:
        model: the model.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.linears = _sole(model, (nn.Linear,))
        self.points: dict[Any, Point] = {}
        self.made: dict[
            int, Any
        ] = {}  # id of a tensor -> what it is: Point, or rows with their form
        self.storages: dict[int, tuple[nn.Linear, Tensor]] = {}
        self.strays: set[nn.Module | None] = set()  # layers that read something else, too
        self.spoilt: list[_Rows] = []  # outputs of linear layers that are used otherwise
        self.held: list[Tensor] = []  # so that no id or address is used twice

    def watch(self, module: nn.Module, args: Any, output: Any) -> None:
        """Hook of affine norms."""
        if isinstance(output, Tensor):
            point = self.points.setdefault(module, Point(norm=module))
            self._note(output, point)

    def _note(self, x: Tensor, what: Any) -> None:
        self.made[id(x)] = what
        self.held.append(x)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        used = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        results = [x for x in pytree.tree_leaves(out) if isinstance(x, Tensor)]
        if name == "linear" and isinstance(out, Tensor):
            self._linear(args, kwargs, out)
        elif results or (name.endswith("_") and not name.endswith("__")):
            self._other(name, args, used, results)
        return out

    def _linear(self, args: Any, kwargs: Any, out: Tensor) -> None:
        x, weight = args[0], args[1] if len(args) > 1 else kwargs.get("weight")
        layer = self.linears.get(weight)
        what = self.made.get(id(x))
        if isinstance(what, Point):
            if layer is None:
                what.sound = False
            elif layer not in what.readers:
                what.readers.append(layer)
        else:
            self._spoil(x)
            self.strays.add(layer)
        self._spoil_storage(x, ())
        if layer is not None and out.is_contiguous():
            self.storages[out.untyped_storage().data_ptr()] = layer, out
            self.held.append(out)

    def _other(self, name: str, args: Any, used: list[Tensor], results: list[Tensor]) -> None:
        inplace = name.endswith("_") and not name.endswith("__")
        if not inplace and any(r is x for r in results for x in used):
            return  # contiguous() and its like, where there is nothing to do
        if len(results) == 1 and not inplace and self._understood(name, args, used, results[0]):
            return
        for x in used:
            self._spoil(x)
            self._spoil_storage(x, results)
            self.strays.add(self.linears.get(x))

    def _understood(self, name: str, args: Any, used: list[Tensor], out: Tensor) -> bool:
        """One of the steps of a modulation, ``n * (1 + scale) + shift``."""
        found = [self.made.get(id(x)) for x in used]
        if name in _SUMS and len(args) == 2 and 1 in [a for a in args if not isinstance(a, Tensor)]:
            rows = self._rows(used[0])
            if rows is not None:
                self._note(out, ("1 + scale", rows))
                return True
        if name == "addcmul" and len(used) == 3:
            return self._modulated(used[0], used[1], found[2], out) or self._modulated(
                used[0], used[2], found[1], out
            )
        if name in _PRODUCTS and len(used) == 2:
            for other, what in ((used[1], found[0]), (used[0], found[1])):
                if what is not None and _form(what) == "1 + scale":
                    self._spoil(other)
                    self._note(out, ("scaled", what[1]))
                    return True
        if name in _SUMS and len(used) == 2:
            for other, what in ((used[1], found[0]), (used[0], found[1])):
                shift = self._rows(other)
                if what is not None and _form(what) == "scaled" and shift is not None:
                    self._note(out, self._point(what[1], shift))
                    return True
        return False

    def _modulated(self, shift: Tensor, n: Tensor, what: Any, out: Tensor) -> bool:
        if _form(what) != "1 + scale":
            return False
        rows = self._rows(shift)
        if rows is None and (shift.numel() > 1 or bool(shift.any())):
            return False
        self._spoil(n)
        self._note(out, self._point(what[1], rows))
        return True

    def _point(self, scale: _Rows, shift: _Rows | None) -> Point:
        return self.points.setdefault((scale, shift), Point(scale=scale, shift=shift))

    def _rows(self, x: Tensor) -> _Rows | None:
        """Which outputs of a linear layer a tensor is a view of, if whole ones side by side."""
        found = self.storages.get(x.untyped_storage().data_ptr())
        if found is None or x.dim() == 0 or x.stride(-1) != 1:
            return None
        layer, whole = found
        width = layer.out_features
        start = int(x.storage_offset() - whole.storage_offset()) % width
        steps = [s for s, n in zip(x.stride()[:-1], x.shape[:-1], strict=True) if n > 1]
        if start + x.shape[-1] > width or any(step % width for step in steps):
            return None
        return _Rows(layer, start, start + x.shape[-1])

    def _spoil(self, x: Tensor) -> None:
        """A tensor is used in a way that does not allow its division."""
        what = self.made.get(id(x))
        if isinstance(what, Point):
            what.sound = False
        elif what is not None:
            self.spoilt.append(what[1])

    def _spoil_storage(self, x: Tensor, results: Iterable[Tensor]) -> None:
        place = x.untyped_storage().data_ptr()
        found = self.storages.get(place)
        if found is None or any(r.untyped_storage().data_ptr() == place for r in results):
            return  # a view is no use
        self.spoilt.append(self._rows(x) or _Rows(found[0], 0, found[0].out_features))


def _form(what: Any) -> str | None:
    return what[0] if isinstance(what, tuple) else None


def _sole(model: nn.Module, kinds: tuple[type, ...]) -> dict[Tensor, Any]:
    """Modules by their weight, those whose weight is theirs alone."""
    owners: dict[Tensor, list[nn.Module]] = {}
    for module in model.modules():
        for p in module.parameters(recurse=False):
            owners.setdefault(p, []).append(module)
    return {
        m._parameters["weight"]: m  # type: ignore[misc]
        for m in model.modules()
        if isinstance(m, kinds) and m._parameters.get("weight") is not None
        and all(len(owners[p]) == 1 for p in m.parameters(recurse=False))
    }  # fmt: skip


def points(model: nn.Module, call: Call) -> list[Point]:
    """Tensors of a model that can be divided where they are made, and are read by linear layers only.

    Args:
        model: the model; it stays as it is.
        call: inputs to run it with.
    """
    trace = _Trace(model)
    norms = _sole(model, (nn.LayerNorm, nn.RMSNorm)).values()
    handles = [norm.register_forward_hook(trace.watch) for norm in norms]
    try:
        with evaluating(model), torch.no_grad(), trace:
            made = call(model)
    finally:
        for handle in handles:
            handle.remove()
    for x in outputs(made):
        trace._spoil(x)
        trace._spoil_storage(x, ())
    return list(_sound(trace))


def _sound(trace: _Trace) -> Iterator[Point]:
    found = list(trace.points.values())
    taken: dict[nn.Module, list[tuple[int, int, Any]]] = {}
    for rows in trace.spoilt:
        taken.setdefault(rows.layer, []).append((rows.start, rows.stop, None))
    for point in found:
        for part in (point.scale, point.shift):
            if part is not None:
                taken.setdefault(part.layer, []).append((part.start, part.stop, point))
    counts = Counter(reader for point in found for reader in point.readers)
    for point in found:
        clear = all(
            owner is point or stop <= part.start or part.stop <= start
            for part in (point.scale, point.shift) if part is not None
            for start, stop, owner in taken[part.layer]
        )  # fmt: skip
        bias = all(r.layer.bias is not None for r in (point.scale, point.shift) if r is not None)
        alone = all(counts[r] == 1 and r not in trace.strays for r in point.readers)
        if point.sound and point.readers and clear and bias and alone:
            yield point
