"""Agent attention: softmax attention through a few tokens that stand for the others."""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt, prod
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effformer.config import Config as BaseConfig
from effformer.context import Context
from effformer.nn.lepe import LePE, Reduction
from effformer.nn.resample import averages, stretch_grid
from effformer.registry import Caps, attention
from effformer.site import Site
from effformer.values import Count, Odd

from .agent_bias import AgentBias
from .backends import fused
from .lin import GridMixer, joined

__all__ = ["Agent"]


@attention.register("agent", caps=Caps(axes="hw", front=True, cost="n"), paper="2312.08874")
class Agent(GridMixer):
    """Agent attention: ``W(softmax(q A^T d^-1/2 + B2) softmax(A k^T d^-1/2 + B1) v + dwconv(v))``.

    The a agents A are the queries averaged over sqrt(a) x sqrt(a) parts of the grid; they collect
    values from all keys and hand them to all queries. Both weights are distributions, the product
    has rank a at most. Biases are the only positions beside the convolution, see `AgentBias`.

    Tokens in front of the grid (class token) attend and are attended to, but make no agents and
    have no neighbours. With ``reduction`` r the keys of the grid come from `Reduction`, and the
    values are interpolated back, in 2-D, for the convolution.

    Averages over the parts of the grid are products with small matrices, about sqrt(a) N D in
    ``macs``.

    Args:
        config: the knobs.
        site: the place in the model.

    Raises:
        CapabilityError: see `GridMixer`.

    Reference: Agent Attention: On the Integration of Softmax and Linear Attention, 2023, arXiv
    2312.08874.
    """

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(BaseConfig):
        """Knobs of `Agent`.

        Attributes:
            agents: number of agents, a square.
            bias: "none", "maps" (7 x 7 maps) or "full" (maps, and rows, columns and tokens in front
                where the model fixes its grid).
            qkv_bias: the input projections have biases.
            proj_bias: the output projection has a bias.
            reduction: side r of the squares of cells that share a key.
            kernel: side of the convolution, odd.
        """

        agents: Count = 49
        bias: Literal["none", "maps", "full"] = "full"
        qkv_bias: bool = True
        proj_bias: bool = True
        reduction: Count = 1
        kernel: Odd = 3

        def check(self) -> None:
            if isqrt(self.agents) ** 2 != self.agents:
                raise ValueError(f"agent: agents must be a square number, got {self.agents}")

    NAME = "agent"

    def __init__(self, config: Agent.Config, site: Site) -> None:
        super().__init__(config, site)
        dim, bias = site.dim, config.qkv_bias
        self.side = isqrt(config.agents)
        self.q = nn.Linear(dim, dim, bias=bias)
        self.kv = nn.Linear(dim, 2 * dim, bias=bias)
        self.reduce = Reduction(dim, config.reduction) if config.reduction > 1 else None
        self.bias = self._bias(config, site)
        self.lepe = LePE(dim, config.kernel)
        self.proj = nn.Linear(dim, site.out_dim or dim, bias=config.proj_bias)

    def _bias(self, config: Agent.Config, site: Site) -> AgentBias | None:
        if config.bias == "none":
            return None
        if config.bias == "maps" or self.cells is None or site.cells is None:
            return AgentBias(site.heads, config.agents, None)
        front = 0 if site.length is None else site.length - prod(site.cells)
        sizes = (self.cells, self.reduced(self.cells))
        return AgentBias(site.heads, config.agents, sizes, front)

    def mix(self, x: Tensor, grid: tuple[int, int], ctx: Context) -> Tensor:
        front, keys = x.shape[1] - grid[0] * grid[1], self.reduced(grid)
        q = self.split(self.q(x), "q", ctx)
        k, v = self.kv(self._fewer(x, grid, front)).chunk(2, dim=-1)
        k, v = self.split(k, "k", ctx), self.split(v, "v", ctx)
        agents, bias = self._agents(q[:, :, front:], grid), self.bias
        to_keys = to_agents = None
        if bias is not None:
            to_keys = bias("key", keys, front)[None].to(q.dtype)
            to_agents = bias("query", grid, front)[None].mT.to(q.dtype)
        collected = fused(agents, k, v, attn_mask=to_keys)
        mixed = fused(q, agents, collected, attn_mask=to_agents)
        local = joined(v)[:, front:]
        if self.reduce is not None:
            local = stretch_grid(local.unflatten(1, keys), grid, 1).flatten(1, 2)
        return self.proj(joined(mixed) + F.pad(self.lepe(local, grid), (0, 0, front, 0)))

    def _fewer(self, x: Tensor, grid: tuple[int, int], front: int) -> Tensor:
        if self.reduce is None:
            return x
        return torch.cat([x[:, :front], self.reduce(x[:, front:], grid)], dim=1)

    def _agents(self, q: Tensor, grid: tuple[int, int]) -> Tensor:
        """Queries (B, H, h * w, d) averaged over the parts of the grid: (B, H, a, d)."""
        down, right = (averages(size, self.side, q) for size in grid)
        lines = down @ q.unflatten(2, grid).flatten(3)  # (B, H, sqrt(a), w * d)
        return (right @ lines.unflatten(3, (grid[1], self.head_dim))).flatten(2, 3)

    def image_macs(self, grid: tuple[int, int], front: int) -> int:
        n, dim, agents = grid[0] * grid[1], self.site.dim, self.config.agents
        keys = n if self.reduce is None else self.reduced(grid)[0] * self.reduced(grid)[1]
        fewer = 0 if self.reduce is None else self.reduce.macs(keys)
        pooled = (self.side * n + agents * grid[1]) * dim
        queries, keys = front + n, front + keys
        projections = dim * ((queries + 2 * keys) * dim + queries * self.proj.out_features)
        attended = 2 * agents * (queries + keys) * dim
        return projections + fewer + pooled + attended + self.lepe.macs(n, dim)
