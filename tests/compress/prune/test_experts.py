"""Whole experts are cut out of mixtures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import assert_close
from effformer.compress import cut, importance, plan, prune

import effformer
from effformer.train import Classification

MOE = {"name": "moe", "experts": 4, "top_k": 2, "shared": 1, "hidden": 16}


def mixture(name: str = "vit-nano", **options: Any) -> Any:
    torch.manual_seed(0)
    return effformer.build_model(name, ffn=MOE, **options).eval()


def test_the_plan_knows_whole_experts() -> None:
    model = mixture()
    group = plan(model, "blocks.0.ffn")["blocks.0.ffn.part"]
    assert (group.kind, group.units, group.least) == ("experts", 4, 2)
    owned = sum(m.per_unit(torch.ones(model.state_dict()[m.path].shape), 4) for m in group.members)
    expert = sum(p.numel() for p in model.blocks[0].ffn.part.experts[0].parameters())
    assert owned.tolist() == [expert + model.config.dim] * 4


@pytest.mark.parametrize("name", ["vit-nano", pytest.param("triposg-nano", marks=pytest.mark.slow)])
def test_an_expert_that_no_token_reaches_goes_without_a_change(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    alone = MOE | {"top_k": 1, "renormalise": True}
    model: Any = effformer.build_model(name, ffn=alone).eval()
    with torch.no_grad():  # the mean of others is never the largest
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
        router = model.blocks[0].ffn.part.router.weight
        router[3] = router[:3].mean(dim=0)
    inputs = model.example_inputs(2)
    moe = model.blocks[0].ffn.part
    by = importance(model, "activation", "blocks.0.ffn", data=inputs)["blocks.0.ffn.part"]
    small = cut(model, {"blocks.0.ffn.part": [0, 1, 2]})
    assert by[3] == by.min() == 0
    assert len(small.blocks[0].ffn.part.experts) == 3
    assert small.transforms == ()
    assert small.config.at("blocks.0.ffn.experts") == 3
    assert len(moe.experts) == 4
    with torch.no_grad():
        assert_close(small(**inputs), model(**inputs), rtol=1e-4, atol=1e-5)
        again: Any = effformer.load_model(effformer.save_pretrained(small, tmp_path / "m"))
        assert torch.equal(again.eval()(**inputs), small(**inputs))


@pytest.mark.parametrize(
    "method",
    [
        "activation",
        "gradient",
        *(pytest.param(m, marks=pytest.mark.slow) for m in ("magnitude", "taylor", "sides")),
    ],
)
def test_half_of_the_experts_go_by_every_measure(method: Any) -> None:
    model = mixture(depth=1)
    batch = model.example_inputs(8) | {"y": torch.arange(8)}
    scheme = {"importance": method, "keep": {"experts": 0.5}}
    small, report = prune(model, scheme, data=batch, objective=Classification())
    (part,) = report.parts
    assert (part.kind, part.before, part.after) == ("experts", 4, 2)
    scores = importance(model, method, "blocks.0.ffn", data=batch, objective=Classification())
    best = scores["blocks.0.ffn.part"].argsort(descending=True)[:2].sort().values
    assert part.kept == tuple(best.tolist())
    kept = [model.blocks[0].ffn.part.experts[e].fc1.weight for e in part.kept]
    now = [e.fc1.weight for e in small.blocks[0].ffn.part.experts]
    assert all(torch.equal(a, b) for a, b in zip(now, kept, strict=True))
    assert report.params_ratio < 1
    assert report.said_by == "config"


def test_a_budget_of_parameters_and_what_stays() -> None:
    model = mixture()
    small, report = prune(model, {"params": 0.85, "units": ("experts",)})
    assert report.params_ratio <= 0.85
    least = {len(b.ffn.part.experts) for b in small.blocks}
    assert min(least) >= 2  # every token runs two
    with pytest.raises(ValueError, match="cannot be met by taking out experts"):
        prune(model, {"params": 0.1, "units": ("experts",)})
    one = cut(model, {"blocks.0.ffn.part": [1]})  # asked for by hand, with a record
    assert one.blocks[0].ffn.part.top_k == 1
    assert one.transforms
    assert one(**model.example_inputs()).isfinite().all()
