"""`choose_kernels`: for every linear layer the form that is fastest, or smallest, and still right here."""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from effformer.arguments import checked
from effformer.calls import Call, Inputs, bind, check_parts, evaluating
from effformer.checks import CapabilityError, unknown
from effformer.notebook import Shown
from effformer.profile import interleave, machine
from effformer.profile.tables import size, table
from effformer.values import Positive
from effformer.wrapped import unwrapping

from ..quant.swap import hooked, place, tampered
from ..report import relative_error
from .exact import PackedLinear, optimize, prepare, unnarrowed
from .forms import FORMS, Form, available
from .times import Times, several

__all__ = ["KernelReport", "LayerKernel", "choose_kernels"]

_SLOWEST = 1.02
"""Time of a result by that of what went in, above which something else is taken."""

_SAME = 1.05
"""Bytes by the least of all, up to which a form counts as small as that."""

_SAMPLE = 64  # rows of a layer's inputs on which forms are compared


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LayerKernel:
    """What became of one layer.

    Attributes:
        name: its path.
        shape: (out, in).
        rows: tokens times batch in a call.
        form: the name of its form, "float32" if it stays.
        error: relative error of its output on what it was given.
        seconds: form -> time of a call, as measured on this machine for this shape.
        wrong: form -> relative error, of those that were smaller or faster and too inexact.
        bytes_before: of weight and bias.
        bytes_after: that the form holds.
    """

    name: str
    shape: tuple[int, int]
    rows: int
    form: str
    error: float
    seconds: Mapping[str, float]
    wrong: Mapping[str, float]
    bytes_before: int
    bytes_after: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class KernelReport(Shown):
    """What `choose_kernels` found.

    Attributes:
        goal: "latency" or "size".
        layers: one for every linear layer that was called.
        ratio: time of the result by that of the model that went in, in turns in this process.
        error: relative error of the output.
        verdict: what was returned, and why, in a sentence.
        machine: where it was measured.
    """

    goal: str
    layers: tuple[LayerKernel, ...]
    ratio: float
    error: float
    verdict: str
    machine: str

    @property
    def bytes_before(self) -> int:
        """Bytes of these layers."""
        return sum(layer.bytes_before for layer in self.layers)

    @property
    def bytes_after(self) -> int:
        """Bytes of their forms."""
        return sum(layer.bytes_after for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        sizes = {"bytes_before": self.bytes_before, "bytes_after": self.bytes_after}
        return dataclasses.asdict(self) | sizes

    def __str__(self) -> str:
        groups: dict[tuple[Any, ...], list[LayerKernel]] = {}
        for layer in self.layers:
            groups.setdefault((layer.shape, layer.rows, layer.form), []).append(layer)
        rows = []
        for (shape, count, form), some in groups.items():
            times = some[0].seconds
            taken = times[form]
            error = max(layer.error for layer in some)
            rows.append(
                (
                    "x".join(map(str, shape)), str(count), str(len(some)), form, f"{1e3 * taken:.3g} ms",
                    f"{taken / times['float32']:.2f}x", f"{error:.2%}",
                )
            )  # fmt: skip
        header = ("linear", "rows", "layers", "form", "time", "of float32", "error")
        return "\n".join(
            [
                table(header, rows),
                f"layers: {size(self.bytes_before)} -> {size(self.bytes_after)}; model: {self.ratio:.3f}x of "
                f"its time, relative output error {self.error:.2%}",
                self.verdict,
                self.machine,
            ]
        )


@dataclasses.dataclass(slots=True)
class _Seen:
    """What a layer is given in the first call of a forward."""

    name: str
    rows: int = 0
    sample: Tensor | None = None


@checked
@unwrapping
def choose_kernels(
    model: nn.Module,
    inputs: Inputs | None = None,
    *,
    goal: Literal["latency", "size"] = "latency",
    tolerance: Positive = 0.03,
    forms: Sequence[str] | None = None,
    cache: str | Path | None = None,
) -> tuple[nn.Module, KernelReport]:
    """An inference-ready copy for the CPU whose linear layers have the form that is best on this machine.

    Every shape is timed once in every form that the machine has: float32 as it is and prepacked for
    oneDNN, bfloat16 where the processor multiplies it, int8 by FBGEMM, oneDNN, ONNX Runtime and
    bitsandbytes; the times are kept for this machine. Which wins differs between processors, so nothing is
    assumed. Whether a form is right is measured for every layer, on what it is given. Then the whole
    model is timed against what went in: asked for latency, the result is never slower than that by more
    than 2 %, asked for size, its layers are never larger; if nothing is better than the model as it
    is, a plain copy comes back, and the report says so. Asked for latency, what stays in float32 is made
    ready as by `optimize`.

    The copy cannot be trained, saved or exported: keep the original for that.

    Args:
        model: any module; it is not changed.
        inputs: named tensors (or one tensor, or a tuple) as the model will get them; None: its example
            inputs. Their number of rows decides which form is fastest.
        goal: the least time, or the fewest bytes.
        tolerance: largest relative error of a layer's output.
        forms: names of the forms to try; None: all that this machine has.
        cache: folder of the times; None: ``effformer`` in the user's cache folder.

    Returns:
        The copy, in eval mode, and what was measured.

    Raises:
        CapabilityError: weights that are not float32 on the CPU.
        ValueError: an unknown form, or one that this machine does not have.

    Example:
        >>> import effformer, tempfile
        >>> from effformer.compress import choose_kernels
        >>> model = effformer.build_model("vit-nano")
        >>> ready, report = choose_kernels(model, model.example_inputs(4), cache=tempfile.mkdtemp())
        >>> report.ratio <= 1.02
        True
    """
    check_parts(model, where="choose_kernels")
    names = _names(forms)
    for parameter in model.parameters():
        if parameter.device.type != "cpu" or parameter.dtype != torch.float32:
            raise CapabilityError(
                f"choose_kernels: float32 weights on the CPU only, got {parameter.dtype} on "
                f"{parameter.device}"
            )
    call = bind(model, inputs, where="choose_kernels")
    ready = copy.deepcopy(model).eval().requires_grad_(False)
    seen = _looked_at(ready, call)
    times = Times(cache)
    found, chosen = _chosen(ready, seen, names, goal, tolerance, times)
    times.save()
    place(ready, chosen)
    rows = max((layer.rows for layer in found), default=256)
    return _judged(model, ready, call, goal, found, rows)


def _names(forms: Sequence[str] | None) -> list[str]:
    here = available()
    if forms is None:
        return here
    for name in forms:
        if name not in FORMS:
            raise unknown("form", name, [*FORMS], where="choose_kernels: forms")
        if name not in here:
            raise ValueError(
                f"choose_kernels: forms: {name!r} does not exist on this machine; available: "
                f"{', '.join(here)}"
            )
    return list(forms)


def _looked_at(model: nn.Module, call: Call) -> dict[nn.Linear, _Seen]:
    """Linear layers that can be replaced, with what they are given; those that are not called are left out."""
    outside = {id(module) for module in unnarrowed(model)}
    found = {
        module: _Seen(path)
        for path, module in model.named_modules()
        if path and type(module) is nn.Linear and id(module) in outside
        and not hooked(module) and tampered(module) is None
    }  # fmt: skip

    def hook(module: Any, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        x = args[0] if args else named["input"]
        if found[module].sample is None:
            flat = x.detach().reshape(-1, x.shape[-1])
            found[module].rows, found[module].sample = len(flat), flat[:_SAMPLE].clone()

    handles = [m.register_forward_pre_hook(hook, with_kwargs=True) for m in found]
    try:
        with evaluating(model):
            call.run(model)
    finally:
        for handle in handles:
            handle.remove()
    return {module: seen for module, seen in found.items() if seen.rows}


def _chosen(
    model: nn.Module,
    seen: Mapping[nn.Linear, _Seen],
    names: Sequence[str],
    goal: str,
    tolerance: float,
    times: Times,
) -> tuple[list[LayerKernel], dict[nn.Module, nn.Module]]:
    """What becomes of every layer, and the forms of those that change."""
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values())
    found, chosen = [], dict[nn.Module, nn.Module]()
    with torch.no_grad():
        for linear, facts in seen.items():
            seconds = times.of(*_timing(linear, facts.rows, names))
            tied = owners[id(linear.weight)] > 1  # its bytes stay, whatever form the layer has
            tried = [] if tied and goal == "size" else names
            form, error, wrong = _best(linear, facts, tried, goal, tolerance, seconds)
            if form is not None:
                chosen[linear] = form
            before = sum(4 * p.numel() for p in linear.parameters())
            name = "float32" if form is None else _name(form)
            found.append(
                LayerKernel(
                    name=facts.name, shape=(linear.out_features, linear.in_features), rows=facts.rows,
                    form=name, error=error, seconds=seconds, wrong=wrong, bytes_before=before,
                    bytes_after=before if form is None else form.bytes,
                )
            )  # fmt: skip
    return found, chosen


def _timing(
    linear: nn.Linear, rows: int, names: Sequence[str]
) -> tuple[str, dict[str, Callable[[], list[Callable[[], object]]]]]:
    """The key of a shape, and what makes the calls of its forms."""
    bias = "" if linear.bias is None else "+bias"
    key = f"{linear.in_features}x{linear.out_features}{bias}@{rows}"

    def calls(make: Callable[[nn.Linear], nn.Module]) -> Callable[[], list[Callable[[], object]]]:
        def made() -> list[Callable[[], object]]:
            x = torch.randn(rows, linear.in_features)
            layers = [make(one) for one in several(linear)]
            return [lambda layer=layer: layer(x) for layer in layers]  # type: ignore[misc]

        return made

    kinds: dict[str, Callable[[nn.Linear], nn.Module]] = {"float32": lambda one: one}
    if torch.backends.mkldnn.is_available():
        kinds["float32-packed"] = PackedLinear
    kinds |= {name: FORMS[name] for name in names}
    return key, {name: calls(make) for name, make in kinds.items()}


def _best(
    linear: nn.Linear,
    facts: _Seen,
    names: Sequence[str],
    goal: str,
    tolerance: float,
    seconds: Mapping[str, float],
) -> tuple[Form | None, float, dict[str, float]]:
    """The best form that is right, with its error, None for float32; and better ones that are wrong."""
    exact = min(seconds["float32"], seconds.get("float32-packed", seconds["float32"]))
    before = sum(4 * p.numel() for p in linear.parameters())
    expected = linear(facts.sample)
    wrong: dict[str, float] = {}
    right: list[tuple[Form, float]] = []
    for name in sorted(names, key=seconds.__getitem__):
        if goal == "latency" and (right or seconds[name] >= exact):
            break
        form = FORMS[name](linear)
        error = relative_error([form(facts.sample)], [expected])
        if not error <= tolerance:
            wrong[name] = error
        elif goal == "latency" or form.bytes < before:
            right.append((form, error))
    if not right:
        return None, 0.0, wrong
    least = min(form.bytes for form, _ in right)  # the fastest of those that are about as small
    form, error = next(one for one in right if one[0].bytes <= _SAME * least)
    return form, error, wrong


def _name(form: Form) -> str:
    return next(name for name, kind in FORMS.items() if type(form) is kind)


def _judged(
    model: nn.Module,
    ready: nn.Module,
    call: Call,
    goal: str,
    found: Sequence[LayerKernel],
    rows: int,
) -> tuple[nn.Module, KernelReport]:
    """The result that keeps what was promised, the best first."""
    changed = Counter(layer.form for layer in found if layer.form != "float32")
    if goal == "latency":
        prepare(ready, rows)
    else:
        ready.inference_only = True  # type: ignore[assignment]
    ratio = _ratio(model, ready, call)
    words = ", ".join(f"{count} in {form}" for form, count in changed.items())
    stays = tuple(_staying(layer) for layer in found)
    verdict = f"{words}, the others in float32"
    if goal == "latency" and (ratio > _SLOWEST or not changed):
        if changed:
            ready = optimize(model, rows=rows)
            ratio = _ratio(model, ready, call)
        found, verdict = stays, "float32 is fastest here; prepacked where that is faster"
        if ratio > _SLOWEST:
            ready, ratio = copy.deepcopy(model).eval(), 1.0
            verdict = "float32 is fastest here, as the model is: nothing was changed"
    elif not changed:
        ready, ratio, found = copy.deepcopy(model).eval(), 1.0, stays
        verdict = "no right form is smaller than float32: nothing was changed"
    with evaluating(model):
        expected = [x for x in call.run(model) if x.is_floating_point()]
        actual = [x for x in call.run(ready) if x.is_floating_point()]
    report = KernelReport(
        goal=goal, layers=tuple(found), ratio=ratio, error=relative_error(actual, expected),
        verdict=verdict, machine=str(machine()),
    )  # fmt: skip
    return ready, report


def _staying(layer: LayerKernel) -> LayerKernel:
    return dataclasses.replace(layer, form="float32", error=0.0, bytes_after=layer.bytes_before)


def _ratio(model: nn.Module, ready: nn.Module, call: Call) -> float:
    """Time of a result by that of the model, in turns."""

    def run(one: nn.Module) -> Callable[[], object]:
        return lambda: call.run(one)

    with evaluating(model):
        side = interleave({"before": run(model), "after": run(ready)}, warmup=2, runs=9)
    return side.ratios["after"]
