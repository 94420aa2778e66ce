"""From dense to dynamic in one call: gates that start open, fine-tuned to a share of the work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import assert_close
from effformer.compress import DynamicScheme, dynamize, merge, quantize

import effformer
from effformer.checks import CapabilityError
from effformer.train import Classification, Dataset, Generation, load_data

IMAGES: dict[str, Any] = {
    "input_size": 8, "channels": 1, "num_classes": 10, "learn_sigma": False, "dim": 48, "heads": 4,
}  # fmt: skip


def sit() -> Any:
    torch.manual_seed(0)
    model = effformer.build_model("sit-nano", **IMAGES).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


def digits(count: int) -> Dataset:
    return load_data("digits").subset(torch.arange(count))


def test_gates_start_open_and_what_matters_most_comes_first() -> None:
    model = sit()
    inputs = model.example_inputs(3)
    dynamic, report = dynamize(model)
    assert not dynamic.training
    assert {place.split(".", 2)[2] for place in report.places} == {
        "width.gates.attn",
        "width.gates.ffn",
        "tokens.gates.ffn",
    }
    assert report.executed is None
    assert "data= trains them" in str(report)
    with torch.no_grad():
        assert_close(dynamic(**inputs), model(**inputs), rtol=1e-4, atol=1e-5)
    for block, old in zip(dynamic.blocks, model.blocks, strict=True):
        sizes = block.ffn.part.magnitudes()
        assert bool((sizes[:-1] >= sizes[1:]).all())
        assert not torch.equal(sizes, old.ffn.part.magnitudes())
    plain, _ = dynamize(model, {"sort": False})
    assert torch.equal(plain.blocks[0].ffn.part.fc1.weight, model.blocks[0].ffn.part.fc1.weight)


@pytest.mark.slow
def test_a_generator_learns_to_do_a_share_of_its_work(tmp_path: Path) -> None:
    model = sit()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    scheme = {"target": 0.6, "steps": 100, "batch": 16, "lr": 2e-2, "weight": 20.0}
    given: dict[str, Any] = {"data": digits(200), "objective": Generation(), "progress": False}
    dynamic, report = dynamize(model, scheme, **given)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert report.executed == pytest.approx(0.6, abs=0.2)
    assert report.executed < 0.85
    assert dynamic.trained is not None
    again: Any = effformer.load_model(effformer.save_pretrained(dynamic, tmp_path / "m"))
    inputs = model.example_inputs(2)
    with torch.no_grad():
        assert torch.equal(again.eval()(**inputs), dynamic(**inputs))


def test_without_an_objective_the_old_model_is_followed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model: Any = effformer.build_model("vit-nano").eval()
    scheme = {"width": None, "steps": 4, "batch": 2}
    given: dict[str, Any] = {"data": model.example_inputs(4), "out": tmp_path, "progress": False}
    one, report = dynamize(model, scheme, "blocks.1", **given)
    assert report.places == ("blocks.1.tokens.gates.ffn",)
    assert report.output_error is not None
    two, _ = dynamize(model, scheme, "blocks.1", **given)  # what is finished is not done again
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True))
    with pytest.raises(ValueError, match=str(tmp_path)):
        dynamize(model, scheme | {"target": 0.3}, "blocks.1", **given)
    with torch.no_grad():
        model.head.linear.bias.add_(1)
    with pytest.raises(ValueError, match=str(tmp_path)):
        dynamize(model, scheme, "blocks.1", **given)


def test_gates_and_changes_that_follow_the_time_learn_alone() -> None:
    model = sit()
    scheme = {"steps": 3, "batch": 4, "lora": {"kind": "td", "rank": 2}, "sort": False}
    dynamic, report = dynamize(
        model, scheme, data=digits(16), objective=Generation(), progress=False
    )
    assert report.executed is not None
    old = dict(model.named_parameters())
    moved = {n for n, p in dynamic.named_parameters() if n not in old or not torch.equal(p, old[n])}
    assert moved
    assert all("lora_" in n or ".gates." in n for n in moved)
    at_half = merge(dynamic, time=0.5)
    inputs = model.example_inputs(2) | {"t": torch.full((2,), 0.5)}
    with torch.no_grad():
        assert_close(at_half(**inputs), dynamic(**inputs), rtol=1e-4, atol=1e-5)
    assert at_half.config == dynamic.config


@pytest.mark.parametrize("name", ["triposg-nano", "triflow-tiny"])
@pytest.mark.parametrize("over", ["all", "ffn"])
def test_blocks_with_a_memory_of_another_width(name: str, over: str) -> None:
    torch.manual_seed(0)
    model: Any = effformer.build_model(name).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    gates = {"width": {"name": "dynamic", "over": over, "bias": 15.0}}
    dynamic, report = dynamize(model, gates | {"tokens": {"name": "dynamic", "bias": 35.0}})
    assert all(place.startswith("blocks.") for place in report.places)
    inputs = model.example_inputs(2)
    with torch.no_grad():
        assert_close(dynamic(**inputs), model(**inputs), rtol=1e-4, atol=1e-5)


def test_refusals() -> None:
    model = sit()
    with pytest.raises(ValueError, match="nothing becomes dynamic"):
        DynamicScheme(width=None, tokens=None)
    with pytest.raises(ValueError, match=r"where='blocks\.7' matches no module"):
        dynamize(model, where="blocks.7")
    dynamic, _ = dynamize(model, {"tokens": None})
    with pytest.raises(CapabilityError, match="has width='dynamic' already; give width=None"):
        dynamize(dynamic)
    both, _ = dynamize(dynamic, {"width": None, "sort": False})
    assert both.config.tokens is not None
    with pytest.raises(CapabilityError, match="dynamize first"):
        dynamize(quantize(model, "int8")[0])
    with pytest.raises(CapabilityError, match="not a stack of equally wide blocks"):
        dynamize(torch.nn.Linear(2, 2))
    with pytest.raises(CapabilityError, match=r"'dynamic' .* time"):
        dynamize(effformer.build_model("vit-nano"), {"tokens": None})
    with pytest.raises(ValueError, match="dynamize: data"):
        dynamize(model, data=[], objective=Classification())
