from __future__ import annotations

import pytest
import torch
from effformer.compress.dynamic.work import WorkTarget, executed_ratio, work_loss, write_work_loss

from effformer.context import Ledger
from effformer.ledger import Share


def _shares() -> dict[str, Share]:
    fractions = torch.tensor([[0.5, 1.0], [0.25, 0.75]], requires_grad=True)
    return {"blocks.0.attn": Share(fractions[0], 1.0), "blocks.0.ffn": Share(fractions[1], 3.0)}


def test_ratio_and_loss_are_those_of_the_paper() -> None:
    shares = _shares()
    ratio = executed_ratio(shares)
    torch.testing.assert_close(ratio, torch.tensor([(0.5 + 0.75) / 4, (1.0 + 2.25) / 4]))
    torch.testing.assert_close(work_loss(shares, 0.5), (ratio.mean() - 0.5) ** 2)


def test_the_gradient_pushes_towards_the_target() -> None:
    for target, sign in ((0.1, 1), (0.9, -1)):
        fraction = torch.full((4,), 0.5, requires_grad=True)
        work_loss({"a": Share(fraction, 2.0)}, target).backward()
        assert fraction.grad is not None
        assert bool((fraction.grad * sign > 0).all())


def test_the_ledger_gets_the_weighted_loss() -> None:
    ledger = Ledger()
    write_work_loss(ledger, 0.5)
    assert not ledger.losses
    ledger.shares |= _shares()
    write_work_loss(ledger, 0.5, weight=2.0)
    torch.testing.assert_close(ledger.losses["dynamic/work"], 2 * work_loss(_shares(), 0.5))


@pytest.mark.parametrize(
    ("step", "target"),
    [(0, 1.0), (99, 1.0), (100, 0.95), (500, 0.75), (1000, 0.5), (1001, 0.5), (10**6, 0.5)],
)
def test_the_target_falls_as_published(step: int, target: float) -> None:
    assert WorkTarget(share=0.5)(step) == pytest.approx(target)


def test_bad_values_are_refused() -> None:
    with pytest.raises(ValueError, match=r"target must lie in \(0, 1\], got 0"):
        work_loss(_shares(), 0)
    with pytest.raises(ValueError, match="no part reported its work; call the model with a ledger"):
        executed_ratio({})
    with pytest.raises(ValueError, match=r"share must lie in \(0, 1\]"):
        WorkTarget(share=1.5)
    assert WorkTarget(share=0.3, warmup=0, hold=0)(0) == 0.3
