"""Adapters: neutral at the start, trained alone, merged, saved, and on packed layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import assert_close
from effformer.compress import (
    LoRA,
    adapt,
    adapter_scale,
    dequantize,
    load_adapter,
    merge,
    prune,
    quantize,
    save_adapter,
    unadapt,
)
from effformer.compress.adapt import fuse_adapters, split_adapter
from torch import Tensor, nn

import effformer
from effformer.checks import CapabilityError, FormatError


@pytest.fixture
def vit() -> Any:
    torch.manual_seed(0)
    return effformer.build_model("vit-nano").eval()


def images(model: Any) -> Tensor:
    x: Tensor = model.example_inputs(2, generator=torch.Generator().manual_seed(1))["x"]
    return x


def moved(model: Any) -> Any:
    """An adapter that does something."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


@pytest.mark.parametrize("kind", ["lora", "rs", "dora"])
def test_from_neutral_to_merged(vit: Any, kind: str, tmp_path: Path) -> None:
    x = images(vit)
    adapted, report = adapt(vit, {"rank": 4, "alpha": 8, "kind": kind}, "blocks.*")
    with torch.no_grad():
        assert_close(adapted(x), vit(x), rtol=0, atol=1e-6)
    trained = {n for n, p in adapted.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in adapted.named_parameters() if "lora_" in n}
    assert report.trainable == sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    moved(adapted)
    merged = merge(adapted)
    assert merged.transforms == ()
    assert type(merged.blocks[0].attn.part.qkv) is nn.Linear
    assert_close(merged(x), adapted(x), rtol=1e-4, atol=1e-5)
    assert (merged(x) - vit(x)).abs().max() > 1e-3
    assert_close(unadapt(adapted)(x), vit(x), rtol=0, atol=1e-6)
    again = effformer.load_model(effformer.save_pretrained(adapted, tmp_path / "m"))
    assert_close(again(x), adapted(x), rtol=0, atol=1e-6)
    loaded = load_adapter(vit, save_adapter(adapted, tmp_path / "a"))
    assert_close(loaded(x), adapted(x), rtol=1e-5, atol=1e-6)


def test_only_the_adapter_learns_on_packed_layers(vit: Any, tmp_path: Path) -> None:
    x = images(vit)
    packed, _ = quantize(vit, "int4", "blocks.*.ffn")
    adapted, _ = adapt(packed, LoRA(rank=2), "blocks.*.ffn")
    moved(adapted)(x).sum().backward()
    assert {n for n, p in adapted.named_parameters() if p.grad is not None} == {
        n for n, _ in adapted.named_parameters() if "lora_" in n
    }
    again = effformer.load_model(effformer.save_pretrained(adapted, tmp_path / "m"))
    assert_close(again(x), adapted(x), rtol=0, atol=1e-6)
    with pytest.raises(CapabilityError, match=r"merge\(dequantize\(model\)\)"):
        merge(adapted)
    dense = merge(dequantize(adapted))
    assert_close(dense(x), adapted(x), rtol=1e-4, atol=1e-5)


def test_strength_goes_from_none_to_all(vit: Any) -> None:
    x = images(vit)
    adapted = moved(adapt(vit, LoRA(rank=2))[0])
    whole = adapted(x)
    adapter_scale(adapted, 0.0)
    assert_close(adapted(x), vit(x), rtol=0, atol=1e-6)
    adapter_scale(adapted, 1.0)
    assert_close(adapted(x), whole, rtol=0, atol=1e-6)


def test_ranks_and_convolutions_by_name() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 2, stride=2), nn.Flatten(2), nn.Linear(4, 6)).eval()
    scheme = LoRA(rank=4, alpha=2.0, ranks={"0": 2}, alphas={"2": 8.0})
    adapted, report = adapt(net, scheme, ("0", "2"))
    assert report.layers == {"0": 2, "2": 4}
    assert (adapted[0].lora_scale, adapted[2].lora_scale) == (1.0, 2.0)
    x = torch.randn(1, 3, 4, 4)
    assert_close(merge(moved(adapted))(x), adapted(x), rtol=1e-5, atol=1e-6)


def test_separate_and_fused_projections_convert_exactly() -> None:
    torch.manual_seed(2)
    x = torch.randn(5, 7)
    parts = [
        (torch.randn(r, 7), torch.randn(o, r), s) for r, o, s in ((2, 4, 0.5), (3, 4, 1), (1, 6, 2))
    ]
    a, b = fuse_adapters(parts)
    expected = torch.cat([s * (x @ one.T @ two.T) for one, two, s in parts], dim=-1)
    assert_close(x @ a.T @ b.T, expected, rtol=1e-5, atol=1e-6)
    split = [x @ one.T @ two.T for one, two in split_adapter(a, b, [4, 4, 6])]
    assert_close(torch.cat(split, dim=-1), expected, rtol=1e-5, atol=1e-6)


def test_refusals(vit: Any, tmp_path: Path) -> None:
    adapted, _ = adapt(vit, LoRA(rank=2))
    with pytest.raises(CapabilityError, match="adapted already; merge it"):
        adapt(adapted)
    with pytest.raises(ValueError, match="matches no module"):
        adapt(vit, where="elsewhere")
    with pytest.raises(ValueError, match="no layer of this model is adapted"):
        merge(vit)
    with pytest.raises(ValueError, match="has no linear layer"):
        adapt(nn.Sequential(nn.GELU()))
    with pytest.raises(
        CapabilityError, match="'dora' changes dense linear layers, this is a Conv2d"
    ):
        adapt(nn.Sequential(nn.Conv2d(2, 2, 1)), LoRA(kind="dora"), "0")
    with pytest.raises(CapabilityError, match="could go"):
        prune(adapted, {"keep": {"heads": 0.5}}, "blocks.*.attn")
    folder = save_adapter(adapted, tmp_path / "a")
    with pytest.raises(FormatError, match="made for another model, which has a layer"):
        load_adapter(nn.Sequential(nn.Linear(2, 2)), folder)
    with pytest.raises(FormatError, match="the model expects"):
        load_adapter(effformer.build_model("vit-nano", dim=32), folder)
    with pytest.raises(FormatError):
        load_adapter(vit, tmp_path / "nothing")
    with pytest.raises(ValueError, match="all or nothing"):
        adapter_scale(adapt(vit, LoRA(kind="dora"))[0], 0.5)


def moved_in_time(name: str = "sit-nano", **options: Any) -> tuple[Any, Any]:
    """A generator that is awake, and the same with changes that follow the time."""
    torch.manual_seed(0)
    model: Any = effformer.build_model(name, **options).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    adapted, _ = adapt(
        model, {"rank": 2, "kind": "td", "experts": 3}, ("*attn.part*", "*ffn.part*")
    )
    with torch.no_grad():
        for key, p in adapted.named_parameters():
            if "lora_router" in key:
                p.normal_(std=2.0)
    return model, moved(adapted)


@pytest.mark.parametrize("name", ["sit-nano", pytest.param("mmdit-nano", marks=pytest.mark.slow)])
def test_changes_follow_the_time_and_merge_for_one(name: str, tmp_path: Path) -> None:
    model, adapted = moved_in_time(name)
    inputs = model.example_inputs(3)
    inputs["t"] = torch.tensor([0.2, 0.2, 0.9])
    layer = adapted.get_submodule(next(iter(adapted.transforms[0]["layers"])))
    with torch.no_grad():
        out = adapted(**inputs)
        singles = torch.cat(
            [adapted(**{k: v[i : i + 1] for k, v in inputs.items()}) for i in range(3)]
        )
    assert_close(singles, out, rtol=1e-4, atol=1e-5)  # each alone, merged in the call
    assert layer.moment.ctx is None
    for i, time in ((0, 0.2), (2, 0.9)):
        merged = merge(adapted, time=time)
        assert merged.transforms == ()
        assert not any(m._forward_pre_hooks for m in merged.modules())
        one = {k: v[i : i + 1] for k, v in inputs.items()}
        with torch.no_grad():
            assert_close(merged(**one), out[i : i + 1], rtol=1e-4, atol=1e-5)
            assert (merged(**one) - model(**one)).abs().max() > 1e-3
    with torch.no_grad():
        assert_close(unadapt(adapted)(**inputs), model(**inputs), rtol=0, atol=1e-6)
        again: Any = effformer.load_model(effformer.save_pretrained(adapted, tmp_path / "m"))
        assert_close(again.eval()(**inputs), out, rtol=0, atol=1e-6)


def test_changes_that_follow_the_time_learn_with_their_routers_and_what_is_named() -> None:
    torch.manual_seed(0)
    model: Any = effformer.build_model("sit-nano", width="dynamic", tokens="dynamic")
    scheme = {"rank": 2, "kind": "td", "also": ["*.gates"]}
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    adapted, _ = adapt(model, scheme, "*.ffn.part")
    learns = {n for n, p in adapted.named_parameters() if p.requires_grad}
    assert learns == {n for n, _ in adapted.named_parameters() if "lora_" in n or ".gates." in n}
    inputs = model.example_inputs(2)
    with torch.no_grad():
        assert_close(adapted.eval()(**inputs), model.eval()(**inputs), rtol=0, atol=1e-6)
    moved(adapted).train()(**{**inputs, "t": torch.tensor([0.1, 0.7])}).square().sum().backward()
    assert adapted.blocks[0].ffn.part.fc1.lora_router.weight.grad.abs().max() > 0


def test_wrong_times_of_changes_are_refused(vit: Any, tmp_path: Path) -> None:
    with pytest.raises(CapabilityError, match="blocks that are told the time"):
        adapt(vit, {"kind": "td"})
    model, adapted = moved_in_time()
    with pytest.raises(CapabilityError, match=r"say which: merge\(model, time=0.5\)"):
        merge(adapted)
    with pytest.raises(ValueError, match="no change of this model follows the time"):
        merge(adapt(model, {"rank": 2})[0], time=0.5)
    for time in (9.0, -0.1):
        with pytest.raises(ValueError, match="sit-nano counts the time from 0 to 1, got time="):
            merge(adapted, time=time)
    adapted.trained = {"convention": "mdt-dist"}  # 0 to 1000
    merge(adapted, time=999.0)
    with pytest.raises(CapabilityError, match="peft has no layout"):
        save_adapter(adapted, tmp_path / "a")
    with pytest.raises(ValueError, match="reaches a layer with its block alone"):
        adapted.blocks[0].attn.part.qkv(torch.zeros(1, 2, 48))
    with pytest.raises(ValueError, match="adapt: also"):
        adapt(model, {"also": ["gates"]})
