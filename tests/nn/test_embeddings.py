"""Embeddings against their formulas."""

from __future__ import annotations

import math

import pytest
import torch

from effformer.nn.embeddings import LabelEmbedding, sincos_2d, time_features


@pytest.mark.parametrize("shift", [0, 1])
def test_time_features_cosines_first(shift: int) -> None:
    t = torch.tensor([0.0, 0.5, 999.0], dtype=torch.float64)
    out = time_features(t, 8, freq_shift=shift)
    for b in range(3):
        for i in range(4):
            angle = float(t[b]) * math.exp(-math.log(1e4) * i / (4 - shift))
            assert out[b, i] == pytest.approx(math.cos(angle), abs=1e-9)
            assert out[b, 4 + i] == pytest.approx(math.sin(angle), abs=1e-9)


def test_half_precision_times_are_computed_in_float32() -> None:
    assert time_features(torch.tensor([999], dtype=torch.int64)).dtype == torch.float32
    exact = time_features(torch.tensor([3.0]))
    torch.testing.assert_close(time_features(torch.tensor([3.0]).half()), exact)


def test_positions_encode_the_column_first() -> None:
    code = sincos_2d(3, 5, 16)
    assert code.shape == (1, 15, 16)
    for row in range(3):
        for column in range(5):
            for i in range(4):
                w = 1e4 ** (-i / 4)
                got = code[0, row * 5 + column]
                assert got[i] == pytest.approx(math.sin(column * w), abs=1e-6)
                assert got[4 + i] == pytest.approx(math.cos(column * w), abs=1e-6)
                assert got[8 + i] == pytest.approx(math.sin(row * w), abs=1e-6)
                assert got[12 + i] == pytest.approx(math.cos(row * w), abs=1e-6)


def test_dropped_labels_become_the_null_class() -> None:
    embed = LabelEmbedding(4, 8, null=True)
    y = torch.tensor([0, 3])
    out = embed(y, torch.tensor([True, False]))
    torch.testing.assert_close(out[0], embed.table.weight[4])
    torch.testing.assert_close(out[1], embed.table.weight[3])
    with pytest.raises(ValueError, match="no null class"):
        LabelEmbedding(4, 8, null=False)(y, torch.tensor([True, False]))
