"""What normalizing flows of tokens share: one autoregressive map, its state, and the whole pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effformer.attention import Mixer
from effformer.blocks import BackboneConfig, init_states
from effformer.checks import CapabilityError, check_shape
from effformer.context import EMPTY, Context, Stream, Tap
from effformer.nn.patch import patchify
from effformer.nn.precision import widened
from effformer.values import Count, Natural

from .flow_ends import Affine, Ends

__all__ = [
    "Latents",
    "MapState",
    "TokenFlowConfig",
    "TokenMap",
    "cooled",
    "patches",
    "pieces",
    "run_maps",
]  # fmt: skip


class Latents(NamedTuple):
    """What a flow makes of data.

    Attributes:
        z: latents, of the shape of the data, in float32 at least; N(0, I) if the data follow the model.
        log_det: (B,) log |det dz/dx|, the sum over all numbers of a sample.
    """

    z: Tensor
    log_det: Tensor


class MapState(NamedTuple):
    """What a map has read.

    Attributes:
        parts: states of its token mixers by path.
        read: number of tokens read, those in front included.
    """

    parts: Mapping[str, Any]
    read: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenFlowConfig(BackboneConfig):
    """Knobs of flows of tokens, beside `BackboneConfig`.

    Attributes:
        flows: number of blocks of every autoregressive map, from the data to the latents; ``layers``
            counts through the blocks of all. A map without blocks is the identity.
        channels: channels of the data.
        patch: patch side; a patch is a token.
    """

    flows: tuple[Natural, ...] = (1,)
    channels: Count = 3
    patch: Count = 1

    def check(self) -> None:
        if sum(self.flows) != self.depth:
            raise ValueError(
                f"flows {self.flows} have {sum(self.flows)} blocks together, but depth is {self.depth}"
            )

    def runs(self) -> list[range]:
        """The numbers of the blocks of every map."""
        ends = [sum(self.flows[: i + 1]) for i in range(len(self.flows))]
        return [range(end - count, end) for end, count in zip(ends, self.flows, strict=True)]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenMap:
    """One autoregressive map of tokens (B, T, D), under given conditions: token i becomes
    ``z_i = (x_i - shift_i) exp(-log_scale_i)``, and both come from the tokens before it.

    Attributes:
        ends: what stands around the blocks.
        blocks: its blocks.
        ctx: context of all tokens, those in front included.
        added: (B or 1, 1, width) what is added to every embedded input, None for nothing.
        front: (B, L, width) tokens of a text that the blocks read first, None for none.
        conditioned: the conditions of the model reach this map.
    """

    ends: Ends
    blocks: nn.ModuleList
    ctx: Context = EMPTY
    added: Tensor | None = None
    front: Tensor | None = None
    conditioned: bool = True

    @property
    def free(self) -> int:
        """Number of tokens that pass unchanged."""
        return self.ends.free

    def order(self, x: Tensor) -> Tensor:
        """Tokens (B, T, D) as the map reads them, or back: its own inverse."""
        return x.flip(1) if self.ends.reverses else x

    def inputs(self, x: Tensor) -> Tensor:
        """What is read to predict all but the free tokens of x, in the map's order."""
        return self.ends.inputs(x)

    def matrices(self) -> tuple[Tensor | None, Tensor]:
        """Rows of the last matrix that make log-scales and shifts."""
        return self.ends.matrices()

    def __call__(self, x: Tensor) -> Latents:
        """Tokens (B, T, D) to latents of the same order, and the log-determinant."""
        x = self.order(x)
        log_scale, shift = self.affine(x)
        z = (x - shift) * torch.exp(-log_scale)
        return Latents(self.order(z), -log_scale.sum(dim=(1, 2)))

    def affine(self, x: Tensor) -> Affine:
        """The map of all tokens of x (B, T, D), in the map's order, at once."""
        found, _ = self.step(self.inputs(x), None)
        return Affine(*(F.pad(part, (0, 0, self.free, 0)) for part in found))

    def init_state(self, batch: int) -> MapState:
        """The state before the first input; the tokens in front are read.

        Raises:
            CapabilityError: a token mixer cannot stream; those that can are named.
        """
        parts: dict[str, Any] = {}
        for block in self.blocks:
            parts |= init_states(block, batch, like=self.ends.like)
        state = MapState(parts, 0)
        return state if self.front is None else self._read(self.front, state)[1]

    def step(self, inputs: Tensor, state: MapState | None) -> tuple[Affine, MapState | None]:
        """The map of the tokens that follow these inputs.

        Args:
            inputs: (B, n, D), the next of `inputs`.
            state: from `init_state` or the step before, not changed; None: these are the first and no
                more will follow, which needs no mixer that streams.

        Returns:
            The map of n tokens, and the state behind them.
        """
        done = 0 if self.front is None else self.front.shape[1]
        h = self.ends.embed(inputs, 0 if state is None else state.read - done)
        if self.added is not None:
            h = h + self.added
        if state is not None:
            h, state = self._read(h, state)
            return self.ends.head(h), state
        if self.front is not None:
            h = torch.cat([self.front, h], dim=1)
        for block in self.blocks:
            h = block(h, self.ctx)
        return self.ends.head(h[:, done:]), None

    def _read(self, h: Tensor, state: MapState) -> tuple[Tensor, MapState]:
        """The blocks on the next tokens."""
        start, end = state.read, state.read + h.shape[1]
        ctx, stream = self.ctx, Stream(state.parts)
        if ctx.rope is not None and ctx.positions is not None:
            here = slice(start, end)
            ctx = replace(ctx, rope=ctx.rope.tokens(here), positions=ctx.positions[:, here])
        ctx = replace(ctx, stream=stream)
        for block in self.blocks:
            h = block(h, ctx)
        return h, MapState(stream.after, end)


def run_maps(maps: Sequence[TokenMap], tokens: Tensor) -> Latents:
    """All maps one after the other."""
    x = widened(tokens)
    total = x.new_zeros(x.shape[0])
    for one in maps:
        x, log_det = one(x)
        total = total + log_det
    return Latents(x, total)


def cooled(ctx: Context, temperature: float, blocks: nn.ModuleList, where: str) -> Context:
    """A context in which the scores of all attentions are divided by the temperature.

    Raises:
        CapabilityError: a mixer has no scores.
    """
    if temperature == 1:
        return ctx
    mixers = [part.config for part in blocks.modules() if isinstance(part, Mixer)]
    other = next((m.title for m in mixers if m.title != "softmax"), None)
    if other is not None:
        raise CapabilityError(
            f"{where}: a temperature divides the scores of softmax attention, and {other!r} has none; "
            "temperature=1 would do"
        )
    return replace(ctx, tap=Tap(edit=lambda _, q: q / temperature, at=("*.q",)))


def pieces(
    config: TokenFlowConfig, flows: nn.ModuleList, blocks: nn.ModuleList
) -> Iterator[tuple[int, Any, nn.ModuleList]]:
    """Number, ends and blocks of every map that has blocks."""
    for i, (ends, run) in enumerate(zip(flows, config.runs(), strict=True)):
        if run:
            yield i, ends, blocks[run.start : run.stop]


def patches(
    config: TokenFlowConfig, x: Tensor, *, size: int | None, channels_first: bool, where: str
) -> Tensor:
    """Images (B, C, H, W) as tokens (B, T, D), row by row.

    Args:
        config: channels and patch.
        x: the images.
        size: side that they must have, None for any.
        channels_first: order inside a token, see `effformer.nn.patch.patchify`.
        where: the place, for messages.

    Raises:
        ValueError: the shape does not fit.
        TypeError: the images are not floating point.
    """
    shown = f"(B, {config.channels}, {size or 'H'}, {size or 'W'})"
    check_shape(x, shown, (None, config.channels, size, size), where=f"{where}: x")
    if x.shape[2] % config.patch or x.shape[3] % config.patch:
        raise ValueError(f"{where}: {tuple(x.shape[2:])} is not divisible by patch {config.patch}")
    if not x.is_floating_point():
        raise TypeError(f"{where}: x must be floating point, got {x.dtype}")
    return patchify(x, config.patch, channels_first=channels_first)
