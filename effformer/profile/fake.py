"""Run a model on fake tensors: shapes and operators of its device, no arithmetic, no memory."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

__all__ = ["Inputs", "Run", "bind_inputs", "evaluating", "on_fake", "on_real", "visible_operators"]

Inputs = Mapping[str, Any] | Sequence[Any] | Tensor


@dataclass(frozen=True, slots=True)
class Run:
    """A forward that is ready to be called.

    Attributes:
        call: runs the model once; keywords are added to the inputs.
        model: the module.
        inputs: the positional and keyword arguments.
        own: tensors that exist before the call (parameters, buffers, inputs).
    """

    call: Callable[..., Any]
    model: nn.Module
    inputs: tuple[tuple[Any, ...], dict[str, Any]]
    own: tuple[Tensor, ...]


def bind_inputs(
    model: nn.Module, inputs: Inputs | None, where: str
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of the forward.

    Args:
        model: the module.
        inputs: keyword arguments as a dict, positional ones as a tuple or list, a single tensor, or
            None for ``model.example_inputs()``.
        where: the public entry point, for messages.

    Raises:
        TypeError: inputs of another kind, None for a model without ``example_inputs``, or arguments
            that the forward does not accept.
    """
    if inputs is None:
        example = getattr(model, "example_inputs", None)
        if example is None:
            raise TypeError(
                f"{where}: {type(model).__name__} has no example_inputs(); pass inputs, for "
                "instance (torch.randn(1, 3, 224, 224),) or a dict of keyword arguments"
            )
        inputs = example()
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    if isinstance(inputs, Tensor):
        args, kwargs = (inputs,), {}
    elif isinstance(inputs, Mapping):
        args, kwargs = (), dict(inputs)
    elif isinstance(inputs, Sequence) and not isinstance(inputs, str):
        args, kwargs = tuple(inputs), {}
    else:
        raise TypeError(
            f"{where}: inputs must be a tensor, a tuple, a dict of keyword arguments or None, "
            f"got {type(inputs).__name__}"
        )
    try:
        inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(f"{where}: {type(model).__name__}.forward: {error}") from error
    return args, kwargs


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; afterwards every module is in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def visible_operators() -> Iterator[None]:
    """No fast path of nn.MultiheadAttention: one opaque operator would stand for its products."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def on_real(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Run:
    """A forward on the tensors as they are; the inputs move to the device of the parameters."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    args, kwargs = tree_map_only(Tensor, lambda x: x.to(device), (args, kwargs))
    own = (*model.parameters(), *model.buffers(), *_tensors((args, kwargs)))

    def call(**more: Any) -> Any:
        return model(*args, **kwargs, **more)

    return Run(call, model, (args, kwargs), own)


@contextmanager
def on_fake(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Run]:
    """A forward on fake tensors, to be called inside the block.

    Fake tensors keep the device of the parameters, so the same operators run as on the real ones; a
    model on the meta device is treated as if it were on the CPU.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    device = torch.device("cpu") if device.type == "meta" else device
    with FakeTensorMode(allow_non_fake_inputs=True):

        def fake(x: Tensor, place: torch.device = device) -> Tensor:
            like = torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device=place)
            return like.requires_grad_(x.requires_grad)

        state: dict[str, Tensor] = {name: fake(p) for name, p in model.named_parameters()}
        state |= {name: fake(b) for name, b in model.named_buffers()}
        fake_args, fake_kwargs = tree_map_only(Tensor, fake, (args, kwargs))

        def call(**more: Any) -> Any:
            return torch.func.functional_call(model, state, fake_args, fake_kwargs | more)

        own = (*state.values(), *_tensors((fake_args, fake_kwargs)))
        yield Run(call, model, (fake_args, fake_kwargs), own)


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in torch.utils._pytree.tree_leaves(tree) if isinstance(x, Tensor)]
