"""Performer: softmax attention estimated by positive random features."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from effformer.checks import CapabilityError
from effformer.context import EMPTY, Context
from effformer.nn.precision import exactly, widened
from effformer.registry import Caps, core
from effformer.site import Site
from effformer.values import Count, NonNegative, Positive, Seed

from .base import Core, CoreConfig
from .slices import Rows, chunk_count, known_length, pieces, token_slices

__all__ = ["Performer", "PerformerState", "orthogonal_rows"]


class PerformerState(NamedTuple):
    """Sums over the past of a causal Performer; the size does not depend on the number of tokens.

    Attributes:
        top: (B, H, 1) largest ``w . x'`` of the keys so far, the scale of the sums below.
        k: (B, H, R) sum of ``exp(exponent - top)``.
        kv: (B, H, R, V) the same times values.
        tokens: (B, H, 1) number of tokens.
        v: (B, H, V) sum of values.
    """

    top: Tensor
    k: Tensor
    kv: Tensor
    tokens: Tensor
    v: Tensor


@core.register(
    "performer",
    caps=Caps(
        causal="optional",
        cross=True,
        order_free=True,
        mask="key",
        rope=True,
        packed=True,
        streaming=True,
        width=True,
        cost="n",
    ),
    paper="2009.14794",
)
class Performer(Core):
    """FAVOR+ attention: ``phi(q_i) sum_j phi(k_j)^T v_j / (phi(q_i) . sum_j phi(k_j))``.

    With x' = K^-0.25 x and R random rows w, ``phi(x) = R^-0.5 (exp(w . x' - |x'|^2 / 2 - c) +
    eps)``; c, the largest ``w . x'`` of the token (queries) or of all keys, keeps exponentials
    below one and takes no gradient. The ReLU kernel is ``relu(w . x') + eps``. Rows are orthogonal
    in blocks of K; they are the buffer ``projection``, drawn from ``seed`` and the layer's index
    and saved with the weights.

    Rotary positions turn queries and keys before the features, ``phi(R_i q_i) . phi(R_j k_j)`` in
    numerator and denominator: |x| stays, weights stay positive, and the estimate is that of softmax
    attention with the same positions.

    The causal form takes c over the keys so far and rescales its sums when c grows: row i is what
    the parallel form gives on tokens <= i. A graph for any number of tokens holds all chunks side by
    side and sums their states by a matrix, (N / chunk)^2 K R multiply-adds per head more.

    Differs from the paper: the published causal form takes c over all keys, so that eps lets the
    future through (``stabilizer="global"`` reproduces it); masked keys leave the normaliser too; the
    published code draws rows of a biased distribution (signs of the QR decomposition).

    Args:
        config: the knobs.
        site: the place in the model; ``site.dim / site.heads`` is the width of a head.

    Reference: Rethinking Attention with Performers, 2020, arXiv 2009.14794.
    """

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(CoreConfig):
        """Knobs of `Performer`.

        Attributes:
            features: number of random rows R; None means K ln K.
            kernel: "softmax" or "relu".
            eps: added to every feature; None means 1e-4 (softmax) or 1e-3 (relu).
            causal_eps: added to every component of the summed key features, in the normaliser of
                the causal form.
            lengths: lengths of the rows: of fresh Gaussian vectors (unbiased), or "constant"
                K^0.5 (smaller variance, slightly biased).
            stabilizer: c of the causal form: "running", or "global" over all keys, which leaks.
            seed: seed of the rows.
            chunk: tokens per chunk of the causal form; changes speed, not results.
        """

        features: Count | None = None
        kernel: Literal["softmax", "relu"] = "softmax"
        eps: NonNegative | None = None
        causal_eps: Positive = 1e-6
        lengths: Literal["gaussian", "constant"] = "gaussian"
        stabilizer: Literal["running", "global"] = "running"
        seed: Seed = 0
        chunk: Count = 128

    projection: Tensor

    def __init__(self, config: Performer.Config, site: Site) -> None:
        super().__init__(config, site)
        width = site.dim // site.heads
        self.features = config.features or max(1, int(width * math.log(width)))
        self.softmax = config.kernel == "softmax"
        self.eps = (1e-4 if self.softmax else 1e-3) if config.eps is None else config.eps
        self.register_buffer("projection", torch.empty(self.features, width))
        self.redraw(torch.Generator().manual_seed(config.seed + site.layer))

    def redraw(self, generator: torch.Generator) -> None:
        """Draw new rows in place, as training may do now and then."""
        rows, width = self.projection.shape

        def draw(count: int) -> Tensor:
            return torch.randn(count, width, generator=generator, device="cpu")

        blocks = [_uniform_rows(draw(width)) for _ in range(-(-rows // width))]
        if self.config.lengths == "gaussian":
            lengths = draw(rows).norm(dim=1, keepdim=True)
        else:
            lengths = torch.full((rows, 1), width**0.5, device="cpu")
        self.projection.copy_(torch.cat(blocks)[:rows] * lengths)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context = EMPTY) -> Tensor:
        if (
            known_length(k) and not k.shape[2]
        ):  # no key has the largest value; all hidden give as much
            return q.new_zeros(*q.shape[:3], v.shape[3])
        mask = None if ctx.mask is None else ctx.mask[:, None]
        with exactly(q):
            wide = widened(q), widened(k), widened(v)
            mixed = (
                self._scan(*wide, mask, None)[0] if self.config.causal else self._mix(*wide, mask)
            )
        return mixed.to(v.dtype)

    def _mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """The parallel form, a few tokens at a time.

        The factor R^-0.5 cancels, and eps enters through sums: ``(e + eps) s = e s + eps sum(s)``.
        """
        sums = self._key_sums(k, v, mask)
        floor = self.eps * sums.sum(dim=2, keepdim=True)
        outputs = Rows(q.shape[2])
        slices = token_slices(q.shape[2], q.shape[0] * q.shape[1] * self.features, device=q.device)
        for some in pieces(q, slices):
            h, top = self._exponents(some)
            phi = (h - top[..., None]).exp() if self.softmax else h.relu()
            total = phi @ sums + floor
            normaliser = total[..., -1:]
            tiny = torch.finfo(total.dtype).tiny  # a row without a key is zero
            outputs.append(total[..., :-1] / normaliser.clamp(min=tiny))
        return outputs.joined()

    def _key_sums(self, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """``sum_j phi(k_j)^T [v_j, 1]``, (B, H, R, V + 1), up to the factor of the stabilizer."""
        v = F.pad(v, (0, 1), value=1.0)
        v = v if mask is None else v * mask[..., None]
        sums, top = None, k.new_full((*k.shape[:2], 1, 1), _lowest(k))
        slices = token_slices(k.shape[2], k.shape[0] * k.shape[1] * self.features, device=k.device)
        for rows, keys, values in zip(slices, pieces(k, slices), pieces(v, slices), strict=True):
            h, largest = self._exponents(keys)
            if not self.softmax:
                piece, fade = h.relu(), torch.ones_like(top)
            else:
                if mask is not None:  # masked keys neither set the scale nor overflow under it
                    largest = largest.masked_fill(~mask[:, :, rows], _lowest(h))
                    h = h.masked_fill(~mask[:, :, rows, None], -torch.inf)
                new = torch.maximum(top, largest.amax(dim=-1)[..., None, None])
                piece, fade, top = (h - new).exp(), (top - new).exp(), new
            part = piece.mT @ values
            sums = part if sums is None else sums * fade + part
        assert sums is not None
        return sums + self.eps * v.sum(dim=2, keepdim=True)

    def query_features(self, q: Tensor) -> Tensor:
        """Phi of queries (B, H, N, K) -> (B, H, N, R)."""
        h, top = self._exponents(q)
        if not self.softmax:
            return h.relu() + self.eps
        return ((h - top[..., None]).exp() + self.eps) * self._scale

    def key_features(self, k: Tensor, mask: Tensor | None = None) -> Tensor:
        """Phi of keys (B, H, M, K) -> (B, H, M, R), zero where mask (B, 1, M) is False."""
        h, top = self._exponents(k)
        if not self.softmax:
            phi = h.relu() + self.eps
        else:
            if mask is not None:  # masked keys neither set the scale nor overflow under it
                top = top.masked_fill(~mask, _lowest(h))
                h = h.masked_fill(~mask[..., None], -torch.inf)
            phi = ((h - top.amax(dim=-1)[..., None, None]).exp() + self.eps) * self._scale
        return phi if mask is None else phi * mask[..., None]

    @property
    def _scale(self) -> float:
        return self.features**-0.5 if self.softmax else 1.0

    def _exponents(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``w . x' - |x'|^2 / 2`` (softmax) or ``w . x'`` (relu), and the largest ``w . x'``."""
        x = x * x.shape[-1] ** -0.25
        h = x @ self.projection.to(x.dtype).T
        top = h.amax(dim=-1).detach()
        return (h - 0.5 * x.square().sum(dim=-1, keepdim=True) if self.softmax else h), top

    def _largest(self, k: Tensor, mask: Tensor | None) -> Tensor:
        """The largest ``w . x'`` of all keys, (B, H, 1)."""
        tops = self._exponents(k)[1]
        tops = tops if mask is None else tops.masked_fill(~mask, _lowest(tops))
        return tops.amax(dim=-1, keepdim=True)

    def _scan(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, state: PerformerState | None
    ) -> tuple[Tensor, PerformerState]:
        """The causal form on the next tokens, chunk by chunk."""
        top = self._largest(k, mask) if self.config.stabilizer == "global" else None
        if state is None:
            state = _empty(v.shape[0], v.shape[1], self.features, v.shape[-1], v)
        if not known_length(q):
            return self._side_by_side(q, k, v, mask, top, state)
        outputs = Rows(q.shape[2])
        for start in range(0, q.shape[2], self.config.chunk):
            rows = slice(start, start + self.config.chunk)
            real = None if mask is None else mask[:, :, rows]
            keys = self._keys(k[:, :, rows], real, top)
            weights = self.query_features(q[:, :, rows])
            out, state = self._chunk(weights, *keys, v[:, :, rows], real, state)
            outputs.append(out)
        return outputs.joined(), state

    def _keys(self, k: Tensor, mask: Tensor | None, top: Tensor | None) -> tuple[Tensor, Tensor]:
        """Exponents of keys (B, H, n, R), or their features ("relu"), and the scale of each; ``top``
        is the same for all.
        """
        h, tops = self._exponents(k)
        if mask is not None:
            tops = tops.masked_fill(~mask, _lowest(tops))
            h = h.masked_fill(~mask[..., None], -torch.inf)
        if not self.softmax:
            return h.relu() + self.eps, torch.zeros_like(tops)
        return h, tops if top is None else top.expand_as(tops)

    def _side_by_side(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        top: Tensor | None,
        state: PerformerState,
    ) -> tuple[Tensor, PerformerState]:
        """All chunks at once, as heads of their own, for graphs of any number of tokens."""
        (batch, heads, n), chunk = q.shape[:3], self.config.chunk
        count = chunk_count(q, chunk)
        pad = count * chunk - n
        real = torch.ones_like(q[:, :1, :, 0], dtype=torch.bool) if mask is None else mask
        real = F.pad(real, (0, pad))
        q, k, v = (F.pad(x, (0, 0, 0, pad)) for x in (q, k, v))

        def cut(x: Tensor) -> Tensor:
            return x.unflatten(2, (count, chunk)).flatten(1, 2)

        h, tops = map(cut, self._keys(k, real, top))
        rows = cut(real.expand(batch, heads, -1))
        before, last = self._states(h, tops, cut(v), rows, state)
        out, _ = self._chunk(cut(self.query_features(q)), h, tops, cut(v), rows, before)
        return out.unflatten(1, (heads, -1)).flatten(2, 3)[:, :, :n], last

    def _states(
        self, h: Tensor, top: Tensor, v: Tensor, mask: Tensor, start: PerformerState
    ) -> tuple[PerformerState, PerformerState]:
        """The states before the chunks, (B, H c, ...) as they are, and the one after the last."""
        heads = start.top.shape[1]
        most, ones = top.amax(dim=-1, keepdim=True), mask.to(v.dtype)[..., None]
        k = ((h - most[..., None]).exp() if self.softmax else h) * ones
        v, most = v * ones, most.squeeze(-1).unflatten(1, (heads, -1))
        place = torch.arange(most.shape[2], device=v.device)
        earlier = F.pad(place + 1, (1, 0))[:, None] > place  # (c + 1, c)
        tops = most[:, :, None].masked_fill(~earlier, _lowest(top)).amax(dim=-1)
        tops = torch.maximum(tops, start.top)
        share = (most[:, :, None] - tops[..., None]).masked_fill(~earlier, -torch.inf).exp()
        fade = (start.top - tops).exp()[..., None]

        def summed(weights: Tensor, x: Tensor) -> Tensor:
            return weights @ x.flatten(2).unflatten(1, (heads, -1))

        count = earlier.to(v.dtype)
        kv = summed(share, k.mT @ v) + fade * start.kv.flatten(2)[:, :, None]
        states = (
            tops[..., None],
            summed(share, k.sum(dim=2)) + fade * start.k[:, :, None],
            kv.unflatten(3, (-1, v.shape[-1])),
            summed(count, ones.sum(dim=2)) + start.tokens[:, :, None],
            summed(count, v.sum(dim=2)) + start.v[:, :, None],
        )
        before = PerformerState(*(x[:, :, :-1].flatten(1, 2) for x in states))
        return before, PerformerState(*(x[:, :, -1] for x in states))

    def _chunk(
        self,
        q: Tensor,
        h: Tensor,
        top: Tensor,
        v: Tensor,
        mask: Tensor | None,
        past: PerformerState,
    ) -> tuple[Tensor, PerformerState]:
        """One chunk: every exponential is of a difference that is at most zero."""
        lower = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()
        # a running maximum that has an ONNX form, unlike cummax
        running = top[:, :, None].masked_fill(~lower, _lowest(top)).amax(dim=-1)
        top = torch.maximum(running, past.top)
        k = (h - top[..., None]).exp() if self.softmax else h
        ones = torch.ones_like(top) if mask is None else mask.to(v.dtype).expand_as(top)
        k, v = k * ones[..., None], v * ones[..., None]
        decay = (top[:, :, None] - top[..., None]).masked_fill(~lower, -torch.inf).exp()
        carry = (past.top - top).exp()[..., None]
        width = q.sum(dim=-1, keepdim=True)
        floor = width * (self.eps if self.softmax else 0.0)
        scores = (q @ k.mT) * decay + floor * (lower * ones[:, :, None])
        out = scores @ v + (q @ past.kv) * carry + floor * past.v[:, :, None]
        total = scores.sum(dim=-1, keepdim=True) + floor * past.tokens[..., None]
        total = total + (q * past.k[:, :, None]).sum(dim=-1, keepdim=True) * carry
        last = top[..., -1:]
        fade, k = (past.top - last).exp(), k * (top - last).exp()[..., None]
        state = PerformerState(
            last, past.k * fade + k.sum(dim=2), past.kv * fade[..., None] + k.mT @ v,
            past.tokens + ones.sum(dim=-1, keepdim=True), past.v + v.sum(dim=2),
        )  # fmt: skip
        total = total * self._scale + self.config.causal_eps * width
        return out * self._scale / total, state

    def macs(self, n: int, m: int | None = None, *, heads: int, head_dim: int) -> int:
        keys, r = n if m is None else m, self.features
        if not self.config.causal:
            return heads * (n + keys) * r * (2 * head_dim + 1)
        chunk = self.config.chunk
        squares = (n // chunk) * chunk**2 + (n % chunk) ** 2
        looks = 5 if self.config.stabilizer == "global" else 4
        return heads * (looks * n * r * head_dim + squares * (r + head_dim))

    def init_state(self, batch: int, *, heads: int, head_dim: int, like: Tensor) -> PerformerState:
        """Zero sums, in float32 at least."""
        return _empty(batch, heads, self.features, head_dim, widened(like))

    def step(
        self, q: Tensor, k: Tensor, v: Tensor, state: PerformerState, ctx: Context = EMPTY
    ) -> tuple[Tensor, PerformerState]:
        """Feed the next tokens; the state has a fixed size.

        Raises:
            CapabilityError: a stabilizer that would need the tokens to come.
        """
        if self.config.stabilizer == "global":
            raise CapabilityError(
                f"{self.site.path or 'performer'}: stabilizer='global' looks at later tokens and "
                "cannot stream; use stabilizer='running'"
            )
        with exactly(q):
            out, state = self._scan(widened(q), widened(k), widened(v), None, state)
        return out.to(v.dtype), state


def orthogonal_rows(gaussian: Tensor) -> Tensor:
    """Orthonormal rows (K, K) from a Gaussian (K, K): the transposed Q of its QR decomposition."""
    return torch.linalg.qr(gaussian).Q.mT


def _uniform_rows(gaussian: Tensor) -> Tensor:
    """`orthogonal_rows` with the signs that the process of Gram and Schmidt gives them. Those of the
    library favour one side of the space, a bias that no number of features would mend.
    """
    rows = orthogonal_rows(gaussian)
    return rows * (rows * gaussian.mT).sum(dim=1, keepdim=True).sign()


def _lowest(x: Tensor) -> float:
    """An exponent below all others whose differences stay finite."""
    return torch.finfo(x.dtype).min / 4


def _empty(batch: int, heads: int, rows: int, width: int, like: Tensor) -> PerformerState:
    top = like.new_full((batch, heads, 1), _lowest(like))
    square = like.new_zeros(batch, heads, rows, width)
    one = like.new_zeros(batch, heads, 1)
    return PerformerState(top, square[..., 0], square, one, square[:, :, 0])
