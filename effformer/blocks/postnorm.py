"""The post-norm block of the original transformer."""

from __future__ import annotations

from dataclasses import dataclass

from effformer.config import Config as BaseConfig
from effformer.registry import Caps, block
from effformer.site import Site

from .base import Block, ffn_branches, mixer_branches

__all__ = ["PostNorm"]


@block.register(
    "postnorm",
    caps=Caps(sequential=True, cross=True, packed=True, mixer_only=True),
    paper="1706.03762",
)
class PostNorm(Block):
    """Post-norm block: ``norm(x + attn(x))``, then ``norm(x + ffn(x))``.

    In a decoder ``norm(x + cross(x, memory))`` stands between the two.

    Args:
        config: no knobs.
        site: the place in the model.
        attn: config of the token mixer.
        ffn: config of the position-wise network, None for none.
        cross: config of the mixer that attends to a memory of width ``site.memory_dim``, None for
            no such branch.

    Reference: Attention Is All You Need, 2017, arXiv 1706.03762.
    """

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(BaseConfig):
        """`PostNorm` has no knobs."""

    def __init__(
        self,
        config: PostNorm.Config,
        site: Site,
        *,
        attn: BaseConfig,
        ffn: BaseConfig | None,
        cross: BaseConfig | None = None,
    ) -> None:
        branches = mixer_branches(attn, cross, site, post_norm=True)
        branches |= ffn_branches(ffn, site, post_norm=True)
        super().__init__(branches, site)
