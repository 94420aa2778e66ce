"""A block is an ordered list of residual branches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from effformer import registry
from effformer.attention import Mixer
from effformer.config import Config
from effformer.context import EMPTY, Context, Site
from effformer.ffn import FFN
from effformer.nn.drop import DropPath
from effformer.nn.norms import Modulation, make_norm, modulate

__all__ = ["Block", "Branch", "make_ffn", "make_mixer"]


class Branch(nn.Module):
    """One residual branch: ``x + gate * factor * part(modulate(norm(x)))``.

    Args:
        part: a `Mixer` or an `FFN`.
        site: the place of the branch in the model.
        factor: constant factor of the branch (Macaron's 0.5).
        post_norm: the norm stands behind the sum, ``norm(x + factor * part(x))``, instead of before
            the part.
    """

    def __init__(
        self, part: Mixer | FFN, site: Site, *, factor: float = 1.0, post_norm: bool = False
    ) -> None:
        super().__init__()
        self.site = site
        self.factor = factor
        self.post_norm = post_norm
        self.norm = make_norm(site, affine=False if site.cond_dim is not None else None)
        self.part = part
        if site.layer_scale is not None:
            self.layer_scale = nn.Parameter(torch.full((site.dim,), site.layer_scale))
        self.drop_path = DropPath(site.drop_path) if site.drop_path else nn.Identity()

    def forward(self, x: Tensor, ctx: Context, mods: tuple[Tensor, ...] | None = None) -> Tensor:
        """Add the branch to x (B, N, D); mods are shift, scale and gate, (B, 1, D) each."""
        if self.post_norm:
            return self.norm(x + self._branch(x, ctx))
        h = self.norm(x)
        if mods is None:
            return x + self._branch(h, ctx)
        shift, scale, gate = mods
        h = self._branch(modulate(h, shift, scale), ctx)
        return torch.addcmul(x, gate, h)

    def _branch(self, h: Tensor, ctx: Context) -> Tensor:
        h = self.part(h, ctx)
        if ctx.tap is not None:
            h = ctx.tap(self.site.path, h)
        if self.factor != 1.0:
            h = h * self.factor
        if self.site.layer_scale is not None:
            h = h * self.layer_scale
        return self.drop_path(h)


class Block(nn.Module):
    """Kind "block": its branches run in the order of ``order``; with ``site.cond_dim`` each is
    modulated.

    The modulation is adaLN-Zero: one linear layer maps ``silu(cond)`` to (shift, scale, gate) for
    every branch, in branch order, and starts at zero.

    Args:
        branches: name -> branch, in execution order; the names become children of the block.
        site: the place of the block in the model.
    """

    def __init__(self, branches: Mapping[str, Branch], site: Site) -> None:
        super().__init__()
        self.site = site
        self.order = tuple(branches)
        for name, branch in branches.items():
            self.add_module(name, branch)
        if site.cond_dim is not None:
            self.modulation = Modulation(site.cond_dim, site.dim, 3 * len(branches))

    @property
    def branches(self) -> tuple[Branch, ...]:
        """The branches in execution order."""
        return tuple(getattr(self, name) for name in self.order)

    def forward(self, x: Tensor, ctx: Context = EMPTY) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        if self.site.cond_dim is None:
            for branch in self.branches:
                x = branch(x, ctx)
            return x
        if ctx.cond is None:
            raise ValueError(
                f"{self.site.path or 'block'}: ctx.cond is None, but the block is modulated"
            )
        mods = self.modulation(ctx.cond)
        for i, branch in enumerate(self.branches):
            x = branch(x, ctx, mods[3 * i : 3 * i + 3])
        return x

    def macs(self, n: int, m: int | None = None) -> int:
        """Dense multiply-adds of one sample with n tokens (m in the memory)."""
        total = 0 if self.site.cond_dim is None else self.modulation.linear.weight.numel()
        for branch in self.branches:
            part: Any = branch.part
            total += part.macs(n, m) if isinstance(part, Mixer) else part.macs(n)
        return total


def below(site: Site, name: str, **changes: Any) -> Site:
    """The site of a child called ``name``."""
    return replace(site, path=f"{site.path}.{name}" if site.path else name, **changes)


def make_mixer(config: Config, site: Site) -> Mixer:
    """Build a registered token mixer."""
    entry = registry.attention.owner(config)
    assert entry is not None, type(config)
    mixer: Mixer = entry.build(config, site)
    return mixer


def make_ffn(config: Config, site: Site) -> FFN:
    """Build a registered position-wise network."""
    entry = registry.ffn.owner(config)
    assert entry is not None, type(config)
    part: FFN = entry.build(config, site)
    return part
