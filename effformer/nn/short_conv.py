"""Short causal convolution over the tokens, one filter per channel."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .activations import ACTIVATIONS
from .cut import put, twin
from .onnx_nodes import MICROSOFT, node_domains

__all__ = ["ShortConv"]


class ShortConv(nn.Module):
    """``y_t = act(bias + sum_i w_i x_{t - width + 1 + i})`` for every channel; the last tap meets
    the current token. With ``both`` the same filter comes from the other side, too, and the token
    counts once, ``sum_i w_i (x_{t - width + 1 + i} + x_{t + width - 1 - i}) - w_last x_t``.

    Packed sequences run one by one, each from no state.

    Args:
        channels: C.
        width: number of taps, 2 at least.
        bias: add a bias.
        activation: what follows.
        both: look both ways along the tokens.

    Attributes:
        weight: (C, 1, width).
        bias: (C) or None.

    Reference: Gated Delta Networks: Improving Mamba2 with Delta Rule, 2024, arXiv 2412.06464; SANA:
    Efficient High-Resolution Image Synthesis with Linear Diffusion Transformers, 2024, arXiv
    2410.10629 (the code's form for both ways).

    Example:
        >>> import torch
        >>> conv = ShortConv(8)
        >>> y, state = conv(torch.randn(1, 5, 8))
        >>> y.shape, state.shape
        (torch.Size([1, 5, 8]), torch.Size([1, 3, 8]))
    """

    def __init__(
        self,
        channels: int,
        width: int = 4,
        *,
        bias: bool = False,
        activation: Literal["silu", "identity"] = "silu",
        both: bool = False,
    ) -> None:
        super().__init__()
        if width < 2:
            raise ValueError(f"ShortConv: width {width} is below 2, which is no convolution")
        if activation not in ("silu", "identity"):
            raise ValueError(
                f"ShortConv: unknown activation {activation!r} (choices: silu, identity)"
            )
        self.activation, self.both = activation, both
        self.weight = nn.Parameter(torch.empty(channels, 1, width))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform within width^-1/2, as a convolution of torch."""
        bound = self.weight.shape[-1] ** -0.5
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Convolve the next tokens.

        Args:
            x: (B, N, C).
            state: the inputs before them, (B, width - 1, C), None for zeros.

        Returns:
            y (B, N, C) and the last width - 1 inputs (B, width - 1, C).
        """
        channels, _, width = self.weight.shape
        if state is None:
            state = self.init_state(x.shape[0], like=x)
        if not self.both and MICROSOFT in (node_domains() or ()):
            return self._node(x, state)
        if x.shape[1] == 0:  # fewer than one window
            return x, state.to(x.dtype)
        row = torch.cat([state.to(x.dtype), x], dim=1)
        y = F.conv1d(row.mT, self.weight, self.bias, groups=channels).mT
        if self.both:
            back = F.pad(x.mT, (0, width - 1))
            y = y + F.conv1d(back, self.weight.flip(-1), groups=channels).mT
            y = y - x * self.weight[:, 0, -1]
        return ACTIVATIONS[self.activation](y), row[:, row.shape[1] - width + 1 :]

    def init_state(self, batch: int, *, like: Tensor) -> Tensor:
        """Nothing before the first token, (B, width - 1, C)."""
        channels, _, width = self.weight.shape
        return like.new_zeros(batch, width - 1, channels)

    def select(self, channels: Tensor) -> ShortConv:
        """The filters of some channels (int64 indices)."""
        small = twin(self)
        put(small, "weight", self.weight.index_select(0, channels))
        if self.bias is not None:
            put(small, "bias", self.bias.index_select(0, channels))
        return small

    def macs(self, n: int) -> int:
        """Multiply-adds for n tokens."""
        return n * self.weight.shape[0] * self.weight.shape[-1] * (2 if self.both else 1)

    def _node(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """The same as one operator of ONNX Runtime."""
        x, state = x.mT, state.mT
        y, last = torch.onnx.ops.symbolic_multi_out(
            "com.microsoft::CausalConvWithState",
            (x, self.weight, self.bias, state),
            {"activation": "silu" if self.activation == "silu" else "none"},
            dtypes=(x.dtype, x.dtype),
            shapes=(tuple(x.shape), tuple(state.shape)),
            version=1,
        )
        return y.mT, last.mT

    def extra_repr(self) -> str:
        channels, _, width = self.weight.shape
        return f"{channels}, width={width}, activation={self.activation!r}"
