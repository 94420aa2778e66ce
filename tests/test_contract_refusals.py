"""Arguments that do not fit: every model answers, or says in a sentence what would fit; parts do so in
their contract."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from contract import context_for, make_ffn, make_mixer, tokens
from torch import Tensor

from effformer.build import build_model
from effformer.testing.matrix import columns, families
from effformer.testing.work import Calls, answers_or_refuses


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
    answers_or_refuses(_model_calls(build_model(column.preset, **column.changes).eval()))


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
