from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from effformer.profile import Counter, register_formula


def count(call, model: nn.Module | None = None) -> Counter:
    with torch.no_grad(), Counter(model or nn.Identity()) as counter:
        call()
    return counter


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape)


PRODUCTS = {
    "mm": (lambda: randn(3, 5) @ randn(5, 7), 3 * 5 * 7),
    "bmm": (lambda: randn(2, 3, 5) @ randn(2, 5, 7), 2 * 3 * 5 * 7),
    "broadcast": (lambda: randn(2, 4, 3, 5) @ randn(5, 7), 2 * 4 * 3 * 5 * 7),
    "mv": (lambda: randn(3, 5) @ randn(5), 15),
    "dot": (lambda: torch.dot(randn(5), randn(5)), 5),
    "addmm_": (lambda: randn(3, 7).addmm_(randn(3, 5), randn(5, 7)), 3 * 5 * 7),
    "baddbmm_": (lambda: randn(2, 3, 7).baddbmm_(randn(2, 3, 5), randn(2, 5, 7)), 2 * 3 * 5 * 7),
    "addmm": (lambda: F.linear(randn(2, 3, 5), randn(7, 5), randn(7)), 2 * 3 * 5 * 7),
    "addmv": (lambda: torch.addmv(randn(3), randn(3, 5), randn(5)), 15),
    "baddbmm": (lambda: torch.baddbmm(randn(2, 3, 7), randn(2, 3, 5), randn(2, 5, 7)), 210),
    "addbmm": (lambda: torch.addbmm(randn(3, 7), randn(2, 3, 5), randn(2, 5, 7)), 210),
    "einsum": (lambda: torch.einsum("bnd,bmd->bnm", randn(2, 3, 5), randn(2, 7, 5)), 210),
    "permuting einsum": (lambda: torch.einsum("abc->cab", randn(2, 3, 5)), 0),
    "int8": (
        lambda: torch._int_mm(torch.ones(32, 16).to(torch.int8), torch.ones(16, 8).to(torch.int8)),
        32 * 16 * 8,
    ),
    "conv2d": (lambda: F.conv2d(randn(2, 4, 8, 8), randn(6, 4, 2, 2), stride=2), 2 * 6 * 16 * 16),
    "grouped": (lambda: F.conv1d(randn(2, 4, 9), randn(4, 1, 3), groups=4), 2 * 4 * 7 * 3),
    "transposed": (
        lambda: F.conv_transpose2d(randn(2, 4, 3, 3), randn(4, 6, 2, 2), stride=2),
        2 * 4 * 9 * 6 * 4,
    ),
    "fourier": (lambda: torch.fft.fft(torch.randn(3, 16, dtype=torch.complex64)), 3 * 160),
    "real fourier": (lambda: torch.fft.rfft(randn(3, 16)), 3 * 80),
    "back to real": (lambda: torch.fft.irfft(torch.fft.rfft(randn(3, 16)), n=16), 3 * 160),
    "fourier of a plane": (lambda: torch.fft.rfft2(randn(8, 16)), 8 * 80 + 9 * 60),
    "recurrent": (lambda: nn.LSTM(5, 7)(randn(3, 2, 5)), 3 * 2 * (4 * 7 * 5 + 4 * 7 * 7)),
    "gated recurrent": (lambda: nn.GRU(5, 7)(randn(3, 2, 5)), 3 * 2 * (3 * 7 * 5 + 3 * 7 * 7)),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products(name: str) -> None:
    call, expected = PRODUCTS[name]
    counter = count(call)
    assert counter.total == expected
    assert not [op for (_, op), t in counter.rows.items() if t.kind == "unknown"]


def attention_cases():
    q, k, v = randn(2, 4, 6, 8), randn(2, 4, 5, 8), randn(2, 4, 5, 8)
    grouped = randn(2, 2, 5, 8)
    allowed = torch.ones(2, 1, 6, 5, dtype=torch.bool)
    full = 2 * 4 * 6 * 5 * 16
    return {
        "cross": ((q, k, v), {}, full),
        "mask": ((q, k, v), {"attn_mask": allowed}, full),
        "float mask": ((q, k, v), {"attn_mask": randn(6, 5)}, full),
        "causal": ((q, q, q), {"is_causal": True}, 2 * 4 * 6 * 6 * 16),
        "grouped queries": ((q, grouped, grouped), {"enable_gqa": True}, full),
        "wide values": ((q, k, randn(2, 4, 5, 12)), {}, 2 * 4 * 6 * 5 * 20),
    }


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", attention_cases())
def test_fused_attention_is_counted(name: str, device: str) -> None:
    args, kwargs, expected = attention_cases()[name]
    args = tuple(x.to(device) for x in args)
    kwargs = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
    assert count(lambda: F.scaled_dot_product_attention(*args, **kwargs)).total == expected


def test_backward_of_a_linear_layer_costs_twice_its_forward() -> None:
    layer, x = nn.Linear(5, 7), randn(3, 5).requires_grad_()
    with Counter(layer) as counter:
        layer(x).sum().backward()
    assert counter.total == 3 * (3 * 5 * 7)
    assert counter.rows["", "aten::addmm"].macs == 3 * 5 * 7


def test_backward_of_convolution_and_attention() -> None:
    x, w = randn(2, 4, 8, 8).requires_grad_(), randn(6, 4, 2, 2).requires_grad_()
    with Counter(nn.Identity()) as counter:
        F.conv2d(x, w, stride=2).sum().backward()
    assert counter.total == 3 * 2 * 6 * 16 * 16
    q, k, v = (randn(1, 2, 6, 8).requires_grad_() for _ in range(3))
    with Counter(nn.Identity()) as counter:
        F.scaled_dot_product_attention(q, k, v).sum().backward()
    assert counter.total == 7 * 2 * 6 * 6 * 8


@pytest.mark.parametrize("grad_mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_grad_mode_does_not_change_the_count(grad_mode) -> None:
    layer = nn.TransformerEncoderLayer(16, 4, batch_first=True).eval()
    with grad_mode(), Counter(layer) as counter:
        layer(randn(2, 5, 16))
    assert counter.total == 2 * 5 * (4 * 16 * 16 + 2 * 16 * 2048) + 2 * 2 * 5 * 5 * 16


def test_unknown_operators_are_listed_with_their_calls() -> None:
    counter = count(lambda: (torch.linalg.qr(randn(4, 4)), torch.linalg.qr(randn(4, 4))))
    tally = counter.rows["", "aten::linalg_qr"]
    assert (tally.kind, tally.calls, tally.macs) == ("unknown", 2, 0)


def test_elementwise_work_is_elements_not_macs() -> None:
    counter = count(lambda: F.layer_norm(F.gelu(randn(4, 8)), (8,)).softmax(-1).sum())
    assert counter.total == 0
    kinds = {t.kind for t in counter.rows.values()}
    assert kinds == {"elementwise"}
    assert {op: t.elements for (_, op), t in counter.rows.items()} == {
        "aten::gelu": 32,
        "aten::native_layer_norm": 32,
        "aten::_softmax": 32,
        "aten::sum": 32,
    }


def test_other_packages_can_register_a_formula() -> None:
    @torch.library.custom_op("effformer_test::double_product", mutates_args=())
    def double_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return 2 * (a @ b)

    assert "effformer_test::double_product" in {
        op for _, op in count(lambda: double_product(randn(3, 5), randn(5, 7))).rows
    }

    @register_formula("effformer_test::double_product")
    def formula(args, kwargs, out) -> int:
        return out.numel() * args[0].shape[-1]

    assert count(lambda: double_product(randn(3, 5), randn(5, 7))).total == 105
    with pytest.raises(ValueError, match="already has a formula"):
        register_formula("effformer_test::double_product")(formula)


def test_the_fast_path_switch_is_restored_after_an_error() -> None:
    def fail() -> None:
        raise KeyError("stop")

    with pytest.raises(KeyError):
        count(fail)
    assert torch.backends.mha.get_fastpath_enabled()


def test_modules_behind_an_unknown_operator_keep_their_names() -> None:
    class Largest(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + x.topk(1).values  # no formula: the counter asks for its parts

    counter = Counter(net := nn.Sequential(Largest(), nn.Linear(5, 3)))
    with torch.inference_mode(), counter:
        net(randn(2, 5))
    assert "1" in counter.paths
    assert counter.total == 2 * 5 * 3
