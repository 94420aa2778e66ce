"""`prune`: budgets, alignment, importance, recovery, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import assert_close
from effformer.compress import PruneScheme, importance, plan, prune, recording
from torch import Tensor, nn

import effformer
from effformer.calls import run
from effformer.checks import CapabilityError
from effformer.profile import profile
from effformer.train import Classification


@pytest.fixture(scope="module")
def vit() -> Any:
    torch.manual_seed(0)
    return effformer.build_model("vit-nano").eval()


@pytest.fixture(scope="module")
def batches() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    model = effformer.build_model("vit-nano")
    x = [model.example_inputs(4, generator=generator)["x"] for _ in range(2)]
    return [{"x": one, "y": torch.tensor([0, 1, 2, 3])} for one in x]


@pytest.mark.parametrize("scope", ["uniform", "global"])
def test_half_of_the_work_is_half(vit: Any, scope: str, tmp_path: Path) -> None:
    before = {k: v.clone() for k, v in vit.state_dict().items()}
    small, report = prune(vit, {"macs": 0.5, "scope": scope, "units": ("channels", "heads")})
    given = vit.example_inputs()
    assert report.macs_after == profile(small, given).total
    assert 0.4 < report.macs_ratio <= 0.5
    assert report.macs_before == profile(vit, given).total
    assert sum(p.numel() for p in small.parameters()) == report.params_after
    assert all(p.after % 8 == 0 for p in report.parts if p.kind == "channels")
    again = effformer.load_model(effformer.save_pretrained(small, tmp_path / "m"))
    assert torch.equal(again(**given), small(**given))
    assert all(torch.equal(v, before[k]) for k, v in vit.state_dict().items())
    small(given["x"]).sum().backward()
    assert all(p.grad is not None for p in small.parameters() if p.requires_grad)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit-nano", "flux-tiny"])
def test_pruned_models_export(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    from effformer.export import export_onnx

    model = effformer.build_model(name).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    small, _ = prune(model, {"keep": {"heads": 0.5, "channels": 0.6}})
    report = export_onnx(small, tmp_path / "m.onnx")
    assert report.parity is not None
    assert report.path.exists()


def test_parameters_are_a_budget_too(vit: Any) -> None:
    small, report = prune(vit, {"params": 0.7})
    assert report.params_after == sum(p.numel() for p in small.parameters())
    assert 0.55 < report.params_ratio <= 0.7


def test_shares_per_kind_and_whole_blocks(batches: list[dict[str, Tensor]]) -> None:
    model = effformer.build_model("vit-nano", depth=4).eval()
    small, report = prune(model, {"keep": {"blocks": 0.5, "channels": 0.5}}, data=batches)
    assert small.config.depth == 2
    assert {p.kind for p in report.parts} == {"blocks", "channels"}
    assert small.config.ffn.hidden == 96


def test_unimportant_units_are_found_whatever_the_method(
    vit: Any, batches: list[dict[str, Tensor]]
) -> None:
    """Units that nobody reads come last in every method, and go without a trace."""
    model = effformer.build_model("vit-nano").double().eval()
    data = [{"x": b["x"].double(), "y": b["y"]} for b in batches]
    silent = [3, 5, 100, 101, 102, 103, 104, 105]
    with torch.no_grad():
        for block in model.blocks:
            block.ffn.part.fc2.weight[:, silent] = 0
            block.ffn.part.fc1.weight[silent] = 0
            block.ffn.part.fc1.bias[silent] = 0
    for method in ("magnitude", "activation", "taylor", "gradient", "sides"):
        more: Any = {} if method == "magnitude" else {"data": data, "objective": Classification()}
        small, report = prune(
            model, {"importance": method, "keep": {"channels": 184 / 192}}, **more
        )
        assert all(set(silent).isdisjoint(p.kept) for p in report.parts), method
        assert_close(
            run(small, data[0]["x"], where="t")[0],
            run(model, data[0]["x"], where="t")[0],
            rtol=0,
            atol=1e-10,
        )


def test_a_duplicate_goes_for_nothing_after_a_refit() -> None:
    """A channel that another one repeats is lost without loss once the columns are fitted anew."""
    torch.manual_seed(1)
    model = effformer.build_model("vit-nano", depth=1).double().eval()
    ffn = model.blocks[0].ffn.part
    with torch.no_grad():
        for row in range(8):
            ffn.fc1.weight[row + 8], ffn.fc1.bias[row + 8] = ffn.fc1.weight[row], ffn.fc1.bias[row]
            ffn.fc1.weight[row] *= 1.0
        ffn.fc2.weight[:, :16] *= 1e-2  # the magnitude finds these sixteen
        ffn.fc2.weight[:, :8] *= 0.5
        ffn.fc1.weight[:16] *= 1e-1
    data = [model.example_inputs(8, generator=torch.Generator().manual_seed(i)) for i in range(8)]
    data = [{"x": d["x"].double()} for d in data]
    errors = {}
    for recover in ("none", "bias", "least-squares"):
        scheme = {"keep": {"channels": 184 / 192}, "recover": recover}
        _, report = prune(model, scheme, data=data)
        errors[recover] = report.output_error
        assert set(report.parts[0].kept) >= set(range(16, 192))
    assert errors["least-squares"] < 0.05 * errors["none"]


@pytest.mark.parametrize("name", ["vit-nano", pytest.param("mmdit-nano", marks=pytest.mark.slow)])
def test_recovery_never_makes_a_layer_worse(name: str) -> None:
    """What reads the lost units is nearer to what it was, on the inputs that it was fitted on."""
    torch.manual_seed(3)
    model = effformer.build_model(name).double().eval()
    given = model.example_inputs(4, generator=torch.Generator().manual_seed(0))
    given = {k: x.double() if x.is_floating_point() else x for k, x in given.items()}
    path = next(g.path for g in plan(model, kinds=("channels",)).groups)
    seen: list[Tensor] = []
    part = model.get_submodule(path)
    hook = part.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    expected = run(model, given, where="t")
    hook.remove()
    errors = []
    for recover in ("none", "bias", "least-squares"):
        small, _ = prune(model, {"keep": {"channels": 0.5}, "recover": recover}, path, data=given)
        with torch.no_grad():
            errors.append(
                float((small.get_submodule(path)(seen[0]) - part(seen[0])).square().mean())
            )
    assert errors[2] < errors[1] < errors[0]
    assert expected[0].isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert-tiny", "flux-tiny", "mmdit-nano", "relactrl-nano"])
def test_other_families(name: str, tmp_path: Path) -> None:
    model = effformer.build_model(name).eval()
    small, report = prune(model, {"keep": 0.5})
    assert 0.2 < report.macs_ratio < 0.9
    again = effformer.load_model(effformer.save_pretrained(small, tmp_path / "m"))
    given = model.example_inputs()
    assert torch.equal(run(again, given, where="t")[0], run(small, given, where="t")[0])


def test_a_pruned_model_is_pruned_again(vit: Any) -> None:
    once, _ = prune(vit, {"macs": 0.8})
    twice, report = prune(once, {"macs": 0.8})
    assert report.macs_ratio <= 0.8
    assert twice.transforms == ()


def test_blocks_matter_by_what_they_do(batches: list[dict[str, Tensor]]) -> None:
    model = effformer.build_model("vit-nano", depth=3).eval()
    with torch.no_grad():
        model.blocks[1].attn.part.proj.weight.zero_()
        model.blocks[1].attn.part.proj.bias.zero_()
        model.blocks[1].ffn.part.fc2.weight.zero_()
        model.blocks[1].ffn.part.fc2.bias.zero_()
    scores = importance(model, where="blocks", data=batches)["blocks"]
    assert scores[1] < 1e-6
    assert scores.argmin() == 1


def test_what_a_sampler_asked_measures_units(vit: Any, batches: list[dict[str, Tensor]]) -> None:
    """One shape of data for every verb: a record of calls, batches, named tensors."""
    images = [{"x": batch["x"]} for batch in batches]
    with recording(vit) as record:
        for batch in images:
            vit(**batch)
    scores = [importance(vit, "activation", data=data) for data in (record, images)]
    for path, own in scores[0].items():
        torch.testing.assert_close(own, scores[1][path])


def test_refusals(vit: Any, batches: list[dict[str, Tensor]]) -> None:
    with pytest.raises(ValueError, match=r"macs=0.01 cannot be met .* the least is macs=0\.\d+"):
        prune(vit, {"macs": 0.01})
    with pytest.raises(ValueError, match="give one of keep=, macs= and params=, got none"):
        prune(vit, {"units": ("heads",)})
    with pytest.raises(ValueError, match="got keep and macs"):
        PruneScheme(keep=0.5, macs=0.5)
    with pytest.raises(ValueError, match="matches no module"):
        prune(vit, {"macs": 0.5}, "nothing.*")
    with pytest.raises(ValueError, match="is measured on data="):
        prune(vit, {"importance": "taylor", "macs": 0.5})
    with pytest.raises(ValueError, match="units 'blocks' is measured on data="):
        prune(vit, {"units": ("blocks",), "keep": 0.5})
    with pytest.raises(ValueError, match="needs a loss: objective="):
        prune(vit, {"importance": "taylor", "macs": 0.5}, data=batches)
    with pytest.raises(ValueError, match="data: there are no samples"):
        prune(vit, data=[])
    with pytest.raises(ValueError, match=r"data: batch 1: (\d+) of \1 values of x are NaN"):
        prune(vit, data=[batches[0], {"x": batches[0]["x"] * float("nan")}])
    with pytest.raises(ValueError, match="data: there are no samples"):
        prune(vit, data={"x": batches[0]["x"][:0]})
    with pytest.raises(TypeError, match=r"data: expected .* got 'digits'"):
        prune(vit, data="digits")
    with pytest.raises(TypeError, match="scheme: expected PruneScheme or a dict"):
        prune(vit, "magnitude")
    with pytest.raises(CapabilityError, match="has no width that could go"):
        prune(effformer.build_model("dit-nano"), {"keep": {"width": 0.5}})
    with pytest.raises(CapabilityError, match="has no heads, channels that could go"):
        prune(nn.Sequential(nn.Linear(4, 4)))


def test_plans_say_what_stays_and_why() -> None:
    planned = plan(effformer.build_model("vit-nano", attn="reformer"))
    assert "kept" in str(planned)
    assert planned.kept["blocks.0.attn.part"]
    with pytest.raises(StopIteration):
        planned["blocks.0.attn.part"]
