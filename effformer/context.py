"""What travels through a forward pass beside the tokens.

A part takes what it needs from a `Context` and refuses a field that it cannot honour; it never
ignores one. What is known when the model is built stands in `effformer.site.Site`.
"""

from __future__ import annotations

import fnmatch
import functools
import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from . import registry
from .arguments import checked
from .calls import bound, misfit, outputs, takes
from .checks import CapabilityError, check_mask, is_refusal
from .ledger import Ledger
from .places import Merging, Packing, Rope

if TYPE_CHECKING:
    from .registry import Caps

__all__ = [
    "EMPTY",
    "Callee",
    "Context",
    "Ledger",
    "Merging",
    "Packing",
    "Rope",
    "Stream",
    "Tap",
    "check_context",
    "explained",
]

M = TypeVar("M", bound=Callable[..., Any])


@dataclass(slots=True)
class Tap:
    """Reads, and optionally replaces, tensors at named places.

    Places are ``<path>.q``, ``<path>.k``, ``<path>.v`` of an attention (B, H, N, K) and ``<path>``
    of a branch (its output before gate and residual), with the path of the part in the model, for
    instance ``blocks.3.attn.q``.

    Attributes:
        keep: glob patterns of places whose values are stored in ``seen``.
        edit: called with (place, value) at places that match ``at``; its result replaces the value.
        at: glob patterns for ``edit``.
        seen: values by place.
    """

    keep: Sequence[str] = ()
    edit: Callable[[str, Tensor], Tensor] | None = None
    at: Sequence[str] = ("*",)
    seen: dict[str, Tensor] = field(default_factory=dict)

    def __call__(self, place: str, value: Tensor) -> Tensor:
        if self.edit is not None and any(fnmatch.fnmatch(place, p) for p in self.at):
            value = self.edit(place, value)
        if any(fnmatch.fnmatch(place, p) for p in self.keep):
            self.seen[place] = value
        return value


@dataclass(slots=True)
class Stream:
    """States of the token mixers while tokens are fed piece by piece.

    Attributes:
        before: state of every mixer by its path; never changed.
        after: the states after this piece.
    """

    before: Mapping[str, Any]
    after: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """Everything that a part may need beside its tokens; a model builds one per forward.

    Attributes:
        cond: (B, Dc) conditioning vector (time + class or text) of modulated branches, or (B, N, Dc)
            one for each token.
        time: (B, Dt) time embedding alone, for timestep-wise routers that must not see the label.
        memory: (B, M, Dm) tokens to attend to; None = self-attention. A model whose blocks attend to
            several things gives a tuple, one for each of them; parts see one, see `facing`.
        mask: bool, True = may attend; (B, N) over the tokens, or broadcastable to (B, H, N, M) over
            pairs. For a core: over the keys that it is given.
        memory_mask: the same over the tokens of the memory, (B, M) or over pairs; of several
            memories a tuple, in which None stands for no mask.
        positions: coordinates of the tokens as they stand, (B or 1, N, axes), in units of the model's
            choice; packed, streamed and merged tokens have those of their places. Like ``grid`` a
            fact about the tokens, not a demand: parts without positions need not look. None: the
            parts that need some count cells.
        rope: rotary tables that the model made of the positions.
        grid: layout of the token axis, for instance (T, H, W). Tokens beyond its product stand in
            front and have no place in it (class token, registers).
        width: (B, U) factors in [0, 1] on the U units of a part: heads of a mixer, equal groups of
            hidden channels of an FFN.
        merging: tokens were merged, or may be; the keys of a self-attention are left here.
        complete: dynamic parts do all of their work; their gates stay idle.
        packing: several sequences in one row.
        ledger: dynamic parts write auxiliary losses and executed work here.
        tap: reads or replaces values at named places.
        stream: tokens continue those that were fed before.
    """

    cond: Tensor | None = None
    time: Tensor | None = None
    memory: Tensor | tuple[Tensor, ...] | None = None
    mask: Tensor | None = None
    memory_mask: Tensor | tuple[Tensor | None, ...] | None = None
    positions: Tensor | None = None
    rope: Rope | None = None
    grid: tuple[int, ...] | None = None
    width: Tensor | None = None
    merging: Merging | None = None
    complete: bool = False
    packing: Packing | None = None
    ledger: Ledger | None = None
    tap: Tap | None = None
    stream: Stream | None = None

    def __post_init__(self) -> None:
        for name, shape, dims in _TENSORS:
            for value, where in _each(getattr(self, name), name):
                if value is not None:
                    _check_tensor(value, where, shape, dims, mask=name.endswith("mask"))
        counts = [len(m) if isinstance(m, tuple) else 0 for m in (self.memory, self.memory_mask)]
        if self.memory_mask is not None and counts[0] != counts[1]:
            raise ValueError(
                f"ctx.memory_mask: {counts[0] or 'one'} memories need as many masks in the same form, a "
                "tensor for a tensor and a tuple for a tuple, in which None stands for no mask"
            )
        for name, kind in _OTHERS:
            value = getattr(self, name)
            missing = value is None and name != "complete"
            if not (missing or isinstance(value, kind)):
                raise TypeError(f"ctx.{name}: expected {kind.__name__}, got {type(value).__name__}")

    def rows(self, index: Tensor) -> Context:
        """The context of some samples: ``index`` (B',) picks from the batch, with repetition."""
        names = ("cond", "time", "memory", "mask", "memory_mask", "positions", "width")
        fields = {name: getattr(self, name) for name in names}
        chosen = {name: _rows(value, index) for name, value in fields.items()}
        rope = None if self.rope is None else self.rope.samples(index)
        merging = None if self.merging is None else self.merging.rows(index)
        return replace(self, rope=rope, merging=merging, **chosen)

    def far(self) -> Context:
        """What a core sees of it that attends to the memory: its mask is that of the memory, whose
        tokens were not merged.
        """
        memory, mask = self.remembered, self.memory_mask
        assert not isinstance(mask, tuple)  # there are as many as memories
        return replace(self, memory=memory, mask=mask, memory_mask=None, merging=None)

    def facing(self, index: int, count: int, where: str) -> Context:
        """What a branch sees of it that attends to one of ``count`` memories.

        Raises:
            CapabilityError: there are more or fewer; or several, and rotary tables for the keys of one.
        """
        if not isinstance(self.memory, tuple) and (count == 1 or self.memory is None):
            return self
        given = len(self.memory) if isinstance(self.memory, tuple) else 1
        if given != count or not isinstance(self.memory, tuple):
            raise CapabilityError(
                f"{where}: the block attends to {count} memories, and ctx.memory holds {given}; give "
                f"{'one tensor' if count == 1 else f'a tuple of {count} tensors'}"
            )
        if self.rope is not None and self.rope.key_cos is not None:
            raise CapabilityError(
                f"{where}: rotary tables for keys belong to one memory, and ctx.memory holds {given}; "
                "give tables without key_cos and key_sin"
            )
        masks = self.memory_mask
        mask = masks[index] if isinstance(masks, tuple) else None
        return replace(self, memory=self.memory[index], memory_mask=mask)

    @property
    def remembered(self) -> Tensor | None:
        """The memory of a part, None without one.

        Raises:
            CapabilityError: there are several.
        """
        if isinstance(self.memory, tuple):
            raise CapabilityError(
                f"this part attends to one memory, but ctx.memory holds {len(self.memory)}; a block "
                "hands each of its branches its own, and a part alone takes one tensor"
            )
        return self.memory


_TENSORS = (
    ("cond", "(B, Dc) or (B, N, Dc)", (2, 3)),
    ("time", "(B, Dt)", (2,)),
    ("memory", "(B, M, Dm)", (3,)),
    ("mask", "(B, N) or broadcastable to (B, H, N, M)", (2, 3, 4)),
    ("memory_mask", "(B, M) or broadcastable to (B, H, N, M)", (2, 3, 4)),
    ("positions", "(B or 1, N, axes)", (3,)),
    ("width", "(B, U)", (2,)),
)
"""Tensors of a context: name, shape in words, and numbers of axes."""

_OTHERS: tuple[tuple[str, type], ...] = (
    ("rope", Rope), ("grid", tuple), ("merging", Merging), ("packing", Packing),
    ("ledger", Ledger), ("tap", Tap), ("stream", Stream), ("complete", bool),
)  # fmt: skip


def _each(value: Any, name: str) -> list[tuple[Any, str]]:
    """A field and how messages call it; of several memories each one."""
    if not (isinstance(value, tuple) and name in ("memory", "memory_mask")):
        return [(value, f"ctx.{name}")]
    return [(one, f"ctx.{name}[{i}]") for i, one in enumerate(value)]


def _rows(value: Any, index: Tensor) -> Any:
    """Some samples of a field; a single one stands for all."""
    if isinstance(value, tuple):
        return tuple(_rows(one, index) for one in value)
    return value if value is None or value.shape[0] == 1 else value.index_select(0, index)


EMPTY = Context()


def explained(method: M) -> M:
    """Where a method of a `Callee` fails on arguments that do not fit, say which and why.

    They are looked at only then: a call that goes well costs nothing more, and graphs are captured
    without a trace of it. A failure on arguments that fit stays as it is.
    """

    def call(self: Callee, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return method(self, *args, **kwargs)
        try:
            return method(self, *args, **kwargs)
        except (
            ArithmeticError,
            LookupError,
            RuntimeError,
            AttributeError,
            TypeError,
            ValueError,
        ) as error:
            if is_refusal(error):
                raise
            called = method.__get__(self)
            why = misfit(self, called, args, kwargs, self.fitting())
            if why is None:
                why = _unfit(self, bound(called, args, kwargs).arguments)
            site = getattr(self, "site", None)
            where = getattr(self, "name", "") or getattr(site, "path", "") or type(self).__name__
            if why is None:
                raise
            raise ValueError(f"{where}: {why}") from error

    # torch.compile counts its graphs by code, so every method has one of its own
    code = call.__code__.replace(co_name=method.__qualname__, co_qualname=method.__qualname__)
    own = types.FunctionType(code, call.__globals__, method.__name__, None, call.__closure__)
    return typing.cast(M, functools.update_wrapper(own, method))


class Callee(nn.Module):
    """A part or a model: what it is made of is checked, and its ``forward`` says which arguments do
    not fit, see `explained`.
    """

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "forward" in cls.__dict__:
            cls.forward = explained(cls.__dict__["forward"])
        if "__init__" in cls.__dict__:
            cls.__init__ = checked(cls.__dict__["__init__"])  # type: ignore[method-assign]

    def fitting(self) -> Mapping[str, Tensor]:
        """Inputs that fit, by the names of the arguments: tokens (B, N, D) for a part."""
        site = getattr(self, "site", None)
        return {} if site is None else {"x": torch.empty(2, 4, site.dim)}


def _unfit(callee: Callee, given: Mapping[str, Any]) -> str | None:
    """Why the state or the context of a call that failed does not fit its tokens, None if both do."""
    x = next((a for a in given.values() if isinstance(a, Tensor)), None)
    ctx = given.get("ctx", EMPTY)
    if not isinstance(ctx, Context):
        return f"ctx must be a Context, got {type(ctx).__name__}"
    if not isinstance(given.get("like", x), Tensor):
        return f"like must be a tensor, got {type(given.get('like')).__name__}"
    if "state" in given and x is not None:
        return _stale(callee, given["state"], x)
    batch, tokens = (1, 1) if x is None or x.dim() < 2 else x.shape[:2]
    batch = batch if ctx.packing is None else len(ctx.packing.lengths)
    site: Any = getattr(callee, "site", None)
    for name in ("cond", "time", "memory", "width"):
        values, wanted = _each(getattr(ctx, name), name), getattr(site, f"{name}_dim", None)
        every = wanted if isinstance(wanted, tuple) else (wanted,) * len(values)
        for (value, title), wide in zip(values, every, strict=False):
            title = title.removeprefix("ctx.")
            if value is None:
                continue
            if value.shape[0] not in (1, batch):
                return f"{title} has shape {tuple(value.shape)}, the tokens are {batch} samples"
            if wide is not None and value.shape[-1] != wide:
                return f"{title} has shape {tuple(value.shape)}, its width must be {wide}"
            if name == "cond" and value.dim() == 3 and value.shape[1] != tokens:
                return f"{title} has shape {tuple(value.shape)}, but there are {tokens} tokens"
    whole = ctx.grid is None or all(isinstance(n, int) and n > 0 for n in ctx.grid)
    if not whole or (ctx.grid is not None and math.prod(ctx.grid) > tokens):
        return f"grid must be whole numbers whose product is at most {tokens}, got {ctx.grid}"
    return None


def _stale(callee: Any, state: Any, x: Tensor) -> str | None:
    like = {"like": x} if takes(callee.init_state, "like") else {}
    fresh = callee.init_state(x.shape[0], **like)
    sizes, wanted = (
        {leaf.shape if isinstance(s, Tensor) else leaf.shape[:1] for leaf in outputs(s)}
        for s in (state, fresh)
    )
    if type(state) is type(fresh) and sizes == wanted:
        return None
    return f"state must be that of init_state({x.shape[0]}) or of the step before"


def _check_tensor(value: Any, where: str, shape: str, dims: tuple[int, ...], *, mask: bool) -> None:
    """Refuse what is no such tensor, whatever the tokens are."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{where}: expected a tensor {shape}, got {type(value).__name__}")
    if mask:
        check_mask(value, where=where)
    if not mask and not value.is_floating_point():
        raise TypeError(f"{where}: expected floating-point values, got {value.dtype}")
    if value.dim() not in dims:
        raise ValueError(f"{where}: expected shape {shape}, got {tuple(value.shape)}")


def check_context(ctx: Context, caps: Caps, kind: str, where: str, x: Tensor) -> None:
    """Refuse context fields that a part cannot honour, naming parts that can, and those that are not
    about its tokens.

    Args:
        ctx: the context.
        caps: what the part can do.
        kind: registry of the part.
        where: the place of the part.
        x: (B, N, D) its tokens.

    Raises:
        CapabilityError: a field is set that ``caps`` does not declare.
        ValueError: a field of another size, or on another device.
    """
    wants: dict[str, Any] = {
        "rope": ctx.rope is not None or None,
        "cross": ctx.memory is not None or None,
        "packed": ctx.packing is not None or None,
        "width": ctx.width is not None or None,
        "sizes": (ctx.merging is not None and ctx.merging.weights is not None) or None,
        "mask": None if ctx.mask is None else "key" if ctx.mask.dim() == 2 else "full",
    }
    for field_name, wanted in wants.items():
        if wanted is not None and not caps.satisfies(**{field_name: wanted}):
            able = ", ".join(registry.KINDS[kind].names(**{field_name: wanted}))
            raise CapabilityError(
                f"{where}: this {kind} cannot honour {field_name}={wanted}; choices that can: {able}"
            )
    if ctx is not EMPTY and not torch.compiler.is_compiling():  # a graph leaves sizes open
        _check_sizes(ctx, x, where)


def _check_sizes(ctx: Context, x: Tensor, where: str) -> None:
    """Refuse fields of other tokens, samples or devices than x (B, N, D) has. A size of 1 stands for
    all samples, and in what is said of pairs or heads for all of them.
    """
    batch, tokens = x.shape[0], x.shape[1]
    memory = ctx.remembered
    keys = tokens if memory is None else memory.shape[1]
    samples = batch if ctx.packing is None else len(ctx.packing.lengths)
    each = ctx.cond is not None and ctx.cond.dim() == 3
    rope, merging, pairs = ctx.rope, ctx.merging, ctx.mask is not None and ctx.mask.dim() > 2
    expected: tuple[tuple[str, Tensor | None, tuple[int | None, ...]], ...] = (
        ("cond", ctx.cond, (batch, tokens, None) if each else (samples, None)),
        ("time", ctx.time, (samples, None)),
        ("width", ctx.width, (samples, None)),
        ("memory", memory, (samples, None, None)),
        ("mask", None if pairs else ctx.mask, (batch if memory is None else samples, keys)),
        ("mask", ctx.mask if pairs else None, (tokens, keys)),
        ("positions", ctx.positions, (batch, tokens, None)),
        ("rope.cos", None if rope is None else rope.cos, (tokens, None)),
        ("rope.key_cos", None if rope is None else rope.key_cos, (keys, None)),
        ("merging.sizes", None if merging is None else merging.sizes, (batch, tokens)),
    )
    for name, value, sizes in expected:
        if value is None:
            continue
        shape, alone = value.shape[-len(sizes) :], value.dim() > len(sizes)
        fits = all(
            want in (None, have) or (have == 1 and (alone or i == 0))
            for i, (have, want) in enumerate(zip(shape, sizes, strict=True))
        )
        if not fits:
            of = "" if memory is None else f", {keys} in the memory"
            raise ValueError(
                f"{where}: ctx.{name} has shape {tuple(value.shape)}, but there are {samples} samples "
                f"of {tokens} tokens{of}"
            )
        if value.device != x.device:
            raise ValueError(f"{where}: ctx.{name} is on {value.device}, the tokens on {x.device}")
