"""Small plain networks for the export tests."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Mlp(nn.Module):
    def __init__(self, dim: int = 32, hidden: int = 64, out: int = 8) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.drop = nn.Dropout(0.5)
        self.fc2 = nn.Linear(hidden, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.drop(nn.functional.gelu(self.fc1(x))))


class Tokens(nn.Module):
    """Attention over any number of tokens, with a mask, two outputs and a constant argument."""

    def __init__(self, dim: int = 16) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, dim)
        self.qkv = nn.Linear(dim, 3 * dim)

    def forward(self, ids: Tensor, mask: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        h = self.embed(ids)
        q, k, v = self.qkv(h).unsqueeze(1).chunk(3, dim=-1)
        attend = nn.functional.scaled_dot_product_attention
        y = attend(q, k, v, attn_mask=mask[:, None, None, :]).squeeze(1)
        return y * scale, y.mean(dim=1)


class Flow(nn.Module):
    """A velocity of pixels, times and labels: ``v(x, t, y)``, nonlinear in all of them."""

    def __init__(self, channels: int = 1, classes: int = 3) -> None:
        super().__init__()
        self.table = nn.Embedding(classes + 1, 8)
        self.time = nn.Linear(1, 8)
        self.conv1 = nn.Conv2d(channels, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, channels, 3, padding=1)
        self.mix = nn.Linear(8, 8)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        c = self.mix(torch.tanh(self.time(t[:, None]) + self.table(y)))
        return self.conv2(torch.tanh(self.conv1(x) + c[:, :, None, None]))


def randomize(model: nn.Module) -> nn.Module:
    """Random trainable weights: DiTs start with output 0, which any graph reproduces."""
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        if p.requires_grad:
            p.data = torch.randn(p.shape, generator=generator) * 0.05
    return model
