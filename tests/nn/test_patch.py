"""Patches out and back."""

from __future__ import annotations

import torch

from effformer.nn.patch import PatchEmbed, unpatchify, unpatchify_video


def test_unpatchify_has_the_channel_fastest() -> None:
    height, width, patch, channels = 2, 3, 2, 5
    x = torch.randn(1, height * width, patch * patch * channels)
    image = unpatchify(x, height, width, patch)
    assert image.shape == (1, channels, height * patch, width * patch)
    for h in range(height):
        for w in range(width):
            token = x[0, h * width + w].view(patch, patch, channels)
            corner = image[0, :, h * patch : (h + 1) * patch, w * patch : (w + 1) * patch]
            torch.testing.assert_close(corner, token.permute(2, 0, 1))


def test_unpatchify_may_have_the_channel_first() -> None:
    x = torch.randn(2, 5, 6, 4)
    tokens = torch.nn.functional.pixel_unshuffle(x, 2).flatten(2).mT
    torch.testing.assert_close(tokens[0, 3], x[0, :, 2:4, 2:4].flatten(), rtol=0, atol=0)
    again = unpatchify(tokens, 3, 2, 2, channels_first=True)
    torch.testing.assert_close(again, x, rtol=0, atol=0)


def test_patch_embed_is_row_major() -> None:
    embed = PatchEmbed(1, 1, 2, bias=False)
    torch.nn.init.constant_(embed.proj.weight, 0.25)
    image = torch.arange(24.0).view(1, 1, 4, 6)
    means = image.unfold(2, 2, 2).unfold(3, 2, 2).mean((-2, -1)).flatten()
    torch.testing.assert_close(embed(image).flatten(), means)


def test_patches_of_a_video_come_back() -> None:
    embed, x = PatchEmbed(2, 12, (1, 2, 3), bias=False), torch.randn(2, 2, 3, 4, 6)
    with torch.no_grad():
        embed.proj.weight.copy_(torch.eye(12).view(12, 2, 1, 2, 3))  # channel first
    tokens = embed(x).unflatten(2, (2, 6)).mT.flatten(2)  # channel last
    torch.testing.assert_close(tokens[0, 4 + 3, :2], x[0, :, 1, 2, 3])
    assert torch.equal(unpatchify_video(tokens, (3, 2, 2), (1, 2, 3)), x)
