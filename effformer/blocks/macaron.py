"""The Macaron block: half an FFN before attention, half behind it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from effformer.config import Config as BaseConfig
from effformer.ffn import InnerConfig
from effformer.nn.activations import Activation
from effformer.registry import Caps, block
from effformer.site import Site
from effformer.values import Count, Portion, Positive

from .base import Block, Branch, below, make_ffn, mixer_branches

__all__ = ["Macaron"]


@block.register(
    "macaron",
    caps=Caps(sequential=True, cond="optional", cross=True, packed=True),
    paper="1906.02762",
)
class Macaron(Block):
    """Macaron block: ``x + 1/2 ffn1(norm(x))``, ``x + attn(norm(x))``, ``x + 1/2 ffn2(norm(x))``.

    The two FFNs have separate weights and, by default, half of the inner width each, so that the
    block has the parameters of an ordinary one. In a conditioned model each branch is modulated and
    gated (nine vectors). In a decoder ``x + cross(norm(x), memory)`` follows the attention.

    Differs from the paper: the conditioned form is ours.

    Args:
        config: the knobs.
        site: the place in the model.
        attn: config of the token mixer.
        ffn: config of the position-wise network as an ordinary block would have it.
        cross: config of the mixer that attends to a memory of width ``site.memory_dim``, None for
            no such branch.

    Reference: Understanding and Improving Transformer From a Multi-Particle Dynamic System Point of
    View, 2019, arXiv 1906.02762.
    """

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(BaseConfig):
        """Knobs of `Macaron`.

        Attributes:
            share: fraction of the FFN's inner width that each half step gets.
            factor: factor of both FFN branches.
            first_act: activation of the leading FFN if it differs (the published BERT models:
                "relu").
            first_hidden: inner width of the leading FFN if it differs (the published decoders: the
                encoder's).
            post_norm: norms stand behind the sums.
        """

        share: Portion = 0.5
        factor: Positive = 0.5
        first_act: Activation | None = None
        first_hidden: Count | None = None
        post_norm: bool = False

    def __init__(
        self,
        config: Macaron.Config,
        site: Site,
        *,
        attn: BaseConfig,
        ffn: InnerConfig,
        cross: BaseConfig | None = None,
    ) -> None:
        if config.post_norm and site.cond_dim is not None:
            raise ValueError(
                f"{site.path or 'macaron'}: post_norm has no conditioned form; use post_norm=False"
            )
        half = ffn.scaled(config.share)
        own: dict[str, Any] = {"act": config.first_act, "hidden": config.first_hidden}
        first = half.replace(**{k: v for k, v in own.items() if v is not None})
        f1, f2 = below(site, "ffn1"), below(site, "ffn2")
        post, factor = config.post_norm, config.factor
        branches = {
            "ffn1": Branch(make_ffn(first, f1), f1, factor=factor, post_norm=post),
            **mixer_branches(attn, cross, site, post_norm=post),
            "ffn2": Branch(make_ffn(half, f2), f2, factor=factor, post_norm=post),
        }
        super().__init__(branches, site)
