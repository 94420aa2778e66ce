"""Run a model on fake tensors: shapes and operators of its device, no arithmetic, no memory."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from effformer.calls import Call, device_of
from effformer.checks import check_values

__all__ = ["Run", "on_fake", "on_real", "visible_operators"]


_EAGER = "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG"
"""Torch's switch for flex_attention without compilation."""


@dataclass(frozen=True, slots=True)
class Run:
    """A forward that is ready to be called.

    Attributes:
        call: runs the model once; keywords are added to the inputs.
        model: the module.
        inputs: its arguments.
        own: tensors that exist before the call (parameters, buffers, inputs).
    """

    call: Callable[..., Any]
    model: nn.Module
    inputs: Call
    own: tuple[Tensor, ...]


@contextmanager
def visible_operators() -> Iterator[None]:
    """No fast path of nn.MultiheadAttention, where one opaque operator would stand for its products,
    and no compilation inside flex_attention, whose operator would not be seen.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    flex: Any = sys.modules.get("torch.nn.attention.flex_attention")
    eager = getattr(flex, _EAGER, None)
    try:
        if eager is not None:
            setattr(flex, _EAGER, True)
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
        if eager is not None:
            setattr(flex, _EAGER, eager)


@contextmanager
def _silent() -> Iterator[None]:
    """Torch logs a traceback of every operator that fails, which whoever asked for it is told anyway."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def on_real(model: nn.Module, inputs: Call) -> Run:
    """A forward on the tensors as they are; the inputs move to the device of the parameters."""
    device = device_of(model)
    for name, x in inputs.tensors.items():
        if device.type != "meta":
            check_values(x, where=f"input {name!r} of {type(model).__name__}")
    inputs = inputs.map(lambda x: x.to(device))
    own = (*model.parameters(), *model.buffers(), *inputs.leaves)

    def call(**more: Any) -> Any:
        return inputs(model, **more)

    return Run(call, model, inputs, own)


@contextmanager
def on_fake(model: nn.Module, inputs: Call) -> Iterator[Run]:
    """A forward on fake tensors, to be called inside the block.

    Fake tensors keep the device of the parameters, so the same operators run as on the real ones; a
    model on the meta device is treated as if it were on the CPU.
    """
    device = device_of(model)
    device = torch.device("cpu") if device.type == "meta" else device
    with FakeTensorMode(allow_non_fake_inputs=True), _silent():

        def fake(x: Tensor, place: torch.device = device) -> Tensor:
            like = torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device=place)
            return like.requires_grad_(x.requires_grad)

        state: dict[str, Tensor] = {name: fake(p) for name, p in model.named_parameters()}
        state |= {name: fake(b) for name, b in model.named_buffers()}
        faked = inputs.map(fake)

        def call(**more: Any) -> Any:
            return torch.func.functional_call(model, state, faked.args, faked.kwargs | more)

        yield Run(call, model, faked, (*state.values(), *faked.leaves))
