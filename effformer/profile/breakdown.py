"""Where work, bytes, time and error sit: models side by side, module by module."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from statistics import median
from typing import Any, Self

import torch
from torch import Tensor, nn

from effformer.arguments import checked
from effformer.calls import Call, Inputs, bind, evaluating, outputs
from effformer.checks import unknown
from effformer.values import Times
from effformer.wrapped import unwrapped

from .attribution import ancestors
from .compare import labels
from .fake import on_real
from .html import breakdown_section, page
from .machine import machine
from .profiler import profile
from .save import BREAKDOWN, Saved
from .tables import amount, size, table

__all__ = ["Box", "Breakdown", "Side", "Watched", "breakdown", "joined", "ways"]

_SAMPLE = 2**16
"""Numbers of an output that are kept to compare them, evenly spread over it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """A module of one of the models, with everything inside it.

    Attributes:
        kind: its class.
        macs: dense multiply-adds of one forward.
        bytes: of its parameters and buffers; tied ones count where they come first.
        seconds: median time in it; None if it did not run.
        error: relative error ``||a - b|| / ||b||`` of its output against that of the same path in the
            first model, inside the whole forward; None for the first model, and where the outputs have
            other shapes.
    """

    kind: str
    macs: int
    bytes: int
    seconds: float | None = None
    error: float | None = None


@dataclass(frozen=True, slots=True)
class Side:
    """One of the models: its boxes by path, and the numbers that each gave."""

    name: str
    boxes: Mapping[str, Box]
    given: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Breakdown(Saved):
    """Models side by side as one tree.

    Attributes:
        names: of the models.
        boxes: path of a module ("" is the model) -> its box in each of them, None where it has none.
        how: what was measured, in words.
    """

    KIND = BREAKDOWN

    names: tuple[str, ...]
    boxes: Mapping[str, tuple[Box | None, ...]]
    how: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        rows = [
            {"module": path, **{n: None if b is None else asdict(b) for n, b in self._pairs(path)}}
            for path in self.boxes
        ]
        return {"names": list(self.names), "boxes": rows, "how": self.how}

    @checked
    def cells(self, path: str) -> dict[str, str]:
        """Work, bytes, time and error of a module in words, before and after.

        Raises:
            ValueError: there is no such module.
        """
        if path not in self.boxes:
            raise unknown("module", path, list(self.boxes), where="breakdown")
        boxes = self.boxes[path]
        errors = [None if box is None else box.error for box in boxes[1:]]
        return {
            "work": _steps(None if b is None else amount(b.macs) for b in boxes),
            "bytes": _steps(None if b is None else size(b.bytes) for b in boxes),
            "time": _steps(None if b is None or b.seconds is None else _time(b.seconds) for b in boxes),
            **({"error": _steps(None if e is None else f"{e:.2%}" for e in errors)} if errors else {}),
        }  # fmt: skip

    def _pairs(self, path: str) -> Iterable[tuple[str, Box | None]]:
        return zip(self.names, self.boxes[path], strict=True)

    def _rows(self) -> list[dict[str, Any]]:
        return [
            {"module": path, "model": name, **asdict(box)}
            for path in self.boxes
            for name, box in self._pairs(path)
            if box is not None
        ]

    def _body(self) -> str:
        return breakdown_section(self)

    def _page(self) -> str:
        title = " and ".join(self.names)
        return page(title, breakdown_section(self, title), BREAKDOWN)

    def __str__(self) -> str:
        shown = [path for path in self.boxes if path.count(".") < 2]
        header = ("module", *self.cells(""))
        rows = [
            ("  " * path.count(".") + (path or "model"), *self.cells(path).values())
            for path in shown
        ]
        return "\n".join([" -> ".join(self.names), table(header, rows), self.how])


def _steps(words: Iterable[str | None]) -> str:
    """One word where all are equal, else all of them in order."""
    said = [word or "-" for word in words]
    return said[0] if len({*said}) == 1 else " → ".join(said)


def _time(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms" if seconds >= 1e-3 else f"{1e6 * seconds:.3g} µs"


@checked
def breakdown(
    models: Sequence[nn.Module],
    inputs: Inputs | None = None,
    *,
    names: Sequence[str] | None = None,
    runs: Times = 5,
) -> Breakdown:
    """Work, bytes, time and error of every module of several models, by their paths: usually a model
    and what was made of it.

    The models run in turns. Times are those of modules inside a whole forward, with what watching them
    costs (some microseconds each), and errors are what has added up on the way there.

    Args:
        models: modules with weights; the first is what the others are compared with.
        inputs: the same for all, or None for the first one's own.
        names: of the models; default: their own, numbered where they repeat.
        runs: timed runs of each, after one that is not.

    Returns:
        The tree; ``save("report.html")`` writes it as a page.

    Raises:
        ValueError: no models, as many names as there are not models, or weights without values.
        TypeError: inputs that a model does not accept.
        RunError: a model fails.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from effformer.profile import breakdown
        >>> both = [nn.Sequential(nn.Linear(8, n), nn.Linear(n, 2)) for n in (8, 4)]
        >>> breakdown(both, torch.ones(1, 8), names=["wide", "narrow"]).cells("1")["work"]
        '16 → 8'
    """
    if not models:
        raise ValueError("breakdown: no models given")
    given = bind(models[0], inputs, where="breakdown")
    with ExitStack() as stack:
        watched = [
            stack.enter_context(
                Watched(stack.enter_context(unwrapped(model)), given, name)
            )
            for name, model in zip(labels(models, names, where="breakdown"), models, strict=True)
        ]  # fmt: skip
        for _ in range(1 + runs):
            for one in watched:
                one.run()
        return joined([one.side() for one in watched], ways(runs))


def ways(runs: int) -> str:
    """How a breakdown was measured, in words."""
    return f"{runs} runs each in turns after 1, in one process; {machine()}"


def joined(sides: Sequence[Side], how: str) -> Breakdown:
    """Sides in one tree; errors are those against the first one."""
    first, *others = sides
    paths = _merged([[*side.boxes] for side in sides])
    columns = [first.boxes, *(_with_errors(side, first.given) for side in others)]
    rows = {path: tuple(column.get(path) for column in columns) for path in paths}
    return Breakdown(tuple(side.name for side in sides), rows, how)


def _merged(orders: Sequence[Sequence[str]]) -> list[str]:
    """All paths, parents before what is inside them, in the order in which they come first."""
    inside: dict[str, dict[str, None]] = {}
    for path in (path for order in orders for path in order if path):
        inside.setdefault(path.rpartition(".")[0], {})[path] = None

    def below(path: str) -> list[str]:
        return [path, *(deep for child in inside.get(path, {}) for deep in below(child))]

    return below("")


def _with_errors(side: Side, reference: Mapping[str, Tensor]) -> dict[str, Box]:
    out = {}
    for path, box in side.boxes.items():
        a, b = side.given.get(path), reference.get(path)
        if a is not None and b is not None and a.shape == b.shape:
            norm = float(b.norm()) or 1.0
            box = replace(box, error=float((a - b).norm()) / norm)
        out[path] = box
    return out


class Watched:
    """A model whose modules are timed while it runs.

    Args:
        model: the model, without wrappers.
        inputs: of its runs.
        name: its name.
    """

    def __init__(self, model: nn.Module, inputs: Call, name: str) -> None:
        self.model, self.name = model, name
        self._inputs = inputs
        self._run = on_real(model, inputs)
        self._spent: dict[str, list[float]] = {}
        self._starts: list[float] = []
        self._given: dict[str, Tensor] = {}
        self._exits = ExitStack()
        self._first = True

    def __enter__(self) -> Self:
        self._exits.enter_context(evaluating(self.model))
        for path, module in self.model.named_modules():
            self._exits.callback(module.register_forward_pre_hook(self._enter).remove)
            leave = module.register_forward_hook(self._leave(path), always_call=True)
            self._exits.callback(leave.remove)
        return self

    def __exit__(self, *error: object) -> None:
        self._exits.close()

    def run(self) -> None:
        """One run; the first warms up, and keeps what the modules give."""
        for spent in self._spent.values():
            spent.append(0.0)
        with torch.no_grad():
            self._run.call()
        if self._first:
            self._first = False
            self._spent = {path: [] for path in self._spent}

    def side(self) -> Side:
        """What was found."""
        macs = profile(self.model, self._inputs.kwargs or self._inputs.args, memory=False).by_module
        held: dict[str, int] = {}
        for key, x in (*self.model.named_parameters(), *self.model.named_buffers()):
            for path in ancestors(key.rpartition(".")[0]):
                held[path] = held.get(path, 0) + x.numel() * x.element_size()
        spent = {path: median(runs) for path, runs in self._spent.items()}
        for path in [*spent]:  # lists of modules are never called themselves
            for above in ancestors(path)[1:]:
                if above in self._spent:
                    break
                spent[above] = spent.get(above, 0.0) + spent[path]
        boxes = {
            path: Box(
                kind=type(module).__name__, macs=macs.get(path, 0), bytes=held.get(path, 0),
                seconds=spent.get(path),
            )
            for path, module in self.model.named_modules()
            if (path in held or path in macs or path in spent) and not isinstance(module, nn.Identity)
        }  # fmt: skip
        return Side(self.name, boxes, self._given)

    def _enter(self, module: nn.Module, args: Any) -> None:
        self._starts.append(_now())

    def _leave(self, path: str) -> Any:
        def leave(module: nn.Module, args: Any, out: Any) -> None:
            spent = self._spent.setdefault(path, [0.0])
            spent[-1] += _now() - self._starts.pop()
            if self._first and (told := [x for x in outputs(out) if x.is_floating_point()]):
                self._given[path] = sampled(told[0])

        return leave


def sampled(x: Tensor) -> Tensor:
    """Some of the numbers of a tensor, the same ones of every tensor of its shape, in float64."""
    flat = x.detach().flatten()
    return flat[:: max(1, len(flat) // _SAMPLE)].cpu().double()


def _now() -> float:
    """The time, when an accelerator has done what it was given."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()
