from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from effformer.compress import Frugal
from effformer.compress.dynamic.work import WorkTarget, executed_ratio
from torch import Tensor, nn

import effformer
from effformer.checks import CapabilityError
from effformer.context import Ledger
from effformer.train import Batch, Classification, Generation, TrainConfig, load_data, train

SMALL: dict[str, Any] = {"input_size": 8, "num_classes": 10, "dim": 48, "heads": 4}


def awake(name: str = "dydit-nano", **options: Any) -> Any:
    torch.manual_seed(0)
    model = effformer.build_model(name, **{**SMALL, **options}).eval()
    with torch.no_grad():
        for key, p in model.named_parameters():
            if ".gates." in key:
                p.normal_(std=0.4)
            elif p.requires_grad:
                p.add_(torch.randn_like(p) * 0.1)
    return model


@torch.no_grad()
def test_tables_are_the_gates_of_a_forward() -> None:
    model = awake()
    times = torch.tensor([0.0, 333.0, 999.0])
    table = effformer.gate_tables(model, times)
    assert sorted(table.active) == [f"blocks.{i}.{n}" for i in range(2) for n in ("attn", "ffn")]
    ledger, given = Ledger(), model.example_inputs(3)
    model(**{**given, "t": times}, ledger=ledger)
    for path, active in table.active.items():
        assert active.shape == (3, 4)
        assert active[:, 0].all()
        if path.endswith("attn"):
            torch.testing.assert_close(active.float().mean(1), ledger.executed[path])
    mean = torch.stack([a.float().mean(1) for a in table.active.values()]).mean(0)
    torch.testing.assert_close(table.fraction(), mean)
    assert not model.training


@torch.no_grad()
def test_prepared_forms_are_used_until_weights_change() -> None:
    model = awake()
    times = torch.arange(0.0, 1000.0, 50.0)
    table = effformer.prepare_widths(model, times)
    branch = model.blocks[0].attn
    patterns = {tuple(row) for row in table.active["blocks.0.attn"].tolist()}
    kept = dict(branch.forms._kept)
    assert set(kept) == {p for p in patterns if not all(p)}
    assert kept
    given = {**model.example_inputs(2), "t": torch.full((2,), 100.0)}
    out = model(**given)
    assert dict(branch.forms._kept) == kept
    branch.part.proj.weight.mul_(2)
    assert not torch.equal(model(**given), out)
    assert all(form is not kept.get(key) for key, form in branch.forms._kept.items())


def test_models_without_gates_over_time_are_refused() -> None:
    with pytest.raises(CapabilityError, match="build it with width='dynamic'"):
        effformer.gate_tables(effformer.build_model("dit-nano"), torch.zeros(2))
    with pytest.raises(ValueError, match=r"gate_tables: times: expected shape \(T,\)"):
        effformer.gate_tables(awake(), torch.zeros(2, 2))


@pytest.mark.parametrize("attn", ["softmax", "flow", "relative", "nystrom"])
@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
@torch.no_grad()
def test_sorting_keeps_the_function(attn: str, ffn: str) -> None:
    options = {"landmarks": 4, "conv": 3} if attn == "nystrom" else {}
    model = awake("dit-nano", attn={"name": attn, **options}, ffn=ffn).double()
    given = model.example_inputs(2)
    before = model(**given)
    first = model.blocks[0].attn.part.magnitudes().clone()
    effformer.sort_by_magnitude(model)
    torch.testing.assert_close(model(**given), before)
    for block in model.blocks:
        for part in (block.attn.part, block.ffn.part):
            sizes = part.magnitudes()
            assert bool((sizes[:-1] >= sizes[1:]).all())
    torch.testing.assert_close(
        model.blocks[0].attn.part.magnitudes(), first.sort(descending=True)[0]
    )


@pytest.mark.parametrize("name", ["triposg-nano", "triflow-tiny"])
@torch.no_grad()
def test_sorting_knows_a_memory_of_another_width(name: str) -> None:
    torch.manual_seed(0)
    model: Any = effformer.build_model(name).double().eval()
    for p in model.parameters():
        p.add_(torch.randn_like(p) * 0.1)
    given = model.example_inputs(2)
    before = model(**given)
    effformer.sort_by_magnitude(model)
    torch.testing.assert_close(model(**given), before)
    narrow = [m for m in model.modules() if getattr(m, "cross", None) is True]
    assert any(m.q.in_features != m.kv.in_features for m in narrow)
    for part in narrow:
        heads = (part.q.weight, *part.kv.weight.chunk(2), part.proj.weight.T)
        norm = sum(w.unflatten(0, (part.heads, -1)).square().sum((1, 2)) for w in heads).sqrt()
        torch.testing.assert_close(part.magnitudes(), norm)
        assert bool((norm[:-1] >= norm[1:]).all())


@torch.no_grad()
def test_sorting_leaves_parts_alone_that_cannot_be_taken_apart() -> None:
    model = awake("dit-nano", attn={"kv_heads": 2}, ffn="acm")
    state = {k: v.clone() for k, v in model.state_dict().items()}
    effformer.sort_by_magnitude(model)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


IMAGES: dict[str, Any] = {
    "input_size": 8, "channels": 1, "num_classes": 10, "learn_sigma": False, "dim": 48, "heads": 4,
}  # fmt: skip


def _dynamic(bias: float = 2.0) -> Any:
    torch.manual_seed(0)
    gates = {"name": "dynamic", "bias": bias}
    return effformer.build_model("sit-nano", **IMAGES, width=gates, tokens=gates)


def _batch() -> Batch:
    data = load_data("digits")
    return data.rows(torch.arange(16))


def test_training_reaches_the_wanted_work() -> None:
    model = _dynamic()
    objective = Frugal(
        task=Generation(), target=WorkTarget(share=0.5, warmup=40, hold=5), weight=20.0
    )
    config = TrainConfig(steps=120, batch=16, lr=2e-2, warmup=5, ema=None, clip=None)
    train(model, load_data("digits"), objective, config, progress=False)
    ledger = Ledger()
    Generation()(model.train(), _batch(), torch.Generator().manual_seed(0), ledger)
    assert float(executed_ratio(ledger.shares).mean().detach()) == pytest.approx(0.5, abs=0.12)


def test_the_complete_model_sees_the_same_samples_and_noise() -> None:
    model, batch = _dynamic(bias=100.0), _batch()  # gates that never close: both are one model
    plain, ledger = Generation(), Ledger()
    value = plain(model, batch, torch.Generator().manual_seed(3), Ledger())
    both = Frugal(task=plain, target=1.0, complete=1)
    torch.testing.assert_close(
        both(model, batch, torch.Generator().manual_seed(3), ledger), 2 * value
    )
    assert not torch.as_tensor(ledger.total_loss()).any()
    later = Ledger(step=1)
    torch.testing.assert_close(both(model, batch, torch.Generator().manual_seed(3), later), value)


def test_a_vit_with_dynamic_tokens_trains_complete_as_well() -> None:
    torch.manual_seed(0)
    gates = {"name": "dynamic", "bias": 2.0}
    model = effformer.build_model("vit-nano", channels=1, num_classes=10, tokens=gates)
    objective = Frugal(task=Classification(), target=0.5, complete=2)
    config = TrainConfig(steps=3, batch=4, warmup=0)
    assert math.isfinite(train(model, load_data("digits"), objective, config, progress=False).loss)


def test_a_model_that_cannot_run_complete_is_refused() -> None:
    class Partial(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = _dynamic()

        def forward(self, x: Tensor, t: Tensor, y: Tensor, *, ledger: Ledger) -> Tensor:
            return self.inner(x, t, y, ledger=ledger)

    task = Generation(label_drop=0.0)
    given = (Partial(), _batch(), torch.Generator())
    assert Frugal(task=task, target=0.5)(*given, Ledger()).isfinite()
    with pytest.raises(CapabilityError, match=r"Partial.forward has no argument 'complete'.*=0"):
        Frugal(task=task, target=0.5, complete=1)(*given, Ledger())


def test_models_without_dynamic_parts_have_no_work_to_save() -> None:
    model = effformer.build_model("sit-nano", **IMAGES)
    with pytest.raises(CapabilityError, match="no gate reported to the ledger"):
        Frugal(task=Generation(), target=0.5)(model, _batch(), torch.Generator(), Ledger())
    with pytest.raises(ValueError, match=r"target must lie in \(0, 1\], got 1.5"):
        Frugal(task=Generation(), target=1.5)
