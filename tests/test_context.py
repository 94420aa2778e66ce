from __future__ import annotations

import pytest
import torch

from effformer import registry
from effformer.checks import CapabilityError, check_shape
from effformer.context import EMPTY, Context, Ledger, Packing, Rope, Tap, check_context
from effformer.registry import Caps


def test_packing_takes_any_mask() -> None:
    mask = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0], [0, 1, 1, 1]], dtype=torch.bool)
    packing = Packing.from_mask(mask)
    assert packing.lengths == (3, 0, 3)
    assert packing.longest == 3
    assert packing.offsets.tolist() == [0, 3, 3, 6]
    assert packing.positions.tolist() == [0, 1, 3, 1, 2, 3]
    assert packing.samples.tolist() == [0, 0, 0, 2, 2, 2]
    x = torch.randn(3, 4, 5)
    packed = packing.pack(x)
    assert packed.shape == (1, 6, 5)
    torch.testing.assert_close(packing.unpack(packed), x * mask[..., None])


def test_neighbours_of_equal_length_are_a_run() -> None:
    lengths = torch.tensor([[2], [2], [0], [2], [4], [1], [1]])
    packing = Packing.from_mask(torch.arange(4) < lengths)
    assert packing.runs == ((3, 2), (1, 4), (2, 1))
    assert Packing.from_mask(torch.zeros(2, 3)).runs == ()


def test_packing_keeps_gradients() -> None:
    packing = Packing.from_mask(torch.tensor([[True, False, True]]))
    x = torch.randn(1, 3, 2, requires_grad=True)
    packing.unpack(2 * packing.pack(x)).sum().backward()
    assert x.grad is not None
    assert x.grad[0, :, 0].tolist() == [2, 0, 2]


def test_packing_wants_a_key_mask() -> None:
    with pytest.raises(ValueError, match=r"expected a mask \(B, N\), got \(2, 1, 3\)"):
        Packing.from_mask(torch.ones(2, 1, 3))


def test_ledger_sums_losses_and_keeps_work() -> None:
    ledger = Ledger()
    assert ledger.total_loss() == 0.0
    ledger.loss("a", torch.tensor(1.0))
    ledger.loss("a", torch.tensor(2.0))
    ledger.loss("b", torch.tensor(0.5))
    ledger.work("blocks.0.ffn", torch.tensor([0.5, 1.0], requires_grad=True))
    assert ledger.total_loss() == 3.5
    assert not ledger.executed["blocks.0.ffn"].requires_grad


def test_tap_reads_and_replaces() -> None:
    tap = Tap(keep=("blocks.*.q",), edit=lambda place, x: x + 1, at=("blocks.0.*",))
    one = torch.zeros(1)
    assert tap("blocks.0.attn.q", one) == 1
    assert tap("blocks.1.attn.q", one) == 0
    assert tap("blocks.0.attn.v", one) == 1
    assert set(tap.seen) == {"blocks.0.attn.q", "blocks.1.attn.q"}


def test_parts_refuse_what_they_cannot_honour() -> None:
    able = Caps(mask="key", rope=False)
    check_context(EMPTY, able, "core", "here")
    check_context(Context(mask=torch.ones(2, 3, dtype=torch.bool)), able, "core", "here")
    full = Context(mask=torch.ones(2, 1, 3, 3, dtype=torch.bool))
    with pytest.raises(CapabilityError, match="here: this core cannot honour mask=full") as caught:
        check_context(full, able, "core", "here")
    for name in registry.core.names(mask="full"):
        assert name in str(caught.value)
    rope = Context(rope=Rope(torch.ones(1, 2), torch.zeros(1, 2)))
    with pytest.raises(CapabilityError, match=r"cannot honour rope=True; .*softmax"):
        check_context(rope, able, "core", "here")


def test_contexts_are_immutable() -> None:
    with pytest.raises(AttributeError):
        EMPTY.mask = torch.ones(1)  # type: ignore[misc]


def test_check_shape() -> None:
    check_shape(torch.zeros(2, 3), "(B, 3)", (None, 3), where="f: x")
    with pytest.raises(ValueError, match=r"f: x: expected shape \(B, 3\), got \(2, 4\)"):
        check_shape(torch.zeros(2, 4), "(B, 3)", (None, 3), where="f: x")
    with pytest.raises(TypeError, match=r"f: x: expected a tensor \(B, 3\), got list"):
        check_shape([[1]], "(B, 3)", (None, 3), where="f: x")  # type: ignore[arg-type]
