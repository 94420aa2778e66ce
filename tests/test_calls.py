from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import effformer
from effformer.blocks import Block
from effformer.calls import accepted, bind, evaluating, match, outputs, run, takes
from effformer.checks import CapabilityError, RunError, is_refusal
from effformer.context import Context, Ledger
from effformer.testing import matrix


class Two(nn.Module):
    def forward(self, first: Tensor, second: Tensor | None = None, *, scale: float = 1.0) -> Tensor:
        return first * scale if second is None else first * scale + second


class Spread(nn.Module):
    def forward(self, *parts: Tensor, **more: Tensor) -> Tensor:
        return sum((*parts, *more.values()), torch.zeros(2))


A, B = torch.ones(2), torch.arange(2.0)


@pytest.mark.parametrize(
    ("inputs", "names", "tensors"),
    [
        (A, ("first",), ["first"]),
        ((A, B), ("first", "second"), ["first", "second"]),
        ([A], ("first",), ["first"]),
        ({"scale": 2.0, "second": B, "first": A}, (), ["first", "second"]),
        (MappingProxyType({"first": A}), (), ["first"]),
    ],
)
def test_inputs_of_every_shape_have_names(
    inputs: Any, names: tuple[str, ...], tensors: list[str]
) -> None:
    call = bind(Two(), inputs, where="here")
    assert call.names == names
    assert list(call.tensors) == tensors
    assert call.tensors["first"] is A


def test_arguments_are_in_the_order_of_the_signature() -> None:
    call = bind(Two(), {"scale": 2.0, "second": B, "first": A}, where="here")
    assert list(call.arguments) == ["first", "second", "scale"]
    assert call(Two()).tolist() == [2.0, 3.0]
    assert call.with_tensors({"second": A}).run(Two())[0].tolist() == [3.0, 3.0]
    positional = bind(Two(), (A, B), where="here").with_tensors({"second": A})
    assert positional(Two(), scale=3.0).tolist() == [4.0, 4.0]


def test_spread_arguments_have_places() -> None:
    call = bind(Spread(), (A, B), where="here")
    assert call.names == ("parts[0]", "parts[1]")
    assert list(bind(Spread(), {"u": A, "v": B}, where="here").tensors) == ["u", "v"]
    assert call.map(lambda x: x * 2).run(Spread())[0].tolist() == [2.0, 4.0]


def test_nested_tensors_are_changed_but_have_no_name() -> None:
    class Nested(nn.Module):
        def forward(self, x: Tensor, coords: list[Tensor]) -> Tensor:
            return x + coords[0] + coords[1]

    call = bind(Nested(), {"x": A, "coords": [A, B]}, where="here")
    assert list(call.tensors) == ["x"]
    assert len(call.leaves) == 3
    assert call.map(torch.zeros_like).run(Nested())[0].tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (None, r"here: Two has no example_inputs\(\); give inputs"),
        (
            "text",
            "here: inputs must be a tensor, a tuple, a dict of named tensors or None, got str",
        ),
        (3, "got int"),
        ((A, A, A), r"here: inputs do not fit Two.forward\(first.*too many positional"),
        ({"first": A, "thrid": A}, "unexpected keyword argument 'thrid'"),
        ({}, "missing a required argument: 'first'"),
    ],
)
def test_bind_refuses(inputs: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        bind(Two(), inputs, where="here")


def test_examples_are_the_same_every_time() -> None:
    model = effformer.build_model("sit-nano")
    first, again = (bind(model, where="here", batch=3).tensors for _ in range(2))
    assert list(first) == ["x", "t", "y"]
    assert all(len(x) == 3 for x in first.values())
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    with torch.device("meta"):
        hollow = effformer.build_model("sit-nano")
    assert bind(hollow, where="here").tensors["x"].is_meta


def test_examples_of_models_that_choose_their_batch() -> None:
    class Fixed(Two):
        def example_inputs(self) -> dict[str, Tensor]:
            return {"first": A}

    assert bind(Fixed(), where="here", batch=2).tensors == {"first": A}


class Pair(NamedTuple):
    a: Tensor
    b: Any = None


@dataclass
class Record:
    first: Tensor
    rest: Any = None
    note: str = "no tensor"


class Answer(OrderedDict[str, Tensor]):
    """A mapping that torch does not open by itself."""


X, Y, Z = torch.zeros(1), torch.ones(1), torch.full((1,), 2.0)


@pytest.mark.parametrize(
    "value",
    [
        (X, [Y, (Z,)]),
        {"b": X, "a": {"c": Y, "d": Z}},
        Pair(X, Pair(Y, Z)),
        Record(X, Record(Y, [Z])),
        Record(X, {"k": Y, "l": Pair(Z)}),
        [Record(X), None, 3, Record(Y, Z)],
        MappingProxyType({"x": X, "y": Record(Y, Z)}),
        Answer(x=X, y=Y, z=Z),
    ],
    ids=lambda value: type(value).__name__,
)
def test_outputs_of_every_kind_are_flat(value: Any) -> None:
    found = outputs(value)
    assert [id(x) for x in found] == [id(X), id(Y), id(Z)]


def test_outputs_of_nothing() -> None:
    assert outputs(X) == [X]
    assert outputs(None) == outputs(Record) == outputs("text") == []


def test_evaluating_gives_every_module_its_mode_back() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.Sequential(nn.Dropout(0.5), nn.Linear(2, 2)))
    model[0].eval()
    before = [m.training for m in model.modules()]

    def fail() -> None:
        with evaluating(model):
            assert not any(m.training for m in model.modules())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert [m.training for m in model.modules()] == before == [True, False, True, True, True]


def test_run_evaluates_without_gradients() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.9))
    (out,) = run(model, torch.ones(1, 2), where="here")
    assert not out.requires_grad
    torch.testing.assert_close(out, model[0](torch.ones(1, 2)).detach())
    assert model.training


def test_a_module_that_fails_is_named_with_what_it_was_given() -> None:
    message = r"^Linear does not run on input \(1, 3\) float32 on cpu: mat1 and mat2"
    with pytest.raises(RunError, match=message) as caught:
        run(nn.Linear(2, 2), torch.ones(1, 3), where="here")
    assert is_refusal(caught.value)
    assert isinstance(caught.value, RuntimeError)  # as torch's own

    class Refusing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise CapabilityError("this part cannot")

    with pytest.raises(CapabilityError, match=r"^this part cannot$"):
        run(Refusing(), A, where="here")


def test_what_a_module_takes() -> None:
    assert takes(Two(), "scale")
    assert not takes(Two(), "ledger")
    assert not takes(Spread(), "more")
    assert not takes(Spread(), "ledger")
    assert accepted(Two(), {"second": 1, "other": 2}) == {"second": 1}
    assert accepted(Spread(), {"second": 1, "other": 2}) == {"second": 1, "other": 2}
    assert accepted(lambda x, t, y: x, {"y": 1, "mask": 2}) == {"y": 1}


def test_a_module_gets_what_it_takes_and_x_first() -> None:
    assert match(Two(), {"x": A, "second": B, "other": A}, where="here").arguments == {
        "first": A, "second": B,
    }  # fmt: skip
    assert match(nn.Flatten(), {"x": A}, where="here").names == ("input",)
    assert list(match(Two(), {"x": A, "first": B}, where="here").tensors) == ["first"]
    assert match(Spread(), {"x": A, "more": B}, where="here").arguments == {
        "parts[0]": A, "more": B,
    }  # fmt: skip
    with pytest.raises(TypeError, match=r"here: inputs do not fit Two.forward.*'first'"):
        match(Two(), {"tokens": A}, where="here")


COLUMNS = [column for family in matrix.families() for column in matrix.columns(family)]
DYNAMIC = [
    pytest.param(column, slot, name, id=f"{column.title}-{slot}-{name}".replace(", ", "-"))
    for column in COLUMNS
    for slot, kind in matrix.slots(column).items()
    if slot in ("width", "tokens")
    for name in matrix.names(kind)
    if isinstance(matrix.fit(column.preset, column.title, slot, name), matrix.Built)
]


def _complete(args: tuple[Any, ...]) -> list[bool]:
    """What the contexts among the arguments of a block say; two streams have one each."""
    return [arg.complete for arg in args if isinstance(arg, Context)]


@pytest.mark.parametrize("column", COLUMNS, ids=lambda column: column.title.replace(", ", "-"))
@torch.no_grad()
def test_every_model_of_blocks_runs_complete(column: matrix.Column) -> None:
    torch.manual_seed(0)
    model = effformer.build_model(column.preset, **column.changes).eval()
    if not any(isinstance(m, Block) for m in model.modules()):
        assert not takes(model, "complete")
        return
    given = bind(model, where="here", batch=2)
    seen: list[bool] = []
    for module in model.modules():
        if isinstance(module, Block):
            module.register_forward_pre_hook(lambda _, args: seen.extend(_complete(args)))
    dense, complete = outputs(given(model)), outputs(given(model, complete=True))
    torch.testing.assert_close(complete, dense, rtol=0, atol=0)
    assert seen == [False] * (len(seen) // 2) + [True] * (len(seen) // 2)
    assert seen


@pytest.mark.parametrize(("column", "slot", "name"), DYNAMIC)
@torch.no_grad()
def test_complete_is_the_dense_function(column: matrix.Column, slot: str, name: str) -> None:
    found = matrix.fit(column.preset, column.title, slot, name)
    assert isinstance(found, matrix.Built)
    torch.manual_seed(0)
    model: Any = matrix.build(column, slot, name, found.options).eval()
    for path, p in model.named_parameters():
        if ".gates." in path:  # some open, some closed
            p.normal_() if p.dim() > 1 else p.zero_()
        else:
            p.add_(torch.randn_like(p), alpha=0.05)
    empty = dict.fromkeys({"width", "tokens"} & set(matrix.slots(column)))
    dense = effformer.build_model(column.preset, **column.changes, **empty).eval()
    kept = {k: v for k, v in model.state_dict().items() if k in dense.state_dict()}
    dense.load_state_dict(kept)
    given = bind(model, where="here", batch=2)
    ledger = Ledger()
    complete = outputs(given(model, complete=True, ledger=ledger))
    torch.testing.assert_close(complete, outputs(given(dense)), rtol=0, atol=0)
    assert not ledger.executed
    less = outputs(given(model))
    assert not all(torch.equal(a, b) for a, b in zip(less, complete, strict=True))


def test_slots_for_dynamic_parts_were_found() -> None:
    assert {p.values[1] for p in DYNAMIC} == {"width", "tokens"}
    assert {p.values[0].title for p in DYNAMIC} >= {"vit", "dit", "bert"}
