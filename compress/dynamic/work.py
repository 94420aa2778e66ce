"""Training of dynamic blocks: the loss on the executed work, and the target that it aims at.

Reference: Dynamic Diffusion Transformer, 2024, arXiv 2410.03456.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from effformer.config import Config
from effformer.context import Ledger
from effformer.ledger import Share
from effformer.values import Natural, Portion

__all__ = ["WorkTarget", "executed_ratio", "work_loss", "write_work_loss"]


def executed_ratio(shares: Mapping[str, Share]) -> Tensor:
    """Executed over dense work of each sample, ``r_b = sum_p c_p f_pb / sum_p c_p``: (B,).

    Args:
        shares: what dynamic parts reported, as in `Ledger.shares`; c is the dense cost of a part,
            f the fraction that it executed.

    Raises:
        ValueError: nothing was reported.
    """
    if not shares:
        raise ValueError("executed_ratio: no part reported its work; call the model with a ledger")
    done = torch.stack([share.cost * share.fraction for share in shares.values()]).sum(dim=0)
    return done / sum(share.cost for share in shares.values())


def work_loss(shares: Mapping[str, Share], target: float) -> Tensor:
    """``(mean_b r_b - target)^2``, see `executed_ratio`.

    One number per batch is constrained: cheap times may pay for dear ones.

    Args:
        shares: what dynamic parts reported, as in `Ledger.shares`.
        target: wanted share of the work, in (0, 1].

    Raises:
        ValueError: ``target`` is outside (0, 1], or nothing was reported.

    Differs from the paper: costs are the exact multiply-adds of the parts at hand; its code has a
    table of constants for three sizes, with which this agrees.
    """
    if not 0 < target <= 1:
        raise ValueError(f"work_loss: the target must lie in (0, 1], got {target}")
    return (executed_ratio(shares).mean() - target) ** 2


def write_work_loss(ledger: Ledger, target: float, *, weight: float = 1.0) -> None:
    """Write ``weight`` times `work_loss` of a forward into its ledger, as "dynamic/work".

    Args:
        ledger: the ledger that the model was called with; nothing happens if no part reported.
        target: wanted share of the work, in (0, 1].
        weight: 1 in the paper, 2 in its code.
    """
    if ledger.shares:
        ledger.loss("dynamic/work", weight * work_loss(ledger.shares, target))


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkTarget(Config):
    """The target over training: from all of the work down to a share of it.

    ``1 - (1 - share) step / warmup`` up to ``warmup``, then ``share``; 1 for the first ``hold``
    steps.

    Attributes:
        share: final target, in (0, 1].
        warmup: steps until it is reached; 1,000, or 5,000 for a share of 0.7, in the paper's code.
        hold: first steps with the target 1.

    Reference: Dynamic Diffusion Transformer, 2024, arXiv 2410.03456.

    Example:
        >>> from effformer.compress import WorkTarget
        >>> [WorkTarget(share=0.5)(step) for step in (0, 500, 1000)]
        [1.0, 0.75, 0.5]
    """

    share: Portion
    warmup: Natural = 1000
    hold: Natural = 100

    def __call__(self, step: int) -> float:
        """The target at a step, counted from 0."""
        if step < self.hold:
            return 1.0
        if step > self.warmup or self.warmup == 0:
            return self.share
        return 1 - (1 - self.share) * step / self.warmup
