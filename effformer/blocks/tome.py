"""Token merging between the branches of a block, or around its attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Annotated

import torch
from torch import Tensor

from effformer import registry
from effformer.attention import Mixer
from effformer.checks import CapabilityError
from effformer.config import Config as BaseConfig
from effformer.context import Context, Merging
from effformer.nn.merging import Matching, match_tokens, merge_schedule
from effformer.registry import Caps, tokens
from effformer.site import Layer, Needs, Site
from effformer.values import Natural, Range

from .base import Branch
from .slots import TokenPart, dense_macs

__all__ = ["ToMe"]


@tokens.register("tome", caps=Caps(), paper="2210.09461")
class ToMe(TokenPart):
    """Token merging: in every block the r most similar pairs of tokens become one.

    In a model that goes on with fewer tokens (ViT) they merge behind the attention, by the mean of
    its keys over heads, and stay merged: the FFN and all later blocks run on N - r tokens. In a
    model that needs all of them (DiT) they merge by their own normed values in front of the
    attention, and its output is copied back to all; the FFN runs on all. Tokens in front of the
    grid (class token, registers) take no part. Nothing is learned: weights of a trained model are
    used as they are.

    Merged tokens are means weighted by their sizes; attention counts a key of size s as s keys
    (``softmax(scale q k^T + log s)``) if ``proportional``.

    Args:
        config: the knobs.
        site: the place in the model.
        branches: the branches of the block.

    Raises:
        CapabilityError: ``restore=False`` in a model that needs all tokens; at call, a context with
            a mask, packing, a stream or rotary tables.

    Differs from the paper: all tokens in front of the grid are protected, not the class token (and
    one distillation token) only.

    Reference: Token Merging: Your ViT But Faster, 2022, arXiv 2210.09461; Token Merging for Fast
    Stable Diffusion, 2023, arXiv 2303.17604.
    """

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(BaseConfig):
        """Knobs of `ToMe`.

        Attributes:
            r: tokens to remove in every block (at most half of what is there), or one number for
                each block.
            inflection: from -1 (twice r in the first block, none in the last) over 0 (the same in
                all) to 1 (the other way round).
            proportional: attention counts merged keys by their size. Right for weights that were
                trained without merging.
            restore: copy the attention's output back to all tokens; None: if the model needs them.
        """

        r: Natural | tuple[Natural, ...] = 8
        inflection: Annotated[float, Range(-1, 1)] = 0.0
        proportional: bool = True
        restore: bool | None = None

        def check(self) -> None:
            if isinstance(self.r, tuple) and self.inflection:
                raise ValueError(
                    f"tome: r={list(self.r)} says what every block does; leave inflection out"
                )

    def __init__(self, config: ToMe.Config, site: Site, branches: Mapping[str, Branch]) -> None:
        super().__init__(config, site, branches)
        self.r = merge_schedule(config.r, site.depth, config.inflection)[site.layer]
        mixers = [b.part for b in branches.values() if isinstance(b.part, Mixer) and not b.far]
        self._mixers = len(mixers)
        self.restore = config.restore is not False
        self._metric = site.dim if self.restore else getattr(mixers[0], "head_dim", site.dim)

    @classmethod
    def settled(cls, config: BaseConfig, needs: Needs) -> BaseConfig:
        return config.replace(restore=not needs.shrinks) if config.at("restore") is None else config

    @classmethod
    def check(cls, config: BaseConfig, layer: Layer, needs: Needs, where: str) -> None:
        assert isinstance(config, ToMe.Config)
        reason = _reason(config, layer, needs)
        if reason is not None:
            raise CapabilityError(f"{where}.tokens: 'tome' {reason}; choices: None")

    @classmethod
    def admits(cls, config: BaseConfig, kind: str, caps: Caps) -> bool:
        return kind != "block" or not caps.joint

    def forward(
        self,
        name: str,
        branch: Branch,
        x: Tensor,
        ctx: Context,
        mods: tuple[Tensor, ...] | None = None,
    ) -> Tensor:
        if ctx.complete:
            return branch(x, ctx, mods)
        self._check(ctx)
        attends = isinstance(branch.part, Mixer) and not branch.far
        if self.restore:
            merges = attends and self.r > 0
            return self._around(branch, x, ctx, mods) if merges else branch(x, ctx, mods)
        return self._behind(branch, x, ctx, mods, merges=attends)

    def _around(
        self, branch: Branch, x: Tensor, ctx: Context, mods: tuple[Tensor, ...] | None
    ) -> Tensor:
        """Merge the normed tokens, mix them, copy the result back."""
        n = x.shape[1]
        h = branch.enter(x, mods)
        front = 0 if ctx.grid is None else n - prod(ctx.grid)
        matching = self._shown(match_tokens(h, self.r, front=front), ctx)
        state = Merging(tokens=n, front=front, proportional=self.config.proportional)
        if matching.count < n:
            state.sizes = matching.sizes(h)
        each = ctx.cond is not None and ctx.cond.dim() == 3
        cond = matching.merge(ctx.cond) if each and ctx.cond is not None else ctx.cond
        few = replace(ctx, merging=state, grid=None, cond=cond)
        before = _taken(branch, ctx)
        y = matching.unmerge(branch.run(matching.merge(h), few))
        _report(branch, matching.count, n, x.shape[0], ctx, before)
        return branch.leave(x, y, mods)

    def _behind(
        self,
        branch: Branch,
        x: Tensor,
        ctx: Context,
        mods: tuple[Tensor, ...] | None,
        *,
        merges: bool,
    ) -> Tensor:
        """Run the branch on the tokens that are left; behind a mixer merge some more."""
        state = ctx.merging
        if state is None:
            raise ValueError(f"{self.site.path}: ctx.merging is None, but tokens stay merged")
        if ctx.cond is not None and ctx.cond.dim() == 3:
            raise CapabilityError(
                f"{self.site.path}: tokens stay merged, but ctx.cond has a vector for each; choices: "
                "restore=True, tokens=None"
            )
        state.proportional = self.config.proportional
        before = _taken(branch, ctx)
        x = branch(x, replace(ctx, grid=None), mods)
        _report(branch, x.shape[1], state.tokens, x.shape[0], ctx, before)
        if not merges or self.r == 0:
            return x
        if state.keys is None:
            raise CapabilityError(
                f"{self.site.path}: 'tome' found no keys, because the samples of the batch run "
                "different heads; choices: restore=True, width=None"
            )
        matching = self._shown(match_tokens(state.keys, self.r, front=state.front), ctx)
        sizes, state.keys = state.sizes, None
        state.sizes = matching.sizes(x, sizes)
        if ctx.tap is not None:
            state.sizes = ctx.tap(f"{self.site.path}.sizes", state.sizes)
        return matching.merge(x, sizes)

    def macs(self, n: int) -> int:
        if self.r == 0:
            return 0
        return self._mixers * ((n + 1) // 2) * (n // 2) * self._metric

    def _shown(self, matching: Matching, ctx: Context) -> Matching:
        """Taps see, and may change, which tokens merge: ``<path>.groups`` (B, N)."""
        if ctx.tap is None:
            return matching
        return replace(matching, groups=ctx.tap(f"{self.site.path}.groups", matching.groups))

    def _check(self, ctx: Context) -> None:
        """Refuse what merged tokens cannot honour."""
        for name in ("mask", "packing", "stream", "rope"):
            if getattr(ctx, name) is not None:
                raise CapabilityError(
                    f"{self.site.path}: 'tome' cannot honour ctx.{name}, because merged tokens stand "
                    "for several places; choices: tokens=None"
                )


def _reason(config: ToMe.Config, layer: Layer, needs: Needs) -> str | None:
    """Why merging cannot serve in a block, None if it can."""
    name = layer.attn.title
    able = sorted(registry.core.names(order_free=True))
    if not layer.attn.caps().multihead:
        return f"compares keys, but attn {name!r} has none (attn: {', '.join(able)} would do)"
    caps = layer.attn.caps()
    if not caps.order_free:
        return (
            f"leaves no order of tokens, but attn {name!r} depends on it "
            f"(attn: {', '.join(able)} would do)"
        )
    if config.proportional and not caps.sizes:
        able = sorted(registry.core.names(order_free=True, sizes=True))
        return (
            f"has proportional=True, but attn {name!r} cannot count a key several times "
            f"(proportional=False, or attn: {', '.join(able)} would do)"
        )
    if config.restore is False and not needs.shrinks:
        return "has restore=False, but this model needs all of its tokens (restore=True would do)"
    for missing, why in (
        (needs.joint, "merges around a token mixer, but here two streams share one"),
        (needs.causal, "mixes later tokens into earlier ones, but this model must not see them"),
        (
            needs.rope is not None,
            "leaves tokens without a place of their own, but rotary tables need one",
        ),
        (needs.mask != "none", f"cannot honour the {needs.mask} mask of this model"),
    ):
        if missing:
            return why
    entry = None if layer.ffn is None else layer.ffn.entry
    if entry is not None and entry.caps.axes and needs.shrinks and not config.restore:
        able = sorted(registry.ffn.names(axes=False))
        return (
            f"leaves no grid, but ffn {entry.name!r} needs one (restore=True, or ffn: "
            f"{', '.join(able)} would do)"
        )
    return None


def _taken(branch: Branch, ctx: Context) -> Tensor | None:
    """Take what the ledger says about a branch out of it, so that only its own report is found
    there afterwards.
    """
    return None if ctx.ledger is None else ctx.ledger.executed.pop(branch.site.path, None)


def _report(
    branch: Branch, count: int, full: int, batch: int, ctx: Context, before: Tensor | None
) -> None:
    """Write what a branch did on ``count`` of ``full`` tokens, times what it skipped by itself.

    Args:
        branch: the branch.
        count: tokens that it ran on.
        full: tokens of the model.
        batch: number of samples.
        ctx: its context.
        before: fraction in the ledger before the branch ran (of a part in the slot "width").
    """
    if ctx.ledger is None:
        return
    m = None if ctx.remembered is None else ctx.remembered.shape[1]
    dense, done = (dense_macs(branch.part, n, m, grid=None) for n in (full, count))
    own = ctx.ledger.executed.get(branch.site.path, before)
    fraction = torch.full((batch,), done / dense, dtype=torch.float64)
    ctx.ledger.work(branch.site.path, fraction if own is None else fraction * own, dense)
