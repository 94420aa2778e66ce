"""Activation memory from the storages that are alive, and the memory of a process."""

from __future__ import annotations

import multiprocessing
import pickle
import sys
import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from effformer.arguments import checked

from .fake import Run

__all__ = ["Memory", "MemoryTracker", "activation_memory", "peak_memory", "peak_rss"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Memory of one forward, in bytes; parameters, buffers and inputs are not activations.

    Attributes:
        peak: largest sum of live activations (storages made by operators and not yet freed) in a
            forward without gradients. Temporary buffers inside an operator are not seen.
        saved: activations that a forward with gradients keeps for the backward pass, in evaluation
            mode; None if there is no backward pass.
        weights: parameters and buffers.
        method: how it was found.
    """

    peak: int
    saved: int | None
    weights: int
    method: str


class MemoryTracker(TorchDispatchMode):
    """Context manager that adds up the storages that operators make, until they are freed.

    Args:
        own: tensors that exist before and are not counted.

    Attributes:
        live: bytes alive now.
        peak: largest value of ``live``.
    """

    supports_higher_order_operators = True

    @checked
    def __init__(self, own: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()
        self._ours = [x.untyped_storage() for x in own if _has_storage(x)]
        self._known.update(self._ours)

    def __enter__(self) -> Self:
        super().__enter__()
        return self

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(args):
            # what was made outside (constants of the model) is not an activation
            if isinstance(x, Tensor) and _has_storage(x) and x.untyped_storage() not in self._known:
                self._known.add(x.untyped_storage())
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and _has_storage(x):
                self._add(x.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, size).atexit = False

    def _free(self, size: int) -> None:
        self.live -= size


def _has_storage(x: Tensor) -> bool:
    return x.layout == torch.strided and not x.is_mkldnn


def activation_memory(run: Run, *, peak: int, method: str) -> Memory:
    """Complete the memory of a forward with what a backward pass would need.

    Args:
        run: the forward, called once with gradients.
        peak: peak of live activations, measured while the operators were counted.
        method: how the tensors were made.
    """
    own = {id(x.untyped_storage()) for x in run.own if _has_storage(x)}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(x: Tensor) -> Tensor:
        if _has_storage(x) and id(x.untyped_storage()) not in own:
            kept[id(x.untyped_storage())] = x.untyped_storage()
        return x

    saved: int | None = None
    if any(p.requires_grad for p in run.model.parameters()):
        # operators without a backward pass (flex_attention on a CPU) leave it unknown
        with suppress(NotImplementedError), torch.enable_grad():
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
                out = run.call()
            saved = sum(storage.nbytes() for storage in kept.values())
            del out
    state = (*run.model.parameters(), *run.model.buffers())
    weights = sum(x.numel() * x.element_size() for x in state)
    return Memory(peak=peak, saved=saved, weights=weights, method=method)


@checked
def peak_memory(call: Callable[[], Any], own: Iterable[Tensor] = ()) -> int:
    """Largest number of bytes that tensors made by a call take at one time.

    Args:
        call: anything that computes with torch.
        own: tensors that exist before and that the call may return.

    Returns:
        Bytes; temporary buffers inside single operators are not seen.

    Example:
        >>> peak_memory(lambda: torch.ones(256).exp())
        2048
    """
    with MemoryTracker(own) as tracker:
        call()
    return tracker.peak


@checked
def peak_rss(call: Callable[..., Any], *args: Any) -> int:
    """Growth of the resident memory of a fresh process while it runs ``call(*args)``, in bytes.

    Unlike `peak_memory` this includes buffers inside operators, allocator slack and threads.

    Args:
        call: an importable function (it is pickled).
        args: its arguments, pickled as well.

    Raises:
        TypeError: what cannot be pickled.
        RuntimeError: the process failed; the message carries its error.
    """
    try:
        pickle.dumps((call, args))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise TypeError(
            f"peak_rss: another process runs it, which takes functions of modules and what can be "
            f"pickled ({error})"
        ) from error
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure_rss, args=(sender, call, args))
    process.start()
    sender.close()
    try:
        result = receiver.recv()
    except EOFError:
        process.join()
        result = f"the process ended with code {process.exitcode}"
    process.join()
    if isinstance(result, str):
        raise RuntimeError(f"peak_rss: {call!r} failed in its own process: {result}")
    return int(result)


def _measure_rss(sender: Connection, call: Callable[..., Any], args: tuple[Any, ...]) -> None:
    before = rss_peak(reset=True)
    try:
        call(*args)
    except BaseException as error:
        sender.send(f"{type(error).__name__}: {error}")
        raise
    sender.send(rss_peak() - before)


def rss_peak(*, reset: bool = False) -> int:
    """Largest resident memory of this process in bytes, since the start or the last reset."""
    status = Path("/proc/self/status")
    if status.exists():
        # getrusage would start from the memory of the parent, which Linux hands on
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM:"))
        return 1024 * int(line.split()[1])
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
