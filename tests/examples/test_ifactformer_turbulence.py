"""Decaying turbulence: the solver against exact laws, the pieces, and the whole example."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

import effformer


def test_without_viscosity_energy_and_enstrophy_stay(example: ModuleType) -> None:
    w = example.random_vorticity(3, seed=0, dtype=torch.float64)
    solver = example.Solver(viscosity=0.0, dtype=torch.float64)
    flows = solver.simulate(w, 10)
    assert example.relative_error(flows[:, 0], flows[:, -1]).min() > 0.2
    for quantity in (solver.energy, example.enstrophy):
        values = quantity(flows)
        torch.testing.assert_close(values, values[:, :1].expand_as(values), rtol=1e-5, atol=0)


def test_enstrophy_drains_energy(example: ModuleType) -> None:
    """``dE/dt = -2 nu Z``, by central differences."""
    w = example.random_vorticity(2, seed=0, dtype=torch.float64)
    solver = example.Solver(dtype=torch.float64)
    flows = solver.simulate(w, 20, interval=0.02)
    energy, enstrophy = solver.energy(flows), example.enstrophy(flows)
    slope = (energy[:, 2:] - energy[:, :-2]) / 0.04
    expected = -2 * example.VISCOSITY * enstrophy[:, 1:-1]
    torch.testing.assert_close(slope, expected, rtol=1e-4, atol=0)
    assert (enstrophy.diff(dim=1) < 0).all()


def test_taylor_green_vortices_only_fade(example: ModuleType) -> None:
    x = torch.arange(example.SIZE, dtype=torch.float64) * (2 * math.pi / example.SIZE)
    w = (x.cos()[:, None] * x.cos())[None]
    flows = example.Solver(viscosity=0.05, dtype=torch.float64).simulate(w, 10)
    torch.testing.assert_close(flows[:, -1], w * math.exp(-2 * 0.05 * 10 * example.INTERVAL))


@pytest.mark.parametrize("seed", range(6))
def test_the_solver_commutes_with_moving(example: ModuleType, seed: int) -> None:
    solver = example.Solver(dtype=torch.float64)
    w = example.random_vorticity(2, seed=3, dtype=torch.float64)
    after, before = (torch.Generator().manual_seed(seed) for _ in range(2))
    expected = example.moved(solver.simulate(w, 5), after)
    torch.testing.assert_close(solver.simulate(example.moved(w, before), 5), expected)


def test_flows_begin_alike(example: ModuleType) -> None:
    w = example.random_vorticity(4, seed=0)
    torch.testing.assert_close(example.enstrophy(w), torch.full((4,), 0.5))
    torch.testing.assert_close(w.mean(dim=(1, 2)), torch.zeros(4), rtol=0, atol=1e-6)
    assert torch.equal(example.random_vorticity(4, seed=0), w)
    assert not torch.equal(example.random_vorticity(4, seed=1), w)


@pytest.mark.slow
def test_the_network_learns_and_a_perfect_one_keeps_every_promise(
    example: ModuleType, tmp_path: Path
) -> None:
    flows = example.Solver().simulate(example.random_vorticity(4, seed=1), 50)
    model = example.Emulator()
    start = example.evaluate(model, flows)
    example.fit(model, flows, 30, batch=4, progress=False)
    learned = example.evaluate(model, flows)
    assert learned.error[0] < 0.97 * start.error[0]
    with pytest.raises(AssertionError, match=r"after 1 steps the relative error is .* more than"):
        example.require(learned)
    ones = torch.ones(51)
    perfect = replace(
        learned, predicted=flows, error=torch.zeros(50), energy=ones, enstrophy=ones, growth=1.0
    )
    example.require(perfect)
    with pytest.raises(AssertionError, match=r"enstrophy grows to 1.5"):
        example.require(replace(perfect, enstrophy=1.5 * ones))
    near = 0.9 * min(example.HORIZONS.values()) * torch.ones(50)
    with pytest.raises(AssertionError, match=r"persistence has"):
        example.require(replace(perfect, error=near, persistence=1.5 * near))
    example.picture(tmp_path / "picture.png", learned)
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_stable_rollout_of_fifty_steps(example: ModuleType, tmp_path: Path) -> None:
    result = example.main(["--out", str(tmp_path / "out")])
    for horizon, bound in example.HORIZONS.items():
        assert result[f"error_{horizon}"] <= 0.9 * bound, "no margin left"
    assert result["growth"] <= 1.01
    assert (tmp_path / "out" / "ifactformer_turbulence.png").exists()
    assert effformer.load_model(tmp_path / "out" / "model").config.channels == 3
