"""Depthwise convolutions on a grid of tokens: positions from neighbours, and fewer keys."""

from __future__ import annotations

from torch import Tensor, nn

from .norms import LayerNorm

__all__ = ["LePE", "Reduction"]


class LePE(nn.Module):
    """Locally enhanced positional encoding: a depthwise convolution of the values on their grid.

    One kernel per channel, zeros outside the grid. Where tokens are wider than ``channels``, their
    consecutive groups of channels (heads) share the kernels.

    Args:
        channels: number of kernels.
        kernel: side of a kernel, odd.

    Raises:
        ValueError: an even kernel.

    Reference: CSWin Transformer: A General Vision Transformer Backbone with Cross-Shaped Windows,
    2021, arXiv 2107.00652. Differs from the paper: kernels may be shared by the heads.
    """

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"lepe: the kernel must be odd, got {kernel}")
        self.channels = channels
        self.conv = nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=channels)

    def forward(self, v: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, h * w, G * channels) -> the same shape."""
        image = v.unflatten(1, grid).unflatten(-1, (-1, self.channels)).permute(0, 3, 4, 1, 2)
        mixed = self.conv(image.flatten(0, 1)).unflatten(0, image.shape[:2])
        return mixed.permute(0, 3, 4, 1, 2).flatten(3).flatten(1, 2)

    def macs(self, n: int, dim: int) -> int:
        """Multiply-adds on n tokens of width ``dim``; those with zeros outside count."""
        return n * dim * self.conv.kernel_size[0] ** 2


class Reduction(nn.Module):
    """Fewer keys: ``LayerNorm(conv(x))``, one key for every square of ``side`` x ``side`` cells.

    Rows and columns beyond the last whole square have no part in it.

    Args:
        dim: width of the tokens.
        side: side of a square, kernel and stride of the convolution.

    Reference: Pyramid Vision Transformer: A Versatile Backbone for Dense Prediction without
    Convolutions, 2021, arXiv 2102.12122.
    """

    def __init__(self, dim: int, side: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, side, stride=side)
        self.norm = LayerNorm(dim, eps=1e-5)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, h * w, D) -> (B, (h // side) * (w // side), D)."""
        image = x.unflatten(1, grid).permute(0, 3, 1, 2)
        return self.norm(self.conv(image).flatten(2).transpose(1, 2))

    def macs(self, keys: int) -> int:
        """Multiply-adds for so many keys."""
        return keys * self.conv.weight.numel()
