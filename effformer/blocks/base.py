"""A block is an ordered list of residual branches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from effformer import registry
from effformer.attention import Mixer, Streaming
from effformer.checks import CapabilityError, check_batch
from effformer.config import Config
from effformer.context import EMPTY, Callee, Context, Stream
from effformer.ffn import FFN
from effformer.nn.cut import Forms
from effformer.nn.drop import DropPath
from effformer.nn.norms import Modulation, SharedModulation, branch_norm, modulate
from effformer.site import Site

from .slots import TokenPart, WidthPart, dense_macs, report

__all__ = ["Block", "Branch", "init_states", "make_ffn", "make_mixer"]


class Branch(nn.Module):
    """One residual branch: ``x + gate * factor * part(modulate(norm(x)))``.

    Args:
        part: a `Mixer` or an `FFN`.
        site: the place of the branch in the model.
        factor: constant factor of the branch (Macaron's 0.5).
        post_norm: the norm stands behind the sum, ``norm(x + factor * part(x))``, instead of before
            the part.
        normed: False leaves the norm to the block, which shares one among several branches.
        memory: number of the memory that the branch attends to, and how many the block has.
    """

    def __init__(
        self,
        part: Mixer | FFN,
        site: Site,
        *,
        factor: float = 1.0,
        post_norm: bool = False,
        normed: bool = True,
        memory: tuple[int, int] = (0, 1),
    ) -> None:
        super().__init__()
        self.site = site
        self.memory = memory
        self.factor = factor
        self.post_norm = post_norm
        ffn = isinstance(part, FFN)
        self.norm = branch_norm(site, ffn=ffn) if normed else nn.Identity()
        self.part = part
        self.forms = Forms()
        if site.layer_scale is not None:
            self.layer_scale = nn.Parameter(torch.full((site.dim,), site.layer_scale))
        self.drop_path = DropPath(site.drop_path) if site.drop_path else nn.Identity()

    @property
    def far(self) -> bool:
        """The branch attends to ``ctx.memory``."""
        return isinstance(self.part, Mixer) and self.part.site.memory_dim is not None

    @property
    def beside(self) -> bool:
        """The branch reads the tokens that the branch before it reads, and both are added: those over
        several memories. With norms behind the sums each reads what is there.
        """
        return self.memory[0] > 0 and not self.post_norm

    def view(self, ctx: Context) -> Context:
        """What concerns this branch: its own tokens, or its memory."""
        if self.far:
            ctx = ctx.facing(*self.memory, self.site.path or "block")
        rope = ctx.rope
        if self.far:
            turns = None if rope is None or rope.key_cos is None else rope
            return replace(ctx, mask=None, rope=turns)
        if ctx.memory is None and ctx.memory_mask is None:
            return ctx
        return replace(
            ctx, memory=None, memory_mask=None, rope=None if rope is None else rope.own()
        )

    def forward(self, x: Tensor, ctx: Context, mods: tuple[Tensor, ...] | None = None) -> Tensor:
        """Add the branch to x (B, N, D); mods are shift, scale and gate, (B, 1, D) each, or (B, N, D)
        where each token has its own, as in a packed row.
        """
        return self.leave(x, self.run(self.enter(x, mods), ctx), mods)

    def enter(self, x: Tensor, mods: tuple[Tensor, ...] | None = None) -> Tensor:
        """What the part gets: x behind the norm and the modulation."""
        if self.post_norm:
            return x
        h: Tensor = self.norm(x)
        return h if mods is None else modulate(h, mods[0], mods[1])

    def leave(self, x: Tensor, h: Tensor, mods: tuple[Tensor, ...] | None = None) -> Tensor:
        """Add to x what the part made."""
        h = self.scale(h)
        if self.post_norm:
            return self.norm(x + h)
        return x + h if mods is None else torch.addcmul(x, mods[2], h)

    def run(self, h: Tensor, ctx: Context) -> Tensor:
        """What the part makes of normed tokens, times the constant factor."""
        if ctx.stream is not None and isinstance(self.part, (Mixer, Streaming)):
            h = self._continue(h, ctx, ctx.stream)
        else:
            h = self.part(h, ctx) if ctx.width is None else self.forms.run(self.part, h, ctx)
        if ctx.tap is not None:
            h = ctx.tap(self.site.path, h)
        return h if self.factor == 1.0 else h * self.factor

    def _continue(self, h: Tensor, ctx: Context, stream: Stream) -> Tensor:
        """The part on the next tokens, from its state in the stream."""
        path = self.site.path
        h, stream.after[path] = self._streaming().step(h, stream.before[path], ctx)
        return h

    def init_state(self, batch: int, *, like: Tensor) -> dict[str, Any]:
        """States before the first token, by path; none if every token stands alone.

        Raises:
            CapabilityError: the token mixer cannot stream.
        """
        if not isinstance(self.part, (Mixer, Streaming)):
            return {}
        return {self.site.path: self._streaming().init_state(batch, like=like)}

    def _streaming(self) -> Streaming:
        if not isinstance(self.part, Streaming):
            able = ", ".join(registry.attention.names(streaming=True))
            raise CapabilityError(
                f"{self.site.path}: this token mixer cannot stream; choices: {able}"
            )
        return self.part

    def scale(self, h: Tensor) -> Tensor:
        """Layer scale and stochastic depth, the last steps before the sum."""
        if self.site.layer_scale is not None:
            h = h * self.layer_scale
        return self.drop_path(h)


class Block(Callee):
    """Kind "block": its branches run in the order of ``order``; with ``site.cond_dim`` each is
    modulated.

    The modulation is adaLN-Zero: one linear layer maps ``silu(cond)`` to (shift, scale, gate) for
    every branch, in branch order, and starts at zero. Without shifts it makes (scale, gate).

    Parts in the slots ``width`` and ``tokens`` (see `attach`) let it run less of its branches.

    A branch built with a memory attends to ``ctx.memory`` under ``ctx.memory_mask``; the others see
    their own tokens only. Branches over several memories run side by side, ``x + sum_j
    cross_j(norm_j(x), memory_j)``. In a packed row each token is modulated as its sample asks for.

    Args:
        branches: name -> branch, in execution order; the names become children of the block.
        site: the place of the block in the model.
        shift: the modulation shifts.

    Raises:
        CapabilityError: norms before FFNs have an epsilon of their own (`NormRule`), and this block
            no norm that could follow it.

    Attributes:
        ROLES: child -> part of a transformer, for the profiler.
        SHARED_NORM: why an FFN has no norm with an epsilon of its own, empty if it has.
    """

    ROLES: ClassVar[Mapping[str, str]] = {"modulation": "adaln_blocks"}
    SHARED_NORM: ClassVar[str] = ""

    def __init__(self, branches: Mapping[str, Branch], site: Site, *, shift: bool = True) -> None:
        super().__init__()
        self._check_norms(site)
        self.site = site
        self.shift = shift
        self.order = tuple(branches)
        self.far = any(branch.far for branch in branches.values())
        self.width: WidthPart | None = None
        self.tokens: TokenPart | None = None
        for name, branch in branches.items():
            self.add_module(name, branch)
        if site.cond_dim is not None:
            self.modulation = self.modulate_by(site.cond_dim, len(branches))

    def modulate_by(self, cond_dim: int, branches: int) -> Modulation | SharedModulation:
        """What makes the vectors of so many branches of the conditioning."""
        return Modulation(cond_dim, self.site.dim, (3 if self.shift else 2) * branches)

    def _check_norms(self, site: Site) -> None:
        rule = site.norm
        if not self.SHARED_NORM or rule.ffn_eps in (None, rule.eps):
            return
        able = [e for e in registry.block if e.caps.satisfies(cond=site.cond_dim is not None)]
        apart = ", ".join(sorted(e.name for e in able if not getattr(e.build, "SHARED_NORM", "")))
        raise CapabilityError(
            f"{site.path or 'block'}: {type(self).Config.ENTRY.name!r} {self.SHARED_NORM}, and the "  # type: ignore[attr-defined]
            f"epsilon before FFNs is {rule.ffn_eps:g} instead of {rule.eps:g} ({rule.eps:g} would "
            f"do); choices: {apart}"
        )

    @property
    def branches(self) -> tuple[Branch, ...]:
        """The branches in execution order."""
        return tuple(getattr(self, name) for name in self.order)

    def forward(self, x: Tensor, ctx: Context = EMPTY) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        return self.walk(x, ctx, None if self.site.cond_dim is None else self.modulations(ctx))

    def walk(
        self, x: Tensor, ctx: Context, mods: tuple[Tensor, ...] | None, *, start: int = 0
    ) -> Tensor:
        """Run the branches from the one at ``start`` on; mods are those of all branches."""
        read = x
        for i, name in list(enumerate(self.order))[start:]:
            branch, own = getattr(self, name), None if mods is None else mods[3 * i : 3 * i + 3]
            view = self.narrowed(name, x, branch.view(ctx) if self.far else ctx)
            if branch.beside:
                x = branch.leave(x, branch.run(branch.enter(read, own), view), own)
                continue
            read = x
            if self.tokens is None:
                x = branch(x, view, own)
            else:
                x = self.tokens(name, branch, x, view, own)
        return x

    def attach(self, *, width: Config | None = None, tokens: Config | None = None) -> None:
        """Fill the slots; None leaves a slot as it is.

        Args:
            width: config of a registered part that switches heads and channels off.
            tokens: config of a registered part that chooses the tokens to work on.
        """
        branches = dict(zip(self.order, self.branches, strict=True))
        for kind, config in (("width", width), ("tokens", tokens)):
            if config is not None:
                setattr(self, kind, config.build(below(self.site, kind), branches))

    def narrowed(self, name: str, x: Tensor, ctx: Context) -> Context:
        """The context of a branch with its active units, which are reported to the ledger."""
        if self.width is None or ctx.complete:
            return ctx
        width = self.width(name, ctx)
        if width is None:
            return ctx
        if ctx.ledger is not None:
            report(getattr(self, name), x, ctx, width.mean(dim=1))
        return replace(ctx, width=width)

    def modulations(self, ctx: Context) -> tuple[Tensor, ...]:
        """Shift, scale and gate of every branch, in branch order.

        Raises:
            ValueError: the context carries no conditioning.
        """
        if ctx.cond is None:
            raise ValueError(
                f"{self.site.path or 'block'}: ctx.cond is None, but the block is modulated"
            )
        mods: tuple[Tensor, ...] = self.modulation(ctx.cond)
        if ctx.packing is not None and ctx.cond.dim() == 2:
            mods = tuple(ctx.packing.spread(m[:, 0]) for m in mods)
        if self.shift:
            return mods
        zero = mods[0].new_zeros(())
        pairs = zip(mods[0::2], mods[1::2], strict=True)
        return tuple(x for scale, gate in pairs for x in (zero, scale, gate))

    def macs(
        self, n: int, m: int | tuple[int, ...] | None = None, *, grid: tuple[int, ...] | None = None
    ) -> int:
        """Dense multiply-adds of one sample with n tokens (m in the memory, or in each of several);
        mixers whose work depends on the shape of the grid need ``grid``.
        """
        total = 0
        if self.site.cond_dim is not None:
            total = self.modulation.macs()
        if self.width is not None:
            total += self.width.macs()
        if self.tokens is not None:
            total += self.tokens.macs(n)
        for branch in self.branches:
            far = m[branch.memory[0]] if isinstance(m, tuple) else m
            total += dense_macs(branch.part, n, far if branch.far else None, grid=grid)
        return total


def init_states(module: nn.Module, batch: int, *, like: Tensor) -> dict[str, Any]:
    """What `effformer.context.Stream` holds before the first token: the state of every branch.

    Args:
        module: a model, or any module with blocks in it.
        batch: number of samples.
        like: gives dtype and device.

    Raises:
        CapabilityError: a token mixer cannot stream.
    """
    check_batch(batch, where="init_states")
    states: dict[str, Any] = {}
    for branch in module.modules():
        if isinstance(branch, Branch):
            states |= branch.init_state(batch, like=like)
    return states


def below(site: Site, name: str, **changes: Any) -> Site:
    """The site of a child called ``name``."""
    return replace(site, path=f"{site.path}.{name}" if site.path else name, **changes)


def make_mixer(config: Config, site: Site) -> Mixer:
    """Build a registered token mixer."""
    mixer: Mixer = config.build(site)
    return mixer


def mixer_branches(
    attn: Config, cross: Config | None, site: Site, *, post_norm: bool = False
) -> dict[str, Branch]:
    """The branches ``attn`` and, with a memory, ``cross``; see `cross_branches`."""
    here = below(site, "attn", memory_dim=None)
    branches = {"attn": Branch(make_mixer(attn, here), here, post_norm=post_norm)}
    return branches | cross_branches(cross, site, post_norm=post_norm)


def cross_branches(
    cross: Config | None, site: Site, *, kind: type[Branch] = Branch, **options: bool
) -> dict[str, Branch]:
    """A branch for every memory, ``cross``, ``cross_2``, ...; options are those of the branch."""
    branches: dict[str, Branch] = {}
    if cross is None:
        return branches
    widths = site.memories
    for i, width in enumerate(widths):
        name = f"cross_{i + 1}" if i else "cross"
        here = below(site, name, memory_dim=width)
        mixer = make_mixer(cross, here)
        branches[name] = kind(mixer, here, memory=(i, len(widths)), **options)
    return branches


def ffn_branches(
    ffn: Config | None, site: Site, *, kind: type[Branch] = Branch, post_norm: bool = False
) -> dict[str, Branch]:
    """The branch ``ffn``, or nothing in a model without position-wise networks."""
    if ffn is None:
        return {}
    here = below(site, "ffn")
    return {"ffn": kind(make_ffn(ffn, here), here, post_norm=post_norm)}


def make_ffn(config: Config, site: Site) -> FFN:
    """Build a registered position-wise network."""
    part: FFN = config.build(site)
    return part
