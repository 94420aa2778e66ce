"""Accuracy-driven search: what a measured loss does not miss goes, and the result is an ordinary model."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import assert_close
from effformer.compress import approximate, quantize
from effformer.compress.prune.greedy import greedy

import effformer
from effformer.checks import CapabilityError
from effformer.profile import profile
from effformer.train import Classification, Dataset, Generation, TrainConfig, load_data, train

VIT: dict[str, Any] = {
    "image_size": 8, "patch": 2, "channels": 1, "num_classes": 10, "depth": 3, "dim": 32, "heads": 2,
}  # fmt: skip


def digits(count: int) -> Dataset:
    return load_data("digits").subset(torch.arange(count))


def awake(name: str = "vit-nano", **options: Any) -> Any:
    torch.manual_seed(0)
    model = effformer.build_model(name, **options).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


@pytest.fixture(scope="module")
def trained() -> Any:
    """A classifier that knows something, with one FFN that does harm."""
    torch.manual_seed(0)
    model: Any = effformer.build_model("vit-nano", **VIT)
    config = TrainConfig(steps=60, batch=32, lr=3e-3, warmup=5, ema=None)
    train(model, digits(400), Classification(), config, progress=False)
    with torch.no_grad():
        model.blocks[2].ffn.part.fc2.weight.normal_(std=3)
    return model.eval()


@pytest.mark.slow
def test_what_does_harm_goes_and_what_is_needed_stays(trained: Any, tmp_path: Path) -> None:
    data = digits(128)
    scheme = {"group": 32, "threshold": 0.02, "keys": [8, 2]}
    small, report = approximate(trained, scheme, data=data, objective=Classification())
    assert "blocks.2.ffn" in report.removed
    assert [v.element for v in report.visits[:3]] == [
        "blocks.2.attn",
        "blocks.2.ffn",
        "blocks.1.attn",
    ]
    assert "blocks.0.attn" not in report.removed or "blocks.0.ffn" not in report.removed
    assert report.loss_after < report.loss_before
    last = [v.loss for v in report.visits if v.accepted][-1]
    assert report.loss_after == pytest.approx(last, rel=1e-4)  # cut is what was masked
    assert report.params_after == sum(p.numel() for p in small.parameters())
    assert report.macs_after == profile(small, memory=False).total < report.macs_before
    x = data["x"][:4]
    again: Any = effformer.load_model(effformer.save_pretrained(small, tmp_path / "m"))
    with torch.no_grad():
        assert torch.equal(again.eval()(x), small(x))
    same, _ = approximate(trained, scheme, data=data, objective=Classification())
    with torch.no_grad():
        assert torch.equal(same(x), small(x))
    packed, _ = quantize(small, "int8")
    assert packed(x).isfinite().all()
    assert "in " in str(report)


@pytest.mark.parametrize(
    "name",
    [
        "vit-nano",
        pytest.param("bert-tiny", marks=pytest.mark.slow),
        pytest.param("sit-nano", marks=pytest.mark.slow),
    ],
)
def test_every_kind_of_element_is_cut_as_it_was_searched(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = awake(name, **({} if name == "bert-tiny" else {"depth": 2}))
    given = model.example_inputs(4)
    first = "blocks.1" if name != "bert-tiny" else f"blocks.{model.config.depth - 1}"
    out = {f"{first}.ffn", "blocks.0.attn/1", "blocks.0.ffn/0", "blocks.0.attn, 3 keys"}
    seen: list[torch.Tensor] = []

    def chosen(parts: Any, units: Any, hard: Any, measure: Any, **options: Any) -> Any:
        """A search that finds one of everything."""
        found = greedy(parts, units, hard, lambda *_: 0.0, **(options | {"most": 1}))
        found.removed = [f"{first}.ffn", "blocks.0.attn/1", "blocks.0.ffn/0"]
        found.keys = {"blocks.0.attn": 3}
        measure(found.removed, found.keys)
        return found

    def task(model: Any, batch: Any, generator: Any, ledger: Any) -> torch.Tensor:
        seen.append(effformer.calls.outputs(model(**batch))[0])
        return torch.zeros(())

    verb = importlib.import_module("effformer.compress.prune.approximate")
    monkeypatch.setattr(verb, "greedy", chosen)
    small, report = approximate(model, {"group": 16}, data=given, objective=task)
    assert {*report.removed} == out - {"blocks.0.attn, 3 keys"}
    assert_close(
        seen[-1], seen[-2], rtol=1e-4, atol=1e-5
    )  # the cut model, and the one in the search
    assert (seen[-1] - seen[0]).abs().max() > 1e-3
    assert small.config.at("blocks.0.attn.core.keep") == 3
    assert report.params_after < report.params_before
    again: Any = effformer.load_model(effformer.save_pretrained(small, tmp_path / "m"))
    with torch.no_grad():
        mine, other = (effformer.calls.outputs(m.eval()(**given))[0] for m in (small, again))
    assert torch.equal(mine, other)


def test_the_search_keeps_its_rules() -> None:
    losses = {"a": 0.9, "b": 1.05, "c": 2.0, "b/0": 0.9, "b/1": 0.8, "c/0": 0.1}
    asked: list[tuple[str, ...]] = []

    def measure(removed: Sequence[str], keys: Mapping[str, int]) -> float:
        asked.append((*removed, *(f"{k}={n}" for k, n in keys.items())))
        keyed = {8: -0.01, 4: -0.02, 2: 1.0}
        last = losses[removed[-1]] if removed else 1.0
        return last + sum(keyed[n] for n in keys.values())

    units = {"b": ["b/0", "b/1"], "c": ["c/0"]}
    found = greedy("abc", units, {"b": (8, 4, 2)}, measure, threshold=0.2)
    assert found.removed == ["a", "b/0"]  # the last unit of b is not tried, c is too far
    assert found.keys == {"b": 4}
    assert [v.element for v in found.visits] == [
        "a", "b", "c", "b/0", "b, 8 keys", "b, 4 keys", "b, 2 keys",
    ]  # fmt: skip
    assert len(greedy("abc", units, {}, measure, threshold=0.2, most=3).visits) == 2
    loose = greedy("abc", {}, {}, measure, threshold=0.2, slack=0.2)
    assert loose.removed == ["a", "b"]


def test_refusals() -> None:
    model, data = awake(**VIT), digits(8)
    task = Classification()
    with pytest.raises(ValueError, match="keys must descend"):
        approximate(model, {"keys": [8, 16]}, data=data, objective=task)
    with pytest.raises(ValueError, match="matches no module"):
        approximate(model, where="blocks.9", data=data, objective=task)
    with pytest.raises(ValueError, match="approximate: data"):
        approximate(model, data=[], objective=task)
    with pytest.raises(ValueError, match="the loss of the model as it is is inf"):
        approximate(model, data=data, objective=lambda *_: torch.tensor(torch.nan))
    with pytest.raises(CapabilityError, match="approximate first"):
        approximate(quantize(model, "int8")[0], data=data, objective=task)
    with pytest.raises(CapabilityError, match="runs in part already"):
        approximate(awake("dydit-nano"), data=data, objective=Generation())
