"""What travels through a forward pass beside the tokens, and where a part stands in a model.

`Site` is known when the model is built, `Context` when it runs. A part takes what it needs from the
two and refuses a `Context` field that it cannot honour; it never ignores one.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import registry
from .checks import CapabilityError

if TYPE_CHECKING:
    from .registry import Caps

__all__ = [
    "EMPTY", "Choice", "Context", "Ledger", "Merging", "Packing", "Rope", "Share", "Site", "Stream", "Tap",
    "check_context",
]  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """Where a part is placed: what the model, not the part, decides.

    Attributes:
        dim: width of the tokens.
        heads: number of attention heads.
        cond_dim: width of the conditioning vector, None if the model has none.
        time_dim: width of the time embedding ``ctx.time``, None if the model has none.
        memory_dim: width of ``ctx.memory``; None means that there is no memory.
        out_dim: width of what a token mixer returns, None for ``dim`` (blocks need ``dim``).
        tokens: number of tokens where the model fixes it, else None.
        axes: number of axes of the token grid where the model fixes it, else None.
        grid: layout of these tokens, see `Context`; None if they have none or the model fixes none.
        norm: "layer" or "rms".
        norm_eps: epsilon of every norm.
        norm_affine: the norms have a learned scale (and bias); see ``modulated_affine``.
        modulated_affine: the norms of modulated branches have one, too (LightningDiT).
        dropout: probability after each part.
        drop_path: probability of dropping a whole branch (stochastic depth).
        layer_scale: initial value of a learned per-channel factor on each branch, None for no
            factor.
        layer: index of the block in its stack, for initial values that depend on depth.
        depth: number of blocks in the stack.
        shrinks: the model goes on with fewer tokens if a block returns fewer.
        path: dotted name of the part in the model, for messages, `Tap` and `Ledger`.
    """

    dim: int
    heads: int = 1
    cond_dim: int | None = None
    time_dim: int | None = None
    memory_dim: int | None = None
    out_dim: int | None = None
    tokens: int | None = None
    axes: int | None = None
    grid: tuple[int, ...] | None = None
    norm: str = "layer"
    norm_eps: float = 1e-6
    norm_affine: bool = True
    modulated_affine: bool = False
    dropout: float = 0.0
    drop_path: float = 0.0
    layer_scale: float | None = None
    layer: int = 0
    depth: int = 1
    shrinks: bool = False
    path: str = ""


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embedding, tables for queries and keys.

    ``rotate(x) = x * cos + rotate_pairs(x) * sin``; tables are (N, K) or broadcastable to (B, H, N,
    K).

    Attributes:
        cos: cosine table of the queries.
        sin: sine table of the queries.
        key_cos: table of the keys if they differ (cross attention), else None.
        key_sin: likewise.
        interleaved: pairs are (0, 1), (2, 3), ... (True) or (0, K/2), (1, K/2 + 1), ... (False).
    """

    cos: Tensor
    sin: Tensor
    key_cos: Tensor | None = None
    key_sin: Tensor | None = None
    interleaved: bool = False


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

    @classmethod
    def from_mask(cls, mask: Tensor) -> Packing:
        """Build from a (B, N) mask, True = real token.

        Raises:
            ValueError: the mask is not (B, N).
        """
        if mask.dim() != 2:
            raise ValueError(f"Packing.from_mask: expected a mask (B, N), got {tuple(mask.shape)}")
        lengths = mask.bool().sum(1)
        offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        indices = mask.bool().flatten().nonzero().flatten()
        return cls(indices, offsets, tuple(lengths.tolist()), mask.shape[1])

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
    def positions(self) -> Tensor:
        """(T,) position of each packed row in the padded layout."""
        return self.indices % self.padded

    @property
    def samples(self) -> Tensor:
        """(T,) sample index of each packed row."""
        return self.indices // self.padded

    def pack(self, x: Tensor) -> Tensor:
        """(B, N, ...) -> (1, T, ...)."""
        return x.flatten(0, 1).index_select(0, self.indices)[None]

    def unpack(self, x: Tensor) -> Tensor:
        """(1, T, ...) -> (B, N, ...), zeros on padding."""
        flat = x.new_zeros(len(self.lengths) * self.padded, *x.shape[2:])
        return flat.index_copy(0, self.indices, x[0]).unflatten(0, (len(self.lengths), self.padded))


@dataclass(frozen=True, slots=True)
class Choice:
    """What the gate of a dynamic part chose.

    Attributes:
        gate: (B, N, K + 1) probabilities, or one-hot with a gradient, of running 0..K units.
        cost: multiply-adds of one unit on one token.
    """

    gate: Tensor
    cost: float


@dataclass(frozen=True, slots=True)
class Share:
    """How much of its dense work a dynamic part executed.

    Attributes:
        fraction: (B,) in [0, 1], with the gradient of the gates.
        cost: dense multiply-adds of one sample.
    """

    fraction: Tensor
    cost: float


@dataclass(slots=True)
class Ledger:
    """Where dynamic parts write what the output tensor cannot carry.

    Attributes:
        losses: auxiliary losses by name; the trainer adds `total_loss` to its objective.
        executed: fraction of its dense work that each part executed, (B,) tensors in [0, 1]; the
            profiler reports executed = dense x fraction.
        choices: what gates chose, for losses over all of them.
        shares: executed fractions with their gradients, for losses on the work of all parts.
        step: the optimizer step, counted from 0, for losses that follow a schedule; the trainer
            sets it.
    """

    losses: dict[str, Tensor] = field(default_factory=dict)
    executed: dict[str, Tensor] = field(default_factory=dict)
    choices: dict[str, Choice] = field(default_factory=dict)
    shares: dict[str, Share] = field(default_factory=dict)
    step: int = 0

    def loss(self, name: str, value: Tensor) -> None:
        """Record an auxiliary loss; the same name adds up."""
        self.losses[name] = self.losses[name] + value if name in self.losses else value

    def work(self, name: str, fraction: Tensor, cost: float | None = None) -> None:
        """Record the executed fraction (B,) of the part at path ``name``; with its dense cost also
        as a `Share`.
        """
        self.executed[name] = fraction.detach()
        if cost is not None:
            self.shares[name] = Share(fraction, cost)

    def choose(self, name: str, gate: Tensor, cost: float) -> None:
        """Record the gate of the part at path ``name``, see `Choice`."""
        self.choices[name] = Choice(gate, cost)

    def average(self, passes: Sequence[Ledger]) -> None:
        """Record what a part did that ran several times, each with a ledger of its own.

        Losses and executed fractions are means over the passes, dense costs add up; choices stand
        one behind the other as if the tokens were so many more.
        """
        for name in passes[0].losses:
            self.loss(name, torch.stack([p.losses[name] for p in passes]).mean(dim=0))
        for name in passes[0].executed:
            self.work(name, torch.stack([p.executed[name] for p in passes]).mean(dim=0))
        for name in passes[0].shares:
            made = [p.shares[name] for p in passes]
            fraction = torch.stack([s.fraction for s in made]).mean(dim=0)
            self.shares[name] = Share(fraction, sum(s.cost for s in made))
        for name in passes[0].choices:
            chosen = [p.choices[name] for p in passes]
            self.choose(name, torch.cat([c.gate for c in chosen], dim=1), chosen[0].cost)

    def total_loss(self) -> Tensor | float:
        """Sum of the auxiliary losses, 0.0 if there are none."""
        return sum(self.losses.values(), start=0.0)


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """Everything that a part may need beside its tokens; a model builds one per forward.

    Attributes:
        cond: (B, Dc) conditioning vector (time + class or text) of modulated branches.
        time: (B, Dt) time embedding alone, for timestep-wise routers that must not see the label.
        memory: (B, M, Dm) tokens to attend to; None = self-attention.
        mask: bool, True = may attend; (B, M) over keys, or broadcastable to (B, H, N, M).
        memory_mask: the same over the memory, for blocks that attend to their own tokens and to a
            memory.
        rope: rotary tables.
        grid: layout of the token axis, for instance (T, H, W). Tokens beyond its product stand in
            front and have no place in it (class token, registers).
        coords: real coordinates of the grid's cells, one (n,) tensor per axis, in units of the
            model's choice; None: the parts that need some count from 0 to 1 on every axis. Like
            ``grid`` a fact about the tokens, not a demand: parts without positions need not look.
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
    memory: Tensor | None = None
    mask: Tensor | None = None
    memory_mask: Tensor | None = None
    rope: Rope | None = None
    grid: tuple[int, ...] | None = None
    coords: tuple[Tensor, ...] | None = None
    width: Tensor | None = None
    merging: Merging | None = None
    complete: bool = False
    packing: Packing | None = None
    ledger: Ledger | None = None
    tap: Tap | None = None
    stream: Stream | None = None

    def rows(self, index: Tensor) -> Context:
        """The context of some samples: ``index`` (B',) picks from the batch, with repetition."""
        names = ("cond", "time", "memory", "mask", "memory_mask", "width")
        fields = {name: getattr(self, name) for name in names}
        chosen = {
            name: value.index_select(0, index)
            for name, value in fields.items()
            if value is not None and value.shape[0] > 1
        }
        rope = self.rope
        if rope is not None and rope.cos.dim() == 4 and rope.cos.shape[0] > 1:
            raise CapabilityError("rotary tables that differ between samples cannot be regrouped")
        merging = None if self.merging is None else self.merging.rows(index)
        return replace(self, merging=merging, **chosen)


EMPTY = Context()


def check_context(ctx: Context, caps: Caps, kind: str, where: str) -> None:
    """Refuse context fields that a part cannot honour, naming parts that can.

    Raises:
        CapabilityError: a field is set that ``caps`` does not declare.
    """
    if ctx.memory_mask is not None:
        raise CapabilityError(
            f"{where}: memory_mask is for blocks that attend to their own tokens and to a memory; "
            "give a cross-attention its mask as ctx.mask"
        )
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
            able = ", ".join(_able(kind, **{field_name: wanted}))
            raise CapabilityError(
                f"{where}: this {kind} cannot honour {field_name}={wanted}; choices that can: {able}"
            )


def _able(kind: str, **wanted: Any) -> list[str]:
    """Names that a user may write instead; the name of a core stands for an attention, too."""
    kinds = ("attention", "core") if kind == "attention" else (kind,)
    return sorted({name for k in kinds for name in registry.KINDS[k].names(**wanted)})
