"""The two blocks of FlowTransformer, a classifier of network flows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from effformer import registry
from effformer.checks import CapabilityError
from effformer.config import Config as BaseConfig
from effformer.context import EMPTY, Context
from effformer.registry import Caps, block
from effformer.site import Site

from .base import Block, Branch, below, make_ffn, mixer_branches

__all__ = ["FlowTransformerDecoder", "FlowTransformerEncoder"]


@block.register("flowtransformer-encoder", caps=Caps(packed=True), paper="2304.14746")
class FlowTransformerEncoder(Block):
    """FlowTransformer's encoder block, whose second residual adds the attention alone.

    ``a = attn(x)``, ``y = norm(x + a)``, ``norm(a + relu(ffn(y)))``: neither x nor y reaches the
    second sum. The official FFN is an `MLP` with ReLU between its layers, too; its form with
    convolutions of one token is the same.

    Differs from the paper: with dropout, FFNs that drop inner units do so here.

    Args:
        config: no knobs.
        site: the place in the model.
        attn: config of the token mixer.
        ffn: config of the position-wise network.

    Reference: FlowTransformer: A Transformer Framework for Flow-based Network Intrusion Detection
    Systems, 2023, arXiv 2304.14746.
    """

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(BaseConfig):
        """`FlowTransformerEncoder` has no knobs."""

    def __init__(
        self,
        config: FlowTransformerEncoder.Config,
        site: Site,
        *,
        attn: BaseConfig,
        ffn: BaseConfig,
    ) -> None:
        here = below(site, "ffn")
        branches = mixer_branches(attn, None, site, post_norm=True)
        branches["ffn"] = Branch(make_ffn(ffn, here), here, post_norm=True)
        super().__init__(branches, site)

    def forward(self, x: Tensor, ctx: Context = EMPTY) -> Tensor:
        attn, ffn = self.branches
        a = attn.scale(attn.run(x, ctx))
        y: Tensor = attn.norm(x + a)
        out: Tensor = ffn.norm(a + ffn.scale(F.relu(ffn.run(y, ctx))))
        return out


@block.register(
    "flowtransformer-decoder", caps=Caps(packed=True, multihead=True), paper="2304.14746"
)
class FlowTransformerDecoder(Block):
    """FlowTransformer's decoder block, which uses one attention and its second norm twice.

    ``y = norm1(x + attn(x, x))``, ``z = norm2(y + attn(y, x))``, ``norm2(z + ffn(z))``, where
    ``attn(q, m)`` takes queries from q and keys and values from m, at the same positions. It has
    no causal mask of its own; in a causal model the attention is causal, and so is the block.

    A `Tap` meets the attention's places twice. The official FFN is an `MLP` with ReLU.

    Differs from the paper: with dropout, FFNs that drop inner units do so here.

    Args:
        config: no knobs.
        site: the place in the model.
        attn: config of the attention, with any core.
        ffn: config of the position-wise network.

    Raises:
        CapabilityError: the token mixer has no queries that could come from other tokens; at call,
            the context carries a memory or a stream.

    Reference: FlowTransformer: A Transformer Framework for Flow-based Network Intrusion Detection
    Systems, 2023, arXiv 2304.14746.
    """

    SHARED_NORM: ClassVar[str] = "has one norm behind its second attention and the FFN"

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(BaseConfig):
        """`FlowTransformerDecoder` has no knobs."""

    def __init__(
        self,
        config: FlowTransformerDecoder.Config,
        site: Site,
        *,
        attn: BaseConfig,
        ffn: BaseConfig,
    ) -> None:
        a, f = below(site, "attn", memory_dim=site.dim), below(site, "ffn")
        if not attn.caps().multihead:
            raise CapabilityError(
                f"{a.path}: {attn.title!r} has no queries that the "
                "flowtransformer-decoder block could take from other tokens; choices: "
                + ", ".join(registry.core.names())
            )
        branches = {
            "attn": Branch(attn.build(a, aligned=True), a, post_norm=True),
            "ffn": Branch(make_ffn(ffn, f), f, post_norm=True),
        }
        super().__init__(branches, site)
        self.order = ("attn", "attn", "ffn")

    def forward(self, x: Tensor, ctx: Context = EMPTY) -> Tensor:
        where = self.site.path or "flowtransformer-decoder"
        if ctx.memory is not None or ctx.stream is not None:
            able = ", ".join(registry.block.names(cross=True))
            raise CapabilityError(
                f"{where}: this block takes neither a memory nor a stream; choices that can: {able}"
            )
        attn, _, ffn = self.branches
        first = replace(ctx, memory=x)
        y: Tensor = attn.norm(x + attn.scale(attn.run(x, first)))
        z: Tensor = ffn.norm(y + attn.scale(attn.run(y, first)))
        out: Tensor = ffn.norm(z + ffn.scale(ffn.run(z, ctx)))
        return out
