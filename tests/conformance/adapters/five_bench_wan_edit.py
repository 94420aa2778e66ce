"""The loop of Wan-Edit on a toy: Wan's times and sampler, on the difference of two guided velocities."""

from __future__ import annotations

import torch
from harness import Golden
from torch import Tensor

from effformer.flow import TimeGrid, sample


def check(golden: Golden) -> None:
    c = golden.config
    golden.only("solver", "unipc", why="it is Wan's", among=c)
    grid = TimeGrid.uniform(c["steps"], 0.001).shifted(c["shift"])
    sigmas = torch.tensor([1 - t for t in grid.points], dtype=torch.float64)
    golden.assert_close(sigmas, "out.sigmas")
    told = (sigmas[:-1] * c["num_train_timesteps"]).floor()
    golden.assert_close(told, "out.timesteps")
    matrix, start = golden.tensor("in.M"), golden.tensor("in.latent")
    points: list[tuple[Tensor, Tensor]] = []
    calls = 0

    def network(x: Tensor, label: Tensor, words: str) -> Tensor:
        nonlocal calls
        calls += 1
        mixed = torch.einsum("dc,cthw->dthw", matrix, x)
        return (
            mixed.tanh() * (0.5 + label / 1000)
            + golden.tensor(f"in.ctx_{words}")[:, None, None, None]
        )

    def guided(x: Tensor, label: Tensor, words: str) -> Tensor:
        none = network(x, label, "negative")
        return none + c[f"{words}_guidance"] * (network(x, label, words) - none)

    def field(x: Tensor, t: Tensor) -> Tensor:
        step = c["skipped_steps"] + len(points)
        # the released loop mixes in as much noise as at the time before
        level = told[step - 1].float() / c["num_train_timesteps"]
        source = level * golden.tensor("in.noise")[step] + (1 - level) * start
        points.append((source, x[0] + source - start))
        moved, kept = (
            guided(p, told[step].float(), words)
            for p, words in zip(points[-1], ("source", "target"), strict=True)
        )
        return (moved - kept)[None]

    active = TimeGrid(grid.points[c["skipped_steps"] :])
    edited = sample(field, start[None], sampler="unipc", grid=active).x[0]
    assert calls == golden.meta["model_calls"]
    assert told[c["skipped_steps"] :].tolist() == golden.meta["timesteps_used"]
    for name, (source, target) in zip(("first", "second"), points, strict=False):
        golden.assert_close(source, f"out.{name}_source_point")
        golden.assert_close(target, f"out.{name}_target_point")
    golden.assert_close(edited, "out.edited_latent")
