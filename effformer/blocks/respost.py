"""The residual post-norm block."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from effformer.config import Config as BaseConfig
from effformer.registry import Caps, block
from effformer.site import Site

from .base import Block, Branch, below, ffn_branches, make_mixer

__all__ = ["ResPost"]


class _NormedBranch(Branch):
    """``x + norm(part(x))``: the norm bounds what is added."""

    def enter(self, x: Tensor, mods: tuple[Tensor, ...] | None = None) -> Tensor:
        return x

    def leave(self, x: Tensor, h: Tensor, mods: tuple[Tensor, ...] | None = None) -> Tensor:
        return x + self.scale(self.norm(h))


@block.register(
    "respost", caps=Caps(sequential=True, packed=True, mixer_only=True), paper="2111.09883"
)
class ResPost(Block):
    """Residual post-norm block: ``x + norm(attn(x))``, then ``x + norm(ffn(x))``.

    Args:
        config: no knobs.
        site: the place in the model.
        attn: config of the token mixer.
        ffn: config of the position-wise network, None for none.

    Reference: Swin Transformer V2: Scaling Up Capacity and Resolution, 2021, arXiv 2111.09883.
    """

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(BaseConfig):
        """`ResPost` has no knobs."""

    def __init__(
        self, config: ResPost.Config, site: Site, *, attn: BaseConfig, ffn: BaseConfig | None
    ) -> None:
        here = below(site, "attn")
        branches: dict[str, Branch] = {"attn": _NormedBranch(make_mixer(attn, here), here)}
        branches |= ffn_branches(ffn, site, kind=_NormedBranch)
        super().__init__(branches, site)
