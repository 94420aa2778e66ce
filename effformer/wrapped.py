"""Modules around a model: what compiles it, runs it in parallel, checkpoints or averages it.

Nothing else in this library knows them. A public function that takes a model apart sees it without
them (`unwrapping`); one that runs it calls it as it is, and asks `bare` for what the model says.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, ParamSpec, TypeVar, cast

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from .checks import CapabilityError

__all__ = ["COUNT", "bare", "is_compiled", "plain_keys", "unwrapped", "unwrapping"]

M = TypeVar("M", bound=nn.Module)
P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

_CHILDREN = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_forward_module")
"""Names that only wrappers give a child: of torch.compile, checkpoint_wrapper, FSDP, Lightning."""

COUNT = "n_averaged"
"""What `torch.optim.swa_utils.AveragedModel` keeps beside its model."""

_CLASSES = (DataParallel, DistributedDataParallel, AveragedModel)
"""Wrappers that call their child "module", as a model may call one of its own."""

_IN_KEYS = re.compile(rf"(^|(?<=\.))({'|'.join(_CHILDREN)})\.")


def bare(model: T) -> T:
    """The model inside any number of wrappers; what is no wrapper comes back as it is.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(2, 2)
        >>> bare(torch.nn.DataParallel(torch.compile(layer))) is layer
        True
    """
    while (inside := _inside(model)) is not None:
        model = cast(T, inside)
    return model


def _inside(module: object) -> nn.Module | None:
    children: Any = getattr(module, "_modules", {})  # TorchScript's is no dict
    names = ("module",) if isinstance(module, _CLASSES) else _CHILDREN
    return next((children[name] for name in names if name in children), None)


def is_compiled(model: nn.Module) -> bool:
    """The model, or a part of it, is what ``torch.compile`` made."""
    return any(
        hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) is not None
        for m in model.modules()
    )


@contextmanager
def unwrapped(model: M) -> Iterator[M]:
    """The model without wrappers, those around modules inside it included, for the time of the block.

    Names of modules and tensors are the model's own there, and what is compiled runs eagerly.
    Sharded parameters are whole; writing into them counts. What took the place of a wrapped module
    in the block stays.

    Raises:
        CapabilityError: parameters that `torch.distributed.fsdp.fully_shard` has divided.
    """
    with ExitStack() as undo:
        _gather(model, undo)
        plain = bare(model)
        for parent in list(plain.modules()):
            for name, child in list(parent._modules.items()):
                inner = child if child is None else bare(child)
                if inner is not child:
                    parent._modules[name] = inner
                    undo.callback(_put_back, parent, name, inner, child)
            if parent._compiled_call_impl is not None:  # by its method compile()
                undo.callback(setattr, parent, "_compiled_call_impl", parent._compiled_call_impl)
                parent._compiled_call_impl = None
        yield plain


def _put_back(parent: nn.Module, name: str, inner: Any, wrapper: Any) -> None:
    if parent._modules.get(name) is inner:
        parent._modules[name] = wrapper


def _gather(model: nn.Module, undo: ExitStack) -> None:
    """Make sharded parameters whole until the end."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")  # whoever uses it has imported it
    if fsdp is None:
        return
    if any(isinstance(module, fsdp.FSDPModule) for module in model.modules()):
        raise CapabilityError(
            f"{type(bare(model)).__name__}: its parameters are divided by fully_shard; gather them by "
            "torch.distributed.checkpoint.state_dict.get_model_state_dict(model, "
            "options=StateDictOptions(full_state_dict=True)) and load them into a plain model"
        )
    if any(isinstance(module, fsdp.FullyShardedDataParallel) for module in model.modules()):
        undo.enter_context(fsdp.FullyShardedDataParallel.summon_full_params(model))


def unwrapping(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator of a function whose argument ``model`` arrives as in `unwrapped`."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def with_plain_model(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            given = signature.bind(*args, **kwargs)
        except TypeError:
            return function(*args, **kwargs)  # which says what is wrong
        model = given.arguments.get("model")
        if not isinstance(model, nn.Module):
            return function(*args, **kwargs)
        with unwrapped(model) as given.arguments["model"]:
            return function(*given.args, **given.kwargs)

    return with_plain_model


def plain_keys(keys: Iterable[str], own: Iterable[str] = ()) -> dict[str, str]:
    """Keys of a state dict -> the same without the names that wrappers put into them, wherever these
    stand.

    "module" is a name that models use as well: it goes where all keys begin with it, and from inside
    of keys if no key of the model has it.

    Args:
        keys: of the state dict.
        own: keys of the model that they are meant for, if there is one.

    Example:
        >>> plain_keys(["module.blocks.0._orig_mod.weight", "module.head.bias", "n_averaged"])
        {'module.blocks.0._orig_mod.weight': 'blocks.0.weight', 'module.head.bias': 'head.bias'}
    """
    known = set(own)
    plain = {key: _IN_KEYS.sub("", key) for key in keys}
    others = [new for key, new in plain.items() if key != COUNT]
    if others and all(map(_led, others)) and COUNT not in known:
        plain.pop(COUNT, None)
    while plain and not known & set(plain.values()) and all(map(_led, plain.values())):
        plain = {key: _IN_KEYS.sub("", new[len("module.") :]) for key, new in plain.items()}
    if known and not any("module" in key.split(".") for key in known):
        plain = {
            key: ".".join(name for name in new.split(".") if name != "module")
            for key, new in plain.items()
        }
    return plain


def _led(key: str) -> bool:
    return key.startswith("module.")
