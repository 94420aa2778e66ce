from __future__ import annotations

import contract
import pytest
import torch

import effformer
from effformer import registry
from effformer.checks import CapabilityError, check_shape
from effformer.config import resolve
from effformer.context import EMPTY, Context, Ledger, Merging, Packing, Rope, Tap, check_context
from effformer.registry import Caps
from effformer.site import Site

TOKENS = torch.zeros(2, 3, 8)


def test_every_forward_has_a_code_of_its_own() -> None:
    """torch.compile counts the graphs of a code: many parts in one process must not share a limit."""
    builds = {
        entry.build
        for kind in ("attention", "core", "ffn", "block")
        for entry in registry.KINDS[kind]
    }
    own = [cls for cls in builds if "forward" in vars(cls)]
    assert len({cls.forward.__code__ for cls in own}) == len(own) > 20


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
    assert Packing.from_mask(torch.zeros(2, 3).bool()).runs == ()


def test_packing_keeps_gradients() -> None:
    packing = Packing.from_mask(torch.tensor([[True, False, True]]))
    x = torch.randn(1, 3, 2, requires_grad=True)
    packing.unpack(2 * packing.pack(x)).sum().backward()
    assert x.grad is not None
    assert x.grad[0, :, 0].tolist() == [2, 0, 2]


def test_packing_wants_a_key_mask() -> None:
    with pytest.raises(ValueError, match=r"expected a mask \(B, N\), got \(2, 1, 3\)"):
        Packing.from_mask(torch.ones(2, 1, 3).bool())
    with pytest.raises(TypeError, match=r"Packing.from_mask: mask: expected bool"):
        Packing.from_mask(torch.ones(2, 3))
    with pytest.raises(TypeError, match="complete: expected bool"):
        Context(complete=1)  # type: ignore[arg-type]


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
    check_context(EMPTY, able, "core", "here", TOKENS)
    check_context(Context(mask=torch.ones(2, 3, dtype=torch.bool)), able, "core", "here", TOKENS)
    full = Context(mask=torch.ones(2, 1, 3, 3, dtype=torch.bool))
    with pytest.raises(CapabilityError, match="here: this core cannot honour mask=full") as caught:
        check_context(full, able, "core", "here", TOKENS)
    for name in registry.core.names(mask="full"):
        assert name in str(caught.value)
    rope = Context(rope=Rope(torch.ones(1, 2), torch.zeros(1, 2)))
    with pytest.raises(CapabilityError, match=r"cannot honour rope=True; .*softmax"):
        check_context(rope, able, "core", "here", TOKENS)


YES = torch.ones(2, 3, dtype=torch.bool)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"mask": YES.float()}, TypeError, r"ctx.mask: expected bool, .* got torch.float32"),
        ({"memory_mask": YES.long()}, TypeError, r"ctx.memory_mask: expected bool"),
        ({"mask": [[True]]}, TypeError, r"ctx.mask: expected a tensor \(B, N\)"),
        ({"mask": YES[0]}, ValueError, r"ctx.mask: expected shape"),
        ({"cond": YES}, TypeError, r"ctx.cond: expected floating-point values"),
        ({"cond": TOKENS[None]}, ValueError, r"ctx.cond: expected shape \(B, Dc\) or \(B, N"),
        ({"positions": TOKENS[0]}, ValueError, r"ctx.positions: expected shape"),
        ({"memory": TOKENS[0]}, ValueError, r"ctx.memory: expected shape"),
        ({"memory": (TOKENS, TOKENS[0])}, ValueError, r"ctx.memory\[1\]: expected shape"),
        (
            {"memory": (TOKENS,), "memory_mask": (3,)},
            TypeError,
            r"ctx.memory_mask\[0\]: expected a t",
        ),
        (
            {"memory": (TOKENS, TOKENS), "memory_mask": YES},
            ValueError,
            "2 memories need as many masks",
        ),
        ({"memory": TOKENS, "memory_mask": (YES,)}, ValueError, "one memories need as many masks"),
        ({"rope": TOKENS}, TypeError, r"ctx.rope: expected Rope, got Tensor"),
        ({"grid": [1, 3]}, TypeError, r"ctx.grid: expected tuple"),
        ({"packing": YES}, TypeError, r"ctx.packing: expected Packing"),
    ],
)
def test_a_context_refuses_values_of_another_kind(
    given: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Context(**given)  # type: ignore[arg-type]


def test_places_refuse_values_of_another_kind() -> None:
    table = torch.ones(3, 4)
    with pytest.raises(ValueError, match="both tables have one shape"):
        Rope(table, table[:, :2])
    with pytest.raises(ValueError, match="tables are floating-point"):
        Rope(table.long(), table.long())
    with pytest.raises(TypeError, match="a cosine table goes with a sine table"):
        Rope(table, table, key_cos=table)
    with pytest.raises(TypeError, match="indices must be a row of int64"):
        Packing(table, torch.tensor([0, 3]), (3,), 3)
    with pytest.raises(ValueError, match=r"3 indices of 1 samples, but lengths \(2,\)"):
        Packing(torch.arange(3), torch.tensor([0, 3]), (2,), 3)
    with pytest.raises(TypeError, match="sizes must be floating-point"):
        Merging(tokens=3, sizes=torch.ones(2, 3, dtype=torch.int64))


@pytest.mark.parametrize(
    "given",
    [
        {"mask": torch.ones(2, 4, dtype=torch.bool)},
        {"mask": torch.ones(2, 1, dtype=torch.bool)},
        {"mask": torch.ones(3, 3, dtype=torch.bool)},
        {"mask": torch.ones(1, 1, 3, 4, dtype=torch.bool)},
        {"memory": torch.ones(3, 5, 8)},
        {"positions": torch.ones(1, 4, 2)},
        {"cond": torch.ones(3, 8)},
        {"width": torch.ones(3, 2)},
        {"rope": Rope(torch.ones(4, 4), torch.ones(4, 4))},
        {"merging": Merging(tokens=4, sizes=torch.ones(2, 4))},
        {"mask": torch.ones(2, 3, dtype=torch.bool, device="meta")},
    ],
    ids=str,
)
def test_a_part_refuses_what_is_about_other_tokens(given: dict[str, object]) -> None:
    able = Caps(mask="full", rope=True, cross=True, packed=True, width=True, sizes=True)
    name = next(iter(given))
    with pytest.raises(ValueError, match=rf"here: ctx\.{name}"):
        check_context(Context(**given), able, "core", "here", TOKENS)  # type: ignore[arg-type]


def test_a_size_of_one_stands_for_all_samples() -> None:
    able = Caps(mask="full", rope=True)
    table = torch.ones(1, 3, 4)
    for mask in (YES[:1], torch.ones(1, 1, 1, 3, dtype=torch.bool)):
        ctx = Context(mask=mask, rope=Rope(table, table), positions=torch.ones(1, 3, 2))
        check_context(ctx, able, "core", "here", TOKENS)


@pytest.mark.parametrize("name", ["softmax", "linear", "flow"])
def test_attention_refuses_a_float_mask_and_foreign_tables(name: str) -> None:
    part = resolve("attention", name).build(Site(dim=8, heads=2))
    with pytest.raises(TypeError, match="expected bool"):
        part(TOKENS, Context(mask=YES.float()))
    with pytest.raises(ValueError, match="rope: tables for heads of width 2, but these have 4"):
        part(TOKENS, Context(rope=Rope(torch.ones(3, 2), torch.zeros(3, 2))))


@pytest.mark.parametrize("name", contract.mixers(streaming=True))
def test_a_state_of_something_else_is_refused(name: str) -> None:
    part = contract.make_mixer(name, causal=True).eval()
    x = torch.zeros(2, 1, contract.DIM)
    state = part.init_state(2, like=x)
    with pytest.raises(TypeError, match=f"step: expected {type(state).__name__} from init_state"):
        part.step(x, (state,), EMPTY)
    with pytest.raises(ValueError, match="a state of 3 samples, but tokens of 2"):
        part.step(x, part.init_state(3, like=x), EMPTY)
    for batch in (0, -1):
        with pytest.raises(ValueError, match=f"samples must be at least 1, got {batch}"):
            part.init_state(batch, like=x)
    with pytest.raises(TypeError, match="expected a number of samples"):
        part.init_state(1.5, like=x)
    part.step(x, state, EMPTY)


@pytest.mark.parametrize(("name", "other"), [("softmax", "topk"), ("linear", "sana")])
def test_a_state_of_another_core_is_refused(name: str, other: str) -> None:
    x = torch.zeros(2, 1, contract.DIM)
    part, twin = (contract.make_mixer(n, causal=True).eval() for n in (name, other))
    with pytest.raises(ValueError, match=f"the state is one of '{other}', but this .* {name!r}"):
        part.step(x, twin.init_state(2, like=x), EMPTY)
    model = effformer.build_model(
        "flowformer-gpt-mini", dim=24, depth=1, heads=2, vocab=20, context=8
    ).eval()
    ids = torch.zeros(2, 1, dtype=torch.long)
    with pytest.raises(ValueError, match="a state of 1 samples, but tokens of 2"):
        model.step(ids, model.init_state(1))
    with pytest.raises(TypeError, match="step: expected GPTState from init_state"):
        model.step(ids, None)
    with pytest.raises(ValueError, match="init_state: the number of samples must be at least 1"):
        model.init_state(-1)


def test_contexts_are_immutable() -> None:
    with pytest.raises(AttributeError):
        EMPTY.mask = torch.ones(1)  # type: ignore[misc]


def test_check_shape() -> None:
    check_shape(torch.zeros(2, 3), "(B, 3)", (None, 3), where="f: x")
    with pytest.raises(ValueError, match=r"f: x: expected shape \(B, 3\), got \(2, 4\)"):
        check_shape(torch.zeros(2, 4), "(B, 3)", (None, 3), where="f: x")
    with pytest.raises(TypeError, match=r"f: x: expected a tensor \(B, 3\), got list"):
        check_shape([[1]], "(B, 3)", (None, 3), where="f: x")  # type: ignore[arg-type]


def test_a_size_that_others_fix_is_told() -> None:
    with pytest.raises(ValueError, match=r"expected shape \(B, L, 3\), got \(2, 5, 3\): B is 4$"):
        check_shape(torch.zeros(2, 5, 3), "(B, L, 3)", (4, None, 3), where="f: x")
    with pytest.raises(ValueError, match=r"expected shape \(B, L, 3\), got \(4, 5, 2\)$"):
        check_shape(torch.zeros(4, 5, 2), "(B, L, 3)", (4, None, 3), where="f: x")
