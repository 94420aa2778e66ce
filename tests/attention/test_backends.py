"""Backends agree, refuse what they cannot do, and never drop an argument."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from closeness import assert_close

from effformer.attention import Softmax
from effformer.attention.backends import attend, attend_packed
from effformer.checks import CapabilityError, MissingExtra
from effformer.context import Context, Packing
from effformer.site import Site


def _qkv() -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(2, 3, 9, 8, dtype=torch.float64) for _ in range(3))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_sdpa_equals_reference(causal: bool, masked: bool, scale: float | None) -> None:
    q, k, v = _qkv()
    mask = (torch.rand(2, 1, 9, 9) > 0.5) if masked else None
    a = attend("sdpa", q, k, v, mask, causal=causal, scale=scale)
    b = attend("reference", q, k, v, mask, causal=causal, scale=scale)
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_rows_without_a_key_are_zero(backend: str) -> None:
    q, k, v = _qkv()
    mask = torch.ones(2, 1, 9, 9, dtype=torch.bool)
    mask[0, :, 4] = False
    out = attend(backend, q, k, v, mask, causal=False, scale=None)
    assert out[0, :, 4].abs().max() == 0
    assert torch.isfinite(out).all()


def test_xformers_is_refused_on_a_cpu() -> None:
    with pytest.raises(CapabilityError, match=r"CUDA devices only.*choices here: sdpa, reference"):
        attend("xformers", *_qkv(), None, causal=False, scale=None)


def test_unknown_backend_and_lengths() -> None:
    q, k, v = _qkv()
    with pytest.raises(ValueError, match="did you mean 'sdpa'"):
        attend("spda", q, k, v, None, causal=False, scale=None)
    with pytest.raises(CapabilityError, match="as many queries as keys"):
        attend("sdpa", q, k[:, :, :4], v[:, :, :4], None, causal=True, scale=None)


class _OnDevice:
    """A stand-in for a CUDA tensor: says where it is, and what it was asked for."""

    is_cuda = True
    device = "cuda:0"
    dtype = torch.float32
    shape = (2, 3, 9, 8)

    def transpose(self, a: int, b: int) -> _OnDevice:
        return self


def test_xformers_selection_passes_every_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}

    def kernel(
        q: object, k: object, v: object, *, attn_bias: object, scale: float | None
    ) -> _OnDevice:
        seen.update(bias=attn_bias, scale=scale)
        return _OnDevice()

    ops = SimpleNamespace(memory_efficient_attention=kernel, LowerTriangularMask=lambda: "causal")
    monkeypatch.setitem(sys.modules, "xformers", ModuleType("xformers"))
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    x = _OnDevice()
    attend("xformers", x, x, x, None, causal=True, scale=0.5)  # type: ignore[arg-type]
    assert seen == {"bias": "causal", "scale": 0.5}
    attend("xformers", x, x, x, None, causal=False, scale=None)  # type: ignore[arg-type]
    assert seen == {"bias": None, "scale": None}


class _BlockDiagonal:
    """A stand-in for the bias of several sequences in one row."""

    def __init__(self, lengths: list[int], causal: bool = False) -> None:
        self.lengths, self.causal = lengths, causal

    @classmethod
    def from_seqlens(cls, lengths: list[int]) -> _BlockDiagonal:
        return cls(lengths)

    def make_causal(self) -> _BlockDiagonal:
        return _BlockDiagonal(self.lengths, causal=True)

    def mask(self) -> torch.Tensor:
        sample = torch.arange(len(self.lengths)).repeat_interleave(torch.tensor(self.lengths))
        mask = sample[:, None] == sample
        return mask.tril() if self.causal else mask


class _Row(torch.Tensor):
    """A CPU tensor that says that it is on a CUDA device."""

    is_cuda = True  # type: ignore[assignment]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_xformers_runs_a_packed_row_in_one_kernel(
    causal: bool, scale: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def kernel(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        attn_bias: _BlockDiagonal,
        scale: float | None,
    ) -> torch.Tensor:
        calls.append(attn_bias.lengths)
        heads = (x.as_subclass(torch.Tensor).transpose(1, 2) for x in (q, k, v))
        mask = attn_bias.mask()
        return attend("reference", *heads, mask, causal=False, scale=scale).transpose(1, 2)

    modules = {
        "xformers": ModuleType("xformers"),
        "xformers.ops": SimpleNamespace(memory_efficient_attention=kernel),
        "xformers.ops.fmha": ModuleType("xformers.ops.fmha"),
        "xformers.ops.fmha.attn_bias": SimpleNamespace(BlockDiagonalMask=_BlockDiagonal),
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    packing = Packing.from_mask(torch.arange(6) < torch.tensor([[4], [0], [6], [1]]))
    q, k, v = (torch.randn(1, 3, 11, 8) for _ in range(3))
    site = Site(dim=24, heads=3)
    fast, slow = (
        Softmax(Softmax.Config(backend=name, causal=causal, scale=scale), site)
        for name in ("xformers", "sdpa")
    )
    out = fast.packed(*(x.as_subclass(_Row) for x in (q, k, v)), Context(packing=packing))
    assert_close(out, slow.packed(q, k, v, Context(packing=packing)), rtol=1e-5, atol=1e-6)
    assert calls == [[4, 6, 1]]


def test_a_packed_row_on_a_cpu_is_refused_by_xformers() -> None:
    x = torch.randn(1, 3, 4, 8)
    with pytest.raises(CapabilityError, match=r"CUDA devices only.*choices here: sdpa, reference"):
        attend_packed(x, x, x, (4,), causal=False, scale=None)


@pytest.mark.parametrize("shape", [(2, 3, 4, 8), (1, 3, 5, 8)])
def test_a_packed_row_holds_all_tokens(shape: tuple[int, ...]) -> None:
    x, packing = torch.randn(shape), Packing.from_mask(torch.ones(1, 4, dtype=torch.bool))
    for backend in ("sdpa", "xformers"):
        core = Softmax(Softmax.Config(backend=backend), Site(dim=24, heads=3))
        with pytest.raises(ValueError, match="expected one row of 4 tokens, got"):
            core.packed(x, x, x, Context(packing=packing))


def test_missing_xformers_says_how_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xformers", None)
    monkeypatch.setitem(sys.modules, "xformers.ops", None)
    x = _OnDevice()
    with pytest.raises(MissingExtra, match=r"pip install 'effformer\[xformers\]'"):
        attend("xformers", x, x, x, None, causal=False, scale=None)  # type: ignore[arg-type]
