"""Feature caching on the trained digits model: distance to the exact samples, and time, at equal work
against fewer steps and samplers of order 2.

Usage: python benchmarks/feature_caching.py [--small]
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import torch
from markdown import Row, write

import effformer
from effformer.cache import CacheReport, cached, compare
from effformer.flow import Guidance, sample
from effformer.profile import Latency, interleave
from effformer.train import load_data, train
from effformer.train.recipes import DIGITS_QUICK as RECIPE

SMALL = "--small" in sys.argv
STEPS = 10 if SMALL else 50
COUNT = 10 if SMALL else 100
POLICIES: dict[str, dict[str, Any]] = {
    "reuse, every 2": {"name": "reuse", "every": 2},
    "reuse, every 3": {"name": "reuse", "every": 3},
    "newton 1, every 2": {"name": "newton", "order": 1, "every": 2},
    "newton 2, every 3": {"name": "newton", "order": 2, "every": 3},
    "forecast 1, every 3": {"name": "forecast", "order": 1, "every": 3},
    "residual, tau 0.1": {"name": "residual", "tau": 0.1},
    "teacache, tau 0.1": {"name": "teacache", "tau": 0.1},
}


def trained() -> Any:
    model = effformer.build_model(RECIPE.model, **RECIPE.overrides)
    config = RECIPE.config.replace(steps=5, warmup=2) if SMALL else RECIPE.config
    train(model, load_data(RECIPE.data), RECIPE.objective, config)
    return model.eval()


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = trained()
    x0 = torch.randn(COUNT, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    y = torch.arange(10).repeat(COUNT // 10)
    rule = Guidance(RECIPE.guidance, null={"y": 10})
    given: dict[str, Any] = {"guidance": rule, "y": y}
    policies = dict(list(POLICIES.items())[-4:]) if SMALL else POLICIES
    reports = {
        name: compare(model, policy, x0, steps=STEPS, **given) for name, policy in policies.items()
    }
    names = {"no cache": partial(sample, model, x0, steps=STEPS, **given)}
    names |= {
        name: partial(sample, cached(model, policy), x0, steps=STEPS, **given)
        for name, policy in policies.items()
    }
    side = interleave(names, warmup=1, runs=2 if SMALL else 7, threads=1)
    full = next(iter(reports.values())).full
    plain = side.rows["no cache"]
    rows = [Row(what=f"no cache, euler, {STEPS} steps", value=_cell(full.distance, 1.0, plain))]
    rows += [_row(name, report, side.rows[name]) for name, report in reports.items()]
    notes = [
        f"{COUNT} digits of `{RECIPE.model}` trained for {RECIPE.config.steps} steps, guidance "
        f"{RECIPE.guidance:g}; distance to the samples of {next(iter(reports.values())).reference}, relative "
        "to their size",
        "ratio: that distance over the one of the best rival without a cache at the same multiply-adds "
        "(fewer steps of euler, midpoint, dpm++2m); above 1 the cache loses",
        *(f"{name}: {report.verdict}" for name, report in reports.items()),
    ]
    title = "Feature caching against fewer steps and samplers of order 2"
    write("feature_caching", title, rows, plain.machine, notes, keep=not SMALL)


def _row(name: str, report: CacheReport, time: Latency) -> Row:
    mine, best = report.cached, min(r.distance for r in report.rivals)
    share = mine.executed / report.full.executed
    value = _cell(mine.distance, share, time)
    spread = f"{1e3 * time.p10:.0f} to {1e3 * time.p90:.0f} ms"
    return Row(what=name, value=value, spread=spread, ratio=mine.distance / best, target=1.0)


def _cell(distance: float, share: float, time: Latency) -> str:
    return f"{1e3 * time.median:.0f} ms, {share:.0%} of the MACs, distance {distance:.4f}"


if __name__ == "__main__":
    main()
