from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from effformer.compress import (
    QuantEmbedding,
    QuantLinear,
    dequantize,
    quantize,
    quantize_,
    replay,
)
from torch import Tensor, nn

import effformer
from effformer.checks import FormatError
from effformer.profile import peak_rss

SCHEMES = ["int8", "int4", "nf4", "fp4", "int8-dynamic", "llm-int8"]


def digits_model(seed: int = 0) -> effformer.models.Model:
    """The size of the demo, with weights that are not zero anywhere."""
    torch.manual_seed(seed)
    model = effformer.build_model(
        "sit-tiny", input_size=8, channels=1, num_classes=10, learn_sigma=False
    )
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return model.eval()


def plain_model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 8))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_saved_and_loaded_models_agree_and_the_report_tells_the_file_size(
    scheme: str, tmp_path: Path
) -> None:
    model = digits_model()
    inputs = model.example_inputs(2)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    small, report = quantize(model, scheme, inputs=inputs)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    effformer.save_pretrained(model, tmp_path / "dense")
    effformer.save_pretrained(small, tmp_path / "small")
    sizes = [(tmp_path / n / "model.safetensors").stat().st_size for n in ("dense", "small")]
    assert report.ratio == pytest.approx(sizes[1] / sizes[0], rel=0.01)
    assert report.bytes_before == pytest.approx(sizes[0], rel=0.01)
    assert report.ratio <= (0.17 if scheme == "int4" else 0.15 if "4" in scheme else 0.27)
    loaded = effformer.load_model(tmp_path / "small")
    assert torch.equal(loaded(**inputs), small(**inputs))
    assert loaded.transforms == small.transforms
    assert json.loads(json.dumps(loaded.transforms)) == list(loaded.transforms)
    assert report.output_error is not None
    assert 0 < report.output_error < (0.12 if "4" in scheme else 0.03)
    torch.testing.assert_close(dequantize(small)(**inputs), small(**inputs))


def test_file_ratios_of_a_published_size() -> None:
    with torch.device("meta"):
        model = effformer.build_model("dit-b")
    dense = effformer.compress.report.file_bytes(model.state_dict())
    for scheme, limit in (("int8", 0.27), ("nf4", 0.15)):
        with torch.device("meta"):
            packed = effformer.build_model("dit-b")
        names = [n for n, m in packed.named_modules() if type(m) in (nn.Linear, nn.Embedding)]
        careful = [n for n in names if n.split(".")[0] in ("label_embed", "final")]
        rest = [n for n in names if n not in careful]
        replay(packed, {"kind": "quantize", "scheme": {"name": "int8"}, "layers": careful})
        replay(packed, {"kind": "quantize", "scheme": {"name": scheme}, "layers": rest})
        assert effformer.compress.report.file_bytes(packed.state_dict()) <= limit * dense


def test_sensitive_layers_stay_in_eight_bit() -> None:
    small, report = quantize(digits_model(), "nf4")
    used = {layer.name: layer.scheme for layer in report.layers}
    assert used["label_embed.table"] == used["final.linear"] == "int8"
    assert used["blocks.0.attn.part.qkv"] == used["time_embed.fc1"] == "nf4"
    assert [r["scheme"]["name"] for r in small.transforms] == ["nf4", "int8"]
    everything, _ = quantize(digits_model(), "nf4", sensitive=None)
    assert [r["scheme"]["name"] for r in everything.transforms] == ["nf4"]
    wide, _ = quantize(digits_model(), "int4", sensitive={"name": "int8", "block": 16})
    assert wide.final.linear.scheme.config.block == 16


def test_where_and_skip_cover_what_is_below_a_match() -> None:
    model = digits_model()
    small, report = quantize(model, "int8", "blocks.*.ffn", skip="blocks.0")
    assert {layer.name for layer in report.layers} == {
        f"blocks.{i}.ffn.part.{fc}" for i in (1, 2) for fc in ("fc1", "fc2")
    }
    assert isinstance(small.blocks[1].ffn.part.fc1, QuantLinear)
    assert isinstance(small.blocks[0].ffn.part.fc1, nn.Linear)
    reasons = {kept.name: kept.reason for kept in report.kept}
    assert reasons["blocks.0.ffn.part.fc1"] == "matches skip=['blocks.0']"
    assert reasons["blocks.1.attn.part.qkv"] == "outside where"
    assert reasons["patch_embed.proj"] == "Conv2d is not a linear layer or embedding"
    again, report = quantize(small, "nf4", ["*.attn", "label_embed"])
    assert {r["scheme"]["name"] for r in again.transforms} == {"int8", "nf4"}
    assert {k.reason for k in report.kept if ".ffn." in k.name and "0" not in k.name} == {
        "already int8"
    }
    assert isinstance(again.label_embed.table, QuantEmbedding)


def test_patterns_that_match_nothing() -> None:
    model = digits_model()
    with pytest.raises(
        ValueError, match=r"where='blocks.\*.fnn' matches no module; .*blocks.0.ffn"
    ):
        quantize(model, "int8", "blocks.*.fnn")
    with pytest.raises(ValueError, match="no linear layer or embedding is in them"):
        quantize(model, "int8", "patch_embed")
    with pytest.raises(ValueError, match=r"skip='finale' matches no module; .*final"):
        quantize(model, "int8", skip="finale")
    with pytest.raises(ValueError, match="leaves nothing"):
        quantize(model, "int8", "blocks.0", skip="blocks")


def test_refusals_leave_the_model_as_it_was() -> None:
    model = digits_model()
    model.blocks[2].ffn.part.fc2.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"blocks\.2\.ffn\.part\.fc2\.weight: 1 NaN"):
        quantize_(model, "int8")
    assert not any(isinstance(m, QuantLinear) for m in model.modules())
    assert model.transforms == ()
    with pytest.raises(ValueError, match="did you mean 'int8'"):
        quantize_(model, "int9")
    with pytest.raises(ValueError, match="no linear layer or embedding"):
        quantize(nn.Sequential(nn.Conv2d(1, 1, 1)), "int8")
    with pytest.raises(ValueError, match="no layer of this model is quantized"):
        dequantize(plain_model())


def test_packing_twice_is_refused() -> None:
    small, _ = quantize(plain_model(), "int8")
    with pytest.raises(ValueError, match="'0' and 1 more are already quantized"):
        quantize(small, "nf4")


def test_plain_modules_and_their_replay() -> None:
    model = plain_model()
    x = torch.randn(5, 64)
    small, report = quantize(model, "nf4", inputs=x)
    assert report.output_error is not None
    fresh = plain_model()
    for record in json.loads(json.dumps(small.transforms)):
        fresh = replay(fresh, record)
    fresh.load_state_dict(small.state_dict())
    assert torch.equal(fresh(x), small(x))
    small.train()
    assert quantize(plain_model().train(), "int8", inputs=(x,))[0].training
    assert not any(isinstance(m, QuantLinear) for m in dequantize(small).modules())


def test_shared_layers_stay_shared() -> None:
    layer = nn.Linear(16, 16)
    small, _ = quantize(nn.Sequential(layer, nn.GELU(), layer), "int8")
    assert small[0] is small[2]
    assert isinstance(small[0], QuantLinear)


def test_layers_that_look_linear_but_are_not() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    doubled = Doubled(16, 16)
    table = nn.Embedding(5, 16, max_norm=1.0)
    model = nn.ModuleDict({"doubled": doubled, "table": table, "out": nn.Linear(16, 4)})
    small, report = quantize(model, "int8")
    assert {layer.name for layer in report.layers} == {"out"}
    reasons = {kept.name: kept.reason for kept in report.kept}
    assert reasons["table"] == "max_norm rewrites the table in every call"
    assert "Doubled is not a linear layer" in reasons["doubled"]
    x = torch.randn(1, 3, 16)
    assert torch.equal(small["doubled"](x), doubled(x))


def test_foreign_records_are_refused() -> None:
    with pytest.raises(FormatError, match="'shrink': unknown"):
        replay(plain_model(), {"kind": "shrink"})
    record = {"kind": "quantize", "scheme": {"name": "int3"}, "layers": ["0"]}
    with pytest.raises(FormatError, match="newer effformer"):
        replay(plain_model(), record)
    record["scheme"] = {"name": "int8"}
    with pytest.raises(FormatError, match="layer '1' is a GELU"):
        replay(plain_model(), record | {"layers": ["1"]})
    with pytest.raises(FormatError, match="layer '9' is missing"):
        replay(plain_model(), record | {"layers": ["9"]})


def test_bitsandbytes_bytes_load_without_bitsandbytes(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    model = digits_model()
    inputs = model.example_inputs(1)
    theirs, _ = quantize(model, "nf4", backend="bitsandbytes")
    assert theirs.blocks[0].attn.part.qkv.backend == "bitsandbytes"
    assert theirs.final.linear.backend == "torch"
    effformer.save_pretrained(theirs, tmp_path / "m")
    loaded = effformer.load_model(tmp_path / "m")
    assert loaded.blocks[0].attn.part.qkv.backend == "torch"
    torch.testing.assert_close(loaded(**inputs), theirs(**inputs), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="backend 'bitsandbytes'"):
        quantize(model, "int8", backend="bitsandbytes")


def test_a_quantized_model_trains_its_other_parameters() -> None:
    small, _ = quantize(digits_model(), "int8")
    inputs = small.example_inputs(2)
    inputs["x"].requires_grad_()
    small(**inputs).square().mean().backward()
    assert inputs["x"].grad is not None
    assert inputs["x"].grad.abs().sum() > 0
    assert small.blocks[0].attn.part.qkv.bias.grad is not None


class _Answer(nn.Module):
    """Wraps an output in containers of several kinds."""

    def __init__(self, wrap: Any) -> None:
        super().__init__()
        self.net, self.wrap = plain_model(), wrap

    def forward(self, tokens: Tensor) -> Any:
        return self.wrap(self.net(tokens))


@dataclass
class _Fields:
    logits: Tensor
    ids: Tensor


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: {"logits": x, "ids": x.argmax(-1)},
        lambda x: _Fields(x, x.argmax(-1)),
        lambda x: (x.argmax(-1), [{"logits": _Fields(x, x.argmax(-1))}]),
    ],
    ids=["dict", "dataclass", "nested"],
)
def test_the_error_of_models_that_return_more_than_a_tensor(wrap: Any) -> None:
    torch.manual_seed(0)
    model = _Answer(wrap)
    given = torch.randn(3, 64)
    small, report = quantize(model, "nf4", inputs={"tokens": given})
    with torch.no_grad():
        expected = model.net(given)
        error = (small.net(given) - expected).norm() / expected.norm()
    assert report.output_error == pytest.approx(float(error), rel=1e-5)
    assert report.output_error > 0.01
    assert model.training


def test_models_without_numbers_to_compare_are_refused() -> None:
    model = _Answer(lambda x: {"ids": x.argmax(-1)})
    with pytest.raises(TypeError, match=r"quantize: _Answer returns no floating-point tensor"):
        quantize_(model, "nf4", inputs=torch.randn(3, 64))
    assert isinstance(model.net[0], nn.Linear)
    with pytest.raises(TypeError, match=r"quantize: inputs do not fit _Answer.forward\(tokens"):
        quantize(model, "nf4", inputs={"x": torch.randn(3, 64)})


@pytest.mark.parametrize("scheme", ["int8", "gptq", "smoothquant"])
def test_the_copy_has_nothing_of_the_model(scheme: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32), nn.Linear(32, 32))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    small, _ = quantize(net, scheme, "1", data={"input": torch.randn(8, 32)})
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    theirs = {p.data_ptr() for p in net.parameters()}
    assert not theirs & {p.data_ptr() for p in small.parameters()}
    with pytest.raises(ValueError, match="matches no module"):
        quantize(net, scheme, "9", data={"input": torch.randn(8, 32)})
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_tied_weights_that_stay_are_tied_in_the_copy() -> None:
    net = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 64))
    net[1].weight = net[0].weight
    small, _ = quantize(net, "int8", "2")
    assert small[0].weight is small[1].weight
    assert small[0].weight is not net[0].weight


def _built(scheme: str | None) -> None:
    """Called in a fresh process, which measures its memory."""
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(48)))
    if scheme is not None:
        quantize(net, scheme)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["int8", "nf4", "hqq"])
def test_memory_of_a_large_model(scheme: str) -> None:
    """At most 2.5 times the bytes of the model, the model included (benchmarks/compress_large.py)."""
    size = 48 * 1025 * 1024 * 4
    assert peak_rss(_built, scheme) <= 2.5 * size


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_packed_models_in_half_precision_are_loaded_so(tmp_path: Path, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model: Any = effformer.build_model("vit-nano", depth=1).eval().to(dtype)
    small, _ = quantize(model, "int8")
    again = effformer.load_model(effformer.save_pretrained(small, tmp_path / "small"))
    x = model.example_inputs(2)["x"]
    assert torch.equal(again(x), small(x))
