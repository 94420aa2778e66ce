"""GS-Jacobi inversion of TarFlow: iterates, strategies with and without guidance, and both metrics."""

from __future__ import annotations

from typing import Any

import torch
from closeness import assert_close
from effformer.models import TarFlow
from harness import Golden, load_adapter
from torch import Tensor

from effformer.flow import Away, Inversion, contractions, invert

STARTS = ("latents", "zeros")
BOUND = 3.0  # theirs, in all iterations


def check(golden: Golden) -> None:
    model: TarFlow = load_adapter("tarflow").build(golden)
    labels = {"y": golden.tensor("in.y")}
    with torch.no_grad():
        _check_metrics(golden, model)
        _check_iterates(golden, model, labels)
        _check_strategies(golden, model, labels)


def _check_metrics(golden: Golden, model: TarFlow) -> None:
    z, log_det = model(golden.tensor("in.x"))
    golden.assert_close(model.tokens(z), "out.detect.z")
    golden.assert_close(log_det / z[0].numel(), "out.detect.logdet")
    found = contractions(model, golden.tensor("in.x"))
    golden.assert_close(
        torch.tensor([[one.from_latents, one.from_zeros] for one in found]), "out.igm_unrounded"
    )
    rates = torch.tensor([one.rate for one in found], dtype=torch.float64)
    assert_close(rates, golden.tensor("out.crm_unrounded")[:, 3], rtol=1e-4, atol=1e-5)


def _check_iterates(golden: Golden, model: TarFlow, labels: dict[str, Tensor]) -> None:
    noise = golden.tensor("in.noise")
    last = model.maps(load_adapter("tarflow").pictures(model, noise), **labels)[-1]
    z = last.order(noise)
    for i, start in enumerate(STARTS):
        iterates = golden.tensor(f"out.block_last.jacobi_guess{i}")
        x = z if start == "latents" else torch.cat([z[:, :1], torch.zeros_like(z[:, 1:])], dim=1)
        for k, expected in enumerate(iterates):
            here = last.affine(x)
            x = here.log_scale.exp() * z + here.shift
            assert_close(last.order(x), expected, rtol=1e-4, atol=1e-5)
            exact = last.order(golden.tensor("out.block_last.sequential"))[:, : k + 2]
            assert_close(x[:, : k + 2], exact, rtol=1e-4, atol=1e-5)


def _inversions(model: TarFlow, strategy: dict[str, Any]) -> list[Inversion]:
    """Their lists begin with the map that is inverted first."""
    made, places = [], model.config.places
    lists = (strategy[f"{name}_list"] for name in ("num_GS", "max_jacobi", "guess"))
    for segments, most, guess in zip(*lists, strict=True):
        if segments <= 0 or segments == places:
            made.append(Inversion())
            continue
        made.append(
            Inversion(
                segment=places // segments if segments > 1 else None,
                iterations=most,
                tolerance=strategy["ebound"],
                start=STARTS[guess],
                bound=BOUND,
            )
        )
    return made[::-1]


def _check_strategies(golden: Golden, model: TarFlow, labels: dict[str, Tensor]) -> None:
    c, noise = golden.config, load_adapter("tarflow").pictures(model, golden.tensor("in.noise"))
    rule = Away(scale=c["guidance"], weak={"y": None}, rising=c["annealed"])
    golden.assert_close(invert(model, noise, **labels).x, "out.sequential")
    golden.assert_close(invert(model, noise, guidance=rule, **labels).x, "out.sequential_cfg")
    for name, strategy in golden.meta["strategies"].items():
        hows = _inversions(model, strategy)
        for kind, guidance in (("", None), ("_cfg", rule)):
            out = invert(model, noise, hows, guidance=guidance, **labels)
            golden.assert_close(out.x, f"out.{name}{kind}")
