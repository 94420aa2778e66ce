"""What the cores over `gated_scan` share: masks, directions, streaming."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effformer.context import EMPTY, Context
from effformer.nn.cut import put, twin
from effformer.nn.precision import widened
from effformer.registry import Caps
from effformer.site import Site
from effformer.values import Count

from .base import Core, CoreConfig
from .gated_scan import gated_scan, gated_scan_macs

__all__ = ["GATED_CAPS", "GatedConfig", "GatedCore", "Terms", "unit_length"]

GATED_CAPS = Caps(causal="optional", mask="key", packed=True, streaming=True, width=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class GatedConfig(CoreConfig):
    """Knobs shared by the cores with one matrix of memory per head.

    Attributes:
        direction: of a core that is not causal, with F_t the memory after tokens 0 to t and B_t that
            after tokens N - 1 down to t: "both" adds a scan from either side,
            ``o_t = s (F_t + B_t)^T q_t``, so that a token meets itself twice; "both-exclusive" shifts
            the second by one step, ``o_t = s (F_t + B_{t+1})^T q_t``, so that it meets itself once;
            "alternate" turns the order round in every second layer, and swaps rows and columns of a
            grid in every second pair of layers.
        chunk: tokens per chunk; changes speed, not results.
    """

    GROUPED: ClassVar[bool] = True
    direction: Literal["both", "both-exclusive", "alternate"] = "both"
    chunk: Count = 64


class Terms(NamedTuple):
    """What the recurrence runs on, see `gated_scan`."""

    q: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor | None = None
    beta: Tensor | None = None


class GatedCore(Core):
    """A core that keeps one matrix S (K, V) of memory per head, see `gated_scan`.

    It is causal; in a model that attends both ways it scans in two directions. Padded tokens write
    nothing and let nothing decay.

    Args:
        config: the knobs.
        site: the place in the model; ``site.heads`` heads of values, ``site.out_dim`` wide together.

    Attributes:
        DELTA: the delta rule: a token overwrites what the memory holds under its key.
        PER_CHANNEL: every key channel has a decay of its own.
        PER_HEAD: parameters and buffers with one row for every head.
        scale: factor of the queries, None for K^-1/2.
    """

    DELTA: ClassVar[bool] = False
    PER_CHANNEL: ClassVar[bool] = False
    PER_HEAD: ClassVar[tuple[str, ...]] = ()
    scale: float | None = None

    def __init__(self, config: GatedConfig, site: Site) -> None:
        super().__init__(config, site)
        self.value_dim = (site.out_dim or site.dim) // site.heads

    @abstractmethod
    def terms(self, q: Tensor, k: Tensor, v: Tensor, **further: Tensor) -> Terms:
        """Decays and gates of every token, in float32 at least."""

    def leave(self, out: Tensor, v: Tensor) -> Tensor:
        """The output (B, H, N, V) of the recurrence on values v, of which a part may go on as it is,
        in float32 at least: it has no normaliser, and may not fit half precision before the norm of
        the heads.
        """
        return out

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, ctx: Context = EMPTY, **further: Tensor
    ) -> Tensor:
        terms = _masked(self.terms(q, k, v, **further), ctx.mask)
        if self.config.causal:
            return self.leave(self._scan(terms, None)[0], v)
        if self.config.direction != "alternate":
            return self.leave(self._scan(terms, None)[0] + self._back(terms), v)
        order = self._order(q.shape[2], ctx.grid, q.device)
        if order is None:
            return self.leave(self._scan(terms, None)[0], v)
        out = self._scan(_each(terms, lambda x: x.index_select(2, order)), None)[0]
        return self.leave(out.index_select(2, order.argsort()), v)

    def _back(self, terms: Terms) -> Tensor:
        """The scan from the last token to the first; exclusive, queries and outputs move by one step
        against the memory.
        """
        n, shifted = terms.q.shape[2], self.config.direction == "both-exclusive"
        if shifted:
            terms = terms._replace(q=F.pad(terms.q, (0, 0, 1, 0))[:, :, :n])
        back = self._scan(_each(terms, lambda x: x.flip(2)), None)[0].flip(2)
        return F.pad(back, (0, 0, 0, 1))[:, :, 1:] if shifted else back

    def _scan(self, terms: Terms, state: Tensor | None) -> tuple[Tensor, Tensor]:
        terms = terms._replace(v=widened(terms.v))
        return gated_scan(
            *terms, state, delta=self.DELTA, scale=self.scale, chunk=self.config.chunk
        )

    def _order(self, n: int, grid: tuple[int, ...] | None, device: torch.device) -> Tensor | None:
        """The order in which this layer reads the tokens, None for the present one."""
        places, layer = torch.arange(n, device=device), self.site.layer
        if grid is not None and len(grid) > 1 and (layer // 2) % 2:
            front, cells = places.split([n - prod(grid), prod(grid)])
            places = torch.cat([front, cells.unflatten(0, grid).transpose(-1, -2).flatten()])
        elif layer % 2 == 0:
            return None
        return places.flip(0) if layer % 2 else places

    def macs(self, n: int, m: int | None = None, *, heads: int, head_dim: int) -> int:
        once = gated_scan_macs(
            n, self.config.chunk, heads=heads, key_dim=head_dim, value_dim=self.value_dim,
            delta=self.DELTA, per_channel=self.PER_CHANNEL,
        )  # fmt: skip
        both = not self.config.causal and self.config.direction != "alternate"
        return 2 * once if both else once

    def init_state(self, batch: int, *, heads: int, head_dim: int, like: Tensor) -> Tensor:
        """Empty memory (B, H, K, V), in float32 at least."""
        return widened(like.new_zeros(batch, heads, head_dim, self.value_dim))

    def step(
        self, q: Tensor, k: Tensor, v: Tensor, state: Tensor, ctx: Context = EMPTY,
        **further: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Feed the next tokens; the memory has a fixed size."""
        out, state = self._scan(self.terms(q, k, v, **further), state)
        return self.leave(out, v), state

    def select(self, heads: Tensor) -> GatedCore:
        small = twin(self)
        for name in self.PER_HEAD:
            value = getattr(self, name)
            if isinstance(value, nn.Parameter):
                put(small, name, value.index_select(0, heads))
            else:
                small._buffers[name] = value.index_select(0, heads)
        return small


def unit_length(x: Tensor, eps: float) -> Tensor:
    """``x (sum x^2 + eps)^-1/2`` over the last dimension, in float32 at least."""
    x = widened(x)
    return x * (x.square().sum(dim=-1, keepdim=True) + eps).rsqrt()


def wide(x: Tensor) -> Tensor:
    """A gate (B, H, N, 1) as (B, H, N), in float32 at least."""
    return widened(x.squeeze(-1))


def _each(terms: Terms, change: Callable[[Tensor], Tensor]) -> Terms:
    """Change what goes along the tokens; constant decays do not."""
    q, k, v, decay, beta = terms
    if decay is not None and decay.dim() > 1:
        decay = change(decay)
    return Terms(change(q), change(k), change(v), decay, None if beta is None else change(beta))


def _masked(terms: Terms, mask: Tensor | None) -> Terms:
    """Padded tokens (False in mask (B, N)) write nothing and let nothing decay."""
    if mask is None:
        return terms
    q, k, v, decay, beta = terms
    real = mask[:, None]
    k = k * real[..., None].to(
        k.dtype
    )  # whatever the rule, all that is written goes through the key
    if decay is not None:
        if decay.dim() == 1:
            decay = decay[:, None].expand(-1, v.shape[2])[None]
        decay = decay.masked_fill(~(real if decay.dim() == 3 else real[..., None]), 0.0)
        decay = decay.expand(v.shape[0], *decay.shape[1:])
    return Terms(q, k, v, decay, beta)
