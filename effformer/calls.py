"""The named inputs of any module: bound to its arguments, run, and evaluated in one place.

One shape serves everywhere. A mapping of named tensors is what `Model.example_inputs` returns, a
batch of training, the data of a calibration, the conditions of a sampler and the inputs of an
exported graph.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from inspect import Parameter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .checks import CapabilityError, RunError, is_refusal
from .wrapped import bare

__all__ = [
    "Call",
    "Inputs",
    "Named",
    "accepted",
    "bind",
    "bound",
    "check_parts",
    "device_of",
    "evaluating",
    "half_of",
    "match",
    "misfit",
    "outputs",
    "run",
    "running",
    "takes",
]  # fmt: skip

Named = Mapping[str, Tensor]
"""Tensors by the names of the arguments that take them."""

Inputs = Tensor | Sequence[Any] | Mapping[str, Any]
"""Arguments of forward: one tensor, positional ones, or named ones."""

_FAILURES = (RuntimeError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError)
_PLACED = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
_NAMED = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)


@dataclass(frozen=True, slots=True)
class Call:
    """Arguments of one call of a module, each under the name that the module gives it.

    Attributes:
        args: positional arguments.
        kwargs: keyword arguments, in the order of the signature.
        names: names of ``args``; the third of ``*args`` is "args[2]".
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    names: tuple[str, ...]

    @property
    def arguments(self) -> dict[str, Any]:
        """All arguments by name, in the order of the signature."""
        return dict(zip(self.names, self.args, strict=True)) | self.kwargs

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Those that are tensors."""
        return {name: x for name, x in self.arguments.items() if isinstance(x, Tensor)}

    @property
    def leaves(self) -> list[Tensor]:
        """Every tensor, nested ones included."""
        found = pytree.tree_leaves((self.args, self.kwargs))
        return [x for x in found if isinstance(x, Tensor)]

    def __call__(self, model: Callable[..., Any], **more: Any) -> Any:
        """Call a model, with further keywords.

        Raises:
            RunError: it fails.
        """
        with running(model, self):
            return model(*self.args, **self.kwargs, **more)

    def run(self, model: nn.Module) -> list[Tensor]:
        """The tensors of the model's output, see `outputs`, without gradients."""
        with torch.no_grad():
            return outputs(self(model))

    def map(self, change: Callable[[Tensor], Tensor]) -> Call:
        """The same call with every tensor changed, nested ones included."""
        args, kwargs = pytree.tree_map_only(Tensor, change, (self.args, self.kwargs))
        return replace(self, args=args, kwargs=kwargs)

    def with_tensors(self, new: Named) -> Call:
        """The same call with some tensors replaced, by name."""
        args = tuple(new.get(name, a) for name, a in zip(self.names, self.args, strict=True))
        kwargs = {name: new.get(name, value) for name, value in self.kwargs.items()}
        return replace(self, args=args, kwargs=kwargs)


def bind(
    model: Callable[..., Any], inputs: Inputs | None = None, *, where: str, batch: int = 1
) -> Call:
    """Bind inputs to the arguments of a module.

    Args:
        model: the module.
        inputs: named arguments as a dict, positional ones as a tuple or list, a single tensor, or
            None for the model's own ``example_inputs``, which are the same in every call.
        where: the public entry point, for messages.
        batch: number of samples if the model gives its examples.

    Raises:
        TypeError: inputs of another kind, none for a model without ``example_inputs``, or arguments
            that the module does not take.

    Example:
        >>> import torch
        >>> from effformer.calls import bind
        >>> call = bind(torch.nn.Linear(4, 2), torch.ones(1, 4), where="here")
        >>> call.tensors, call.run(torch.nn.Identity())[0].shape
        ({'input': tensor([[1., 1., 1., 1.]])}, torch.Size([1, 4]))
    """
    if inputs is None:
        inputs = _examples(model, batch, where)
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(inputs, Tensor):
        args = (inputs,)
    elif isinstance(inputs, Mapping):
        kwargs = dict(inputs)
    elif isinstance(inputs, Sequence) and not isinstance(inputs, str):
        args = tuple(inputs)
    else:
        raise TypeError(
            f"{where}: inputs must be a tensor, a tuple, a dict of named tensors or None, "
            f"got {type(inputs).__name__}"
        )
    return bound(model, args, kwargs, where)


def match(model: Callable[..., Any], named: Mapping[str, Any], *, where: str) -> Call:
    """The call that hands a module those of the named tensors that it takes.

    ``x`` is the first argument, whatever a module calls that. Names that it does not know are left
    out: a data set may hold more than one model reads.

    Raises:
        TypeError: an argument that the module needs is not among them.
    """
    own = _parameters(model)
    kwargs = accepted(model, named)
    first = next(iter(own), "x")
    if "x" in named and "x" not in own and first not in named:
        kwargs.pop("x", None)
        return bound(model, (named["x"],), kwargs, where)
    return bound(model, (), kwargs, where)


def run(model: nn.Module, inputs: Inputs | None = None, *, where: str) -> list[Tensor]:
    """The tensors of a model's output in evaluation mode, without gradients; see `bind` and
    `outputs`.
    """
    call = bind(model, inputs, where=where)
    with evaluating(model):
        return call.run(model)


def outputs(value: Any) -> list[Tensor]:
    """Every tensor in what a model returns, in order: a tensor, or tuples, lists, mappings and
    dataclasses of such, nested at will.
    """
    found = []
    for leaf in pytree.tree_leaves(value, is_leaf=_is_record):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif isinstance(leaf, Mapping):
            found += outputs(list(leaf.values()))
        elif _is_record(leaf):
            found += outputs([getattr(leaf, f.name) for f in dataclasses.fields(leaf)])
    return found


@contextmanager
def running(model: Callable[..., Any], call: Call) -> Iterator[None]:
    """Say which module fails in the block, and on what; what is refused in words of ours stays.

    Raises:
        RunError: it does.
    """
    try:
        yield
    except _FAILURES as error:
        if is_refusal(error) or isinstance(error, torch.OutOfMemoryError):
            raise
        given = ", ".join(
            f"{name} {tuple(x.shape)} {str(x.dtype).removeprefix('torch.')} on {x.device}"
            for name, x in call.tensors.items()
        )
        said = str(error).strip().partition("\n")[0] or type(error).__name__
        title = getattr(bare(model), "name", type(bare(model)).__name__)
        raise RunError(f"{title} does not run on {given or 'its inputs'}: {said[:300]}") from error


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; afterwards every module is in the mode it was in."""
    training = [module for module in model.modules() if getattr(module, "training", False)]
    with suppress(NotImplementedError):  # what torch.export has captured has one mode for ever
        model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def takes(model: Callable[..., Any], name: str) -> bool:
    """True if a module has an argument of this name; ``**kwargs`` is no name."""
    found = _parameters(model).get(name)
    return found is not None and found.kind in _NAMED


def accepted(model: Callable[..., Any], named: Mapping[str, Any]) -> dict[str, Any]:
    """Those that a module takes by name: all of them if it has ``**kwargs``."""
    if any(p.kind == Parameter.VAR_KEYWORD for p in _parameters(model).values()):
        return dict(named)
    return {name: value for name, value in named.items() if takes(model, name)}


def check_parts(model: object, *, where: str) -> None:
    """Refuse what torch has captured without the modules that it was made of.

    Args:
        model: what was given as a model.
        where: the public entry point, for messages.

    Raises:
        TypeError: it is a `torch.export.ExportedProgram`, or no module at all.
        CapabilityError: it is TorchScript, or holds some.
    """
    if isinstance(model, torch.export.ExportedProgram):
        raise TypeError(f"{where}: an ExportedProgram is no module; give what its module() returns")
    if not isinstance(model, nn.Module):
        raise TypeError(f"{where}: expected a torch.nn.Module, got {type(model).__name__}")
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            part = f"{path} is" if path else "the model is"
            raise CapabilityError(
                f"{where}: {part} TorchScript ({module.original_name}), whose parts cannot be seen; "
                "give the module that it was made of"
            )


def device_of(model: nn.Module) -> torch.device:
    """Device of the first parameter; the CPU for a module without any."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def half_of(model: nn.Module) -> torch.dtype | None:
    """The type of weights in half precision, None if there are none."""
    return next(
        (p.dtype for p in model.parameters() if p.dtype in (torch.float16, torch.bfloat16)), None
    )


def misfit(
    module: nn.Module,
    method: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    expected: Named,
) -> str | None:
    """Why a call that failed could not go well, in one sentence; None if its tensors look right.

    Args:
        module: whose weights count.
        method: what was called, the module or a method of it.
        args: positional arguments of the call.
        kwargs: named arguments.
        expected: arguments that fit, by name; their types and ranks count, and the width of tokens.
    """
    try:
        given = bound(method, args, kwargs, "").arguments
    except TypeError as error:
        return str(error).removeprefix(": ")
    for name, one in expected.items():
        if name in given and not isinstance(given[name], Tensor):
            return f"{name} must be a tensor of {_kind(one)}, got {type(given[name]).__name__}"
    batch = given.get("batch", 1)
    if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
        return f"batch must be a whole number of at least 1, got {batch!r}"
    tensors = _with_fields(given)
    measures: list[Tensor] = [p for p in module.parameters() if p.is_floating_point()]
    weight = next(iter([*measures[:1], *tensors.values()]), None)
    for name, x in tensors.items():
        fit = expected.get(name)
        if weight is not None and x.device != weight.device:
            return f"{name} is on {x.device}, the weights are on {weight.device}"
        if fit is not None and (x.dim() != fit.dim() or _sort(x) != _sort(fit)):
            return f"{name} must be {_kind(fit)}, got {_kind(x)}"
        if x.is_floating_point() and weight is not None and x.dtype != weight.dtype:
            return f"{name} is {x.dtype}, the weights are {weight.dtype}; convert one of them"
        if not x.numel():
            return f"{name} of shape {tuple(x.shape)} is empty; give at least one sample and token"
        if fit is not None and fit.dim() == 3 and x.shape[2] != fit.shape[2]:
            return f"{name} must be (B, N, {fit.shape[2]}), got {tuple(x.shape)}"
    return None


def _with_fields(given: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors among arguments, and in records among them."""
    records = {k: v for k, v in given.items() if _is_record(v) and dataclasses.is_dataclass(v)}
    fields = {
        f"{name}.{f.name}": getattr(record, f.name)
        for name, record in records.items()
        for f in dataclasses.fields(record)
    }
    return {name: x for name, x in {**given, **fields}.items() if isinstance(x, Tensor)}


def _sort(x: Tensor) -> str:
    if x.is_floating_point():
        return "real numbers"
    return str(x.dtype) if x.is_complex() or x.dtype == torch.bool else "whole numbers"


def _kind(x: Tensor) -> str:
    return f"{_sort(x)} of a shape such as {tuple(x.shape)}"


def _examples(model: Any, batch: int, where: str) -> Inputs:
    model = bare(model)
    examples = getattr(model, "example_inputs", None)
    if examples is None:
        raise TypeError(
            f"{where}: {type(model).__name__} has no example_inputs(); give inputs: a tensor, a "
            "tuple such as (torch.randn(1, 3, 224, 224),) or a dict of named tensors"
        )
    device = device_of(model)
    seeded = None if device.type == "meta" else torch.Generator(device).manual_seed(0)
    made: Inputs = examples(**accepted(examples, {"batch": batch, "generator": seeded}))
    return made


def bound(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], where: str = ""
) -> Call:
    """The arguments of a call by the names of the module, or the method, that was called.

    Raises:
        TypeError: it does not take them.
    """
    signature = _signature(model)
    try:
        fit = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(
            f"{where}: inputs do not fit {_title(model)}{signature}: {error}"
        ) from error
    own = signature.parameters
    names = [name for name in fit.arguments if own[name].kind in _PLACED][: len(args)]
    spread = next((n for n, p in own.items() if p.kind == Parameter.VAR_POSITIONAL), "")
    names += [f"{spread}[{i}]" for i in range(len(args) - len(names))]
    ordered = [name for name in fit.arguments if name in kwargs]
    ordered += [name for name in kwargs if name not in ordered]
    return Call(args, {name: kwargs[name] for name in ordered}, tuple(names))


def _title(model: Callable[..., Any]) -> str:
    return getattr(model, "__qualname__", f"{type(model).__name__}.forward")


def _signature(model: Callable[..., Any]) -> inspect.Signature:
    method = getattr(bare(model), "forward", model)
    if isinstance(method, torch.ScriptMethod):  # a traced one has no signature of Python's
        own = list(method.schema.arguments)[1:]
        kind = Parameter.POSITIONAL_OR_KEYWORD
        return inspect.Signature(
            [
                Parameter(
                    a.name, kind,
                    default=a.default_value if a.has_default_value() else Parameter.empty,
                )
                for a in own
            ]
        )  # fmt: skip
    return inspect.signature(method)


def _parameters(model: Callable[..., Any]) -> Mapping[str, Parameter]:
    return _signature(model).parameters


def _is_record(value: Any) -> bool:
    """Containers that torch does not open: dataclasses, and mappings of other kinds than its."""
    if isinstance(value, Mapping):
        return type(value) not in (dict, OrderedDict, defaultdict)
    return dataclasses.is_dataclass(value) and not isinstance(value, type)
