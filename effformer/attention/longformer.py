"""Longformer: every token sees a window, and a few tokens see and are seen by everything."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effformer.checks import CapabilityError, check_shape
from effformer.config import Config as BaseConfig
from effformer.context import EMPTY, Context, Site, check_context
from effformer.registry import Caps, attention

from .base import Mixer
from .slices import over_heads, over_sequences

__all__ = ["Longformer"]

_CHUNK = 32
_CAPS = Caps(causal="optional", mask="key", packed=True, cost="n")


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
    output projection.

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

        window: int = 512
        global_tokens: int = 0
        marked: bool = False
        causal: bool = False
        qkv_bias: bool = True
        proj_bias: bool = True

        def __post_init__(self) -> None:
            if self.window < 2 or self.window % 2:
                raise ValueError(f"longformer: window must be even and positive, got {self.window}")
            if self.global_tokens < 0:
                raise ValueError(
                    f"longformer: global_tokens must be at least 0, got {self.global_tokens}"
                )
            if self.marked and self.global_tokens:
                raise ValueError("longformer: global tokens are either leading or marked, not both")

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
        check_context(ctx, _CAPS, "attention", where)
        if self.config.marked != (marks is not None):
            raise ValueError(
                f"{where}: marks of global tokens go with marked=True; global_tokens=1 makes the "
                "first token of every sample global"
            )
        if marks is not None:
            check_shape(marks, "(B, N)", tuple(x.shape[:2]), where=f"{where}: marks")
        if ctx.packing is None:
            return self.drop(self.proj(self._mix(x, ctx, ctx.mask, marks)))
        if ctx.mask is not None or marks is not None or ctx.tap is not None:
            raise CapabilityError(
                f"{where}: packing goes with neither mask nor marks nor tap; unpack first"
            )
        mixed = over_sequences(lambda one: self._mix(one, ctx, None, None), x, ctx.packing)
        return self.drop(self.proj(mixed))

    def _mix(self, x: Tensor, ctx: Context, mask: Tensor | None, marks: Tensor | None) -> Tensor:
        """Everything between input and output projection."""
        q, k, v = self._heads(self.qkv(x), 3)
        if ctx.tap is not None:
            place = self.site.path
            q, k, v = (
                ctx.tap(f"{place}.{name}", x) for name, x in zip("qkv", (q, k, v), strict=True)
            )
        places, real = self._globals(x, mask, marks)

        def mix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return self._window(q, k, v, mask, places, real)

        out = over_heads(mix, q, k, v).transpose(1, 2).flatten(2)
        if places.shape[1]:
            rows = self._global_rows(x, mask, places)
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

    def _window(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, places: Tensor, real: Tensor
    ) -> Tensor:
        """Rows of ordinary tokens: one softmax over window and global keys."""
        n, (c, pieces) = q.shape[2], self._chunks(q.shape[2])
        near = torch.ones(1, n, dtype=torch.bool, device=q.device) if mask is None else mask
        if places.shape[1]:  # global keys leave the window, so that they count once
            marked = torch.zeros(places.shape[0], n, dtype=torch.bool, device=q.device)
            near = near & ~marked.scatter(1, places, real.expand_as(places))
        q = F.pad(q * q.shape[-1] ** -0.5, (0, 0, 0, (-n) % c)).unflatten(2, (-1, c))
        keys, values = (_pieces(x, c, pieces) for x in (k, v))
        valid = _pieces(near[:, None, :, None], c, pieces).mT & self._band(c, pieces, q.device)
        scores = (q @ keys.mT).masked_fill(~valid, torch.finfo(q.dtype).min)
        if not places.shape[1]:
            return ((scores.softmax(dim=-1) * valid) @ values).flatten(2, 3)[:, :, :n]
        index = places[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[-1])
        far = real[:, None, None]
        if self.config.causal:
            far = far & (places[:, None, None] <= torch.arange(n, device=q.device)[:, None])
            far = F.pad(far, (0, 0, 0, (-n) % c)).unflatten(2, (-1, c))
        else:
            far = far[:, :, None]
        distant = q.flatten(2, 3) @ k.gather(2, index).mT
        distant = distant.unflatten(2, (-1, c)).masked_fill(~far, torch.finfo(q.dtype).min)
        weights = torch.cat([scores, distant], dim=-1).softmax(dim=-1)
        inside = (weights[..., : scores.shape[-1]] * valid) @ values
        outside = (weights[..., scores.shape[-1] :] * far).flatten(2, 3) @ v.gather(2, index)
        return (inside.flatten(2, 3) + outside)[:, :, :n]

    def _chunks(self, n: int) -> tuple[int, int]:
        """Queries per chunk, and the number of chunks of keys that one sees."""
        c = max(self.reach, _CHUNK)
        if not torch.compiler.is_exporting() and n <= c:
            return max(n, 1), 1
        return c, 2 if self.config.causal else 3

    def _band(self, c: int, pieces: int, device: torch.device) -> Tensor:
        """(c, pieces c): which keys of the neighbouring chunks lie in the window."""
        first = 0 if pieces == 1 else c
        distance = torch.arange(pieces * c, device=device) - first
        distance = distance - torch.arange(c, device=device)[:, None]
        band = distance.abs() <= self.reach
        return band & (distance <= 0) if self.config.causal else band

    def _global_rows(self, x: Tensor, mask: Tensor | None, places: Tensor) -> Tensor:
        """What the global tokens (B, G) attend to everything with, (B, G, D)."""
        chosen = x.gather(1, places[..., None].expand(-1, -1, x.shape[2]))
        (q,) = self._heads(self.q_global(chosen), 1)
        k, v = self._heads(self.kv_global(x), 2)
        allowed = None if mask is None else mask[:, None, None]
        if self.config.causal:
            past = places[:, None, :, None] >= torch.arange(x.shape[1], device=x.device)
            allowed = past if allowed is None else past & allowed
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
        if allowed is not None:
            out = out * allowed.any(dim=-1, keepdim=True)
        return out.transpose(1, 2).flatten(2)

    def macs(self, n: int, m: int | None = None, *, grid: tuple[int, ...] | None = None) -> int:
        """Dense multiply-adds of one sample; ``marked`` tokens are not known and not counted."""
        dim, c = self.site.dim, self._chunks(n)
        rows = -(-n // c[0]) * c[0]
        total = n * dim * (3 * dim + (self.site.out_dim or dim)) + 2 * rows * c[1] * c[0] * dim
        count = min(self.config.global_tokens, n)
        if count:
            total += 2 * rows * count * dim  # to the global keys
            total += count * dim * dim + 2 * n * dim * dim + 2 * count * n * dim
        return total


def _pieces(x: Tensor, c: int, pieces: int) -> Tensor:
    """(B, H, N, K) -> (B, H, N / c, pieces c, K): chunks with their neighbours, zeros outside."""
    x = F.pad(x, (0, 0, 0, (-x.shape[2]) % c)).unflatten(2, (-1, c))
    if pieces == 1:
        return x
    around = F.pad(x, (0, 0, 0, 0, 1, pieces - 2))
    last = x.shape[2]
    return torch.cat([around[:, :, i : i + last] for i in range(pieces)], dim=3)
