from __future__ import annotations

import pytest
import torch
from cached_models import awake, given
from closeness import assert_close

from effformer.cache import CacheReport, Contender, cached, compare
from effformer.flow import Guidance, adapt, sample


def test_rivals_do_the_same_work() -> None:
    model = awake()
    x, cond = given(model)
    rule = Guidance(1.5, null={"y": 1000})
    policy = {"name": "reuse", "every": 2}
    report = compare(adapt(model), policy, x, steps=12, guidance=rule, **cond)
    field = cached(adapt(model), policy)
    drawn = sample(field, x, steps=12, guidance=rule, **cond).x
    assert report.cached.executed == field.summary().executed < report.full.executed
    assert [r.name.split(",")[0] for r in report.rivals] == ["euler", "midpoint", "dpm++2m"]
    each = report.full.executed / 12
    for rival in report.rivals:
        assert abs(rival.executed - report.cached.executed) <= each
    exact = sample(adapt(model), x, sampler="midpoint", steps=24, guidance=rule, **cond).x
    far = torch.tensor(report.cached.distance)
    assert_close(far, (drawn - exact).norm() / exact.norm(), rtol=1e-4, atol=1e-5)
    assert report.verdict in str(report)
    assert report.to_dict()["loses"] is report.loses


@pytest.mark.parametrize(("rival", "word"), [(0.1, "loses"), (0.3, "wins")])
def test_the_report_says_when_the_cache_loses(rival: float, word: str) -> None:
    def one(distance: float) -> Contender:
        return Contender(name="x", evaluations=1, executed=1, distance=distance)

    report = CacheReport(
        full=one(0.0), cached=one(0.2), rivals=(one(0.9), one(rival)), reference="r"
    )
    assert f"The cache {word}" in str(report)
    assert report.loses is (word == "loses")
