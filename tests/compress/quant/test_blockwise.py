from __future__ import annotations

import pytest
import torch
from effformer.compress.quant import blockwise as bw
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

SHAPES = [(1, 1), (3, 7), (8, 64), (10, 37), (5, 129), (96, 96), (64, 300)]
quick = settings(max_examples=60, deadline=None)


def heavy(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Heavy-tailed values: a normal divided by the root of a uniform."""
    generator = torch.Generator().manual_seed(seed)
    tail = torch.rand(shape, generator=generator).clamp(min=1e-3).sqrt()
    return torch.randn(shape, generator=generator) / tail


@quick
@given(st.lists(st.integers(0, 15), min_size=1, max_size=70), st.booleans(), st.integers(0, 15))
def test_nibbles_round_trip(values: list[int], high_first: bool, pad: int) -> None:
    codes = torch.tensor([values, values[::-1]], dtype=torch.uint8)
    packed = bw.pack_nibbles(codes, high_first=high_first, pad=pad)
    assert packed.shape == (2, (len(values) + 1) // 2)
    assert torch.equal(bw.unpack_nibbles(packed, len(values), high_first=high_first), codes)
    looked_up = bw.lookup_nibbles(packed, range(16), len(values), high_first=high_first)
    assert torch.equal(looked_up, codes.float())
    if len(values) % 2:
        last = packed[0, -1]
        assert int(last & 15 if high_first else last >> 4) == pad


def test_order_of_nibbles() -> None:
    codes = torch.tensor([1, 2], dtype=torch.uint8)
    assert bw.pack_nibbles(codes, high_first=True).item() == 0x12
    assert bw.pack_nibbles(codes, high_first=False).item() == 0x21


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block", [1, 7, 32, 64, None])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_rows_stay_within_half_a_step(
    shape: tuple[int, int], block: int | None, bits: int, symmetric: bool
) -> None:
    weight = heavy(shape)
    rows = bw.quantize_rows(weight, bits=bits, block=block, symmetric=symmetric)
    width = min(block or shape[1], shape[1])
    assert rows.scales.shape == (shape[0], -(-shape[1] // width))
    zeros = float(2 ** (bits - 1)) if rows.zero_points is None else rows.zero_points.float()
    decoded = bw.dequantize_rows(rows.codes.float(), rows.scales, zeros, block)
    step = rows.scales.abs().repeat_interleave(width, 1)[:, : shape[1]]
    # a symmetric block has one code less on the side away from its largest value, and a zero
    # point is itself rounded: up to one step at that end
    clipped = (rows.codes == 0) | (rows.codes == 2**bits - 1)
    bound = torch.where(clipped, 1.0, 0.5) * step
    assert ((weight - decoded).abs() <= bound * (1 + 1e-4) + 1e-7).all()


@quick
@given(
    st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=40),
    st.sampled_from([3, 8, 64]),
    st.sampled_from([4, 8]),
    st.booleans(),
)
def test_any_finite_row_is_finite_again(
    values: list[float], block: int, bits: int, symmetric: bool
) -> None:
    weight = torch.tensor([values])
    rows = bw.quantize_rows(weight, bits=bits, block=block, symmetric=symmetric)
    zeros = float(2 ** (bits - 1)) if rows.zero_points is None else rows.zero_points.float()
    decoded = bw.dequantize_rows(rows.codes.float(), rows.scales, zeros, block)
    assert decoded.isfinite().all()
    assert (decoded - weight).abs().max() <= weight.abs().max() / (2 ** (bits - 1)) * 1.01 + 1e-30


@pytest.mark.parametrize("table", [bw.NF4, bw.FP4], ids=["nf4", "fp4"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block", [7, 64])
def test_four_bit_codes_are_nearest(
    table: tuple[float, ...], shape: tuple[int, int], block: int
) -> None:
    weight = heavy(shape)
    packed, absmax = bw.quantize_flat_4bit(weight, table, block)
    codes = bw.unpack_nibbles(packed.flatten(), weight.numel(), high_first=True)
    values = torch.tensor(table)
    scaled = weight.flatten() / absmax.repeat_interleave(block)[: weight.numel()]
    best = (scaled[:, None] - values).abs().amin(1)
    assert torch.allclose((scaled - values[codes.int()]).abs(), best, atol=1e-6)
    decoded = bw.dequantize_flat(
        bw.lookup_nibbles(packed.flatten(), table, weight.numel(), high_first=True), absmax, block
    )
    assert torch.equal(
        decoded, values[codes.int()] * absmax.repeat_interleave(block)[: weight.numel()]
    )


def test_the_dynamic_map_is_sorted_and_nearly_nearest() -> None:
    table = torch.tensor(bw.DYNAMIC)
    assert table.numel() == 256
    assert (table.diff() > 0).all()
    weight = heavy((64, 300))
    codes, absmax = bw.quantize_flat_8bit(weight, 64)
    decoded = bw.dequantize_flat(table[codes.flatten().int()], absmax, 64)
    scale = absmax.repeat_interleave(64)
    best = (weight.flatten()[:, None] / scale[:, None] - table).abs().amin(1)
    found = (weight.flatten() - decoded).abs() / scale
    assert (found - best).max() < 3.2e-5  # width of a bin of bitsandbytes' search


@pytest.mark.parametrize("block", [16, 64])
def test_zero_blocks_decode_to_zero(block: int) -> None:
    weight = torch.zeros(3, 50)
    for bits in (4, 8):
        for symmetric in (True, False):
            rows = bw.quantize_rows(weight, bits=bits, block=block, symmetric=symmetric)
            zeros = float(2 ** (bits - 1)) if symmetric else rows.zero_points.float()  # type: ignore[union-attr]
            assert not bw.dequantize_rows(rows.codes.float(), rows.scales, zeros, block).any()
    for table in (bw.NF4, bw.FP4):
        packed, absmax = bw.quantize_flat_4bit(weight, table, block)
        values = bw.lookup_nibbles(packed.flatten(), table, 150, high_first=True)
        assert not bw.dequantize_flat(values, absmax, block).any()
    codes, absmax = bw.quantize_flat_8bit(weight, block)
    assert not bw.dequantize_flat(
        torch.tensor(bw.DYNAMIC)[codes.flatten().int()], absmax, block
    ).any()


@pytest.mark.parametrize("tiny", [1e-40, 1e-45])
def test_denormal_blocks_stay_finite(tiny: float) -> None:
    weight = torch.full((2, 8), tiny)
    rows = bw.quantize_rows(weight, bits=4, block=8, symmetric=False)
    assert rows.zero_points is not None
    assert (
        bw.dequantize_rows(rows.codes.float(), rows.scales, rows.zero_points.float(), 8)
        .isfinite()
        .all()
    )
    assert bw.quantize_flat_4bit(weight, bw.NF4, 8)[1].isfinite().all()


def test_smaller_blocks_have_smaller_errors_on_heavy_tails() -> None:
    weight = heavy((64, 512))

    def row_error(bits: int, block: int) -> float:
        rows = bw.quantize_rows(weight, bits=bits, block=block)
        zero = float(2 ** (bits - 1))
        decoded = bw.dequantize_rows(rows.codes.float(), rows.scales, zero, block)
        return float((decoded - weight).norm())

    def flat_error(block: int) -> float:
        packed, absmax = bw.quantize_flat_4bit(weight, bw.NF4, block)
        values = bw.lookup_nibbles(packed.flatten(), bw.NF4, weight.numel(), high_first=True)
        return float((bw.dequantize_flat(values, absmax, block).view_as(weight) - weight).norm())

    blocks = (16, 32, 64, 128, 256)
    for errors in (
        [row_error(4, b) for b in blocks],
        [row_error(8, b) for b in blocks],
        [flat_error(b) for b in blocks],
    ):
        assert errors == sorted(errors)


def test_double_quantization_error_is_small() -> None:
    absmax = heavy((1000,)).abs() + 1
    decoded = bw.dequantize_absmax(*bw.quantize_absmax(absmax))
    assert float((decoded - absmax).norm() / absmax.norm()) < 0.02


def test_tail_padding() -> None:
    codes = torch.full((2, 5), 9, dtype=torch.uint8)
    packed = bw.pack_rows(codes, bits=4, block=4)
    assert packed.shape == (2, 2, 2)
    assert packed[0].tolist() == [[0x99, 0x99], [0x09, 0]]
    assert bw.pack_rows(codes, bits=8, block=4)[0, 1].tolist() == [9, 0, 0, 0]
    zeros = torch.tensor([[1, 2, 3]], dtype=torch.uint8)
    assert bw.pack_zero_points(zeros, bits=4).tolist() == [[0x21, 0x83]]
