"""The ordinary pre-norm block."""

from __future__ import annotations

from dataclasses import dataclass

from effformer.config import Config
from effformer.context import Site
from effformer.registry import Caps, block

from .base import Block, Branch, below, make_ffn, make_mixer

__all__ = ["PreNorm"]


@block.register("prenorm", caps=Caps(packed=True), paper="2002.04745")
class PreNorm(Block):
    """Pre-norm block: ``x + attn(norm(x))``, then ``x + ffn(norm(x))``.

    Args:
        config: no knobs.
        site: the place in the model.
        attn: config of the token mixer.
        ffn: config of the position-wise network.

    Reference: On Layer Normalization in the Transformer Architecture, 2020, arXiv 2002.04745.
    """

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(Config):
        """`PreNorm` has no knobs."""

    def __init__(self, config: PreNorm.Config, site: Site, *, attn: Config, ffn: Config) -> None:
        a, f = below(site, "attn"), below(site, "ffn")
        branches = {"attn": Branch(make_mixer(attn, a), a), "ffn": Branch(make_ffn(ffn, f), f)}
        super().__init__(branches, site)
