"""Blocks of LMUFormer: batch norms behind the parts, or neurons before them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from effformer import registry
from effformer.attention import Mixer
from effformer.checks import CapabilityError
from effformer.config import Config as BaseConfig
from effformer.context import Context
from effformer.ffn import FFN
from effformer.nn.lif import LIF
from effformer.nn.norms import TokenBatchNorm
from effformer.registry import Caps, block
from effformer.site import Site

from .base import Block, Branch, below, make_ffn, make_mixer

__all__ = ["LMUBlock", "SpikingLMUBlock"]

_BATCH_NORMS = "has batch norms, whose epsilon is their own"


class _ClosedBranch(Branch):
    """``x + act(BN(part(x)))``."""

    def __init__(self, part: Mixer | FFN, site: Site, act: nn.Module) -> None:
        super().__init__(part, site, normed=False)
        self.norm = TokenBatchNorm(site.dim)
        self.act = act

    def enter(self, x: Tensor, mods: tuple[Tensor, ...] | None = None) -> Tensor:
        return x

    def leave(self, x: Tensor, h: Tensor, mods: tuple[Tensor, ...] | None = None) -> Tensor:
        return x + self.scale(self.act(self.norm(h)))


class _SpikingBranch(Branch):
    """``x + close(part(LIF(BN(x))))``: the part sees spikes, the sum is real."""

    def __init__(
        self, part: Mixer | FFN, site: Site, neurons: LIF.Config, close: nn.Module
    ) -> None:
        super().__init__(part, site, normed=False)
        self.norm = TokenBatchNorm(site.dim)
        self.lif = LIF(neurons)
        self.close = close

    def forward(self, x: Tensor, ctx: Context, mods: tuple[Tensor, ...] | None = None) -> Tensor:
        self._check(ctx)
        key, h = f"{self.site.path}.lif", self.norm(x)
        if ctx.stream is None:
            spikes, _ = self.lif(h)
        else:
            spikes, ctx.stream.after[key] = self.lif(h, ctx.stream.before[key])
        return x + self.scale(self.close(self.run(spikes, ctx)))

    def init_state(self, batch: int, *, like: Tensor) -> dict[str, Any]:
        own = self.lif.init_state(batch, self.site.dim, like=like)
        return {**super().init_state(batch, like=like), f"{self.site.path}.lif": own}

    def _check(self, ctx: Context) -> None:
        for name in ("mask", "packing"):
            if getattr(ctx, name) is not None:
                able = ", ".join(registry.block.names(causal=False))
                raise CapabilityError(
                    f"{self.site.path or 'spiking-lmu'}: neurons charge on padding and across "
                    f"sequences, and cannot honour {name}; choices that can: {able}"
                )


@block.register("lmu", caps=Caps(packed=True, sequential=True), paper="2402.04882")
class LMUBlock(Block):
    """Block of the dense LMUFormer: ``x + BN(attn(x))``, then ``x + relu(BN(ffn(x)))``.

    There is no norm before a part, and the second branch only adds. In training the batch norms see
    padded tokens, too.

    Args:
        config: no knobs.
        site: the place in the model.
        attn: config of the token mixer.
        ffn: config of the channel mixer.

    Reference: LMUFormer: Low Complexity Yet Powerful Spiking Model With Legendre Memory Units,
    2024, arXiv 2402.04882.
    """

    SHARED_NORM: ClassVar[str] = _BATCH_NORMS

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(BaseConfig):
        """`LMUBlock` has no knobs."""

    def __init__(
        self, config: LMUBlock.Config, site: Site, *, attn: BaseConfig, ffn: BaseConfig
    ) -> None:
        a, f = below(site, "attn"), below(site, "ffn")
        branches = {
            "attn": _ClosedBranch(make_mixer(attn, a), a, nn.Identity()),
            "ffn": _ClosedBranch(make_ffn(ffn, f), f, nn.ReLU()),
        }
        super().__init__(branches, site)


@block.register("spiking-lmu", caps=Caps(causal="always"), paper="2402.04882")
class SpikingLMUBlock(Block):
    """Block of the spiking LMUFormer: ``x + BN(attn(LIF(BN(x))))``, then ``x + ffn(LIF(BN(x)))``.

    The shortcut carries membrane potentials (real numbers), the parts see spikes. The neurons charge
    along the tokens, so the block is causal whatever its parts are; it streams if they do.

    Args:
        config: the knobs.
        site: the place in the model.
        attn: config of the token mixer.
        ffn: config of the channel mixer.

    Raises:
        CapabilityError: at call, a mask or packed rows.

    Reference: LMUFormer: Low Complexity Yet Powerful Spiking Model With Legendre Memory Units,
    2024, arXiv 2402.04882.
    """

    SHARED_NORM: ClassVar[str] = _BATCH_NORMS

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(BaseConfig):
        """Knobs of `SpikingLMUBlock`.

        Attributes:
            attn_lif: neurons before the token mixer.
            ffn_lif: neurons before the channel mixer.
        """

        attn_lif: LIF.Config = field(default_factory=lambda: LIF.Config(threshold=0.5))
        ffn_lif: LIF.Config = field(default_factory=LIF.Config)

    def __init__(
        self, config: SpikingLMUBlock.Config, site: Site, *, attn: BaseConfig, ffn: BaseConfig
    ) -> None:
        a, f = below(site, "attn"), below(site, "ffn")
        close = TokenBatchNorm(site.dim)
        branches = {
            "attn": _SpikingBranch(make_mixer(attn, a), a, config.attn_lif, close),
            "ffn": _SpikingBranch(make_ffn(ffn, f), f, config.ffn_lif, nn.Identity()),
        }
        super().__init__(branches, site)
