"""Learners: small networks whose outputs add up, as many of them per token as a gate chooses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effformer.config import Config as BaseConfig
from effformer.context import Ledger
from effformer.values import Count, Positive

from .gates import gumbel_like, straight_through, values_known
from .onnx_nodes import gathers
from .precision import widened

__all__ = ["Gate", "Learners", "Run"]


class Gate(nn.Module):
    """Chooses a number of learners for every token: linear layers with nothing between them.

    Training samples from ``softmax((logits + g) / tau)``, g standard Gumbel noise, and passes
    gradients straight through; evaluation takes the largest logit (the first of equal ones).

    Args:
        config: the knobs.
        dim: width of the tokens.
        learners: K, the largest choice.
        least: the smallest choice.
        generator: source of noise; None means torch's default generator, as `nn.Dropout` does.

    Reference: Adaptive Computation Modules, 2023, arXiv 2312.10193; Categorical Reparameterization
    with Gumbel-Softmax, 2016, arXiv 1611.01144.
    """

    ROLES: ClassVar[Mapping[str, str]] = {"": "gates"}

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(BaseConfig):
        """Knobs of `Gate`.

        Attributes:
            depth: number of linear layers.
            hidden: width between them.
            tau: temperature of the samples.
            gradient: "straight-through": the output depends on the choice, so that the task trains
                the gate; "none": only auxiliary losses do.
        """

        depth: Count = 3
        hidden: Count = 16
        tau: Positive = 0.8
        gradient: Literal["straight-through", "none"] = "straight-through"

    def __init__(
        self,
        config: Gate.Config,
        dim: int,
        *,
        learners: int,
        least: int = 0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.least = least
        self.generator = generator
        widths = [dim, *[config.hidden] * (config.depth - 1), learners + 1 - least]
        self.sizes = list(pairwise(widths))
        self.net = nn.Sequential(*(nn.Linear(a, b) for a, b in self.sizes))

    def logits(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., K + 1 - least), choices from ``least`` on, in float32 at least."""
        return widened(self.net(x))

    def soft(self, logits: Tensor, noise: Tensor) -> Tensor:
        """``softmax((logits + noise) / tau)`` over 0..K: (..., K + 1)."""
        scores = (logits + noise) / self.config.tau
        return self._padded(scores.softmax(dim=-1))

    def forward(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """One-hot choices (..., K + 1) for tokens (..., D), in float32 at least: they are counted.

        Args:
            x: the tokens.
            noise: Gumbel noise of the shape of the logits; None means drawn in training, absent in
                evaluation.
        """
        if noise is None and not self.training:
            logits = self.logits(x)
            return self.one_hot(self._best(logits)).to(logits.dtype)
        logits = self.logits(x)
        if noise is None:
            noise = gumbel_like(logits, self.generator)
        return straight_through(self.soft(logits, noise))

    def chosen(self, x: Tensor) -> Tensor:
        """The choices of evaluation, int64 (...), for tokens (..., D)."""
        return self._best(self.logits(x))

    def _best(self, logits: Tensor) -> Tensor:
        return logits.argmax(dim=-1) + self.least

    def one_hot(self, chosen: Tensor) -> Tensor:
        """Choices (...) as (..., K + 1) integers that are one at the choice."""
        return F.one_hot(chosen, self.sizes[-1][1] + self.least)

    def _padded(self, x: Tensor) -> Tensor:
        return F.pad(x, (self.least, 0)) if self.least else x

    def macs(self, n: int) -> int:
        """Multiply-adds for n tokens."""
        return n * sum(a * b for a, b in self.sizes)


@dataclass(frozen=True, slots=True)
class Run:
    """What `Learners` made of a batch.

    Attributes:
        out: (B, N, E) outputs.
        chosen: (B, N) int64, how many learners each token ran.
        choice: (B, N, K + 1) one-hot of it, with the gradient of the gate; None where no gradient
            leads to the gate.
        gated: the gate chose; False if it was idle.
    """

    out: Tensor
    chosen: Tensor
    choice: Tensor | None = None
    gated: bool = True


class Learners(nn.Module):
    """K small networks whose outputs add up, and the gate that says how many of them a token runs.

    ``y_k = sum_{i <= k} f_i(x)``, ``f_i(x) = act(x W1_i + b1_i) W2_i + b2_i``, and ``f_0 = b2_0``.

    There are three executions with equal results. Masked: every learner runs on every token and is
    multiplied by 0 or 1 (training, compiled graphs). Routed: every learner runs on the tokens that
    chose it, which are gathered (ONNX graphs). Grouped: learners that all tokens chose run on all; for
    the others tokens are sorted by their choice, so that learner i works on a contiguous prefix,
    those that chose i or more, and on nothing else.

    Args:
        dim: width of the tokens.
        count: K.
        width: inner width of one learner.
        act: activation.
        bias: the inner layers have biases.
        out_bias: the outputs have biases, f_0 included.
        gate: knobs of the gate.
        least: fewest learners that a token may run.
        fixed: every token runs so many; the gate stays idle. None: the gate decides.
        dropout: probability behind the activation and behind the sum.
        out_dim: width E of the outputs, None for ``dim``.

    Differs from the paper: its code runs one learner too few for the tokens that chose most in a
    batch; ours runs what was chosen.

    Reference: Adaptive Computation Modules: Granular Conditional Computation For Efficient
    Inference, 2023, arXiv 2312.10193.
    """

    def __init__(
        self,
        dim: int,
        *,
        count: int,
        width: int,
        act: Callable[[Tensor], Tensor],
        bias: bool,
        out_bias: bool,
        gate: Gate.Config,
        least: int = 0,
        fixed: int | None = None,
        dropout: float = 0.0,
        out_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.count, self.width = dim, count, width
        self.out_dim = dim if out_dim is None else out_dim
        self.fixed = fixed
        self.act = act
        out = self.out_dim
        self.fc1 = nn.ModuleList(nn.Linear(dim, width, bias=bias) for _ in range(count))
        self.fc2 = nn.ModuleList(nn.Linear(width, out, bias=out_bias) for _ in range(count))
        self.zero = nn.Parameter(torch.empty(out)) if out_bias else None
        self.gate = Gate(gate, dim, learners=count, least=least)
        self.drop = nn.Dropout(dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform values, bounded as the official code bounds them: ``(K h)^-1/2`` and ``E^-1/2``
        for the weights, ``h^-1/2`` and ``E^-1/2`` for the biases; torch's own for the gate.
        """
        bounds = {
            "fc1.weight": self.count * self.width, "fc1.bias": self.width,
            "fc2.weight": self.out_dim, "fc2.bias": self.out_dim, "zero": self.out_dim,
        }  # fmt: skip
        for name, value in self.named_parameters():
            kind = ".".join(part for part in name.split(".") if not part.isdigit())
            if kind in bounds:
                nn.init.uniform_(value, -(bounds[kind] ** -0.5), bounds[kind] ** -0.5)
        for layer in self.gate.net:
            layer.reset_parameters()  # type: ignore[operator]

    def learner(self, i: int, x: Tensor) -> Tensor:
        """``f_i`` of tokens (..., D), i from 1 to K: (..., E)."""
        return self.fc2[i - 1](self._inner(i, x))

    def _inner(self, i: int, x: Tensor) -> Tensor:
        return self.drop(self.act(self.fc1[i - 1](x)))

    def every(self, x: Tensor, *, detach: bool = False) -> Tensor:
        """Outputs after 0..K learners: (..., D) -> (..., K + 1, E).

        Args:
            x: tokens.
            detach: learner k sees what came before as a constant, ``f_k + stop_gradient(y_{k-1})``,
                so that it fits the remainder only.
        """
        outputs = [self._zero(x)]
        for i in range(1, self.count + 1):
            before = outputs[-1].detach() if detach else outputs[-1]
            outputs.append(before + self.learner(i, x))
        return torch.stack(outputs, dim=-2)

    def forward(self, x: Tensor, *, complete: bool = False) -> Run:
        """Tokens (B, N, D) through as many learners as each of them chose; ``complete``: all."""
        fixed = self.count if complete else self.fixed
        if fixed is not None:
            chosen = torch.full(x.shape[:2], fixed, device=x.device)
            return Run(self.drop(self._prefix(x, fixed)), chosen, gated=False)
        if not self.training and gathers():
            chosen = self.gate.chosen(x)
            return Run(self.drop(self._routed(x, chosen)), chosen)
        if self.training or not values_known(x):
            choice = self.gate(x)
            return Run(self.drop(self._masked(x, choice)), choice.argmax(dim=-1), choice)
        chosen = self.gate.chosen(x)
        return Run(self.drop(self._grouped(x, chosen)), chosen)

    def account(self, run: Run, ledger: Ledger, name: str) -> Tensor:
        """Write the choices of a run into a ledger.

        Args:
            run: what forward returned.
            ledger: the ledger.
            name: under which the choices stand there.

        Returns:
            (B,) multiply-adds that each sample executed, the gate's included.
        """
        if run.gated:
            choice = run.choice
            if choice is None:
                choice = widened(self.gate.one_hot(run.chosen).to(run.out.dtype))
            ledger.choose(name, choice, self.cost)
        n = run.chosen.shape[1]
        return self._gate_macs(n) + self.cost * run.chosen.sum(dim=1).float()

    def _masked(self, x: Tensor, choice: Tensor) -> Tensor:
        if self.gate.config.gradient == "none":
            choice = choice.detach()
        out = self._zero(x)
        for i in range(1, self.count + 1):
            runs = choice[..., i:].sum(dim=-1, keepdim=True)
            done = self.learner(i, x)
            out = torch.addcmul(out, runs.to(done.dtype), done)
        return out

    def _routed(self, x: Tensor, chosen: Tensor) -> Tensor:
        flat, k = x.flatten(0, -2), chosen.flatten()
        out = self._zero(flat)
        for i in range(1, self.count + 1):
            rows = (k >= i).nonzero().flatten()
            done = self.learner(i, flat.index_select(0, rows))
            out = out.index_add(0, rows, done.to(out.dtype))
        return out.unflatten(0, x.shape[:-1])

    def _grouped(self, x: Tensor, chosen: Tensor) -> Tensor:
        flat, k = x.flatten(0, -2), chosen.flatten()
        exactly = torch.bincount(k, minlength=self.count + 1).tolist()
        # what all tokens run needs no sorting
        common = next((i for i, number in enumerate(exactly) if number), 0)
        out = self._prefix(flat, common)
        tokens = k.numel() - exactly[common]
        if tokens:
            rows = k.argsort(descending=True)[:tokens]
            chosen_x = flat.index_select(0, rows)
            more = self.learner(common + 1, chosen_x)
            for i in range(common + 2, self.count + 1):
                tokens -= exactly[i - 1]
                if not tokens:
                    break
                self._add(i, chosen_x[:tokens], more[:tokens])
            out = out.index_add_(0, rows, more.to(out.dtype))
        return out.unflatten(0, x.shape[:-1])

    def _prefix(self, x: Tensor, k: int) -> Tensor:
        """``y_k`` for all tokens."""
        if k == 0:
            return self._zero(x) if self.zero is None else self._zero(x).clone()
        out = self.learner(1, x)
        if self.zero is not None:
            out = out + self.zero
        for i in range(2, k + 1):
            self._add(i, x, out)
        return out

    def _add(self, i: int, x: Tensor, out: Tensor) -> None:
        """Add ``f_i`` of tokens (..., D) to out (..., E); a plain matrix adds while it multiplies, if
        autocast leaves all of one type.
        """
        last, h = self.fc2[i - 1], self._inner(i, x)
        if type(last) is not nn.Linear or not h.dtype == last.weight.dtype == out.dtype:
            out.add_(last(h))
            return
        out.view(-1, self.out_dim).addmm_(h.flatten(0, -2), last.weight.t())
        if last.bias is not None:
            out.add_(last.bias)

    def _zero(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:-1], self.out_dim)
        return x.new_zeros(shape) if self.zero is None else self.zero.expand(shape)

    @property
    def cost(self) -> int:
        """Multiply-adds of one learner on one token."""
        return (self.dim + self.out_dim) * self.width

    def macs(self, n: int) -> int:
        """Dense multiply-adds for n tokens: the gate and all learners."""
        return self._gate_macs(n) + n * self.count * self.cost

    def _gate_macs(self, n: int) -> int:
        return 0 if self.fixed is not None else self.gate.macs(n)
