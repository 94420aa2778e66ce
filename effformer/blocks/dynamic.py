"""DyDiT's gates: how many heads and channels run at which time, and which tokens reach the FFN."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from effformer import registry
from effformer.attention import Mixer
from effformer.checks import CapabilityError
from effformer.config import Config as BaseConfig
from effformer.context import Context
from effformer.ffn import FFN
from effformer.nn.gates import Switch, values_known
from effformer.nn.onnx_nodes import gathers
from effformer.nn.routers import TimeRouter, TokenRouter
from effformer.registry import Caps, tokens, width
from effformer.site import Layer, Needs, Site
from effformer.values import Count, Positive, Range, Real

from .base import Branch
from .slots import TokenPart, WidthPart, report

__all__ = ["DynamicTokens", "DynamicWidth"]


@width.register("dynamic", caps=Caps(time=True, dynamic=True), paper="2410.03456")
class DynamicWidth(WidthPart):
    """Timestep-wise width: heads of every mixer and channel groups of every FFN are switched by the
    time alone, with ``over="ffn"`` those of the FFNs.

    ``g = [1, G(W e_t + b)]`` for each branch, see `Switch`; e_t is the embedding of the time,
    without the label. Outputs of heads are multiplied by g before the output projection; groups of
    hidden channels before the activation (of gated units: the product). In evaluation the parts
    are cut to their active units instead, which gives the same result for less work: the pattern
    belongs to the time, so it is the same for all samples of a sampler's step.

    Args:
        config: the knobs.
        site: the place in the model; ``site.time_dim`` is required.
        branches: the branches of the block.

    Raises:
        ValueError: fewer than two heads, or hidden channels that do not divide into the groups.
        CapabilityError: heads that cannot be taken apart.

    Reference: Dynamic Diffusion Transformer, 2024, arXiv 2410.03456; DyDiT++: Dynamic Diffusion
    Transformers for Efficient Visual Generation, 2025, arXiv 2504.06803.
    """

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(BaseConfig):
        """Knobs of `DynamicWidth`.

        Attributes:
            over: "all" branches, or the "ffn" alone, for mixers that stay whole or have no heads that
                could be taken apart.
            groups: channel groups of an FFN; None means as many as heads.
            bias: initial bias of the routers: everything starts switched on.
            tau: temperature of the samples in training.
            threshold: of the gates, in (0, 1).
        """

        over: Literal["all", "ffn"] = "all"
        groups: Annotated[int, Range(2)] | None = None
        bias: Real = 15.0
        tau: Positive = 5.0
        threshold: Annotated[float, Range(0, 1, above=True, below=True)] = 0.5

    def __init__(
        self, config: DynamicWidth.Config, site: Site, branches: Mapping[str, Branch]
    ) -> None:
        super().__init__(config, site, branches)
        if site.time_dim is None:
            raise ValueError(f"{site.path}: the site has no time_dim")
        self.gates = nn.ModuleDict()
        for name, branch in branches.items():
            if config.over == "ffn" and not isinstance(branch.part, FFN):
                continue
            units = self._units(branch.part)
            switch = _switch(config, site, name)
            self.gates[name] = TimeRouter(site.time_dim, units, switch, bias=config.bias)

    @classmethod
    def check(cls, config: BaseConfig, layer: Layer, needs: Needs, where: str) -> None:
        assert isinstance(config, DynamicWidth.Config)
        for slot in ("attn", "cross") if config.over == "all" else ():
            mixer = getattr(layer, slot)
            if mixer is not None and (why := _joined(mixer)) is not None:
                raise CapabilityError(
                    f"{where}.width: 'dynamic' switches heads, but {slot} {mixer.title!r} {why}, "
                    "or over='ffn'; choices: None"
                )
        if layer.ffn is None:
            if config.over == "all":
                return
            raise CapabilityError(
                f"{where}.width: 'dynamic' with over='ffn' switches hidden channels, but the block "
                "has no FFN; choices: None"
            )
        entry = layer.ffn.entry
        if not entry.caps.width:
            able = ", ".join(registry.ffn.names(width=True))
            raise CapabilityError(
                f"{where}.width: 'dynamic' switches hidden channels, but ffn {entry.name!r} has none "
                f"that can be taken apart (ffn: {able} would do); choices: None"
            )

    @classmethod
    def admits(cls, config: BaseConfig, kind: str, caps: Caps) -> bool:
        assert isinstance(config, DynamicWidth.Config)
        met = kind == "ffn" or (config.over == "all" and kind != "block")
        return caps.width or not met

    def narrows(self, name: str) -> bool:
        return name in self.gates

    def forward(self, name: str, ctx: Context) -> Tensor | None:
        return self.gates[name](ctx) if name in self.gates else None

    def macs(self) -> int:
        return sum(gate.macs() for gate in self.gates.values())  # type: ignore[operator]

    def _units(self, part: Mixer | FFN) -> int:
        """Number of gates of a part: heads, or groups of channels."""
        if isinstance(part, Mixer):
            return int(part.units)  # type: ignore[arg-type]
        groups = self.config.groups or self.site.heads
        if part.units % groups:
            raise ValueError(
                f"{self.site.path}: {part.units} hidden channels do not divide into {groups} groups; "
                "change groups, or the FFN's hidden or ratio"
            )
        return int(groups)


@tokens.register("dynamic", caps=Caps(dynamic=True), paper="2410.03456")
class DynamicTokens(TokenPart):
    """Spatial-wise tokens: those that a gate switches off pass an FFN by on the residual stream.

    ``s = G(W2 relu(W1 h))`` of the residual stream h in front of the FFN (no norm, no modulation),
    then ``h + s * ffn_branch(h)``: biases and modulation gates are skipped as well. Attention works
    on all tokens. In evaluation the tokens that remain are gathered into one matrix, and nothing
    else is computed; none at all may remain.

    Args:
        config: the knobs.
        site: the place in the model.
        branches: the branches of the block.

    Reference: Dynamic Diffusion Transformer, 2024, arXiv 2410.03456; DyDiT++: Dynamic Diffusion
    Transformers for Efficient Visual Generation, 2025, arXiv 2504.06803.
    """

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(BaseConfig):
        """Knobs of `DynamicTokens`.

        Attributes:
            reduction: token width over the gate's inner width.
            bias: initial bias of the gate: every token starts switched on.
            tau: temperature of the samples in training.
            threshold: of the gates, in (0, 1).
        """

        reduction: Count = 16
        bias: Real = 35.0
        tau: Positive = 5.0
        threshold: Annotated[float, Range(0, 1, above=True, below=True)] = 0.5

    def __init__(
        self, config: DynamicTokens.Config, site: Site, branches: Mapping[str, Branch]
    ) -> None:
        super().__init__(config, site, branches)
        hidden = max(site.dim // config.reduction, 1)
        self.gates = nn.ModuleDict()
        for name, branch in branches.items():
            if isinstance(branch.part, FFN):
                switch = _switch(config, site, name)
                self.gates[name] = TokenRouter(site.dim, hidden, switch, bias=config.bias)

    @classmethod
    def check(cls, config: BaseConfig, layer: Layer, needs: Needs, where: str) -> None:
        if layer.ffn is None:
            raise CapabilityError(
                f"{where}.tokens: 'dynamic' lets tokens pass the FFN by, but the block has none; "
                "choices: None"
            )
        entry = layer.ffn.entry
        if not cls.admits(config, "ffn", entry.caps):
            why = "mixes tokens"
            if entry.caps.dynamic:
                why = "chooses its work for every token itself"
            able = ", ".join(e.name for e in registry.ffn if cls.admits(config, "ffn", e.caps))
            raise CapabilityError(
                f"{where}.tokens: 'dynamic' lets tokens pass the FFN by, but ffn {entry.name!r} {why} "
                f"(ffn: {able} would do); choices: None"
            )

    @classmethod
    def admits(cls, config: BaseConfig, kind: str, caps: Caps) -> bool:
        alone = not caps.axes and not caps.dynamic and caps.causal == "never"
        return kind != "ffn" or alone

    def forward(
        self,
        name: str,
        branch: Branch,
        x: Tensor,
        ctx: Context,
        mods: tuple[Tensor, ...] | None = None,
    ) -> Tensor:
        if name not in self.gates or ctx.complete:
            return branch(x, ctx, mods)
        gate: Tensor = self.gates[name](x, ctx)
        if ctx.ledger is not None:
            if ctx.packing is None:
                fraction = gate.mean(dim=(1, 2))
            else:
                fraction = ctx.packing.means(gate[..., 0])
            narrow = 1.0 if ctx.width is None else ctx.width.mean(dim=1)
            report(branch, x, ctx, fraction * narrow)
        masked = self.training or ctx.tap is not None
        if gathers() and ctx.packing is None and not masked:
            return _apart(branch, x, ctx, mods, (gate > 0).flatten().nonzero().flatten())
        if masked or not values_known(x):
            # exact at both ends: a token that is switched off keeps its very bits
            return torch.lerp(x, branch(x, ctx, mods), gate.to(x.dtype))
        return _gathered(branch, x, ctx, mods, gate > 0)

    def macs(self, n: int) -> int:
        return sum(gate.macs(n) for gate in self.gates.values())  # type: ignore[operator]


def _switch(config: DynamicWidth.Config | DynamicTokens.Config, site: Site, name: str) -> Switch:
    return Switch(tau=config.tau, threshold=config.threshold, path=f"{site.path}.{name}")


def _gathered(
    branch: Branch, x: Tensor, ctx: Context, mods: tuple[Tensor, ...] | None, keep: Tensor
) -> Tensor:
    """The branch on the tokens in ``keep`` (B, N, 1), the others unchanged."""
    index = keep.flatten().nonzero().flatten()
    if len(index) in (0, keep.numel()):
        return branch(x, ctx, mods) if len(index) else x
    if ctx.packing is None and x.shape[0] > 1:
        return _apart(branch, x, ctx, mods, index)
    flat = x.flatten(0, 1)
    chosen = flat.index_select(0, index)
    own = None if mods is None else tuple(_chosen(m, index) for m in mods)
    packing = None if ctx.packing is None else ctx.packing.chosen(index)
    done = branch(chosen[None], replace(ctx, packing=packing), own)
    return flat.index_copy(0, index, done.flatten(0, 1)).view_as(x)


def _apart(
    branch: Branch, x: Tensor, ctx: Context, mods: tuple[Tensor, ...] | None, index: Tensor
) -> Tensor:
    """The branch on some tokens, each a sample of its own with what belongs to its old sample."""
    flat, sample = x.flatten(0, 1), index // x.shape[1]
    own = None if mods is None else tuple(_picked(m, index, sample) for m in mods)
    done = branch(flat.index_select(0, index)[:, None], ctx.rows(sample), own)
    return flat.index_put((index,), done.flatten(0, 1)).view_as(x)


def _chosen(mod: Tensor, index: Tensor) -> Tensor:
    """The vectors (1, T, D) of some tokens; one that stands for all stays."""
    return mod if mod.dim() == 0 or mod.shape[1] == 1 else mod.index_select(1, index)


def _picked(mod: Tensor, index: Tensor, sample: Tensor) -> Tensor:
    """Those (K, 1, D) of some tokens, from what their samples (B, 1, D) have, or they (B, N, D)."""
    if mod.dim() == 0:
        return mod
    if mod.shape[1] == 1:
        return mod.index_select(0, sample)
    return mod.flatten(0, 1).index_select(0, index)[:, None]


def _joined(mixer: BaseConfig) -> str | None:
    """Why the heads of a mixer cannot be taken apart, None if they can."""
    if not (mixer.entry.caps.width and mixer.caps().width):
        names = ", ".join(n for n in registry.attention.names(width=True) if n != "multihead")
        return f"has none that can be taken apart (attn: {names} would do)"
    return getattr(mixer, "joined", None)
