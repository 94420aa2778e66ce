"""RecTok: hidden cells, noise, losses, generators, angles, layouts, bad input."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from effformer.export import export_onnx
from effformer.models import RecTok
from effformer.models.rectok import Draws, hinge_losses, unit_angles
from torch import Tensor

import effformer
from effformer.checks import CapabilityError

from .small import woken


def awake(**options: Any) -> RecTok:
    """A small model with nothing at zero."""
    model = woken("rectok-tiny", **options)
    assert isinstance(model, RecTok)
    return model


def images(model: RecTok, batch: int = 2) -> Tensor:
    return model.example_inputs(batch, generator=torch.Generator().manual_seed(1))["x"]


def quiet(model: RecTok, batch: int = 2) -> Draws:
    """Nothing hidden, and no noise."""
    zeros = torch.zeros(batch, 16, 6)
    return Draws(torch.arange(16).expand(batch, -1), zeros[:, :1, :1], zeros, zeros)


@torch.no_grad()
def test_cells_that_are_seen_come_back_to_their_places() -> None:
    model = awake()
    x = images(model)
    kept = torch.stack([torch.randperm(16)[:10], torch.randperm(16)[:10]])
    whole, some = model.encode(x), model.encode(x, kept)
    assert some.mean.shape == (2, 10, 6)
    assert not torch.allclose(some.mean, whole.mean.gather(1, kept[..., None].expand(-1, -1, 6)))
    order = torch.randperm(10)
    again = model.encode(x, kept[:, order])
    torch.testing.assert_close(again.mean, some.mean[:, order], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        model.decode(again.mean, kept[:, order]),
        model.decode(some.mean, kept),
        rtol=1e-4,
        atol=1e-5,
    )
    placed = model._placed(kept[..., None].float(), torch.full((1, 1, 1), -1.0), kept)
    for row, seen in zip(placed[..., 0], kept, strict=True):
        assert [int(v) for v in row] == [i if i in seen else -1 for i in range(16)]


@torch.no_grad()
def test_a_step_without_noise_and_hidden_cells_is_evaluation() -> None:
    model = awake()
    x, features = images(model), torch.randn(2, 16, 10)
    losses = model.losses(x, features, quiet(model))
    torch.testing.assert_close(losses.pixels, ((model(x) - x) / 2).square().mean())
    said = model.describe(model.encode(x).mean)
    cosine = torch.nn.functional.cosine_similarity(said, features, dim=-1)
    torch.testing.assert_close(losses.meaning, (1 - cosine).mean())
    torch.testing.assert_close(model.losses(x, 7 * said, quiet(model)).meaning, torch.tensor(0.0))
    total = losses.pixels + 1e-6 * losses.kl + losses.meaning
    torch.testing.assert_close(losses.total(), total)


def test_every_parameter_learns_and_the_teacher_does_not() -> None:
    model = awake().train()
    features = torch.randn(2, 16, 10, requires_grad=True)
    draws = model.draw(2, torch.Generator().manual_seed(5))
    model.losses(images(model), features, draws).total().backward()
    assert features.grad is None
    assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]


def test_draws_come_from_their_generator() -> None:
    model = awake()
    shares = set()
    for seed in range(20):
        one, two = (model.draw(3, torch.Generator().manual_seed(seed)) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
        assert ((one.t >= 0) & (one.t <= 1)).all()
        assert all(len(set(row.tolist())) == one.kept.shape[1] for row in one.kept)
        shares.add(one.kept.shape[1])
    assert min(shares) >= math.ceil(16 * 0.6)
    assert max(shares) == 16
    assert awake(channels=24).shift == 2 * model.shift


def test_pairs_of_channels_turn_differently() -> None:
    """As published; both frequencies of a pair are among those of the axis."""
    angles = unit_angles(3, 16)
    assert angles.shape == (9, 16)
    last = 2 * math.pi * torch.logspace(math.log10(7), math.log10(7e-4), 4)
    torch.testing.assert_close(angles[2], torch.cat([torch.zeros(8), last, last]))
    torch.testing.assert_close(angles[6], torch.cat([last, last, torch.zeros(8)]))


def test_hinge_losses() -> None:
    judged, made = hinge_losses(torch.tensor([2.0, 0.0]), torch.tensor([-3.0, 1.0]))
    assert (judged.item(), made.item()) == (0.75, 1.0)


@pytest.mark.parametrize("options", [{}, {"features": None}, {"attn": {"qk_norm": True}}], ids=str)
def test_saved_and_published_files_come_back(options: dict[str, Any], tmp_path: Path) -> None:
    model, other = awake(**options), effformer.build_model("rectok-tiny", **options).eval()
    x = images(model)
    expected = model(x)
    again = effformer.load_model(effformer.save_pretrained(model, tmp_path / "m"))
    assert torch.equal(again(x), expected)
    effformer.load_weights(other, model.LAYOUTS[0].from_ours(model.state_dict(), model.config))
    assert torch.equal(other(x), expected)


@pytest.mark.slow
def test_exports(tmp_path: Path) -> None:
    report = export_onnx(awake(), tmp_path / "m.onnx")
    assert report.parity is not None
    assert report.parity.passed


def test_bad_input() -> None:
    model = awake()
    with pytest.raises(ValueError, match=r"x: expected shape \(B, 3, 32, 32\)"):
        model(torch.zeros(1, 3, 16, 16))
    with pytest.raises(ValueError, match=r"latents: expected shape \(B, 16, 6\)"):
        model.decode(torch.zeros(1, 9, 6))
    with pytest.raises(ValueError, match=r"features: expected shape \(B, 16, 10\)"):
        model.losses(images(model), torch.zeros(2, 16, 9), quiet(model))
    with pytest.raises(CapabilityError, match=r"features=1024 would have it"):
        awake(features=None).describe(torch.zeros(1, 16, 6))
    with pytest.raises(ValueError, match="32 is not divisible by patch 7"):
        effformer.build_model("rectok-tiny", patch=7)
    with pytest.raises(ValueError, match="encoder: heads of width 6; it must be divisible by 4"):
        effformer.build_model("rectok-tiny", heads=4)
