"""Arguments that do not fit: every part and model answers, or says in a sentence what would fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from compatibility import columns, families
from contract import (
    BLOCKS,
    DIM,
    FFNS,
    MIXERS,
    context_for,
    make_block,
    make_ffn,
    make_mixer,
    mixers,
    tokens,
)
from torch import Tensor, nn

from effformer import registry
from effformer.attention import Streaming
from effformer.build import build_model
from effformer.checks import is_refusal

Calls = Iterator[tuple[str, Callable[[], Any]]]
PARTS: dict[str, nn.Module] = {
    **{f"attention {name}": make_mixer(name) for name in MIXERS},
    **{f"ffn {name}": make_ffn(name) for name in FFNS},
    **{
        f"block {name}": make_block(name, cond=registry.block.get(name).caps.cond != "never")
        for name in BLOCKS
        if not registry.block.get(name).caps.joint
    },
}


def _inputs(x: Tensor) -> dict[str, Any]:
    """What stands for real numbers (B, N, D) and is none."""
    return {
        "another width": torch.cat([x, x[..., :1]], -1), "a rank more": x[None], "a rank less": x[0],
        "a number": x.sum(), "whole numbers": x.long(), "bool": x > 0, "complex": x + 0j,
        "double": x.double(), "another device": x.to("meta"), "nothing": None, "a list": [1.0],
        "an array": x.detach().numpy(), "no samples": x[:0], "no tokens": x[:, :0],
    }  # fmt: skip


def _part_calls(part: nn.Module) -> Calls:
    x = tokens()
    ctx = context_for(part, x)
    for name, value in _inputs(x).items():
        yield name, lambda value=value: part(value, ctx)
    yield "no arguments", lambda: part()
    yield "no context", lambda: part(x, None)
    masks = {
        "short": torch.ones(2, 10) > 0, "whole": torch.ones(2, 11).long(), "more": torch.ones(3, 11) > 0
    }  # fmt: skip
    for name, mask in masks.items():
        yield f"{name} mask", lambda mask=mask: part(x, replace(ctx, mask=mask))
    for grid in ((3, 5), (-1, -11), (0, 0), ("a",), (1.5, 2.0)):
        yield f"grid {grid}", lambda grid=grid: part(x, replace(ctx, grid=grid))
    for name, cond in {"wide": torch.randn(2, DIM + 1), "more": torch.randn(3, DIM)}.items():
        if ctx.cond is not None:
            yield f"{name} condition", lambda cond=cond: part(x, replace(ctx, cond=cond))


def _stream_calls(part: Any) -> Calls:
    x = tokens()
    for batch in (-1, 1.5, None, "x"):
        yield f"batch {batch}", lambda batch=batch: part.init_state(batch, like=x)
    yield "like nothing", lambda: part.init_state(2, like=None)
    state = part.init_state(2, like=x)
    for name, value in (_inputs(x) | {"more samples": torch.cat([x, x[:1]])}).items():
        yield f"step of {name}", lambda value=value: part.step(value, state)
    for other in (None, x):
        yield f"state {type(other)}", lambda other=other: part.step(x, other)


def _error(call: Callable[[], Any]) -> Exception | None:
    try:
        call()
    except Exception as error:
        return error
    return None


def _check(calls: Calls) -> None:
    errors = {name: error for name, call in calls if (error := _error(call)) is not None}
    raw = {name: repr(error) for name, error in errors.items() if not is_refusal(error)}
    assert not raw
    assert len(errors) > 5


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_parts(part: nn.Module) -> None:
    _check(_part_calls(part.eval()))


STREAMS = {name: make_mixer(name, causal=True) for name in mixers(streaming=True)} | {
    name: part
    for name, part in PARTS.items()
    if name.startswith("ffn") and isinstance(part, Streaming)
}


@pytest.mark.parametrize("part", STREAMS.values(), ids=STREAMS)
def test_streams(part: nn.Module) -> None:
    _check(_stream_calls(part.eval()))


def _model_calls(model: Any) -> Calls:
    given = model.example_inputs(2)
    for name, x in given.items():
        values = {
            "nothing": None, "a list": [1], "an array": x.numpy(), "a number": x.flatten()[0],
            "a rank more": x[None], "flat": x.flatten(), "no samples": x[:0], "more samples": x.repeat_interleave(2, 0)[:3],
            "complex": x + 0j, "another type": x.long() if x.is_floating_point() else x.float(),
            "another device": x.to("meta"),
        }  # fmt: skip
        if not x.is_floating_point() and x.dtype != torch.bool:
            values |= {"below": x - 10**6, "beyond": x + 10**6}
        if x.dim() > 1:
            values |= {"shorter": x[..., :-1], "empty": x[..., :0]}
        for kind, value in values.items():
            changed = given | {name: value}
            yield f"{name} {kind}", lambda changed=changed: model(**changed)
    yield "no arguments", lambda: model()
    yield "tap", lambda: model(**given, tap=5)
    yield "ledger", lambda: model(**given, ledger=5)
    for batch in (-1, 1.5, None, "x"):
        yield f"example of {batch}", lambda batch=batch: model.example_inputs(batch)
        if hasattr(model, "init_state"):
            yield f"state of {batch}", lambda batch=batch: model.init_state(batch)
    if hasattr(model, "step"):
        first = next(iter(given.values()))
        for name, x in {"flat": first.flatten(), "empty": first[:, :0], "none": None}.items():
            yield f"step of {name}", lambda x=x: model.step(x, model.init_state(2))
        yield "no state", lambda: model.step(first[:, :1], None)


@pytest.mark.parametrize("family", families())
def test_models(family: str) -> None:
    column = columns(family)[0]
    _check(_model_calls(build_model(column.preset, **column.changes).eval()))


def test_sentences_say_what_would_fit() -> None:
    part, x = make_mixer("flow"), tokens()
    with pytest.raises(ValueError, match=r"x is torch.float64, the weights are torch.float32"):
        part(x.double())
    with pytest.raises(ValueError, match=r"x must be \(B, N, 24\), got \(2, 11, 25\)"):
        part(torch.randn(2, 11, 25))
    with pytest.raises(ValueError, match="number of samples must be at least 1, got -1"):
        make_mixer("lmu").init_state(-1, like=x)
    dit = build_model("sit-nano", input_size=8).eval()
    given = dit.example_inputs(2)
    with pytest.raises(ValueError, match=r"labels y must lie in 0\.\.1000, got 1001"):
        dit(**given | {"y": torch.tensor([0, 1001])})
    with pytest.raises(ValueError, match="labels y must lie in"):
        dit(**given | {"y": torch.tensor([0, -1])})
    with pytest.raises(ValueError, match=r"missing a required argument: 'y'"):
        dit(given["x"], given["t"])
    bert = build_model("bert-tiny")
    with pytest.raises(ValueError, match="tokens must lie in"):
        bert(torch.full((1, 4), bert.config.vocab))


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    part = make_ffn("mlp")

    def broken(*_: Any) -> Tensor:
        raise IndexError("a fault")

    monkeypatch.setattr(part, "forward", lambda x, ctx: broken())
    with pytest.raises(IndexError, match="a fault"):
        part(tokens(), context_for(part, tokens()))
