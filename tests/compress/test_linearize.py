"""Linear attention in place of softmax: fitted layer by layer, then whole, into an ordinary model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from effformer.compress import linearize, quantize

import effformer
from effformer.checks import CapabilityError
from effformer.train import Generation, load_data

QUICK = {"steps": 2, "whole": 1, "batch": 4}


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.fixture
def vit() -> Any:
    torch.manual_seed(0)
    return effformer.build_model("vit-nano", depth=2, num_classes=10).eval()


@pytest.mark.parametrize("name", ["vit-nano", "sit-nano", "bert-tiny"])
def test_every_mixer_is_replaced_and_the_result_is_an_ordinary_model(
    name: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model: Any = effformer.build_model(name, dropout=0.1).eval()
    before = weights(model)
    data = model.example_inputs(6)
    linear, report = linearize(model, {"attn": "flow"} | QUICK, data=data, progress=False)
    assert [one.name for one in report.layers] == ["blocks.0.attn.part", "blocks.1.attn.part"]
    assert {one.after for one in report.layers} == {"flow"}
    assert linear.config.attn.core.entry.name == "flow"
    assert not linear.config.layers
    assert not linear.training
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    again: Any = effformer.load_model(effformer.save_pretrained(linear, tmp_path / "linear"))
    assert again.config == linear.config
    for mine, loaded in zip(linear(**data), again(**data), strict=True):
        assert torch.equal(mine, loaded)


def test_mixers_are_fitted_to_the_old_ones_on_their_inputs(vit: Any) -> None:
    with torch.no_grad():
        for block in vit.blocks:  # attention that is not uniform
            block.attn.part.qkv.weight.mul_(8)
    scheme = {"attn": "linear", "steps": 40, "whole": 0, "batch": 8, "lr": 3e-3}
    torch.manual_seed(1)
    data = {"x": torch.randn(8, *vit.example_inputs()["x"].shape[1:])}
    linear, report = linearize(vit, scheme, data=data, progress=False)
    for one in report.layers:
        assert one.fitted < 0.8 * one.copied
    assert report.fitted_error == report.output_error
    before = weights(vit)
    for name, p in linear.named_parameters():  # nothing else was trained, and all of it can be
        assert p.requires_grad
        assert torch.equal(p, before[name]) != (".attn.part." in name)


def test_the_whole_follows_the_old_model(vit: Any) -> None:
    scheme = {"attn": "sana", "steps": 2, "whole": 40, "batch": 4, "whole_lr": 1e-3}
    data = vit.example_inputs(4)
    _, report = linearize(vit, scheme, data=data, progress=False)
    assert report.output_error < 0.5 * report.fitted_error


def test_only_what_where_covers(vit: Any) -> None:
    scheme = {"attn": {"name": "flow", "eps": 1e-5}} | QUICK
    linear, report = linearize(vit, scheme, "blocks.1", data=vit.example_inputs(4), progress=False)
    assert [one.name for one in report.layers] == ["blocks.1.attn.part"]
    assert linear.config.at("blocks.1.attn.core.eps") == 1e-5
    assert linear.config.at("blocks.0.attn.core").entry.name == "softmax"
    with pytest.raises(ValueError, match="no softmax attention is in them"):
        linearize(linear, scheme, "blocks.1", data=vit.example_inputs(4))
    other, _ = linearize(
        linear, {"attn": "efficient"} | QUICK, data=vit.example_inputs(4), progress=False
    )
    assert other.config.at("blocks.1.attn.core").entry.name == "flow"


@pytest.mark.parametrize(
    ("name", "where"), [("triposg-nano", "*"), ("triflow-tiny", ["blocks.1", "blocks.2"])]
)
def test_what_looks_at_a_memory_or_joins_streams_stays(name: str, where: Any) -> None:
    model: Any = effformer.build_model(name)
    linear, report = linearize(
        model, {"attn": "flow"} | QUICK, where, data=model.example_inputs(4), progress=False
    )
    assert {(one.before, one.after) for one in report.layers} == {("softmax", "flow")}
    assert all(one.name.endswith(".attn.part") for one in report.layers)
    assert linear.config.cross == model.config.cross


def test_views_of_the_tokens_stay() -> None:
    torch.manual_seed(0)
    model: Any = effformer.build_model("sit-nano", attn={"name": "axes", "over": "h"})
    linear, _ = linearize(
        model, {"attn": "flow"} | QUICK, data=model.example_inputs(4), progress=False
    )
    assert linear.config.attn.title == "axes of flow"


def test_what_was_interrupted_goes_on(tmp_path: Path) -> None:
    torch.manual_seed(0)
    options = {"input_size": 8, "channels": 1, "num_classes": 10, "learn_sigma": False}
    model: Any = effformer.build_model("sit-nano", **options)
    data = load_data("digits").subset(torch.arange(40))

    class Stopping(Generation):
        calls = 0

        def __call__(self, *args: Any) -> torch.Tensor:
            Stopping.calls += 1
            if Stopping.calls == 40:
                raise KeyboardInterrupt
            return super().__call__(*args)

    scheme = {"attn": "flow", "steps": 12, "whole": 12, "batch": 8}
    given: dict[str, Any] = {"data": data, "progress": False}
    whole, _ = linearize(model, scheme, objective=Generation(), **given)
    with pytest.raises(KeyboardInterrupt):
        linearize(model, scheme, objective=Stopping(), out=tmp_path, **given)
    assert (tmp_path / "layers").is_dir()
    resumed, report = linearize(model, scheme, objective=Generation(), out=tmp_path, **given)
    assert all(
        torch.equal(p, q) for p, q in zip(whole.parameters(), resumed.parameters(), strict=True)
    )
    assert "layer by layer" in str(report)
    for change in ({"lr": 2e-3}, {"losses": ("hidden",)}):
        with pytest.raises(ValueError, match=str(tmp_path)):
            linearize(model, scheme | change, objective=Generation(), out=tmp_path, **given)
    with torch.no_grad():
        model.final.linear.bias.add_(1)
    with pytest.raises(ValueError, match=str(tmp_path)):
        linearize(model, scheme, objective=Generation(), out=tmp_path, **given)


def test_refusals(vit: Any) -> None:
    data = vit.example_inputs(4)
    for attn, words in (("topk", "all pairs"), ("flwo", "did you mean 'flow'")):
        with pytest.raises(ValueError, match=words):
            linearize(vit, attn, data=data)
    with pytest.raises(CapabilityError, match="'focused' has no place for tokens in front"):
        linearize(vit, "focused", data=data)
    with pytest.raises(ValueError, match="matches no module"):
        linearize(vit, "flow", "blokcs.*", data=data)
    with pytest.raises(CapabilityError, match="linearize first"):
        linearize(quantize(vit, "int8")[0], "flow", data=data)
    with pytest.raises(CapabilityError, match="not a stack of equally wide blocks"):
        linearize(torch.nn.Linear(2, 2), "flow", data=data)
    with pytest.raises(CapabilityError, match="never ran blocks"):
        linearize(vit, "flow", data=data, objective=lambda *_: torch.zeros(()))
    with pytest.raises(CapabilityError, match="has no softmax attention"):
        linearize(effformer.build_model("vit-nano", attn="flow"), "flow", data=data)
    for name, words in (
        ("rectok-tiny", "no single stack of blocks, .* encoder, decoder, describer"),
        (
            "mmdit-nano",
            r"streams meet in the attention of blocks\.0, blocks\.1, .* another attention",
        ),
        ("triflow-tiny", r"of blocks\.0, .* where=\['blocks\.1', 'blocks\.2'\] leaves them out"),
    ):
        model: Any = effformer.build_model(name)
        with pytest.raises(CapabilityError, match=words):
            linearize(model, "flow", data=model.example_inputs(2))
    for wrong in ({"x": data["x"] * torch.nan}, []):
        with pytest.raises(ValueError, match="linearize: data"):
            linearize(vit, "flow", data=wrong)
    with pytest.raises(ValueError, match=r"task=0\.5 weighs an objective"):
        linearize(vit, {"attn": "flow", "task": 0.5}, data=data)
    texts: Any = effformer.build_model("bert-tiny")
    uneven = [{"tokens": torch.ones(2, n).long()} for n in (3, 5)]
    with pytest.raises(ValueError, match="pad them to one length"):
        linearize(texts, "flow", data=uneven)
