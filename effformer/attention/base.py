"""What every token mixer and every attention core is.

Shape legend: B batch, H heads, N queries, M keys, K key width, V value width, D token width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from effformer.checks import CapabilityError
from effformer.config import Config
from effformer.context import EMPTY, Callee, Context
from effformer.registry import Caps
from effformer.site import Site

from .outputs import Input

__all__ = ["Core", "CoreConfig", "Mixer", "Streaming", "View", "check_streamed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CoreConfig(Config):
    """Knobs shared by the cores.

    Attributes:
        causal: output i depends on tokens <= i only.
        GROUPED: the core takes fewer queries and keys than values, and values of another width.
    """

    GROUPED: ClassVar[bool] = False
    causal: bool = False

    def inputs(self, head_dim: int, value_dim: int) -> Mapping[str, Input]:
        """What the core asks for beside q, k and v: keyword arguments of its forward, (B, H, N,
        width) each, which heads of these widths project from the tokens.
        """
        return {}


class Core(Callee, ABC):
    """Kind "core": what happens between the heads of an attention.

    ``forward(q, k, v, ctx, **further)`` mixes q (B, H, N, K), k (B, H, M, K), v (B, H, M, V) to (B,
    H, N, V); ``further`` are the inputs that its config asks for. A streaming core has
    ``init_state(batch, *, heads, head_dim, like)`` and ``step(q, k, v, state, ctx, **further) ->
    (out, state)``.

    Args:
        config: the knobs.
        site: the place in the model; ``site.dim`` is the width of the queries of all heads.

    Attributes:
        rotates: what rotary tables turn: "qk", queries and keys, before the core sees them; or
            "inside": the core finds the tables in its context and turns its features.
        competes: queries compete for the keys, so that an output depends on all queries; over a
            memory the core then cannot serve tokens that must not see later ones.
        counts_heads: no graph can be captured for an unknown number of heads, so that graphs switch
            heads off by multiplying.
        ROLES: child -> part of a transformer, for the profiler; ``""``: everything else in it.
    """

    ROLES: ClassVar[Mapping[str, str]] = {"": "attn"}

    rotates: str = "qk"
    competes: ClassVar[bool] = False
    counts_heads: ClassVar[bool] = False
    forward: Callable[..., Tensor]
    init_state: Callable[..., Any]
    step: Callable[..., tuple[Tensor, Any]]

    def __init__(self, config: CoreConfig, site: Site) -> None:
        super().__init__()
        self.config: Any = config
        self.site = site

    def fitting(self) -> dict[str, Tensor]:
        """As `Callee.fitting`: queries, keys and values (B, H, N, K)."""
        return {name: torch.empty(2, 1, 4, self.site.dim) for name in "qkv"}

    def packed(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context, **further: Tensor) -> Tensor:
        """Mix every sequence of a packed row alone: q (1, H, T, K), k and v likewise -> (1, H, T,
        V).

        Neighbours of equal length run as one batch.

        Raises:
            ValueError: not one row of all real tokens.
        """
        packing, rope = ctx.packing, ctx.rope
        assert packing is not None
        packing.check_row(q, dim=2)
        outputs, start = [], 0
        for count, length in packing.runs:
            rows = slice(start, start + count * length)

            def fold(x: Tensor, rows: slice = rows, count: int = count) -> Tensor:
                return x[0, :, rows].unflatten(1, (count, -1)).transpose(0, 1)

            turns = None if rope is None else rope.tokens(rows).batch(count)
            more = {name: fold(x) for name, x in further.items()}
            out = self(fold(q), fold(k), fold(v), Context(rope=turns), **more)
            # tokens first: the fused operator writes in this order, so that nothing is copied twice
            outputs.append(out.transpose(1, 2).flatten(0, 1))
            start += count * length
        return torch.cat(outputs)[None].transpose(1, 2) if outputs else v

    @abstractmethod
    def macs(self, n: int, m: int | None = None, *, heads: int, head_dim: int) -> int:
        """Dense multiply-adds of one sample with n queries and m keys (None: n)."""

    def turns(self) -> tuple[int, ...]:
        """Numbers of tokens at which the form changes, beyond which a graph is verified."""
        return _turns(self.config)

    def select(self, heads: Tensor) -> Core:
        """The core for some heads (int64 indices); cores that hold values per head override it."""
        return self


class Mixer(Callee, ABC):
    """Kind "attention": any token mixer, (B, N, D) -> (B, N, D).

    Args:
        config: the knobs.
        site: the place in the model.

    Attributes:
        caps: what the mixer can do, in this form.
        ROLES: child -> part of a transformer, as for `Core`.
    """

    ROLES: ClassVar[Mapping[str, str]] = {
        "": "attn", "qkv": "qkv", "q": "qkv", "k": "qkv", "v": "qkv", "kv": "qkv", "proj": "proj",
        "gate": "gates",
    }  # fmt: skip

    def __init__(self, config: Config, site: Site) -> None:
        super().__init__()
        self.config: Any = config
        self.caps: Caps = config.caps()
        self.site = site

    @abstractmethod
    def forward(self, x: Tensor, ctx: Context = EMPTY) -> Tensor:
        """Mix tokens (B, N, D)."""

    @abstractmethod
    def macs(self, n: int, m: int | None = None, *, grid: tuple[int, ...] | None = None) -> int:
        """Dense multiply-adds of one sample with n tokens (m in the memory); ``grid`` is their
        layout, for mixers whose work depends on it.
        """

    def turns(self) -> tuple[int, ...]:
        """As `Core.turns`."""
        return _turns(self.config)


def _turns(config: object) -> tuple[int, ...]:
    """Chunks, windows, landmarks and kept keys that a config names."""
    values = (getattr(config, name, None) for name in ("chunk", "window", "landmarks", "keep"))
    return tuple(value for value in values if isinstance(value, int))


def check_streamed(ctx: Context, where: str) -> None:
    """Refuse what the tokens of a stream cannot have.

    Raises:
        CapabilityError: the context says it.
    """
    for name in ("mask", "width", "packing", "merging"):
        if getattr(ctx, name) is not None:
            raise CapabilityError(
                f"{where}: streaming takes no {name}; feed real tokens only, to all heads, one "
                "sequence a sample"
            )


@runtime_checkable
class View(Protocol):
    """Configs of mixers that put another one into a view of the tokens."""

    def within(self, site: Site) -> tuple[Config, Site]:
        """The inner mixer and its place."""
        ...


@runtime_checkable
class Streaming(Protocol):
    """Mixers with ``caps.streaming``: state goes in, state comes out."""

    def init_state(self, batch: int, *, like: Tensor) -> Any:
        """The state before the first token, with the dtype and device of ``like``."""
        ...

    def step(self, x: Tensor, state: Any, ctx: Context = EMPTY) -> tuple[Tensor, Any]:
        """Feed the next tokens x (B, n, D), n >= 1; returns their outputs and the new state."""
        ...
