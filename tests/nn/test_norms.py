"""Norms by site, modulation, stochastic depth."""

from __future__ import annotations

import pytest
import torch

from effformer.nn.drop import DropPath
from effformer.nn.norms import Modulation, make_norm, modulate
from effformer.site import NormRule, Site


def test_site_chooses_the_norm() -> None:
    x = torch.randn(2, 3, 8)
    layer = make_norm(Site(dim=8, norm=NormRule(eps=1e-3)))
    expected = (x - x.mean(-1, keepdim=True)) / (
        x.var(-1, keepdim=True, correction=0) + 1e-3
    ).sqrt()
    torch.testing.assert_close(layer(x), expected)
    rms = make_norm(Site(dim=8, norm=NormRule(kind="rms", eps=1e-3)))
    torch.testing.assert_close(rms(x), x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt())
    assert not list(make_norm(Site(dim=8), affine=False).parameters())
    with pytest.raises(ValueError, match="did you mean 'layer'"):
        make_norm(Site(dim=8, norm=NormRule(kind="layr")))


@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32])
def test_gradients_of_a_norm_do_not_round_with_the_rows(weights: torch.dtype) -> None:
    norm, x, out = make_norm(Site(dim=8)), torch.randn(16384, 8), torch.randn(16384, 8)
    exact = make_norm(Site(dim=8)).double()
    with torch.autocast("cpu", torch.bfloat16):
        norm.to(weights)(x.bfloat16()).backward(out.bfloat16())
    exact(x.bfloat16().double()).backward(out.bfloat16().double())
    for key, p in norm.named_parameters():
        found, right = p.grad, exact.get_parameter(key).grad
        assert found is not None
        assert right is not None
        assert float((found.double() - right).norm() / right.norm()) < 5e-3  # torch's own: 0.1
    with torch.no_grad():
        assert norm(x.bfloat16()).dtype == torch.bfloat16


def test_modulation_starts_as_nothing() -> None:
    cond, x = torch.randn(2, 6), torch.randn(2, 3, 8)
    shift, scale, gate = Modulation(6, 8, 3)(cond)
    torch.testing.assert_close(modulate(x, shift, scale), x)
    assert gate.abs().max() == 0


def test_drop_path_keeps_the_mean_and_drops_whole_samples() -> None:
    drop = DropPath(0.25, torch.Generator().manual_seed(0)).train()
    out = drop(torch.ones(4000, 2, 3))
    torch.testing.assert_close(out.unique(), torch.tensor([0.0, 4 / 3]))
    assert (out.amin((1, 2)) == out.amax((1, 2))).all()
    assert out.mean().item() == pytest.approx(1.0, abs=0.03)
    assert torch.equal(drop.eval()(torch.ones(2, 2)), torch.ones(2, 2))
    with pytest.raises(ValueError, match="outside"):
        DropPath(1.0)
