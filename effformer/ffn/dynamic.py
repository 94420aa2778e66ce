"""An MLP of which as much runs as the time asks for."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from effformer.context import EMPTY, Context
from effformer.nn.cut import Forms
from effformer.nn.gates import Switch
from effformer.nn.routers import TimeRouter
from effformer.registry import Caps, ffn
from effformer.site import Site

from .base import FFN, FFNConfig
from .mlp import MLP

__all__ = ["DynamicMLP"]


@ffn.register("dynamic-mlp", caps=Caps(time=True, dynamic=True), paper="2410.03456")
class DynamicMLP(FFN):
    """MLP whose groups of hidden channels are switched by the time: ``W2 act(g * (W1 x + b1)) + b2``,
    ``g = [1, G(W e_t + b)]``.

    The FFN's half of ``width="dynamic"`` alone, for models whose attention stays whole or has no
    heads. In evaluation the channels that are switched off are cut out.

    Args:
        config: the knobs.
        site: the place in the model; ``site.time_dim`` is required.

    Raises:
        ValueError: hidden channels that do not divide into the groups, or no time embedding.

    Reference: Dynamic Diffusion Transformer, 2024, arXiv 2410.03456.
    """

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(FFNConfig):
        """Knobs of `DynamicMLP`, beside `FFNConfig`.

        Attributes:
            groups: channel groups; None means as many as heads.
            start: initial bias of the router: everything starts switched on.
            tau: temperature of the samples in training.
            threshold: of the gates, in (0, 1).
        """

        groups: int | None = None
        start: float = 15.0
        tau: float = 5.0
        threshold: float = 0.5

        def __post_init__(self) -> None:
            FFNConfig.__post_init__(self)
            if self.tau <= 0 or not 0 < self.threshold < 1:
                raise ValueError(
                    "dynamic-mlp: tau must be positive and threshold lie in (0, 1), got "
                    f"tau={self.tau}, threshold={self.threshold}"
                )

    def __init__(self, config: DynamicMLP.Config, site: Site) -> None:
        super().__init__(config, site)
        where, groups = site.path or "dynamic-mlp", config.groups or site.heads
        if site.time_dim is None:
            raise ValueError(f"{where}: the site has no time_dim")
        if self.hidden % groups:
            raise ValueError(
                f"{where}: {self.hidden} hidden channels do not divide into {groups} groups; change "
                "groups, hidden or ratio"
            )
        plain = MLP.Config(hidden=self.hidden, act=config.act, bias=config.bias)
        self.mlp = MLP(plain, site)
        switch = Switch(tau=config.tau, threshold=config.threshold, path=f"{where}.gate")
        self.gate = TimeRouter(site.time_dim, groups, switch, bias=config.start)
        self.forms = Forms()

    def forward(self, x: Tensor, ctx: Context = EMPTY) -> Tensor:
        self.check_width(ctx)
        if ctx.complete:
            return self.mlp(x, ctx)
        width = self.gate(ctx)
        if ctx.ledger is not None:
            n = x.shape[1]
            done = self.gate.macs() + width.mean(dim=1) * self.mlp.macs(n)
            ctx.ledger.work(self.site.path, done / self.macs(n), self.macs(n))
        return self.forms.run(self.mlp, x, replace(ctx, width=width))

    def macs(self, n: int) -> int:
        return self.mlp.macs(n) + self.gate.macs()
