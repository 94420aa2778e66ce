from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

from effformer import build_model
from effformer.profile import MemoryTracker, peak_memory, peak_rss, profile


def test_peak_counts_what_is_alive_together() -> None:
    x = torch.ones(256)

    def chain() -> torch.Tensor:
        return x.exp().exp().exp()  # two at a time

    assert peak_memory(chain) == 2 * 1024
    kept: list[torch.Tensor] = []
    assert peak_memory(lambda: kept.extend([x.exp(), x.exp(), x.exp()])) == 3 * 1024
    assert peak_memory(lambda: x.view(16, 16).t()) == 0
    assert peak_memory(lambda: x.add_(1)) == 0


def test_freed_storages_are_subtracted() -> None:
    with MemoryTracker() as tracker:
        y = torch.ones(1024)
        assert tracker.live == 4096
        view = y[:10]
        del y
        assert tracker.live == 4096
        del view
        gc.collect()
        assert tracker.live == 0
    assert tracker.peak == 4096


def test_fake_and_real_tensors_agree() -> None:
    net = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
    x = torch.randn(4, 8)
    p = profile(net, (x,))
    assert p.memory is not None
    with torch.no_grad():
        assert p.memory.peak == peak_memory(lambda: net(x), own=[x, *net.parameters()])
    assert p.memory.peak == 2 * 4 * 32 * 4
    # saved: the first output (for GELU) and the second (for the last weight); inputs are not ours
    assert p.memory.saved == 2 * 4 * 32 * 4
    assert p.memory.weights == 4 * (8 * 32 + 32 + 32 * 8 + 8)


def test_fused_attention_needs_no_square() -> None:
    fused, plain = (
        profile(build_model("dit-nano", attn=attn), memory=True).memory
        for attn in ("softmax", {"name": "softmax", "backend": "reference"})
    )
    square = 256 * 256 * 2 * 4
    assert fused.peak < 2 * square <= plain.peak
    assert fused.saved + 2 * square < plain.saved


def test_frozen_models_save_nothing() -> None:
    net = nn.Linear(8, 8).requires_grad_(False)
    assert profile(net, (torch.randn(2, 8),)).memory.saved is None


def test_memory_can_be_left_out() -> None:
    assert profile(nn.Linear(8, 8), (torch.randn(2, 8),), memory=False).memory is None


@pytest.mark.slow
def test_process_memory() -> None:
    grown = peak_rss(bytes.__mul__, b"x", 200_000_000)
    assert 190e6 < grown < 260e6
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        peak_rss(divmod, 1, 0)
