"""What every position-wise network is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from torch import Tensor

from effformer import registry
from effformer.checks import CapabilityError
from effformer.config import Config
from effformer.context import EMPTY, Callee, Context
from effformer.nn.activations import Activation
from effformer.site import Site
from effformer.values import Count, Positive

__all__ = ["FFN", "FFNConfig", "InnerConfig", "refuse_fields"]


@dataclass(frozen=True, slots=True, kw_only=True)
class InnerConfig(Config):
    """Knobs shared by all networks of this kind.

    Attributes:
        ratio: inner width over token width.
        hidden: inner width; overrides ``ratio``.
        bias: the linear layers have biases.
    """

    ratio: Positive = 4.0
    hidden: Count | None = None
    bias: bool = True

    def width(self, dim: int) -> int:
        """Inner width for tokens of width ``dim``."""
        return int(dim * self.ratio) if self.hidden is None else self.hidden

    def scaled(self, share: float) -> Self:
        """The same network with ``share`` of the inner width (Macaron's half steps)."""
        hidden = None if self.hidden is None else int(self.hidden * share)
        return self.replace(ratio=self.ratio * share, hidden=hidden)


@dataclass(frozen=True, slots=True, kw_only=True)
class FFNConfig(InnerConfig):
    """Knobs shared by the networks with an activation.

    Attributes:
        act: activation.
    """

    act: Activation = "gelu-tanh"


class FFN(Callee, ABC):
    """Kind "ffn": acts on every token alone, (B, N, D) -> (B, N, D).

    Networks that look beyond a token say so: ``caps.axes`` for neighbours, ``caps.causal ==
    "always"`` for a state carried from token to token (then `init_state` and `step` continue it).

    Args:
        config: the knobs.
        site: the place in the model.

    Attributes:
        ROLES: child -> part of a transformer, for the profiler; ``""``: everything else in it.
        UNITS: what its `units` are.
    """

    ROLES: ClassVar[Mapping[str, str]] = {"": "mlp", "router": "gates"}
    UNITS: ClassVar[Literal["channels", "experts"]] = "channels"

    def __init__(self, config: InnerConfig, site: Site) -> None:
        super().__init__()
        self.config: Any = config
        self.site = site
        self.hidden = config.width(site.dim)

    @abstractmethod
    def forward(self, x: Tensor, ctx: Context = EMPTY) -> Tensor:
        """(B, N, D) -> (B, N, D)."""

    @abstractmethod
    def macs(self, n: int) -> int:
        """Dense multiply-adds for n tokens of one sample."""

    @property
    def units(self) -> int:
        """Number of hidden channels, or of what else can be taken out."""
        return self.hidden

    def check_width(self, ctx: Context) -> None:
        """Refuse ``ctx.width``, for networks without ``caps.width``.

        Raises:
            CapabilityError: the context carries factors on channels.
        """
        if ctx.width is not None:
            able = ", ".join(registry.ffn.names(width=True))
            raise CapabilityError(
                f"{self.site.path or 'ffn'}: this ffn cannot honour width=True; choices that can: "
                f"{able}"
            )


def switched(hidden: Tensor, ctx: Context) -> Tensor:
    """Hidden channels (B, N, M) times their groups' factors ``ctx.width`` (B, U) of their samples."""
    assert ctx.width is not None
    width = ctx.width[:, None] if ctx.packing is None else ctx.packing.spread(ctx.width)
    width = width.to(hidden.dtype)
    if width.shape[2] == hidden.shape[2]:  # a factor for every channel
        return hidden * width
    return (hidden.unflatten(-1, (width.shape[2], -1)) * width[..., None]).flatten(-2)


def refuse_fields(ctx: Context, names: tuple[str, ...], what: str, where: str) -> None:
    """Refuse context fields that a network which looks beyond a token cannot honour.

    Args:
        ctx: the context.
        names: fields of it.
        what: who refuses, and why: ``"'glumbconv' mixes neighbours"``.
        where: path of the part.

    Raises:
        CapabilityError: a field is set; networks that act on every token alone are named.
    """
    for name in names:
        if getattr(ctx, name) is not None:
            able = sorted(
                e.name for e in registry.ffn if not e.caps.axes and e.caps.causal == "never"
            )
            raise CapabilityError(
                f"{where}: {what} and cannot honour {name}; choices that can: {', '.join(able)}"
            )
