"""Quantized models of other libraries: attentions of torch, GPT-2's Conv1D, saving and exporting them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import effformer.compress.quant.foreign as foreign
import pytest
import torch
from closeness import assert_close
from effformer.compress import QuantLinear, dequantize, quantize, quantize_, restore
from effformer.export import export_onnx
from torch import Tensor, nn

import effformer
from effformer.checks import FormatError
from effformer.profile import profile


def _attention(**options: Any) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    return nn.MultiheadAttention(16, 2, batch_first=True, **options).eval()


class _Net(nn.Module):
    def __init__(self, attention: nn.MultiheadAttention, width: int = 16) -> None:
        super().__init__()
        self.attention, self.width = attention, width

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        other = x if self.width == 16 else x[..., : self.width]
        out: tuple[Tensor, Tensor] = self.attention(x, other, other)
        return out


def _encoder() -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    return nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval()


class Conv1D(nn.Module):
    """As transformers has it: ``x W + b`` with W (in, out)."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.randn(nx, nf) / nx**0.5)
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        out = torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight)
        return out.view(*x.shape[:-1], self.nf)


def _conv() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Conv1D(24, 16), nn.GELU(), Conv1D(16, 24)).eval()


X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
NETS = {
    "attention": lambda: _Net(_attention()),
    "widths of their own": lambda: _Net(_attention(kdim=8, vdim=8), 8),
    "extra keys": lambda: _Net(_attention(add_bias_kv=True, add_zero_attn=True, bias=False)),
    "encoder": _encoder,
    "Conv1D": _conv,
}
every = pytest.mark.parametrize("make", NETS.values(), ids=NETS)


@every
def test_every_matrix_is_packed_saved_and_restored(make: Any, tmp_path: Path) -> None:
    net = make()
    keys, types = list(net.state_dict()), [type(m) for m in net.modules()]
    small, report = quantize(net, "int8", inputs=X)
    assert list(net.state_dict()) == keys
    assert not report.kept or all("bias_k" in dir(small.get_submodule(k.name)) for k in report.kept)
    dense = sum(p.numel() for p in net.parameters() if p.dim() == 2)
    assert sum(layer.shape[0] * layer.shape[1] for layer in report.layers) == dense
    assert report.output_error is not None
    assert 0 < report.output_error < 0.02
    assert report.bytes_after < report.bytes_before

    path = effformer.save_weights(small, tmp_path / "small.safetensors")
    again = restore(make(), path)
    assert again.transforms == small.transforms
    with torch.no_grad():
        for a, b in zip(_outputs(again(X)), _outputs(small(X)), strict=True):
            assert torch.equal(a, b)
    whole = dequantize(again)
    assert [type(m) for m in whole.modules()] == types or make is _encoder or "Net" in str(types)
    assert list(whole.state_dict()) == keys
    assert [x.shape for x in whole.state_dict().values()] == [
        x.shape for x in net.state_dict().values()
    ]
    with torch.no_grad():
        for a, b in zip(_outputs(whole(X)), _outputs(small(X)), strict=True):
            assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert profile(small, X).total == profile(net, X).total


@pytest.mark.parametrize("name", ["encoder", "Conv1D"])
@pytest.mark.parametrize("target", ["onnx-cpu", pytest.param("onnx", marks=pytest.mark.slow)])
def test_they_are_exported(name: str, target: str, tmp_path: Path) -> None:
    small, _ = quantize(NETS[name](), "int8")
    report = export_onnx(small, tmp_path / "m.onnx", X, target=target)
    assert report.parity is not None
    assert report.parity.passed


def _outputs(value: Any) -> list[Tensor]:
    return list(value) if isinstance(value, tuple) else [value]


def test_fused_paths_read_the_packed_weights() -> None:
    net = _encoder()
    small, _ = quantize(net, "int4")
    with torch.no_grad():
        fused = small(X)
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            plain = small(X)
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
        assert_close(fused, plain, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(fused, net(X), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{"batch_first": False}, {"batch_first": True}])
def test_masks_and_dropout_mean_what_they_meant(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    closed = nn.MultiheadAttention(16, 2, dropout=0.5, **options)
    opened = foreign.OpenAttention(copy.deepcopy(closed))
    hidden = torch.tensor([[False, False, True, False, True]]).expand(
        5 if not options["batch_first"] else 2, 5
    )
    x = X if options["batch_first"] else torch.randn(5, 5, 16)
    for given in ({}, {"key_padding_mask": hidden}, {"attn_mask": torch.ones(5, 5).triu(1).bool()},
                  {"need_weights": False}, {"average_attn_weights": False}):  # fmt: skip
        got = []
        for attention in (closed, opened):
            torch.manual_seed(1)
            got.append(attention(x, x, x, **given))
        for a, b in zip(*got, strict=True):
            assert (a is None and b is None) or torch.equal(a, b)
    single = torch.randn(5, 16)
    with torch.random.fork_rng():
        assert torch.equal(
            opened.eval()(single, single, single)[0], closed.eval()(single, single, single)[0]
        )
    back = opened.close()
    assert list(back.state_dict()) == list(closed.state_dict())


def test_what_is_left_out_stays_as_it_was() -> None:
    net = _encoder()
    attention = net.layers[0].self_attn
    weight = attention.in_proj_weight
    quantize_(net, "int8", skip="*.self_attn")
    assert net.layers[0].self_attn is attention
    assert attention.in_proj_weight is weight
    quantize_(net, "int8", where="*.self_attn.in_proj")
    assert isinstance(net.layers[0].self_attn.in_proj, QuantLinear)
    assert type(dequantize(net).layers[0].self_attn) is nn.MultiheadAttention
    conv = _conv()
    first, second = conv[0], conv[2]
    with pytest.raises(ValueError, match="matches no module"):
        quantize_(conv, "int8", where="nothing")
    quantize_(conv, "int8", skip="0")
    assert conv[0] is first
    assert conv[2] is not second
    assert type(dequantize(conv)[2]) is Conv1D


def test_a_file_without_records_is_refused(tmp_path: Path) -> None:
    path = effformer.save_weights(_conv(), tmp_path / "w.safetensors")
    with pytest.raises(FormatError, match="records no change of its model; load_weights"):
        restore(_conv(), path)
    with pytest.raises(FormatError, match="no readable safetensors file"):
        restore(_conv(), tmp_path / "nothing.safetensors")
    small = effformer.save_weights(quantize(_conv(), "int8")[0], tmp_path / "s.safetensors")
    with pytest.raises(FormatError, match="layer '0' is missing, expected a linear layer"):
        restore(nn.Identity(), small)


def test_models_of_ours_keep_what_their_tables_know() -> None:
    small, _ = quantize(effformer.build_model("bert-tiny", depth=1), "int8")
    call = small.example_inputs()
    assert profile(small).total == profile(effformer.build_model("bert-tiny", depth=1), call).total


@pytest.mark.parametrize("where", ["0.in_proj", "0.out_proj"])
def test_one_projection_of_an_attention_alone(where: str, tmp_path: Path) -> None:
    model = nn.Sequential(nn.MultiheadAttention(32, 2, batch_first=True)).eval()
    small, report = quantize(model, "int8", where)
    assert [layer.name for layer in report.layers] == [where]
    assert report.bytes_after < report.bytes_before
    again = restore(model, effformer.save_weights(small, tmp_path / "small.safetensors"))
    assert again.state_dict().keys() == small.state_dict().keys() != model.state_dict().keys()
