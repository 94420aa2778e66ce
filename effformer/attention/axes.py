"""Any token mixer along some axes of the grid."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import TypeVar

import torch
from torch import Tensor

from effformer.checks import CapabilityError
from effformer.config import Config as BaseConfig
from effformer.config import part
from effformer.context import EMPTY, Context, Ledger, Rope, check_context
from effformer.registry import Caps, attention
from effformer.site import Site

from .base import Mixer
from .multihead import Attention

__all__ = ["Axes", "Lines"]

T = TypeVar("T")
_LETTERS = "thw"


@dataclass(frozen=True, slots=True)
class Lines:
    """How the cells of a grid fall into lines along some of its axes, sample by sample.

    Attributes:
        grid: layout of the cells, row-major.
        over: letters of the axes along which a line runs; a grid has the last letters of "thw".
        front: number of tokens before the grid; every line begins with them.
    """

    grid: tuple[int, ...]
    over: str
    front: int = 0

    @property
    def letters(self) -> str:
        """The axes of the grid."""
        return _LETTERS[-len(self.grid) :]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Layout of the cells of one line."""
        return tuple(self.grid[i] for i in self._axes(inside=True))

    @property
    def length(self) -> int:
        """Number of tokens of one line, those before the grid included."""
        return self.front + prod(self.sizes)

    @property
    def count(self) -> int:
        """Number of lines of a sample."""
        return prod([self.grid[i] for i in self._axes(inside=False)])

    def fold(self, x: Tensor) -> Tensor:
        """Tokens (B, front + cells, ...) to lines (B count, front + cells of a line, ...)."""
        batch, rest = x.shape[0], x.shape[2:]
        cells = x[:, self.front :].reshape(batch, *self.grid, *rest).permute(*self._order(x.dim()))
        cells = cells.reshape(batch * self.count, prod(self.sizes), *rest)
        if not self.front:
            return cells
        return torch.cat([self.spread(x[:, : self.front]), cells], dim=1)

    def unfold(self, y: Tensor, weights: Tensor | None = None) -> Tensor:
        """The inverse of `fold`; tokens before the grid become the mean over the lines.

        Args:
            y: (B count, front + cells of a line, ...).
            weights: (B, count) weights of the lines in that mean, None for equal ones.
        """
        y = y.unflatten(0, (-1, self.count))
        rest = y.shape[3:]
        outside = [self.grid[i] for i in self._axes(inside=False)]
        cells = y[:, :, self.front :].reshape(y.shape[0], *outside, *self.sizes, *rest)
        order = self._order(cells.dim() - len(self.grid) + 1)
        back = [order.index(i) for i in range(cells.dim())]
        cells = cells.permute(*back).reshape(y.shape[0], prod(self.grid), *rest)
        if not self.front:
            return cells
        front = y[:, :, : self.front]
        if weights is None:
            return torch.cat([front.mean(dim=1), cells], dim=1)
        weights = weights.to(y.dtype)
        share = weights / weights.sum(dim=1, keepdim=True).clamp(min=1)
        share = share.reshape(*share.shape, *(1,) * (front.dim() - 2))
        return torch.cat([(front * share).sum(dim=1), cells], dim=1)

    def spread(self, x: Tensor) -> Tensor:
        """What a sample has, for each of its lines: (B, ...) to (B count, ...)."""
        return x.unsqueeze(1).expand(-1, self.count, *x.shape[1:]).flatten(0, 1)

    def positions(self, positions: Tensor, batch: int) -> Tensor:
        """Coordinates along the axes of a line, (B or 1, N, axes) to (B count, length, axes)."""
        every = self.fold(positions.expand(batch, -1, -1))
        return every[..., self._axes(inside=True)]

    def _axes(self, *, inside: bool) -> list[int]:
        return [i for i, letter in enumerate(self.letters) if (letter in self.over) == inside]

    def _order(self, dims: int) -> list[int]:
        """Permutation of (B, *grid, *rest) that brings the axes of a line behind the others; dims
        are those of (B, N, *rest).
        """
        axes = self._axes(inside=False) + self._axes(inside=True)
        behind = range(1 + len(self.grid), dims + len(self.grid) - 1)
        return [0, *(1 + i for i in axes), *behind]


@attention.register(
    "axes",
    caps=Caps(causal="optional", mask="key", rope=True, axes="w", front=True, cost="n^2"),
    paper="1912.12180",
)
class Axes(Mixer):
    """Any token mixer along some axes of the grid: every line of cells is a sequence of its own.

    With ``over="h"`` the columns of each frame of a (T, H, W) grid are mixed, one by one; with
    ``over="hw"`` each frame is. The inner mixer gets the lines as samples of a larger batch, with
    their sizes as its grid, and does what it does elsewhere; it has the place of this one in the
    model, so that a tap finds ``<path>.q`` as always, of (B lines, H, n, K).

    Tokens before the grid (class token, registers) stand at the beginning of every line, and the
    mean of what the lines make of them goes on; lines without a valid cell do not count.

    What it can do follows from the inner mixer. Key masks, rotary tables, conditioning and ledger
    are cut and joined along with the tokens. A memory, packed rows, streams and masks over pairs of
    tokens are refused.

    Differs from the paper: any mixer, any set of axes, one set a layer.

    Args:
        config: the axes and the mixer.
        site: the place in the model.

    Raises:
        CapabilityError: at call, no grid, or a grid without these axes, or a `Context` field that
            cannot be honoured.

    Reference: Axial Attention in Multidimensional Transformers, 2019, arXiv 1912.12180; Is
    Space-Time Attention All You Need for Video Understanding?, 2021, arXiv 2102.05095 (class
    token).
    """

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(BaseConfig):
        """Knobs of `Axes`.

        Attributes:
            over: letters of the axes to mix, in the order of the grid: a (T, H, W) grid has "t",
                "h" and "w", a (H, W) grid "h" and "w".
            mixer: the token mixer (or the name of an attention core).
        """

        over: str = "w"
        mixer: BaseConfig = part("attention", Attention.Config())

        def check(self) -> None:
            inside = "".join(letter for letter in _LETTERS if letter in self.over)
            if not self.over or self.over != inside:
                raise ValueError(
                    f"axes: over names axes of the grid, t, h and w, each once and in this order; "
                    f"got {self.over!r}"
                )

        def caps(self) -> Caps:
            """What the inner mixer can do on lines."""
            inner = self.mixer.caps()
            return replace(
                inner, mask="none" if inner.mask == "none" else "key", axes=self.over,
                front=inner.front or not inner.axes, cross=False, order_free=False, packed=False,
                streaming=False, width=False, sizes=False, multihead=False,
            )  # fmt: skip

        def place(self, site: Site) -> Site:
            """The place of the inner mixer in that of a view: as many tokens as a line has."""
            if site.cells is None or site.length is None:
                return replace(site, length=None, grid=(None,) * len(self.over))
            lines = Lines(site.cells, self.over, site.length - prod(site.cells))
            return replace(site, length=lines.length, grid=lines.sizes)

        def within(self, site: Site) -> tuple[BaseConfig, Site]:
            """The inner mixer, and its place on a line."""
            return self.mixer, self.place(site)

    def __init__(self, config: Axes.Config, site: Site) -> None:
        super().__init__(config, site)
        if site.cells is not None and site.length is not None:
            self._lines(site.length, site.cells)
        self.mixer: Mixer = config.mixer.build(config.place(site))

    def forward(self, x: Tensor, ctx: Context = EMPTY) -> Tensor:
        check_context(ctx, self.caps, "attention", self.site.path or "axes", x)
        lines = self._lines(x.shape[1], ctx.grid)
        inner = replace(
            ctx,
            cond=None if ctx.cond is None else _line_cond(ctx.cond, lines, x),
            time=None if ctx.time is None else lines.spread(ctx.time),
            mask=None if ctx.mask is None else lines.fold(ctx.mask),
            rope=None if ctx.rope is None else _fold_rope(ctx.rope, lines, x),
            grid=lines.sizes,
            merging=None,  # no token was merged, or the grid would not fit
            positions=None if ctx.positions is None else lines.positions(ctx.positions, x.shape[0]),
            ledger=None if ctx.ledger is None else Ledger(step=ctx.ledger.step),
        )
        y = self.mixer(lines.fold(x), inner)
        weights = None
        if inner.mask is not None:
            valid = inner.mask[:, lines.front :].any(dim=1)
            weights = valid.unflatten(0, (-1, lines.count))
        if ctx.ledger is not None and inner.ledger is not None:
            _report(inner.ledger, lines, weights, ctx.ledger)
        return lines.unfold(y, weights)

    def macs(self, n: int, m: int | None = None, *, grid: tuple[int, ...] | None = None) -> int:
        lines = self._lines(n, self.site.cells if grid is None else grid)
        return lines.count * self.mixer.macs(lines.length, grid=lines.sizes)

    def _lines(self, n: int, grid: tuple[int, ...] | None) -> Lines:
        where, over = self.site.path or "axes", self.config.over
        if grid is None:
            able = ", ".join(attention.names(axes=""))
            raise CapabilityError(
                f"{where}: 'axes' needs the layout of the tokens, ctx.grid; choices that do not: {able}"
            )
        if n < prod(grid):
            raise ValueError(f"{where}: {n} tokens do not fill the grid {grid}")
        lines = Lines(grid, over, n - prod(grid))
        if not set(over) <= set(lines.letters):
            raise CapabilityError(
                f"{where}: over={over!r}, but the grid {grid} has only axes {', '.join(lines.letters)}"
            )
        return lines


def _line_cond(cond: Tensor, lines: Lines, x: Tensor) -> Tensor:
    """Of samples (B, Dc) for their lines, of tokens (B, N, Dc) along these."""
    if cond.dim() == 2:
        return lines.spread(cond)
    return lines.fold(cond.expand(x.shape[0], -1, -1))


def _fold_rope(rope: Rope, lines: Lines, x: Tensor) -> Rope:
    """Every token keeps its own angles."""

    def fold(table: Tensor | None) -> Tensor | None:
        if table is None:
            return None
        table = table[(None,) * (4 - table.dim())]
        table = table.expand(x.shape[0], -1, x.shape[1], -1).transpose(1, 2)
        return lines.fold(table).transpose(1, 2)

    cos, sin = fold(rope.cos), fold(rope.sin)
    assert cos is not None
    assert sin is not None
    return replace(rope, cos=cos, sin=sin, key_cos=fold(rope.key_cos), key_sin=fold(rope.key_sin))


def _report(lines_ledger: Ledger, lines: Lines, weights: Tensor | None, ledger: Ledger) -> None:
    """What was reported for lines, for samples; all lines of a sample cost the same."""
    for name, loss in lines_ledger.losses.items():
        ledger.loss(name, loss)
    for name, fraction in lines_ledger.executed.items():
        share = lines_ledger.shares.get(name)
        fraction = fraction if share is None else share.fraction
        cost = None if share is None else share.cost * lines.count
        ledger.work(name, fraction.unflatten(0, (-1, lines.count)).mean(dim=1), cost)
    for name, choice in lines_ledger.choices.items():
        ledger.choose(name, lines.unfold(choice.gate, weights), choice.cost)
