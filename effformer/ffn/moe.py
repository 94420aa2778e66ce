"""Mixture of experts: a router sends every token to a few of many FFNs."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effformer.context import EMPTY, Context
from effformer.nn.activations import Activation
from effformer.nn.cut import cut_linear, twin
from effformer.nn.gates import values_known
from effformer.nn.onnx_nodes import gathers
from effformer.registry import Caps, ffn
from effformer.site import Site
from effformer.values import Count, Natural, NonNegative

from .base import FFN, FFNConfig
from .mlp import MLP

__all__ = ["MoE", "balance_loss"]


@ffn.register("moe", caps=Caps(packed=True, dynamic=True), paper="2502.06608")
class MoE(FFN):
    """Mixture of experts: ``shared(x) + sum_{e in top-k} p_e expert_e(x)``, ``p = softmax(W x)``.

    Experts are MLPs of the same width, and so is each shared expert, which serves every token. Each
    expert runs on the tokens that were sent to it, in ONNX graphs, too; a compiled graph runs every
    expert on every token and multiplies most results by zero, so it costs experts / top_k times as
    much. ``macs`` is the work of the chosen experts.

    With a ledger in the context, ``<path>/balance`` receives ``balance`` times `balance_loss`.

    Args:
        config: the knobs.
        site: the place in the model.

    Differs from the paper: it does not say whether p is divided by its sum over the chosen experts;
    ``renormalise`` decides.

    Reference: TripoSG: High-Fidelity 3D Shape Synthesis using Large-Scale Rectified Flow Models,
    2025, arXiv 2502.06608; Scaling Diffusion Transformers to 16 Billion Parameters, 2024, arXiv
    2407.11633.
    """

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(FFNConfig):
        """Knobs of `MoE`; the inner width is that of one expert.

        Attributes:
            experts: number of experts.
            top_k: experts that a token runs.
            shared: experts that every token runs, as one MLP of so many times the width; 0 for
                none.
            renormalise: the chosen probabilities are divided by their sum.
            balance: weight of the auxiliary loss.
        """

        act: Activation = "gelu"
        experts: Count = 8
        top_k: Count = 2
        shared: Natural = 1
        renormalise: bool = False
        balance: NonNegative = 0.01

        def check(self) -> None:
            if self.top_k > self.experts:
                raise ValueError(
                    f"moe: needs top_k <= experts, got top_k={self.top_k}, experts={self.experts}"
                )

    UNITS = "experts"

    def __init__(self, config: MoE.Config, site: Site) -> None:
        super().__init__(config, site)
        self.top_k, self.renormalise, self.balance = (
            config.top_k,
            config.renormalise,
            config.balance,
        )
        inner = MLP.Config(hidden=self.hidden, act=config.act, bias=config.bias)
        self.router = nn.Linear(site.dim, config.experts, bias=False)
        self.experts = nn.ModuleList(MLP(inner, site) for _ in range(config.experts))
        self.shared = None
        if config.shared:
            wide = replace(inner, hidden=config.shared * self.hidden)
            self.shared = MLP(wide, site)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Choose experts for tokens (..., D).

        Returns:
            probabilities (..., E) of all experts, weights (..., top_k) and indices (..., top_k) of
            the chosen ones, the most probable first.
        """
        probabilities = self.router(x).softmax(
            dim=-1, dtype=torch.promote_types(x.dtype, torch.float32)
        )
        weights, chosen = probabilities.topk(self.top_k, dim=-1)
        if self.renormalise:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return probabilities, weights.to(x.dtype), chosen

    def forward(self, x: Tensor, ctx: Context = EMPTY) -> Tensor:
        self.check_width(ctx)
        probabilities, weights, chosen = self.route(x)
        if ctx.ledger is not None:
            ctx.ledger.work(self.site.path, x.new_ones(x.shape[0]))
            loss = self.balance * balance_loss(probabilities, chosen)
            ctx.ledger.loss(f"{self.site.path}/balance", loss)
        unseen = self._routed if gathers() else self._masked
        run = self._grouped if values_known(x) else unseen
        out = run(x, weights, chosen)
        return out if self.shared is None else out + self.shared(x)

    def _masked(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        table = x.new_zeros(*x.shape[:-1], len(self.experts)).scatter(-1, chosen, weights)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            out = torch.addcmul(out, table[..., e : e + 1], expert(x))
        return out

    def _routed(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        flat, where, factors = x.flatten(0, -2), chosen.flatten(), weights.flatten()
        out = torch.zeros_like(flat)
        for e, expert in enumerate(self.experts):
            slots = (where == e).nonzero().flatten()
            tokens = slots // self.top_k
            done = expert(flat.index_select(0, tokens)) * factors.index_select(0, slots)[:, None]
            out = out.index_add(0, tokens, done)
        return out.view_as(x)

    def _grouped(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        flat, where = x.flatten(0, -2), chosen.flatten()
        order = where.argsort()  # slots (token, rank) by expert
        counts = torch.bincount(where, minlength=len(self.experts)).tolist()
        tokens = order // self.top_k
        outputs = [
            expert(part)
            for expert, part in zip(self.experts, flat[tokens].split(counts), strict=True)
            if part.shape[0]
        ]
        out = torch.zeros_like(flat)
        if outputs:
            weighted = torch.cat(outputs) * weights.flatten()[order, None]
            out = out.index_add(0, tokens, weighted)
        return out.view_as(x)

    @property
    def units(self) -> int:
        """Number of experts among which the router chooses."""
        return len(self.experts)

    def select(self, units: Tensor) -> MoE:
        """The network with some of its experts; a token runs no more than there are."""
        small = twin(self)
        small.top_k = min(self.top_k, len(units))
        small.router = cut_linear(self.router, rows=units)
        small.experts = nn.ModuleList(self.experts[int(e)] for e in units)
        return small

    def macs(self, n: int) -> int:
        per_expert = 2 * self.site.dim * self.hidden
        return n * (self.site.dim * len(self.experts) + per_expert * self.top_k) + (
            0 if self.shared is None else self.shared.macs(n)
        )


def balance_loss(probabilities: Tensor, chosen: Tensor) -> Tensor:
    """``E sum_e f_e P_e``: 1 if all experts are used equally.

    f_e is the share of e among what was chosen, P_e its mean probability, both over all tokens of
    the batch.

    Args:
        probabilities: (..., E).
        chosen: (..., K) int64.

    Reference: Switch Transformers, 2021, arXiv 2101.03961.
    """
    experts = probabilities.shape[-1]
    share = F.one_hot(chosen, experts).to(probabilities.dtype).flatten(0, -2).mean(dim=0)
    return experts * (share * probabilities.flatten(0, -2).mean(dim=0)).sum()
