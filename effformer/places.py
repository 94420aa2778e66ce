"""Where tokens stand: rotary tables, several sequences in one row, tokens that were merged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from .checks import check_mask, check_values, shown
from .values import Natural, checker

__all__ = ["Merging", "Packing", "Rope", "rotate"]


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> Tensor:
    """Rotate the pairs of the last dimension; x (..., N, K), tables (N, K) or broadcastable to x, in
    which both members of a pair have the same angle.

    Outside of graphs, pairs that lie next to each other are complex numbers: one pass over x instead
    of four.
    """
    if not interleaved:
        first, second = x.chunk(2, dim=-1)
        turned = torch.cat([-second, first], dim=-1)
        return torch.addcmul(x * cos, turned, sin)
    if not torch.compiler.is_compiling() and x.dtype in (torch.float32, torch.float64):
        turns = torch.complex(cos[..., ::2], sin[..., ::2])
        pairs = x.unflatten(-1, (-1, 2))
        if any(stride % 2 for stride in (*pairs.stride()[:-1], x.storage_offset())):
            pairs = pairs.contiguous()
        return torch.view_as_real(torch.view_as_complex(pairs) * turns).flatten(-2)
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-second, first], dim=-1).flatten(-2)
    return torch.addcmul(x * cos, turned, sin)


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embedding, tables of the tokens as they stand.

    ``rotate(x) = x * cos + rotate_pairs(x) * sin``; tables are (N, K), (H, N, K) or (B, H, N, K),
    axes of length 1 included. A token without a place has cos = 1 and sin = 0.

    Reference: RoFormer: Enhanced Transformer with Rotary Position Embedding, 2021, arXiv
    2104.09864.

    Attributes:
        cos: cosine table of the queries.
        sin: sine table of the queries.
        key_cos: cosine table of the keys if they are other tokens (cross attention), else None.
        key_sin: likewise.
        interleaved: pairs are (0, 1), (2, 3), ... (True) or (0, K/2), (1, K/2 + 1), ... (False).
    """

    cos: Tensor
    sin: Tensor
    key_cos: Tensor | None = None
    key_sin: Tensor | None = None
    interleaved: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.interleaved, bool):
            raise TypeError(f"rope: interleaved is True or False, got {shown(self.interleaved)}")
        for cos, sin in ((self.cos, self.sin), (self.key_cos, self.key_sin)):
            if cos is None and sin is None:
                continue
            if not (isinstance(cos, Tensor) and isinstance(sin, Tensor)):
                raise TypeError("rope: a cosine table goes with a sine table, both tensors")
            if not (cos.is_floating_point() and sin.is_floating_point()) or cos.dim() < 2:
                raise ValueError(
                    f"rope: tables are floating-point (N, K), (H, N, K) or (B, H, N, K), got {cos.dtype} "
                    f"{tuple(cos.shape)} and {sin.dtype} {tuple(sin.shape)}"
                )
            if cos.dim() != sin.dim() or cos.shape[-1] != sin.shape[-1] or cos.device != sin.device:
                raise ValueError(
                    f"rope: cosines are {tuple(cos.shape)} on {cos.device}, sines {tuple(sin.shape)} on "
                    f"{sin.device}; both tables have one shape"
                )

    def query(self, x: Tensor) -> Tensor:
        """Turn queries, or features of queries, (B, H, N, K)."""
        return self._turn(x, self.cos, self.sin)

    def key(self, x: Tensor) -> Tensor:
        """Turn keys, or features of keys, (B, H, M, K)."""
        if self.key_cos is None or self.key_sin is None:
            return self._turn(x, self.cos, self.sin)
        return self._turn(x, self.key_cos, self.key_sin)

    def own(self) -> Rope:
        """The tables of the tokens alone, without those of a memory."""
        return Rope(self.cos, self.sin, interleaved=self.interleaved)

    @staticmethod
    def joined(
        pieces: Sequence[Rope | None], counts: Sequence[int], *, like: Tensor
    ) -> Rope | None:
        """The tables of tokens that stand one behind the other; a piece without any has no places.

        Args:
            pieces: tables, queries and keys alike.
            counts: number of tokens of each piece.
            like: tensor whose device and dtype tables without places get; its last dimension is K.

        Raises:
            ValueError: pairs that lie next to each other in one piece, and apart in another.
        """
        kinds = {rope.interleaved for rope in pieces if rope is not None}
        if not kinds:
            return None
        if len(kinds) > 1:
            raise ValueError("rope: interleaved pairs and halves do not mix")
        cos, sin = [], []
        for rope, count in zip(pieces, counts, strict=True):
            still = like.new_ones(count, like.shape[-1])
            cos.append(still if rope is None else rope.cos)
            sin.append(torch.zeros_like(still) if rope is None else rope.sin)
        front = torch.broadcast_shapes(*(table.shape[:-2] for table in cos))
        cosines, sines = (
            torch.cat([t.expand(*front, *t.shape[-2:]) for t in tables], dim=-2)
            for tables in (cos, sin)
        )
        return Rope(cosines, sines, interleaved=kinds.pop())

    def tokens(self, rows: slice | Tensor) -> Rope:
        """The tables of some tokens (a slice, or int64 indices), queries and keys alike."""
        # `torch.compile` takes a slice that a function finds around it for a constant
        return self._mapped(lambda table, rows: table[..., rows, :], rows)

    def at(self, places: Tensor) -> Rope:
        """The tables of the tokens at some places of every sample: (B, G) -> (B, 1 or H, G, K)."""

        def pick(table: Tensor) -> Tensor:
            table = table[(None,) * (4 - table.dim())].expand(places.shape[0], -1, -1, -1)
            index = places[:, None, :, None].expand(-1, table.shape[1], -1, table.shape[3])
            return table.gather(2, index)

        return self._mapped(pick)

    def heads(self, some: slice | Tensor) -> Rope:
        """The tables of some heads, a slice of them or int64 indices."""
        alone = self.cos.dim() < 3 or self.cos.shape[-3] == 1
        return self if alone else self._mapped(lambda table, some: table[..., some, :, :], some)

    def halved(self) -> Rope:
        """Tables for heads of half the width: every second pair.

        Raises:
            ValueError: the width is not divisible by 4.
        """
        width = self.cos.shape[-1]
        if width % 4:
            raise ValueError(f"rotary tables of width {width} have no half of whole pairs")

        def half(table: Tensor) -> Tensor:
            if self.interleaved:
                return table.unflatten(-1, (-1, 4))[..., :2].flatten(-2)
            return table[..., ::2]

        return self._mapped(half)

    def batch(self, count: int) -> Rope:
        """Tables of ``count`` sequences that stand one behind the other, as a batch of them."""

        def fold(table: Tensor) -> Tensor:
            row = table[0] if table.dim() == 4 else table
            row = row if row.dim() == 3 else row[None]
            return row.unflatten(1, (count, -1)).transpose(0, 1)

        return self._mapped(fold)

    def row(self, count: int) -> Rope:
        """Tables of ``count`` samples that stand in one row, sample behind sample."""

        def flat(table: Tensor) -> Tensor:
            table = table[(None,) * (4 - table.dim())].expand(count, -1, -1, -1)
            return table.transpose(0, 1).flatten(1, 2)

        return self._mapped(flat)

    def samples(self, index: Tensor) -> Rope:
        """The tables of some samples: ``index`` (B',) picks from the batch, with repetition."""
        alone = self.cos.dim() < 4 or self.cos.shape[0] == 1
        return self if alone else self._mapped(lambda table: table.index_select(0, index))

    def _mapped(self, change: Callable[..., Tensor], *given: Any) -> Rope:
        """The tables changed; ``given`` are further arguments of ``change``."""
        cos, sin = (None if x is None else change(x, *given) for x in (self.key_cos, self.key_sin))
        return Rope(change(self.cos, *given), change(self.sin, *given), cos, sin, self.interleaved)

    def _turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        if cos.shape[-1] != x.shape[-1]:
            raise ValueError(
                f"rope: tables for heads of width {cos.shape[-1]}, but these have {x.shape[-1]}"
            )
        return rotate(x, cos.to(x.dtype), sin.to(x.dtype), interleaved=self.interleaved)


_LENGTHS, _PADDED = checker(tuple[Natural, ...]), checker(Natural)


@dataclass(frozen=True, slots=True)
class Packing:
    """Several sequences in one row: only real tokens are stored, sequence after sequence.

    Attributes:
        indices: (T,) int64, flat index b * padded + position of each packed row.
        offsets: (B + 1,) int64, rows of sample b are ``offsets[b]:offsets[b + 1]``.
        lengths: number of tokens of each sample.
        padded: length of the padded layout.

    Reference: ByteTransformer: A High-Performance Transformer Boosted for Variable-Length Inputs,
    2022, arXiv 2210.03052. Differs from the paper: any key mask packs (left padding, holes), not
    right padding only.
    """

    indices: Tensor
    offsets: Tensor
    lengths: tuple[int, ...]
    padded: int

    def __post_init__(self) -> None:
        for name in ("indices", "offsets"):
            table = getattr(self, name)
            if not isinstance(table, Tensor) or table.dtype != torch.int64 or table.dim() != 1:
                raise TypeError(
                    f"packing: {name} must be a row of int64 numbers; see Packing.from_mask"
                )
        if torch.compiler.is_compiling():
            return
        _LENGTHS(self.lengths, "packing: lengths")
        _PADDED(self.padded, "packing: padded")
        counts = (self.indices.numel(), self.offsets.numel() - 1)
        if counts != (sum(self.lengths), len(self.lengths)):
            raise ValueError(
                f"packing: {counts[0]} indices of {counts[1]} samples, but lengths {self.lengths}; see "
                "Packing.from_mask"
            )

    @classmethod
    def from_mask(cls, mask: Tensor) -> Packing:
        """Build from a (B, N) mask, True = real token.

        Raises:
            TypeError: the mask is not bool.
            ValueError: it is not (B, N), or on the meta device.
        """
        check_mask(mask, where="Packing.from_mask: mask")
        check_values(mask, where="Packing.from_mask: mask")
        if mask.dim() != 2:
            raise ValueError(f"Packing.from_mask: expected a mask (B, N), got {tuple(mask.shape)}")
        lengths = mask.sum(1)
        offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        indices = mask.flatten().nonzero().flatten()
        return cls(indices, offsets, tuple(lengths.tolist()), mask.shape[1])

    @classmethod
    def joined(cls, first: Packing, second: Packing) -> tuple[Packing, Tensor]:
        """Rows of two packings as one: behind the tokens of ``first`` each sample has those of
        ``second``.

        Returns:
            The packing, and where its tokens stand in ``cat([first row, second row])``, (T,) int64.

        Raises:
            ValueError: other numbers of samples.
        """
        if len(first.lengths) != len(second.lengths):
            raise ValueError(
                f"Packing.joined: {len(first.lengths)} and {len(second.lengths)} samples"
            )
        padded = first.padded + second.padded
        samples = torch.cat([first.samples, second.samples])
        places = torch.cat([first.positions, first.padded + second.positions])
        order = samples.argsort(stable=True)
        lengths = tuple(a + b for a, b in zip(first.lengths, second.lengths, strict=True))
        indices = (samples * padded + places).index_select(0, order)
        return cls(indices, first.offsets + second.offsets, lengths, padded), order

    @property
    def longest(self) -> int:
        """Length of the longest sequence."""
        return max(self.lengths, default=0)

    @property
    def runs(self) -> tuple[tuple[int, int], ...]:
        """(count, length) of neighbours of equal length, empty samples left out: each run is a
        batch, and a view of the packed row.
        """
        groups = groupby(length for length in self.lengths if length)
        return tuple((len(list(same)), length) for length, same in groups)

    def check_row(self, tokens: Tensor, dim: int = 1) -> None:
        """Refuse a tensor that is not one row of all real tokens along ``dim``.

        Raises:
            ValueError: it is not.
        """
        if tokens.shape[0] != 1 or tokens.shape[dim] != sum(self.lengths):
            raise ValueError(
                f"packed input: expected one row of {sum(self.lengths)} tokens, got "
                f"{tokens.shape[0]} of {tokens.shape[dim]}"
            )

    @property
    def mask(self) -> Tensor:
        """(B, padded) True where a token was packed."""
        flat = torch.zeros(
            len(self.lengths) * self.padded, dtype=torch.bool, device=self.indices.device
        )
        return flat.index_fill(0, self.indices, True).unflatten(0, (-1, self.padded))

    @property
    def holes(self) -> bool:
        """Tokens of a sample stand apart in the padded layout: what looks at neighbours must not
        take those in the row for them.
        """
        same = self.samples.diff() == 0
        return bool(((self.indices.diff() != 1) & same).any())

    @property
    def positions(self) -> Tensor:
        """(T,) position of each packed row in the padded layout."""
        return self.indices % self.padded

    @property
    def samples(self) -> Tensor:
        """(T,) sample index of each packed row."""
        return self.indices // self.padded

    def chosen(self, rows: Tensor) -> Packing:
        """The same row with some of its tokens only, in their order."""
        samples = self.samples.index_select(0, rows)
        lengths = torch.bincount(samples, minlength=len(self.lengths))
        offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        indices = self.indices.index_select(0, rows)
        return Packing(indices, offsets, tuple(lengths.tolist()), self.padded)

    def means(self, x: Tensor) -> Tensor:
        """Mean over the tokens of each sample, (1, T) -> (B,); 0 for empty samples."""
        sums = x.new_zeros(len(self.lengths)).index_add(0, self.samples, x[0])
        return sums / torch.tensor(self.lengths, device=x.device).clamp(min=1)

    def spread(self, x: Tensor) -> Tensor:
        """What a sample has, for each of its tokens: (B, ...) -> (1, T, ...)."""
        return x.index_select(0, self.samples)[None]

    def pack(self, x: Tensor) -> Tensor:
        """(B, N, ...) -> (1, T, ...)."""
        return x.flatten(0, 1).index_select(0, self.indices)[None]

    def unpack(self, x: Tensor) -> Tensor:
        """(1, T, ...) -> (B, N, ...), zeros on padding."""
        flat = x.new_zeros(len(self.lengths) * self.padded, *x.shape[2:])
        return flat.index_copy(0, self.indices, x[0]).unflatten(0, (len(self.lengths), self.padded))


@dataclass(slots=True, kw_only=True)
class Merging:
    """What is known about tokens that were merged; the model makes one per forward.

    Attributes:
        tokens: number of tokens before anything was merged.
        front: tokens at the front that do not merge.
        sizes: (B, N) how many tokens each of the present ones stands for; None means one.
        proportional: cores count a key as often as its size says.
        keys: (B, N, K) keys of the last self-attention, mean over heads.
    """

    tokens: int
    front: int = 0
    sizes: Tensor | None = None
    proportional: bool = True
    keys: Tensor | None = None

    def __post_init__(self) -> None:
        if self.sizes is not None and not (
            isinstance(self.sizes, Tensor) and self.sizes.is_floating_point()
        ):
            raise TypeError("merging: sizes must be floating-point numbers (B, N)")

    @property
    def weights(self) -> Tensor | None:
        """The sizes that a core must honour, None if all keys count once."""
        return self.sizes if self.proportional else None

    def rows(self, index: Tensor) -> Merging:
        """The same for some samples; keys are not handed back to this one."""
        sizes = self.sizes
        if sizes is not None and sizes.shape[0] > 1:
            sizes = sizes.index_select(0, index)
        return replace(self, sizes=sizes, keys=None)
