"""Blocks whose branches read the same tokens: attention beside the FFN, and several of each."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import reduce
from typing import ClassVar

import torch
from torch import Tensor, nn

from effformer.config import Config as BaseConfig
from effformer.context import EMPTY, Context
from effformer.nn.drop import DropPath
from effformer.nn.norms import Modulation, branch_norm, modulate
from effformer.registry import Caps, block
from effformer.site import Site
from effformer.values import Count

from .base import Block, Branch, below, make_ffn, make_mixer

__all__ = ["Parallel", "ParallelBranches"]


@block.register("parallel", caps=Caps(cond="optional", packed=True), paper="2302.05442")
class Parallel(Block):
    """Attention and FFN side by side: ``h = norm(x)``, ``x + attn(h) + ffn(h)``.

    One norm serves both branches. In a conditioned model each branch shifts, scales and gates for
    itself (six vectors), or, with ``fused``, both together (three)::

        x + gate * (attn(h) + ffn(h)),   h = norm(x) * (1 + scale) + shift

    Differs from the paper: the conditioned form with six vectors is ours, that with three is FLUX's
    (its single blocks).

    Args:
        config: the knobs.
        site: the place in the model.
        attn: config of the token mixer.
        ffn: config of the position-wise network.

    Reference: Scaling Vision Transformers to 22 Billion Parameters, 2023, arXiv 2302.05442.
    """

    SHARED_NORM: ClassVar[str] = "has one norm for attention and FFN"

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(BaseConfig):
        """Knobs of `Parallel`.

        Attributes:
            fused: both branches are one, as where their projections are fused: one modulation, and
                one bias behind both, that of the FFN (the output projection of the heads has none).
        """

        fused: bool = False

    def __init__(
        self, config: Parallel.Config, site: Site, *, attn: BaseConfig, ffn: BaseConfig
    ) -> None:
        shared = replace(site, layer_scale=None, drop_path=0.0)
        a, f = below(shared, "attn"), below(shared, "ffn")
        if config.fused and hasattr(attn, "proj_bias"):
            attn = attn.replace(proj_bias=False)
        branches = {
            "attn": Branch(make_mixer(attn, a), a, normed=False),
            "ffn": Branch(make_ffn(ffn, f), f, normed=False),
        }
        super().__init__(branches, site)
        self.fused = config.fused
        if self.fused and site.cond_dim is not None:
            self.modulation = Modulation(site.cond_dim, site.dim, 3)
        self.norm = branch_norm(site)
        if site.layer_scale is not None:
            self.layer_scale = nn.Parameter(torch.full((site.dim,), site.layer_scale))
        self.drop_path = DropPath(site.drop_path) if site.drop_path else nn.Identity()

    def forward(self, x: Tensor, ctx: Context = EMPTY) -> Tensor:
        h, gate = self.norm(x), None
        mods = () if self.site.cond_dim is None else self.modulations(ctx)
        if mods and self.fused:
            shift, scale, gate = mods
            h = modulate(h, shift, scale)
        if mods and not self.fused:
            triples = zip(mods[0::3], mods[1::3], mods[2::3], strict=True)
            y = _total(
                own * branch.run(modulate(h, shift, scale), view)
                for (branch, view), (shift, scale, own) in zip(
                    self._narrowed(h, ctx), triples, strict=True
                )
            )
        else:
            y = _total(branch.run(h, view) for branch, view in self._narrowed(h, ctx))
        if self.site.layer_scale is not None:
            y = y * self.layer_scale
        y = self.drop_path(y)
        return x + y if gate is None else torch.addcmul(x, gate, y)

    def _narrowed(self, h: Tensor, ctx: Context) -> list[tuple[Branch, Context]]:
        """The branches, each with its context."""
        return [(getattr(self, name), self.narrowed(name, h, ctx)) for name in self.order]


@block.register("parallel-branches", caps=Caps(packed=True), paper="2203.09795")
class ParallelBranches(Block):
    """Several attentions side by side, then several FFNs: ``x + sum_j attn_j(norm_j(x))``, then ``x
    + sum_j ffn_j(norm_j(x))``.

    A block with c copies has the parameters of c ordinary ones and a c-th of their sequential
    steps.

    Args:
        config: the knobs.
        site: the place in the model.
        attn: config of each token mixer.
        ffn: config of each position-wise network.

    Reference: Three things everyone should know about Vision Transformers, 2022, arXiv 2203.09795.
    """

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(BaseConfig):
        """Knobs of `ParallelBranches`.

        Attributes:
            copies: number of attentions and of FFNs.
        """

        copies: Count = 2

    def __init__(
        self, config: ParallelBranches.Config, site: Site, *, attn: BaseConfig, ffn: BaseConfig
    ) -> None:
        branches = {}
        for j in range(config.copies):
            here = below(site, f"attn{j}")
            branches[f"attn{j}"] = Branch(make_mixer(attn, here), here)
        for j in range(config.copies):
            here = below(site, f"ffn{j}")
            branches[f"ffn{j}"] = Branch(make_ffn(ffn, here), here)
        super().__init__(branches, site)
        self.copies = config.copies

    def forward(self, x: Tensor, ctx: Context = EMPTY) -> Tensor:
        for group in (self.order[: self.copies], self.order[self.copies :]):
            runs = [(getattr(self, name), self.narrowed(name, x, ctx)) for name in group]
            x = x + _total(branch.scale(branch.run(branch.norm(x), view)) for branch, view in runs)
        return x


def _total(terms: Iterable[Tensor]) -> Tensor:
    return reduce(torch.add, terms)
