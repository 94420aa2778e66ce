"""Schemes that look at the inputs of layers or change them."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from effformer.compress import QuantEmbedding, QuantLinear, dequantize, quantize, quantize_, restore
from effformer.compress.quant import hqq, make_scheme, rotate
from effformer.compress.quant.calibrate import Seen
from effformer.compress.quant.gptq import loss_of_rows
from torch import Tensor, nn

import effformer
from effformer.profile import profile

METHODS: list[str | dict[str, Any]] = [
    "affine", "gptq", "hqq", "awq", "smoothquant", "ptq4dit", "rotate", "svdquant", "bct", "w8a8", "w4a4",
    "torchao-int8", "torchao-int4",
    {"name": "affine", "bits": 3, "block": None, "symmetric": True},
    {"name": "gptq", "block": 20, "order": True},
    {"name": "hqq", "bits": 2, "block": 24},
    {"name": "awq", "scheme": {"name": "gptq", "block": 32}, "fold": False},
    {"name": "smoothquant", "scheme": {"name": "w8a8", "inputs": "static"}},
    {"name": "smoothquant", "scheme": "rotate"},
    {"name": "rotate", "group": 16, "scheme": {"name": "gptq", "block": 32}},
    {"name": "svdquant", "rank": 4, "alpha": 0.5, "beta": 0.5, "scheme": "int4"},
    {"name": "w8a8", "inputs": "static", "range": "minmax"},
    {"name": "bct", "bits": 8, "rows": 7, "columns": 9, "inputs": "int8"},
]  # fmt: skip
each = pytest.mark.parametrize("spec", METHODS, ids=str)


class Net(nn.Module):
    """A table, a norm with two readers, odd widths, and outliers in a few channels."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 70)
        self.norm = nn.LayerNorm(70)
        self.up, self.gate = nn.Linear(70, 50), nn.Linear(70, 50, bias=False)
        self.down = nn.Linear(50, 9)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.norm(self.table(ids))
        return self.down(nn.functional.silu(self.gate(h)) * self.up(h))


def net() -> Net:
    torch.manual_seed(0)
    model = Net().eval()
    with torch.no_grad():
        model.norm.weight[::17] *= 20
        model.norm.bias.normal_()
    return model


def ids(count: int = 24) -> dict[str, Tensor]:
    return {"ids": torch.randint(0, 11, (count, 6), generator=torch.Generator().manual_seed(1))}


@each
def test_a_quantized_model_is_a_model(spec: Any, tmp_path: Path) -> None:
    model, data = net(), ids()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    dense = model(**data).detach()
    small, report = quantize(model, spec, data=data, sensitive=None)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    made = small(**data)
    limit = 0.7 if make_scheme(spec).bits < 4 else 0.35
    assert float((made - dense).detach().norm() / dense.norm()) < limit
    assert report.output_error is not None
    assert {layer.name for layer in report.layers} == {"table", "up", "gate", "down"}
    assert isinstance(small.table, QuantEmbedding)
    assert not small.table.scheme.prepares
    path = effformer.save_weights(small, tmp_path / "small.safetensors")
    again = restore(net(), path)
    assert torch.equal(again(**data), made)
    assert json.loads(json.dumps(small.transforms)) == list(small.transforms)
    if not any(m.scheme.prepares for m in small.modules() if isinstance(m, QuantLinear)):
        torch.testing.assert_close(dequantize(small)(**data), made)
    made.sum().backward()
    assert small.down.bias.grad is not None


@pytest.mark.parametrize("spec", ["gptq", "awq", "smoothquant", "rotate", "svdquant", "bct"])
def test_models_of_ours_save_and_load(spec: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = effformer.build_model("sit-tiny", input_size=8, channels=1, num_classes=4, depth=1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    data = model.eval().example_inputs(4)
    small, _ = quantize(model, spec, data=data)
    effformer.save_pretrained(small, tmp_path / "small")
    loaded = effformer.load_model(tmp_path / "small")
    assert torch.equal(loaded(**data), small(**data))
    assert loaded.transforms == small.transforms


def inputs_of(k: int, count: int = 400) -> Tensor:
    """Correlated, with outliers in every eighth channel."""
    torch.manual_seed(3)
    x = torch.randn(count, k) @ (torch.eye(k) + 0.3 * torch.randn(k, k) / k**0.5)
    x[:, ::8] *= 12
    return x


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("block", [None, 16, 40])
def test_gptq_and_awq_are_never_worse_than_rounding_to_nearest(
    bits: int, symmetric: bool, block: int | None
) -> None:
    x, weight = inputs_of(72), torch.randn(24, 72)
    seen = Seen(72, ["second", "mean"])
    seen.add(x)
    assert seen.second is not None
    knobs: dict[str, Any] = {"bits": bits, "symmetric": symmetric, "block": block}

    def losses(spec: Any) -> Tensor:
        scheme = make_scheme(spec)
        made = scheme.decode(scheme.fit(weight, seen), *weight.shape)
        return loss_of_rows(made - weight, seen.second)  # type: ignore[arg-type]

    nearest = losses({"name": "affine", **knobs})
    for order in (False, True):
        solved = losses({"name": "gptq", "order": order, **knobs})
        assert bool((solved <= nearest * (1 + 1e-4)).all())
        assert float(solved.sum()) < 0.95 * float(nearest.sum())
    searched = losses({"name": "awq", "scheme": {"name": "affine", **knobs}})
    assert float(searched.sum()) < 0.95 * float(nearest.sum())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_hqq_is_never_worse_than_rounding_to_nearest(bits: int) -> None:
    torch.manual_seed(0)
    weight = torch.distributions.StudentT(4.0).sample((16, 100))
    config = hqq.HQQ.Config(bits=bits, block=32)  # type: ignore[arg-type]
    nearest = make_scheme(config.replace(steps=0))
    scheme = make_scheme(config)
    errors = [
        (s.decode(s.encode(weight), 16, 100) - weight).abs().pow(0.7).sum()
        for s in (scheme, nearest)
    ]
    assert float(errors[0]) <= float(errors[1])
    if bits < 8:
        assert float(errors[0]) < 0.99 * float(errors[1])


@pytest.mark.parametrize(
    ("better", "worse", "factor", "outlier"),
    [
        ("smoothquant", "w8a8", 0.7, 60.0),
        ({"name": "rotate", "scheme": "w8a8"}, "w8a8", 0.5, 60.0),
        ("svdquant", "w4a4", 0.6, 60.0),
        ("rotate", {"name": "w4a4", "block": None}, 0.6, 10.0),
    ],
    ids=str,
)
def test_outliers_of_inputs_are_mended(
    better: Any, worse: Any, factor: float, outlier: float
) -> None:
    torch.manual_seed(0)
    dense, x = nn.Linear(128, 48), torch.randn(200, 128)
    x[:, :4] *= outlier
    errors = []
    for spec in (better, worse):
        small, _ = quantize(nn.Sequential(dense), spec, data=x, sensitive=None)
        errors.append(float((small(x) - dense(x)).detach().norm()))
    assert errors[0] < factor * errors[1]


def test_svdquant_keeps_the_iteration_with_the_least_error() -> None:
    torch.manual_seed(0)
    dense, x = nn.Linear(64, 48), inputs_of(64)
    errors = []
    for iterations in (1, 2, 100):
        spec = {"name": "svdquant", "rank": 8, "iterations": iterations}
        small, _ = quantize(nn.Sequential(dense), spec, data=x, sensitive=None)
        errors.append(float((small(x) - dense(x)).detach().norm()))
    assert errors[2] <= errors[0] * 1.02
    assert small[0].down.dtype == torch.float16


def test_ranges_over_time_weigh_what_disagrees_with_the_weight() -> None:
    """A channel that is large at few times counts more than its mean over all times."""
    torch.manual_seed(0)
    weight = torch.rand(16, 12) + 0.5
    seen = Seen(12, ["times", "peak"])
    quiet, loud = torch.rand(8, 12), torch.rand(8, 12) * 9
    seen.add(quiet[:, None], torch.full((8,), 0.1))
    seen.add(loud[:, None], torch.full((8,), 0.9))
    scheme: Any = make_scheme("ptq4dit")
    scale = scheme.scale(weight, seen)
    low, high = ((a.amax(0) / weight.amax(0)).sqrt() for a in (quiet, loud))
    assert bool((scale >= torch.minimum(low, high) - 1e-5).all())
    assert bool((scale <= torch.maximum(low, high) + 1e-5).all())


@pytest.mark.parametrize("size", [4, 16, 64, 256])
def test_regular_hadamard_matrices(size: int) -> None:
    matrix = rotate.regular_hadamard(size, dtype=torch.float64)
    torch.testing.assert_close(matrix @ matrix.t(), torch.eye(size, dtype=torch.float64))
    torch.testing.assert_close(matrix, matrix.t())
    sums = matrix.sum(1)
    torch.testing.assert_close(sums, sums[:1].expand(size))


@pytest.mark.parametrize("spec", ["svdquant", "rotate", {"name": "awq", "fold": False}], ids=str)
def test_work_is_that_of_the_products(spec: Any) -> None:
    x = torch.randn(20, 72)
    small, _ = quantize(nn.Sequential(nn.Linear(72, 30)), spec, data=x, sensitive=None)
    assert profile(small, x[:7]).total == small[0].macs(7)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("spec", "step"),
    [
        ("gptq", 0.0),
        ("w8a8", 1 / 127),
        ("rotate", 1 / 7),
        ("smoothquant", 1 / 127),
        ({"name": "svdquant", "scheme": "int4"}, 0.0),
        ({"name": "bct", "inputs": "int8"}, 1 / 64),
    ],
    ids=str,
)
def test_rounded_inputs_say_by_how_much_runtimes_may_differ(spec: Any, step: float) -> None:
    scheme = make_scheme(spec)
    assert scheme.step == pytest.approx(step)
    tensors = scheme.fit(torch.randn(8, 64), None)
    x = torch.randn(5, 64)
    moved = (scheme.prepare(x, tensors) - scheme.prepare(x * (1 + 1e-6), tensors)).abs().amax()
    assert float(moved) <= 1.01 * max(scheme.step * 4.5 * float(x.abs().max()), 1e-4)


def test_bct_reaches_eight_times() -> None:
    model = nn.Sequential(nn.Embedding(2048, 256), nn.Linear(256, 1024))
    _, report = quantize(model, "bct", sensitive=None)
    for layer in report.layers:
        assert layer.ratio < 1 / 7.98


def test_layers_that_are_not_called_are_rounded_to_nearest() -> None:
    model = nn.ModuleDict({"used": nn.Linear(8, 8), "idle": nn.Linear(8, 8)})
    model.forward = lambda x: model["used"](x)  # type: ignore[method-assign]
    quantize_(model, "gptq", data=torch.randn(9, 8))
    nearest = make_scheme("affine")
    idle = torch.nn.Linear(8, 8)
    assert isinstance(model["idle"], QuantLinear)
    assert nearest.encode(idle.weight).keys() == model["idle"].tensors().keys()


def test_attention_of_torch_and_shared_weights() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(20, 16)
            self.attn = nn.MultiheadAttention(16, 2, batch_first=True)
            self.out = nn.Linear(16, 20, bias=False)
            self.out.weight = self.table.weight

        def forward(self, ids: Tensor) -> Tensor:
            x = self.table(ids)
            return self.out(self.attn(x, x, x)[0])

    torch.manual_seed(0)
    model, data = Tied().eval(), {"ids": torch.randint(0, 20, (6, 5))}
    for spec in ("awq", "w8a8", "rotate"):
        small, report = quantize(model, spec, data=data)
        assert small.table.codes is small.out.codes
        assert not small.out.scheme.prepares
        assert len(report.layers) == 4
        dense = model(**data).detach()
        assert float((small(**data).detach() - dense).norm() / dense.norm()) < 0.3


def test_refusals() -> None:
    with pytest.raises(ValueError, match="'smoothquant' reads the peak of single channels"):
        make_scheme({"name": "rotate", "scheme": "smoothquant"})
    with pytest.raises(ValueError, match="given together, or both searched"):
        make_scheme({"name": "svdquant", "alpha": 0.5})
    with pytest.raises(ValueError, match=r"'gptq' needs calibration data \(second\)"):
        make_scheme({"name": "svdquant", "scheme": "gptq"})
    with pytest.raises(ValueError, match="inputs of 4 bits"):
        make_scheme({"name": "w4a4", "inputs": "static"})
    with pytest.raises(ValueError, match="block must be at least 1, got 0"):
        make_scheme({"name": "gptq", "block": 0})
    small, _ = quantize(net(), "hqq")
    with pytest.raises(ValueError, match="already quantized"):
        quantize(small, "gptq", data=ids())
    with pytest.raises(ValueError, match="matches no module"):
        quantize(net(), "gptq", "nowhere", data=ids())
    model = net()
    model.down.weight.data[0, 0] = float("inf")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"down\.weight: 0 NaN and 1 infinite"):
        quantize_(model, "smoothquant", data=ids())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


QUICK: list[tuple[Any, str | None]] = [
    ({"name": "awq", "fold": False}, "MatMulNBits"),
]  # fmt: skip
MORE: list[tuple[Any, str | None]] = [
    ("gptq", "MatMulNBits"),
    ({"name": "affine", "bits": 3, "symmetric": True}, "MatMulNBits"),
    ({"name": "rotate", "scheme": "gptq"}, "MatMulNBits"),
    ({"name": "smoothquant", "fold": False}, "MatMulNBits"),
    ("torchao-int4", "MatMulNBits"),
    ("nf4", "MatMulBnb4"),
    ("fp4", "MatMulBnb4"),
    ("hqq", None),
    ("svdquant", None),
    ("bct", None),
]


@pytest.mark.parametrize(
    ("spec", "op"),
    [*QUICK, *(pytest.param(*more, marks=pytest.mark.slow) for more in MORE)],
    ids=str,
)
def test_onnx_runtime_computes_the_same(spec: Any, op: str | None) -> None:
    pytest.importorskip("onnxscript")
    ort = pytest.importorskip("onnxruntime")
    from effformer.export.packed import kernels_for, translations

    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(70, 16)).eval(), torch.randn(5, 70)
    small, _ = quantize(model, spec, data=x, sensitive=None)
    with (
        warnings.catch_warnings(),
        torch.no_grad(),
        kernels_for(small, ("MatMulNBits", "MatMulBnb4"), 0),
    ):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            small, (x,), dynamo=True, verbose=False, custom_translation_table=translations(),
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )  # fmt: skip
    assert program is not None
    assert isinstance(small[0], QuantLinear)
    session = ort.InferenceSession(program.model_proto.SerializeToString())
    used = {node.op_type for node in program.model_proto.graph.node}
    assert used & {"MatMulNBits", "MatMulBnb4"} == ({op} if op else set())
    for rows in (x, torch.randn(3, 70)):
        (made,) = session.run(None, {session.get_inputs()[0].name: rows.numpy()})
        torch.testing.assert_close(torch.from_numpy(made), small(rows), rtol=1e-4, atol=1e-4)
