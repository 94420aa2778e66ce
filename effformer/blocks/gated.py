"""The gated transformer block of PredFormer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from effformer.config import Config as BaseConfig
from effformer.context import EMPTY, Context
from effformer.nn.norms import make_norm
from effformer.registry import Caps, block
from effformer.site import Site
from effformer.values import Count

from .prenorm import PreNorm

__all__ = ["Gated"]


@block.register(
    "gated",
    caps=Caps(sequential=True, cross=True, packed=True, mixer_only=True),
    paper="2410.04733",
)
class Gated(PreNorm):
    """Gated transformer block: a pre-norm block whose unit ends with a norm of the tokens.

    ``x + attn(norm(x))``, then ``x + ffn(norm(x))``, and behind the last block of every unit
    ``norm(x)``: nothing bypasses it, so that a unit starts from tokens of a known scale. With units
    of one block each block ends like that.

    The gate is that of the FFN, ``ffn="swiglu"`` in PredFormer, which shows that an ungated one is
    worse; any FFN goes.

    Args:
        config: the knobs.
        site: the place in the model.
        attn: config of the token mixer.
        ffn: config of the position-wise network, None for none.
        cross: config of the mixer that attends to a memory of width ``site.memory_dim``, None for
            no such branch.

    Reference: PredFormer: Transformers Are Effective Spatial-Temporal Predictive Learners, 2024,
    arXiv 2410.04733.
    """

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(PreNorm.Config):
        """Knobs of `Gated`, beside those of `PreNorm`.

        Attributes:
            unit: number of blocks of a unit; units are counted from the first block of the stack.
        """

        unit: Count = 1

    def __init__(
        self,
        config: Gated.Config,
        site: Site,
        *,
        attn: BaseConfig,
        ffn: BaseConfig | None,
        cross: BaseConfig | None = None,
    ) -> None:
        super().__init__(config, site, attn=attn, ffn=ffn, cross=cross)
        ends = (site.layer + 1) % config.unit == 0
        self.norm = make_norm(site) if ends else nn.Identity()

    def forward(self, x: Tensor, ctx: Context = EMPTY) -> Tensor:
        return self.norm(super().forward(x, ctx))
