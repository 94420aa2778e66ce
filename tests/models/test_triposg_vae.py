"""TripoSG's autoencoder: what latents and distances depend on, losses, training, layouts, bad input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from effformer.export import export_onnx
from effformer.models import TripoSGVAE
from torch import Tensor

import effformer
from effformer.context import Tap
from effformer.nn.points import farthest_points, field_losses, octave_features

from .small import inputs, woken


def awake(**options: Any) -> TripoSGVAE:
    """A small model with nothing at zero."""
    model = woken("triposg-vae-tiny", **options)
    assert isinstance(model, TripoSGVAE)
    return model


@torch.no_grad()
def test_points_stand_alone_and_surfaces_are_sets() -> None:
    model = awake()
    given = inputs(model)
    out = model(**given)
    torch.testing.assert_close(
        model(**given | {"surface": given["surface"].flip(1)}), out, rtol=1e-4, atol=1e-5
    )
    few = given["points"][:, 3:5]
    torch.testing.assert_close(model(**given | {"points": few}), out[:, 3:5], rtol=1e-4, atol=1e-5)
    found = model.encode(given["surface"], given["queries"])
    assert found.mean.shape == (2, 8, 8)
    memory = model.decode(found.mean)
    for chunk in (None, 5, 100):
        torch.testing.assert_close(
            model.distances(memory, given["points"], chunk=chunk), out, rtol=1e-4, atol=1e-5
        )
    more = model.encode(given["surface"], given["surface"][:, :13])
    assert model.distances(model.decode(more.mean), given["points"]).shape == (2, 16)


@torch.no_grad()
def test_latents_are_drawn_by_their_generator() -> None:
    found = awake().encode(*list(inputs(awake()).values())[:2])
    drawn = [found.sample(torch.Generator().manual_seed(n)) for n in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    normal = found._replace(mean=torch.zeros_like(found.mean), logvar=torch.zeros_like(found.mean))
    assert not normal.kl().any()
    assert (found.kl() > 0).all()


def test_queries_lie_far_from_each_other() -> None:
    points = torch.tensor([[[0.0], [1.0], [10.0], [4.0], [9.0]]])
    assert farthest_points(points, 4).tolist() == [[0, 2, 3, 1]]
    model = awake()
    surface = inputs(model)["surface"]
    queries = model.choose(surface, 8, torch.Generator().manual_seed(3))
    again = model.choose(surface, 8, torch.Generator().manual_seed(3))
    assert torch.equal(queries, again)
    for one, all_of_it in zip(queries, surface, strict=True):
        rows = (one[:, None] == all_of_it).all(dim=-1)
        assert (rows.sum(dim=0) <= 1).all()
        assert rows.any(dim=1).all()


def test_an_exact_distance_loses_nothing() -> None:
    points = torch.randn(2, 9, 3, dtype=torch.float64)
    radius = points.norm(dim=-1)
    losses = field_losses(
        lambda x: x.norm(dim=-1) - 0.5, points, radius - 0.5, points / radius[..., None]
    )
    assert all(one.item() < 1e-12 for one in losses)
    twice = field_losses(
        lambda x: 2 * x.norm(dim=-1), points, 2 * radius - 0.5, -points, surface=radius > 1.5
    )
    expected = (0.75, 2.0, 1.0)
    torch.testing.assert_close(torch.stack([*twice]), torch.tensor(expected, dtype=torch.float64))
    nowhere = field_losses(
        lambda x: x.norm(dim=-1), points, radius, -points, surface=torch.zeros(2, 9) > 0
    )
    assert nowhere.normal.item() == 0


def test_losses_of_the_gradient_train_every_weight() -> None:
    """Differentiated twice, in float64 by central differences along a random direction."""
    model = awake().double()
    given = {k: x.double() for k, x in inputs(model, 1).items()}
    normals = torch.nn.functional.normalize(given["points"], dim=-1)

    def loss() -> Tensor:
        memory = model.decode(model.encode(given["surface"], given["queries"]).mean)
        losses = field_losses(
            lambda x: model.distances(memory, x), given["points"], normals[..., 0], normals
        )
        return losses.normal + losses.eikonal

    value = loss()
    value.backward()
    silent = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert silent == {"head.bias", "norm.bias"}  # which only move all values
    weight = model.ask.cross.part.kv.weight
    assert weight.grad is not None
    step = torch.randn(weight.shape, dtype=torch.float64) * 1e-5
    with torch.no_grad():
        weight.add_(step)
        above = loss().item()
        weight.sub_(2 * step)
        below = loss().item()
    assert abs((above - below) / 2 - float((weight.grad * step).sum())) < 1e-3 * abs(above - below)


@torch.no_grad()
def test_places_of_both_halves_are_shown() -> None:
    model, tap = awake(), Tap(keep=("*",))
    model(**inputs(model), tap=tap)
    assert {"gather.cross", "blocks.0.attn", "blocks.2.ffn", "ask.cross"} <= tap.seen.keys()


def test_saved_and_published_files_come_back(tmp_path: Path) -> None:
    model, other = awake(), effformer.build_model("triposg-vae-tiny").eval()
    given = inputs(model)
    expected = model(**given)
    again = effformer.load_model(effformer.save_pretrained(model, tmp_path / "m"))
    assert torch.equal(again(**given), expected)
    effformer.load_weights(other, model.LAYOUTS[0].from_ours(model.state_dict(), model.config))
    assert torch.equal(other(**given), expected)


@pytest.mark.slow
def test_exports_for_other_numbers_of_points(tmp_path: Path) -> None:
    report = export_onnx(awake(), tmp_path / "m.onnx")
    assert report.parity is not None
    assert report.parity.passed
    assert len({c.shapes["points"][1] for c in report.parity.cases}) > 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"surface": torch.ones(2, 32, 3)}, r"surface: expected shape \(B, N, 6\)"),
        ({"queries": torch.ones(1, 8, 6)}, "queries: expected"),
        ({"points": torch.ones(2, 16, 2)}, r"points: expected shape \(B, N, 3\)"),
    ],
)
def test_bad_input(changes: dict[str, Tensor], message: str) -> None:
    model = awake()
    with pytest.raises(ValueError, match=message):
        model(**inputs(model) | changes)
    with pytest.raises(ValueError, match="33 of 32 points"):
        model.choose(inputs(model)["surface"], 33)
    with pytest.raises(ValueError, match="encoder_depth=4 blocks are more than all, depth=3"):
        effformer.build_model("triposg-vae-tiny", encoder_depth=4)
    with pytest.raises(ValueError, match=r"sdf: expected shape \(B, P\)"):
        field_losses(
            lambda x: x[..., 0], torch.ones(1, 4, 3), torch.ones(1, 3), torch.ones(1, 4, 3)
        )
    assert octave_features(torch.ones(2, 3), 4).shape == (2, 27)
