"""Training losses of adaptive computation modules: budget, spread, distillation, gate labels.

Reference: Adaptive Computation Modules: Granular Conditional Computation For Efficient Inference,
2023, arXiv 2312.10193.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from effformer.context import Ledger
from effformer.ledger import Choice
from effformer.nn.learners import Learners
from effformer.nn.precision import widened

__all__ = [
    "acm_losses", "budget_loss", "distillation_loss", "diversity_loss", "entropy_loss", "gate_labels",
    "gate_loss", "used_budget",
]  # fmt: skip

_TINY = 1e-20


def acm_losses(
    ledger: Ledger,
    target: float,
    *,
    budget: float = 0.1,
    entropy: float = 0.05,
    diversity: float = 0.05,
) -> None:
    """Write the three auxiliary losses of a forward into its ledger, weighted as published.

    Args:
        ledger: the ledger that the model was called with; nothing happens if no gate reported.
        target: wanted share of the learners' work, in (0, 1].
        budget: weight of `budget_loss`.
        entropy: weight of `entropy_loss`.
        diversity: weight of `diversity_loss`.

    Raises:
        ValueError: ``target`` is outside (0, 1].
    """
    _check_target(target)
    if ledger.choices:
        ledger.loss("acm/budget", budget * budget_loss(ledger.choices, target))
        ledger.loss("acm/entropy", entropy * entropy_loss(ledger.choices))
        ledger.loss("acm/diversity", diversity * diversity_loss(ledger.choices))


def used_budget(choices: Mapping[str, Choice]) -> Tensor:
    """Executed over dense work of the learners: ``sum_m c_m mean(k_m) / sum_m c_m K_m``, a
    scalar.
    """
    parts = list(choices.values())
    used = sum(c.cost * _load(c.gate).sum(dim=-1).mean() for c in parts)
    return torch.as_tensor(used / sum(c.cost * (c.gate.shape[-1] - 1) for c in parts))


def budget_loss(
    choices: Mapping[str, Choice], target: float, *, power: Literal[1, 2] = 1
) -> Tensor:
    """``|used_budget - target| ** power``.

    Args:
        choices: gates by module, as in `Ledger.choices`.
        target: wanted share, in (0, 1].
        power: 1 (published) or 2.

    Raises:
        ValueError: ``target`` is outside (0, 1].
    """
    _check_target(target)
    return (used_budget(choices) - target).abs() ** power


def entropy_loss(choices: Mapping[str, Choice]) -> Tensor:
    """Minus the entropy of each sample's mean choice, over log(K + 1): -1 when a module uses all
    choices equally, 0 when it always chooses the same.
    """
    terms = []
    for choice in choices.values():
        counts = choice.gate.double().sum(dim=1)
        p = counts / counts.sum(dim=-1, keepdim=True)
        h = -(p * (p + _TINY).log()).sum(dim=-1)
        terms.append(-h / torch.tensor(p.shape[-1], dtype=p.dtype, device=p.device).log())
    return torch.stack(terms).mean()


def diversity_loss(choices: Mapping[str, Choice]) -> Tensor:
    """``-2 mean_{i,j} |l_i - l_j|`` over all pairs of samples, l the mean of ``k G_k`` over tokens,
    modules and choices: pushes samples to different amounts of work.

    Differs from the paper: as in its code the mean runs over the choices as well, which divides by
    K + 1.
    """
    loads = [_load(c.gate.double()).mean(dim=(1, 2)) for c in choices.values()]
    load = torch.stack(loads).mean(dim=0)
    return -2 * (load[:, None] - load[None]).abs().mean()


def distillation_loss(learners: Learners, x: Tensor, y: Tensor, *, detach: bool = True) -> Tensor:
    """Mean squared error between the teacher and the outputs after 0..K learners.

    Args:
        learners: the student.
        x: (B, N, D) what the teacher's module received.
        y: (B, N, D) what it returned.
        detach: learner k fits only what the learners before it left over.
    """
    outputs = learners.every(x, detach=detach)
    return F.mse_loss(widened(outputs), widened(y).unsqueeze(-2).expand_as(outputs))


def gate_labels(errors: Tensor, threshold: float = 1.2) -> Tensor:
    """How many learners a token needs: j + 1 for the first j with ``e_j / e_{j+1} < threshold``.

    Args:
        errors: (..., K + 1) distances of the outputs after 0..K learners from the teacher.
        threshold: an improvement by less than this ratio is none.

    Returns:
        (...) int64. As in the official code a token whose very first learner is of no use (j = 0)
        is treated like one without any such j and gets K.
    """
    hit = errors[..., :-1] / errors[..., 1:] < threshold
    first = hit.int().argmax(dim=-1)
    return torch.where(first > 0, first + 1, errors.shape[-1] - 1)


def gate_loss(log_probabilities: Tensor, labels: Tensor) -> Tensor:
    """Negative log-likelihood of the labels, mean over tokens.

    Args:
        log_probabilities: (..., K + 1), for instance ``log_softmax`` of a gate's logits.
        labels: (...) int64.

    Differs from the paper: its code takes the logarithm of a one-hot sample plus 1e-20, which is 0
    or 46 per token and has gradients of 1e20; give the log-softmax of the logits instead.
    """
    return F.nll_loss(log_probabilities.flatten(0, -2), labels.flatten())


def _load(gate: Tensor) -> Tensor:
    """``k G_k``: (B, N, K + 1)."""
    return gate * torch.arange(gate.shape[-1], dtype=gate.dtype, device=gate.device)


def _check_target(target: float) -> None:
    if not 0 < target <= 1:
        raise ValueError(f"acm: the budget must lie in (0, 1], got {target}")
