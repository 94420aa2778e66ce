"""The slots of a block beside its branches: how much of each part runs, and on which tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from effformer.attention import Mixer
from effformer.config import Config
from effformer.context import Context
from effformer.registry import Caps
from effformer.site import Site

if TYPE_CHECKING:
    from effformer.site import Layer, Needs

    from .base import Branch

__all__ = ["TokenPart", "WidthPart", "report"]


class _SlotPart(nn.Module, ABC):
    """What stands in a slot of a block.

    Args:
        config: the knobs.
        site: the place of the block in the model; ``site.path`` is that of this part.
        branches: the branches of the block, in execution order.

    Attributes:
        neutral_start: initial values leave the model's function as it is, so that weights trained
            without this part may be loaded.
    """

    neutral_start: ClassVar[bool] = True

    def __init__(self, config: Config, site: Site, branches: Mapping[str, Branch]) -> None:
        super().__init__()
        self.config: Any = config
        self.site = site

    @classmethod
    def check(cls, config: Config, layer: Layer, needs: Needs, where: str) -> None:
        """Refuse at build time what this part cannot work with; ``where`` names the blocks.

        Raises:
            CapabilityError: parts that would work are named.
        """

    @classmethod
    def settled(cls, config: Config, needs: Needs) -> Config:
        """The config with what it leaves to the model filled in."""
        return config

    @classmethod
    def admits(cls, config: Config, kind: str, caps: Caps) -> bool:
        """False for parts of a kind ("attention", "core", "ffn", "block") that `check` refuses."""
        return True


class WidthPart(_SlotPart):
    """Kind "width": how many heads and channels of each branch run, for every sample."""

    def narrows(self, name: str) -> bool:
        """The branch called ``name`` may run in part."""
        return True

    @abstractmethod
    def forward(self, name: str, ctx: Context) -> Tensor | None:
        """Factors (B, U) on the units of the branch called ``name``; None leaves it whole."""

    @abstractmethod
    def macs(self) -> int:
        """Multiply-adds of this part itself, for one sample."""


class TokenPart(_SlotPart):
    """Kind "tokens": on which tokens the branches of a block work."""

    @abstractmethod
    def forward(
        self,
        name: str,
        branch: Branch,
        x: Tensor,
        ctx: Context,
        mods: tuple[Tensor, ...] | None = None,
    ) -> Tensor:
        """Run one branch: ``branch(x, ctx, mods)``, or less of it.

        Args:
            name: name of the branch in its block ("attn", "ffn", ...).
            branch: the branch; ``branch.part`` is a `Mixer` or an `FFN`.
            x: (B, N, D) the raw residual stream.
            ctx: the branch's own context.
            mods: shift, scale and gate of a modulated branch, (B, 1, D), or (B, N, D) of every token.

        Returns:
            (B, N', D) the residual stream behind the branch.
        """

    @abstractmethod
    def macs(self, n: int) -> int:
        """Multiply-adds of this part itself, for one sample with n tokens."""


def report(branch: Branch, x: Tensor, ctx: Context, fraction: Tensor) -> None:
    """Write into the ledger that a branch executes this fraction (B,) of its work on x (B, N, D)."""
    if ctx.ledger is None:
        return
    m = None if ctx.remembered is None else ctx.remembered.shape[1]
    cost = dense_macs(branch.part, x.shape[1], m, grid=ctx.grid)
    ctx.ledger.work(branch.site.path, fraction, cost)


def dense_macs(part: Any, n: int, m: int | None = None, *, grid: tuple[int, ...] | None) -> int:
    """Multiply-adds of a mixer or an FFN on n tokens of one sample, m in the memory; a mixer over
    a grid counts by its shape.
    """
    if not isinstance(part, Mixer):
        return part.macs(n)
    return part.macs(n, m, grid=grid)
