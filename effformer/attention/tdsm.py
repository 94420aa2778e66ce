"""TDSM: attention over groups of shuffled scalars of all tokens and channels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from effformer import registry
from effformer.checks import CapabilityError
from effformer.config import Config as BaseConfig
from effformer.config import part
from effformer.context import EMPTY, Context, check_context
from effformer.registry import Caps, attention
from effformer.site import Site
from effformer.values import Count, Seed

from .base import CoreConfig, Mixer
from .multihead import Attention
from .softmax import Softmax

__all__ = ["TDSM", "Shuffle", "group_widths", "reshuffle"]

_CAPS = Caps(cost="n^2")


def group_widths(dim: int, groups: int, unit: int = 32) -> tuple[int, ...]:
    """Widths of the channel groups: nearly equal multiples of ``unit`` whose sum is ``dim``.

    Equal shares are rounded up to multiples of ``unit``; then the groups, in turn, give one
    ``unit`` back until the sum fits, and none becomes empty.

    Args:
        dim: width of the tokens.
        groups: number of groups.
        unit: what every width is a multiple of.

    Raises:
        ValueError: no such widths exist.

    Reference: RelaCtrl: Relevance-Guided Efficient Control for Diffusion Transformers, 2025, arXiv
    2502.14377.
    """
    if groups < 1 or unit < 1:
        raise ValueError(f"tdsm: groups and unit are at least 1, got {groups} and {unit}")
    if dim % unit or dim < groups * unit:
        raise ValueError(
            f"tdsm: width {dim} cannot be cut into {groups} groups of multiples of {unit}; the "
            f"width must be a multiple of {unit} and at least {groups * unit}, or unit smaller"
        )
    shares = (dim // groups + (i < dim % groups) for i in range(groups))
    widths = [-(-share // unit) * unit for share in shares]
    i = 0
    while sum(widths) > dim:  # ends: at least one group is wider than a unit
        if widths[i] > unit:
            widths[i] -= unit
        i = (i + 1) % groups
    return tuple(widths)


@dataclass(frozen=True, slots=True)
class Shuffle:
    """The permutations of one `TDSM`, shared by the samples of a batch.

    Attributes:
        channels: (D,) int64, channel that each place of the row of groups gets.
        elements: per group i (N d_i,) int64, scalar of the group's (N, d_i) that each place gets.
    """

    channels: Tensor
    elements: tuple[Tensor, ...]

    @classmethod
    def draw(
        cls, widths: Sequence[int], tokens: int, generator: torch.Generator | None = None
    ) -> Shuffle:
        """Uniform permutations.

        Args:
            widths: widths of the groups.
            tokens: number of tokens N.
            generator: randomness, on the CPU.
        """
        device = torch.device("cpu")
        channels = torch.randperm(sum(widths), generator=generator, device=device)
        elements = (
            torch.randperm(tokens * width, generator=generator, device=device) for width in widths
        )
        return cls(channels, tuple(elements))

    def order(self, widths: Sequence[int]) -> Tensor:
        """All permutations as one of the N D scalars of a sample: (N D,) int64, group after group.

        Raises:
            ValueError: a member is not a permutation of its length.
        """
        dim = sum(widths)
        _check_permutation(self.channels, dim, "channels")
        if len(self.elements) != len(widths):
            raise ValueError(
                f"tdsm: {len(self.elements)} element permutations for {len(widths)} groups"
            )
        tokens = self.elements[0].numel() // widths[0]
        rows = torch.arange(tokens, device=self.channels.device)[:, None] * dim
        pieces = []
        groups = self.channels.split(list(widths))
        for i, (channels, elements) in enumerate(zip(groups, self.elements, strict=True)):
            _check_permutation(elements, tokens * widths[i], f"elements[{i}]")
            pieces.append((rows + channels).flatten()[elements])
        return torch.cat(pieces)


@attention.register("tdsm", caps=_CAPS, paper="2502.14377")
class TDSM(Mixer):
    """Two-dimensional shuffle mixer: attention inside random segments of all scalars.

    The channels are permuted and cut into groups. In each group the N d scalars are permuted, cut
    into S equal segments, and every segment, seen as (N / S, d) tokens, passes the group's own
    multi-head attention; then both permutations are undone::

        z = x[:, channels],  s = reshape(z[group][elements], (S, N / S, d)),  y = attn(s)

    Attention costs N^2 D / S products instead of N^2 D. The two permutations are evaluated as one
    gather of N D scalars, and their inverse as another.

    The permutations belong to the number of tokens. By default they are drawn from ``seed`` and the
    layer's index, so that the same config computes the same everywhere; for the model's own number
    of tokens they are kept, for others they are drawn at every call. `use` injects others, and
    `reshuffle` draws new ones for a whole model (training). Injected ones are not saved.

    Differs from the paper: the released code draws new permutations at every call, at inference,
    too, from the global state, and inverts them through float32, which is wrong beyond 2^24
    scalars.

    Args:
        config: the knobs.
        site: the place in the model; ``site.heads`` is not used.

    Raises:
        ValueError: the width cannot be cut as asked; at call, the number of tokens cannot.
        CapabilityError: the model's number of tokens cannot be cut, or the core needs an order.

    Reference: RelaCtrl: Relevance-Guided Efficient Control for Diffusion Transformers, 2025, arXiv
    2502.14377.
    """

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(BaseConfig):
        """Knobs of `TDSM`.

        Attributes:
            groups: number of channel groups.
            segments: number of segments S; the number of tokens must be a multiple.
            heads: number of heads of every group.
            unit: widths of groups are multiples of it, see `group_widths`; None means 32 (the
                published value) or, for widths that it does not cut, the largest of 16, 8, 4, 2, 1
                that does and that the heads divide.
            seed: of the default permutations.
            tokens: number of tokens whose permutations are kept; None means the model's.
            core: what attends inside a segment.
        """

        groups: Count = 4
        segments: Count = 4
        heads: Count = 4
        unit: Count | None = None
        seed: Seed = 0
        tokens: Count | None = None
        core: CoreConfig = part("core", Softmax.Config())

        def check(self) -> None:
            if self.core.causal:
                raise ValueError("tdsm: shuffled scalars have no order; use causal=False")

    def __init__(self, config: TDSM.Config, site: Site) -> None:
        super().__init__(config, site)
        self.where = site.path or "tdsm"
        if site.out_dim not in (None, site.dim):
            raise ValueError(f"{self.where}: tdsm keeps the width of tokens, {site.dim}")
        _check_core(config.core, self.where)
        self.length = site.length if config.tokens is None else config.tokens
        if self.length is not None and self.length % config.segments:
            raise CapabilityError(
                f"{self.where}: 'tdsm' cuts tokens into {config.segments} equal segments, which "
                f"{self.length} tokens are not; choices: softmax, flow, linear"
            )
        self.widths = _widths(config, site.dim, self.where)
        tokens = None if self.length is None else self.length // config.segments
        inner = replace(site, heads=config.heads, length=tokens, out_dim=None)
        self.experts = nn.ModuleList(
            Attention(
                Attention.Config(core=config.core),
                replace(inner, dim=width, path=f"{self.where}.experts.{i}"),
            )
            for i, width in enumerate(self.widths)
        )
        self.order: Tensor | None
        self.inverse: Tensor | None
        self.register_buffer("order", None, persistent=False)
        self.register_buffer("inverse", None, persistent=False)
        self.shuffle: Shuffle | None = None
        if self.length is not None:
            self.use(self.drawn(self.length))

    def drawn(self, tokens: int) -> Shuffle:
        """The default permutations for a number of tokens."""
        generator = torch.Generator().manual_seed(self.config.seed + self.site.layer)
        return Shuffle.draw(self.widths, tokens, generator)

    def use(self, shuffle: Shuffle) -> None:
        """Take other permutations from now on, for as many tokens as they have.

        Raises:
            ValueError: they are no permutations, or do not fit the groups.
        """
        order = shuffle.order(self.widths)
        self.length = order.numel() // self.site.dim
        self.shuffle, self.order, self.inverse = shuffle, order, _inverse(order)

    def reset_buffers(self) -> None:
        """Make the permutations in use again, where they are."""
        if self.shuffle is not None and self.order is not None:
            order = self.shuffle.order(self.widths).to(self.order.device)
            self.order, self.inverse = order, _inverse(order)

    def forward(self, x: Tensor, ctx: Context = EMPTY) -> Tensor:
        check_context(ctx, _CAPS, "attention", self.where, x)
        n, segments = x.shape[1], self.config.segments
        if n % segments:
            raise ValueError(
                f"{self.where}: {n} tokens cannot be cut into {segments} equal segments; give a "
                f"multiple of {segments} tokens, or build it with other segments"
            )
        order, inverse = self._orders(n, x.device)
        shuffled = x.flatten(1).index_select(1, order)
        own = Context(ledger=ctx.ledger, tap=ctx.tap)
        mixed = []
        pieces = shuffled.split([n * width for width in self.widths], dim=1)
        for expert, piece, width in zip(self.experts, pieces, self.widths, strict=True):
            tokens = piece.unflatten(1, (segments, n // segments, width)).flatten(0, 1)
            mixed.append(expert(tokens, own).unflatten(0, (-1, segments)).flatten(1))
        flat = torch.cat(mixed, dim=1).index_select(1, inverse)
        return flat.unflatten(1, (n, self.site.dim))

    def macs(self, n: int, m: int | None = None, *, grid: tuple[int, ...] | None = None) -> int:
        segments = self.config.segments
        return sum(segments * expert.macs(n // segments) for expert in self.experts)  # type: ignore[operator]

    def _orders(self, n: int, device: torch.device) -> tuple[Tensor, Tensor]:
        if self.order is not None and self.inverse is not None and self.length == n:
            return self.order.to(device), self.inverse.to(device)
        if torch.compiler.is_compiling():
            number = f"{n}" if type(n) is int else "any number of"
            work = f"build it with tokens={n}" if type(n) is int else "choices: a fixed number"
            raise ValueError(
                f"{self.where}: a compiled or exported graph holds the permutations as constants, "
                f"and there are none for {number} tokens; {work}"
            )
        order = self.drawn(n).order(self.widths)
        return order.to(device), _inverse(order).to(device)


def reshuffle(
    model: nn.Module, generator: torch.Generator | None = None, *, tokens: int | None = None
) -> None:
    """Draw new permutations for every `TDSM` of a model, as the published training does each step.

    Args:
        model: the model; its mixers are changed in place.
        generator: randomness, on the CPU.
        tokens: number of tokens; None means the number that each mixer holds permutations for.

    Raises:
        ValueError: a mixer holds none and ``tokens`` is None, or the model has no `TDSM`.
    """
    mixers = [module for module in model.modules() if isinstance(module, TDSM)]
    if not mixers:
        raise ValueError("reshuffle: the model has no 'tdsm' mixer; build it with attn='tdsm'")
    for mixer in mixers:
        count = mixer.length if tokens is None else tokens
        if count is None:
            raise ValueError(f"reshuffle: {mixer.where} has no number of tokens; give tokens=")
        mixer.use(Shuffle.draw(mixer.widths, count, generator))


def _inverse(order: Tensor) -> Tensor:
    """The permutation that undoes one; integers all the way, exact for any length."""
    places = torch.arange(order.numel(), device=order.device)
    return torch.empty_like(order).scatter_(0, order, places)


def _check_permutation(order: Tensor, length: int, name: str) -> None:
    whole = torch.arange(length, device=order.device)
    if order.shape != (length,) or not torch.equal(order.sort().values, whole):
        raise ValueError(f"tdsm: {name} is not a permutation of {length} numbers")


def _check_core(config: CoreConfig, where: str) -> None:
    entry = config.entry
    if entry.caps.axes or entry.caps.causal == "always":
        able = ", ".join(registry.core.names(axes=False, causal=False))
        raise CapabilityError(
            f"{where}: shuffled scalars have neither grid nor order, which core {entry.name!r} "
            f"needs; choices: {able}"
        )


def _widths(config: TDSM.Config, dim: int, where: str) -> tuple[int, ...]:
    unit, least = config.unit, config.groups
    if unit is None:
        fitting = (u for u in (32, 16, 8, 4, 2, 1) if not (dim % u or u % config.heads))
        unit = next((u for u in fitting if dim >= least * u), 32)
    widths = group_widths(dim, config.groups, unit)
    if any(width % config.heads for width in widths):
        raise ValueError(
            f"{where}: groups of widths {', '.join(map(str, widths))} for {config.heads} heads; "
            "every width must be divisible by the heads"
        )
    return widths
