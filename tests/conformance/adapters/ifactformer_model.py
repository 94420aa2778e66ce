"""IFactFormer as a whole: lifting, positions, iterated block, head, rollout, gradients."""

from __future__ import annotations

import torch
from effformer.models import IFactFormer
from effformer.models.layouts.factformer import IFACTFORMER
from factorized import coordinates, tolerant
from harness import Golden
from torch import Tensor
from torch.nn import functional as F

import effformer
from effformer.attention import FactorizedChained, FactorizedParallel
from effformer.blocks import Iterate
from effformer.context import Tap


def check(golden: Golden) -> None:
    golden = tolerant(golden)
    c, grid = golden.config, tuple(golden.meta["grid"])
    kind = FactorizedParallel if c["model"].endswith("_m") else FactorizedChained
    model = IFactFormer(
        IFactFormer.Config(
            dim=c["dim"], depth=c["depth"], heads=c["heads"], channels=c["in_dim"],
            out_channels=c["out_dim"], window=c["in_time_window"], grid=grid,
            attn=kind.Config(head_dim=c["dim_head"]), block=Iterate.Config(times=c["n_layer"]),
        )
    )  # fmt: skip
    assert effformer.load_weights(model, golden.weights()).layout == "official"
    official = IFACTFORMER.from_ours(model.state_dict(), model.config)
    assert {k: v.shape for k, v in official.items()} == {
        k: v.shape for k, v in golden.weights().items()
    }
    for key, value in golden.weights().items():
        torch.testing.assert_close(official[key], value, rtol=1e-6, atol=0)
    x = _fields_first(golden.tensor("in.u"))
    _check_values(golden, model, x)
    if "in.target" in golden.tensors:
        _check_gradients(golden, model, x)


def _fields_first(x: Tensor) -> Tensor:
    """(B, T, n, ..., C) -> (B, T, C, n, ...)."""
    return x.movedim(-1, 2)


def _check_values(golden: Golden, model: IFactFormer, x: Tensor) -> None:
    grid, coords = tuple(golden.meta["grid"]), coordinates(golden)
    steps: list[Tensor] = []

    def note(place: str, value: Tensor) -> Tensor:
        steps.append(value)
        return value

    tap = Tap(edit=note, at=("blocks.0.body.attn",))
    with torch.no_grad():
        y = model(x, coords, tap=tap)
        golden.assert_close(y[:, 0].movedim(1, -1), "out.y")
        lifted = model.frames(F.gelu(model.lift(x.transpose(1, 2).flatten(3))))
        golden.assert_close(lifted, "out.lifted")
        cells = torch.stack(torch.meshgrid(*coords, indexing="ij"), dim=-1).flatten(0, -2)
        position = model.positions[0](cells)
        golden.assert_close(position[None], "out.pos_encoding")
        h = lifted.squeeze(2).transpose(1, 2) + position
        times = model.config.block.times
        assert len(steps) == times
        for i, update in enumerate(steps):
            for name, value in (("in", h), ("out", update)):
                if (key := f"out.block_{name}_{i}") in golden.tensors:
                    golden.assert_close(value.unflatten(1, grid), key)
            h = h + update / times
        if model.config.depth == 1:
            golden.assert_close(h.unflatten(1, grid), "out.encoded")
        for key in golden.keys("out.rollout_"):
            count = int(key.rpartition("_")[2])
            last = model.rollout(x, count, coords)[:, -1]
            golden.assert_close(last.movedim(1, -1), key)


def _check_gradients(golden: Golden, model: IFactFormer, x: Tensor) -> None:
    y = model(x, coordinates(golden))[:, 0].movedim(1, -1).flatten(1)
    target = golden.tensor("in.target").flatten(1)
    loss = ((y - target).norm(dim=1) / target.norm(dim=1)).mean()
    golden.assert_close(loss, "out.loss")
    loss.backward()
    grads = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
    official = IFACTFORMER.from_ours(grads, model.config)
    for key in golden.keys("grad."):
        golden.assert_close(official[key.removeprefix("grad.")], key)
