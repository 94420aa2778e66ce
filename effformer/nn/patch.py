"""Images and videos to tokens and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor, nn

__all__ = ["PatchEmbed", "patchify", "unpatchify", "unpatchify_video"]


class PatchEmbed(nn.Module):
    """Convolution with kernel = stride = patch, flattened row-major: (B, C, H, W) -> (B, N, D), or of
    patches in three dimensions (B, C, T, H, W) -> (B, N, D).

    Args:
        channels: input channels.
        dim: token width.
        patch: patch side in pixels; or frames, rows and columns of a patch.
        bias: the convolution has a bias.
    """

    ROLES: ClassVar[Mapping[str, str]] = {"": "patch_embed"}

    def __init__(
        self, channels: int, dim: int, patch: int | tuple[int, int, int], *, bias: bool = True
    ) -> None:
        super().__init__()
        self.patch = patch
        self.proj: nn.Conv2d | nn.Conv3d
        if isinstance(patch, int):
            self.proj = nn.Conv2d(channels, dim, patch, stride=patch, bias=bias)
        else:
            self.proj = nn.Conv3d(channels, dim, patch, stride=patch, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, N, D), a patch each."""
        # tokens in memory order: a transposed stream would be copied by every norm behind it
        return self.proj(x).flatten(2).transpose(1, 2).contiguous()


def patchify(x: Tensor, patch: int, *, channels_first: bool = False) -> Tensor:
    """Cut an image into tokens; the inverse of `unpatchify`, with the same order inside a token.

    Args:
        x: (B, C, H, W), H and W divisible by the patch.
        patch: patch side in pixels.
        channels_first: see `unpatchify`.

    Returns:
        (B, H/p * W/p, patch * patch * C), row-major.
    """
    x = x.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))
    order = (0, 2, 4, 1, 3, 5) if channels_first else (0, 2, 4, 3, 5, 1)
    return x.permute(order).flatten(3).flatten(1, 2)


def unpatchify(
    x: Tensor, height: int, width: int, patch: int, *, channels_first: bool = False
) -> Tensor:
    """Tokens of patches to an image.

    Args:
        x: (B, height * width, patch * patch * C).
        height: rows of the token grid.
        width: columns of the token grid.
        patch: patch side in pixels.
        channels_first: inside a token the channel comes first, (C, row, column), as
            `torch.nn.functional.pixel_unshuffle` puts them (FLUX), instead of last (DiT).

    Returns:
        (B, C, height * patch, width * patch).
    """
    x = x.unflatten(1, (height, width))
    if channels_first:
        x = x.unflatten(3, (-1, patch, patch)).permute(0, 3, 1, 4, 2, 5)
    else:
        x = x.unflatten(3, (patch, patch, -1)).permute(0, 5, 1, 3, 2, 4)
    return x.flatten(4, 5).flatten(2, 3)


def unpatchify_video(x: Tensor, grid: tuple[int, int, int], patch: tuple[int, int, int]) -> Tensor:
    """Tokens of patches to a video.

    Args:
        x: (B, T * H * W, p * q * r * C), the channel last inside a token.
        grid: frames T, rows H and columns W of tokens.
        patch: frames p, rows q and columns r of a patch.

    Returns:
        (B, C, T * p, H * q, W * r).
    """
    x = x.unflatten(2, (*patch, -1)).unflatten(1, grid)
    x = x.permute(0, 7, 1, 4, 2, 5, 3, 6)
    return x.flatten(6, 7).flatten(4, 5).flatten(2, 3)
