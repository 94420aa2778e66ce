"""Longformer: every token sees a window, and a few tokens see and are seen by everything."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effformer.checks import CapabilityError, check_shape
from effformer.config import Config as BaseConfig
from effformer.context import EMPTY, Context, Rope, check_context
from effformer.registry import Caps, attention
from effformer.site import Site
from effformer.values import Even, Natural

from .backends import attend, fused
from .base import Mixer
from .slices import Rows, chunk_count, known_length, over_sequences

__all__ = ["Longformer"]

_CHUNK, _BLOCK = 32, 64
_CAPS = Caps(causal="optional", mask="key", rope=True, packed=True, cost="n")


@attention.register("longformer", caps=_CAPS, paper="2004.05150")
class Longformer(Mixer):
    """Sliding-window attention with global tokens.

    With w = ``window`` / 2, token i attends to the keys |i - j| <= w and to all global keys, each
    counted once, in one softmax of ``K^-0.5 q_i . k_j``. A global token attends to all keys, with
    queries, keys and values of projections of its own (``q_global``, ``kv_global``). The window is
    cut at the ends. Work and memory are O(N (w + G)); no N x N tensor exists.

    Global are the first ``global_tokens`` valid tokens (class token, registers), or with ``marked``
    those that the caller marks in every sample. The causal form sees the left half of the window,
    and global tokens neither see nor show what comes later. Masked tokens yield zeros before the
    output projection. Rotary positions turn queries and keys of both projections, each by the place
    of its token.

    Differs from the paper: no dilation.

    Args:
        config: the knobs.
        site: the place in the model.

    Raises:
        ValueError: the width is not divisible by the heads.

    Reference: Longformer: The Long-Document Transformer, 2020, arXiv 2004.05150.
    """

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(BaseConfig):
        """Knobs of `Longformer`.

        Attributes:
            window: keys in the window beside the token itself, half of them on each side; even.
            global_tokens: number of leading tokens that are global in every sample.
            marked: the caller marks the global tokens of every sample (``part(x, ctx, marks=m)``).
            causal: output i depends on tokens <= i only.
            qkv_bias: the input projections have biases.
            proj_bias: the output projection has a bias.
        """

        window: Even = 512
        global_tokens: Natural = 0
        marked: bool = False
        causal: bool = False
        qkv_bias: bool = True
        proj_bias: bool = True

        def check(self) -> None:
            if self.marked and self.global_tokens:
                raise ValueError("longformer: global tokens are either leading or marked, not both")

        def head_width(self, dim: int, heads: int) -> int:
            """Width of a query or key."""
            return dim // heads

    def __init__(self, config: Longformer.Config, site: Site) -> None:
        super().__init__(config, site)
        dim, self.heads = site.dim, site.heads
        if dim % site.heads:
            raise ValueError(
                f"{site.path or 'longformer'}: width {dim} is not divisible by {site.heads} heads"
            )
        self.reach = config.window // 2
        self.qkv = nn.Linear(dim, 3 * dim, bias=config.qkv_bias)
        if config.global_tokens or config.marked:
            self.q_global = nn.Linear(dim, dim, bias=config.qkv_bias)
            self.kv_global = nn.Linear(dim, 2 * dim, bias=config.qkv_bias)
        self.proj = nn.Linear(dim, site.out_dim or dim, bias=config.proj_bias)
        self.drop = nn.Dropout(site.dropout)

    def forward(self, x: Tensor, ctx: Context = EMPTY, *, marks: Tensor | None = None) -> Tensor:
        """Mix tokens (B, N, D); marks (B, N) bool says which are global (``marked`` only)."""
        where = self.site.path or "longformer"
        check_context(ctx, _CAPS, "attention", where, x)
        if self.config.marked != (marks is not None):
            raise ValueError(
                f"{where}: marks of global tokens go with marked=True; global_tokens=1 makes the "
                "first token of every sample global"
            )
        if marks is not None:
            check_shape(marks, "(B, N)", tuple(x.shape[:2]), where=f"{where}: marks")
        if ctx.packing is None:
            return self.drop(self.proj(self._mix(x, ctx, ctx.mask, marks, ctx.rope)))
        if ctx.mask is not None or marks is not None or ctx.tap is not None:
            raise CapabilityError(
                f"{where}: packing goes with neither mask nor marks nor tap; unpack first"
            )
        mixed = over_sequences(lambda one, rope: self._mix(one, ctx, None, None, rope), x, ctx)
        return self.drop(self.proj(mixed))

    def _mix(
        self,
        x: Tensor,
        ctx: Context,
        mask: Tensor | None,
        marks: Tensor | None,
        rope: Rope | None,
    ) -> Tensor:
        """Everything between input and output projection."""
        q, k, v = self._heads(self.qkv(x), 3)
        if rope is not None:
            q, k = rope.query(q), rope.key(k)
        if ctx.tap is not None:
            place = self.site.path
            q, k, v = (
                ctx.tap(f"{place}.{name}", x) for name, x in zip("qkv", (q, k, v), strict=True)
            )
        places, real = self._globals(x, mask, marks)
        near = self._near(x, mask, places, real)
        if torch.compiler.is_exporting() or not known_length(q):
            out = self._window(q, k, v, near, places, real)
        else:
            out = self._blocks(q, k, v, near, places, real)
        out = out.transpose(1, 2).flatten(2)
        if places.shape[1]:
            rows = self._global_rows(x, mask, places, rope)
            spare = torch.where(real, places, x.shape[1])  # rows of no token go to a spare row
            index = spare[..., None].expand_as(rows)
            out = F.pad(out, (0, 0, 0, 1)).scatter(1, index, rows)[:, :-1]
        return out if mask is None else out * mask[..., None]

    def _heads(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        return x.unflatten(-1, (parts, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)

    def _globals(
        self, x: Tensor, mask: Tensor | None, marks: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Places of the global tokens (B, G), and which of them are real (B, G)."""
        batch, n = x.shape[:2]
        if marks is None and mask is None:
            places = torch.arange(min(self.config.global_tokens, n), device=x.device)
            return places.expand(batch, -1), torch.ones_like(places, dtype=torch.bool)[None]
        if marks is None:
            assert mask is not None
            chosen, count = mask, min(self.config.global_tokens, n)
        else:
            chosen = marks if mask is None else marks & mask
            count = int(chosen.sum(dim=1).max()) if batch else 0
        # the earliest chosen tokens, then others; a stable sort has no ONNX form
        order = chosen.to(torch.int64) * n - torch.arange(n, device=x.device)
        first = order.topk(count, dim=1).indices
        return first, chosen.gather(1, first)

    def _near(self, x: Tensor, mask: Tensor | None, places: Tensor, real: Tensor) -> Tensor | None:
        """(B, N) keys of the windows, None for all: global keys leave them, so that they count
        once.
        """
        if not places.shape[1]:
            return mask
        marked = torch.zeros(places.shape[0], x.shape[1], dtype=torch.bool, device=x.device)
        marked = marked.scatter(1, places, real.expand_as(places))
        return ~marked if mask is None else mask & ~marked

    def _far(self, k: Tensor, v: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the global tokens, (B, H, G, K) each."""
        index = places[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[-1])
        return k.gather(2, index), v.gather(2, index)

    def _blocks(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        near: Tensor | None,
        places: Tensor,
        real: Tensor,
    ) -> Tensor:
        """Rows of ordinary tokens, a block of queries at a time: its keys are a slice, and nothing
        is copied.
        """
        place = torch.arange(q.shape[2], device=q.device)
        far = self._far(k, v, places) if places.shape[1] else None
        bands: dict[tuple[int, int, int], Tensor] = {}
        outputs = Rows(q.shape[2])
        for rows, around in self._slices(q.shape[2]):
            shape = (rows.stop - rows.start, around.stop - around.start, rows.start - around.start)
            if shape not in bands:  # but at the ends, all blocks look alike
                bands[shape] = self._band(*shape, device=q.device)
            keys, values, allowed = k[:, :, around], v[:, :, around], bands[shape][None]
            if near is not None:
                allowed = allowed & near[:, None, around]
            if far is not None:
                seen = real[:, None].expand(-1, shape[0], -1)
                if self.config.causal:
                    seen = seen & (places[:, None] <= place[rows, None])
                batch = max(allowed.shape[0], seen.shape[0])
                allowed = torch.cat([x.expand(batch, -1, -1) for x in (allowed, seen)], dim=2)
                keys, values = torch.cat([keys, far[0]], dim=2), torch.cat([values, far[1]], dim=2)
            here = (q[:, :, rows], keys, values)
            if near is None:  # every token has a key: itself
                out = fused(*here, attn_mask=allowed[:, None])
            else:
                out = attend("sdpa", *here, allowed[:, None], causal=False, scale=None)
            outputs.append(out)
        return outputs.joined()

    def _slices(self, n: int) -> list[tuple[slice, slice]]:
        """Blocks of queries and the keys that their windows reach."""
        size = max(self.reach, _BLOCK)
        ahead = 0 if self.config.causal else self.reach
        return [
            (
                slice(start, min(start + size, n)),
                slice(max(start - self.reach, 0), min(start + size + ahead, n)),
            )
            for start in range(0, n, size)
        ]

    def _window(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        near: Tensor | None,
        places: Tensor,
        real: Tensor,
    ) -> Tensor:
        """The same as one graph for any number of tokens: one softmax over three chunks of keys and
        the global ones.
        """
        n, (c, pieces) = q.shape[2], self._chunks()
        count = chunk_count(q, c)
        pad = count * c - n
        if near is None:
            near = torch.ones(1, n, dtype=torch.bool, device=q.device)
        q = F.pad(q * q.shape[-1] ** -0.5, (0, 0, 0, pad)).unflatten(2, (count, c))
        keys, values = (_pieces(x, pad, count, pieces) for x in (k, v))
        valid = _pieces(near[:, None, :, None], pad, count, pieces).mT & self._band(
            c, pieces * c, c, device=q.device
        )
        scores = (q @ keys.mT).masked_fill(~valid, torch.finfo(q.dtype).min)
        if not places.shape[1]:
            return ((scores.softmax(dim=-1) * valid) @ values).flatten(2, 3)[:, :, :n]
        far_keys, far_values = self._far(k, v, places)
        far = real[:, None, None]
        if self.config.causal:
            far = far & (places[:, None, None] <= torch.arange(n, device=q.device)[:, None])
            far = F.pad(far, (0, 0, 0, pad)).unflatten(2, (count, c))
        else:
            far = far[:, :, None]
        distant = q.flatten(2, 3) @ far_keys.mT
        distant = distant.unflatten(2, (count, c)).masked_fill(~far, torch.finfo(q.dtype).min)
        weights = torch.cat([scores, distant], dim=-1).softmax(dim=-1)
        inside = (weights[..., : scores.shape[-1]] * valid) @ values
        outside = (weights[..., scores.shape[-1] :] * far).flatten(2, 3) @ far_values
        return (inside.flatten(2, 3) + outside)[:, :, :n]

    def _chunks(self) -> tuple[int, int]:
        """Queries per chunk, and the number of chunks of keys that one sees."""
        return max(self.reach, _CHUNK), 2 if self.config.causal else 3

    def _band(self, rows: int, columns: int, ahead: int, *, device: torch.device) -> Tensor:
        """(rows, columns): which keys lie in the windows of neighbouring queries, the first of which
        stands at column ``ahead``.
        """
        distance = torch.arange(columns, device=device) - ahead
        distance = distance - torch.arange(rows, device=device)[:, None]
        band = distance.abs() <= self.reach
        return band & (distance <= 0) if self.config.causal else band

    def _global_rows(
        self, x: Tensor, mask: Tensor | None, places: Tensor, rope: Rope | None
    ) -> Tensor:
        """What the global tokens (B, G) attend to everything with, (B, G, D)."""
        chosen = x.gather(1, places[..., None].expand(-1, -1, x.shape[2]))
        (q,) = self._heads(self.q_global(chosen), 1)
        k, v = self._heads(self.kv_global(x), 2)
        if rope is not None:
            q, k = rope.at(places).query(q), rope.key(k)
        allowed = None if mask is None else mask[:, None, None]
        if self.config.causal:
            past = places[:, None, :, None] >= torch.arange(x.shape[1], device=x.device)
            allowed = past if allowed is None else past & allowed
        out = fused(q, k, v, attn_mask=allowed)
        if allowed is not None:
            out = out * allowed.any(dim=-1, keepdim=True)
        return out.transpose(1, 2).flatten(2)

    def macs(self, n: int, m: int | None = None, *, grid: tuple[int, ...] | None = None) -> int:
        """Dense multiply-adds of one sample; ``marked`` tokens are not known and not counted."""
        dim = self.site.dim
        pairs = sum((r.stop - r.start) * (a.stop - a.start) for r, a in self._slices(n))
        total = n * dim * (3 * dim + (self.site.out_dim or dim)) + 2 * pairs * dim
        count = min(self.config.global_tokens, n)
        if count:
            total += 2 * n * count * dim  # to the global keys
            total += count * dim * dim + 2 * n * dim * dim + 2 * count * n * dim
        return total


def _pieces(x: Tensor, pad: int, count: int, pieces: int) -> Tensor:
    """(B, H, N, K) -> (B, H, count, pieces c, K): chunks of c tokens with their neighbours, zeros
    outside.
    """
    x = F.pad(x, (0, 0, 0, pad)).unflatten(2, (count, -1))
    around = F.pad(x, (0, 0, 0, 0, 1, pieces - 2))
    return torch.cat([around[:, :, i : i + count] for i in range(pieces)], dim=3)
