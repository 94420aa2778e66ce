"""The conditioned block of DiT."""

from __future__ import annotations

from dataclasses import dataclass

from effformer.config import Config as BaseConfig
from effformer.registry import Caps, block
from effformer.site import Site

from .prenorm import PreNorm

__all__ = ["AdaLNZero"]

_PLAIN = PreNorm.Config()


@block.register(
    "adaln-zero",
    caps=Caps(sequential=True, packed=True, cond="always", mixer_only=True),
    paper="2212.09748",
)
class AdaLNZero(PreNorm):
    """Pre-norm block whose branches are shifted, scaled and gated by the conditioning (adaLN-Zero).

    ``x + gate * attn(norm(x) * (1 + scale) + shift)``, the same for the FFN; the six vectors are
    ``Linear(silu(cond))``, zero at initialisation, so that the block starts as the identity.

    Args:
        config: the knobs.
        site: the place in the model; ``site.cond_dim`` is required.
        attn: config of the token mixer.
        ffn: config of the position-wise network, None for none.

    Reference: Scalable Diffusion Models with Transformers, 2022, arXiv 2212.09748.
    """

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(BaseConfig):
        """Knobs of `AdaLNZero`.

        Attributes:
            shift: False leaves the shifts out, ``x + gate * attn(norm(x) * (1 + scale))``: four
                vectors instead of six (LightningDiT's ``wo_shift``).
        """

        shift: bool = True

    def __init__(
        self, config: AdaLNZero.Config, site: Site, *, attn: BaseConfig, ffn: BaseConfig | None
    ) -> None:
        super().__init__(_PLAIN, site, attn=attn, ffn=ffn, shift=config.shift)
