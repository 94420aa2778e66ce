"""Convolutions over frames that run on whole clips and, with the same result, frame by frame."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .lif import LIF
from .norms import TokenBatchNorm

__all__ = ["ConvEmbed", "EmbedState", "FrameConv", "SpikingConvEmbed"]


class FrameConv(nn.Module):
    """Convolution over three frames, zeros beyond both ends of a clip, no bias.

    It looks one frame ahead, so as a stream it lags one frame behind.

    Args:
        channels: width of the input.
        dim: width of the output.
    """

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(channels, dim, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """The whole clip, (B, N, C) -> (B, N, D)."""
        return self.conv(F.pad(x.transpose(1, 2), (1, 1))).transpose(1, 2)

    def init_state(self, batch: int, *, like: Tensor) -> Tensor:
        """The zero frame before the first one (B, 1, C)."""
        return like.new_zeros(batch, 1, self.conv.in_channels)

    def step(self, x: Tensor, past: Tensor, *, last: bool = False) -> tuple[Tensor, Tensor]:
        """Feed the next frames.

        Args:
            x: (B, n, C), n >= 0.
            past: (B, 1 or 2, C) frames that are needed again.
            last: the clip ends behind x.

        Returns:
            Frames (B, m, D) that are complete now, and the new past.
        """
        frames = [past, x, torch.zeros_like(past[:, :1])] if last else [past, x]
        joined = torch.cat(frames, dim=1)
        if joined.shape[1] < 3:
            return x.new_zeros(x.shape[0], 0, self.conv.out_channels), joined
        return self.conv(joined.transpose(1, 2)).transpose(1, 2), joined[:, -2:]

    def macs(self, n: int) -> int:
        """Multiply-adds for n frames of one clip."""
        return 3 * n * self.conv.in_channels * self.conv.out_channels


class EmbedState(NamedTuple):
    """What an embedding keeps of the frames that it has read.

    Attributes:
        pasts: two frames (one at the beginning) before every convolution.
        pending: (B, 0 or 1, D) frames that wait for their positional term.
        potentials: of the neurons before the next convolution, if there are any.
    """

    pasts: tuple[Tensor, ...]
    pending: Tensor
    potentials: tuple[Tensor, ...] = ()


class ConvEmbed(nn.Module):
    """Frames to tokens: four times ``BN(relu(conv(x)))``, then ``y + conv(y)``, which tells positions.

    Five convolutions look one frame ahead each: token t needs frames up to t + 5.

    Args:
        channels: width of a frame.
        dim: width of a token.

    Attributes:
        LAG: frames that a stream lags behind.

    Reference: LMUFormer: Low Complexity Yet Powerful Spiking Model With Legendre Memory Units,
    2024, arXiv 2402.04882.
    """

    LAG = 5

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        widths = (channels, dim, dim, dim)
        self.convs = nn.ModuleList(FrameConv(width, dim) for width in widths)
        self.norms = nn.ModuleList(TokenBatchNorm(dim) for _ in widths)
        self.position = FrameConv(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """The whole clip, (B, N, C) -> (B, N, D)."""
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = norm(conv(x).relu())
        return x + self.position(x)

    def init_state(self, batch: int, *, like: Tensor) -> EmbedState:
        """The state before the first frame."""
        pasts = tuple(
            m.init_state(batch, like=like) for m in self.modules() if isinstance(m, FrameConv)
        )
        return EmbedState(pasts, like.new_zeros(batch, 0, self.position.conv.out_channels))

    def step(
        self, x: Tensor, state: EmbedState, *, last: bool = False
    ) -> tuple[Tensor, EmbedState]:
        """Feed the next frames.

        Args:
            x: (B, n, C), n >= 0.
            state: from `init_state` or the step before.
            last: the clip ends behind x; all tokens that are left come out.

        Returns:
            Tokens (B, m, D) that are complete now, and the new state.
        """
        pasts = []
        for conv, norm, past in zip(self.convs, self.norms, state.pasts[:-1], strict=True):
            x, past = conv.step(x, past, last=last)  # type: ignore[operator]
            pasts.append(past)
            x = norm(x.relu()) if x.shape[1] else x
        term, past = self.position.step(x, state.pasts[-1], last=last)
        waiting = torch.cat([state.pending, x], dim=1)
        ready = term.shape[1]
        after = EmbedState((*pasts, past), waiting[:, ready:])
        return waiting[:, :ready] + term, after

    def macs(self, n: int) -> int:
        """Multiply-adds for n frames of one clip."""
        return sum(m.macs(n) for m in self.modules() if isinstance(m, FrameConv))


class SpikingConvEmbed(ConvEmbed):
    """Frames to tokens with spikes between the convolutions.

    ``s = LIF(BN(conv(x)))`` three times, ``y = conv(s)``, then ``y + conv(LIF(BN(y)))``. Tokens are
    real numbers.

    Args:
        channels: width of a frame.
        dim: width of a token.
        neurons: the neurons.

    Reference: LMUFormer: Low Complexity Yet Powerful Spiking Model With Legendre Memory Units,
    2024, arXiv 2402.04882.
    """

    def __init__(self, channels: int, dim: int, neurons: LIF.Config) -> None:
        super().__init__(channels, dim)
        self.neurons = nn.ModuleList(LIF(neurons) for _ in self.norms)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for conv, norm, lif in zip(self.convs, self.norms, self.neurons, strict=True):
            y = conv(x)
            x, _ = lif(norm(y))
        return y + self.position(x)

    def init_state(self, batch: int, *, like: Tensor) -> EmbedState:
        dim = self.position.conv.out_channels
        rest = tuple(
            m.init_state(batch, dim, like=like) for m in self.modules() if isinstance(m, LIF)
        )
        return super().init_state(batch, like=like)._replace(potentials=rest)

    def step(
        self, x: Tensor, state: EmbedState, *, last: bool = False
    ) -> tuple[Tensor, EmbedState]:
        pasts, potentials, y = [], [], x
        layers = zip(
            self.convs, self.norms, self.neurons, state.pasts[:-1], state.potentials, strict=True
        )
        for conv, norm, lif, past, v in layers:
            y, past = conv.step(x, past, last=last)  # type: ignore[operator]
            x, v = lif(norm(y), v) if y.shape[1] else (y, v)
            pasts.append(past)
            potentials.append(v)
        term, past = self.position.step(x, state.pasts[-1], last=last)
        waiting = torch.cat([state.pending, y], dim=1)
        ready = term.shape[1]
        after = EmbedState((*pasts, past), waiting[:, ready:], tuple(potentials))
        return waiting[:, :ready] + term, after
