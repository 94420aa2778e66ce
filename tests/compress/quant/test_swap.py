"""What a report says, and what hangs on a layer that is packed, of models that are not ours."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import assert_close
from effformer.compress import dequantize, optimize, quantize, quantize_, restore
from effformer.compress.report import file_bytes
from safetensors.torch import load_file, save_model
from torch import Tensor, nn

import effformer
from effformer.profile import count_parameters, latency, profile

X = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))


@dataclasses.dataclass
class Out:
    first: Tensor
    rest: dict[str, Any]


SHAPES = {
    "dict": lambda y: {"y": y, "n": 3},
    "dataclass": lambda y: Out(y, {}),
    "nested": lambda y: Out(y, {"more": [(y, None)]}),
    "tuple": lambda y: (y, (y,)),
}


class Returns(nn.Module):
    """A layer whose output is wrapped, or written into a buffer that every call returns."""

    def __init__(self, shape: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.shape = nn.Linear(32, 32), shape
        self.register_buffer("kept", torch.zeros(3, 32))

    def forward(self, x: Tensor) -> Any:
        y = self.layer(x)
        if self.shape == "buffer":
            return self.kept.copy_(y)
        return SHAPES[self.shape](y)


@pytest.mark.parametrize("shape", [*SHAPES, "buffer"])
def test_the_error_is_that_of_the_output_however_it_is_wrapped(shape: str) -> None:
    model = Returns(shape).eval()
    before = model.layer(X).detach()
    small, report = quantize(model, "int4", inputs=X)
    after = small.layer(X).detach()
    error = (after - before).norm() / before.norm()
    assert report.output_error == pytest.approx(float(error), rel=1e-3)
    assert report.output_error > 0.01


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(64, 32), nn.Linear(32, 64, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.table(ids))


@pytest.mark.parametrize("scheme", ["int8", "int4", "nf4"])
def test_a_tied_table_counts_once(scheme: str, tmp_path: Any) -> None:
    dense, ids = Tied().eval(), torch.arange(5)[None]
    small, report = quantize(dense, scheme, inputs=ids)
    for model, said in ((dense, report.bytes_before), (small, report.bytes_after)):
        save_model(model, str(tmp_path / "m.safetensors"), metadata={"format": "pt"})
        assert (
            abs((tmp_path / "m.safetensors").stat().st_size - said) < 200
        )  # names of tied tensors
        assert count_parameters(model) == 64 * 32
        cost = profile(model, ids)
        assert cost.params == 64 * 32
        assert cost.memory is not None
        written = load_file(tmp_path / "m.safetensors").values()
        assert cost.memory.weights == sum(x.numel() * x.element_size() for x in written)
    assert torch.equal(small.head.weight, small.table.weight)


MOVES: dict[str, Any] = {
    "copied": copy.deepcopy,
    "pickled": lambda model: pickle.loads(pickle.dumps(model)),
    "cast": lambda model: model.half().double(),
    "to another device": lambda model: model._apply(torch.clone),
    "without values": lambda model: model.to_empty(device="cpu"),
}


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("scheme", ["int8", "nf4"])
def test_a_packed_table_stays_tied(scheme: str, move: str) -> None:
    small, _ = quantize(Tied().eval(), scheme)
    values = small.state_dict()
    moved = MOVES[move](small)
    moved.load_state_dict(values)
    for name, tensor in moved.table.tensors().items():
        assert moved.head.get_buffer(name) is tensor
    expected = values["table.codes"]
    assert torch.equal(moved.head.codes, expected)
    assert {x.dtype for x in moved.table.tensors().values()} == {
        x.dtype for key, x in values.items() if key.startswith("table.")
    }


@pytest.mark.parametrize("scheme", ["int8", "nf4"])
def test_a_packed_table_comes_back_tied(scheme: str, tmp_path: Path) -> None:
    dense, ids = Tied().eval(), torch.arange(5)[None]
    small, report = quantize(dense, scheme)
    for model, said in ((dense, report.bytes_before), (small, report.bytes_after)):
        file = effformer.save_weights(model, tmp_path / f"{type(model.head).__name__}.safetensors")
        assert file_bytes(load_file(file)) == said
    back = restore(Tied(), file)
    assert back.head.codes is back.table.codes
    assert torch.equal(back(ids), small(ids))
    plain = dequantize(back)
    assert plain.head.weight is plain.table.weight
    assert torch.equal(plain(ids), small(ids))


def test_what_hangs_on_a_layer_stays() -> None:
    seen: list[str] = []
    layer = nn.Linear(32, 32)
    layer.rank_of_user = 3
    handle = layer.register_forward_hook(lambda m, x, y: seen.append("after") or 2 * y)
    layer.register_forward_pre_hook(lambda m, x: seen.append("before"))
    layer.register_full_backward_hook(lambda m, x, y: seen.append("backward"))
    layer.weight.requires_grad_(False)
    assert layer.bias is not None
    layer.bias.requires_grad_(False)
    model = nn.Sequential(nn.Linear(32, 32), layer.eval())
    before = model(X)
    seen.clear()
    report = quantize_(model, "int8", inputs=X)
    assert report.output_error is not None
    assert report.output_error < 0.05
    seen.clear()
    y = model(X.requires_grad_())
    y.sum().backward()
    assert seen == ["before", "after", "backward"]
    assert_close(y, before, rtol=0, atol=0.05)
    assert (model[0].training, model[1].training) == (True, False)
    assert model[1].rank_of_user == 3
    assert not model[1].bias.requires_grad
    back = dequantize(model)
    assert [p.requires_grad for p in back.parameters()] == [True, True, False, False]
    assert back[1].rank_of_user == 3
    handle.remove()
    assert_close(2 * model(X), y, rtol=1e-5, atol=1e-5)


def own_forward(layer: nn.Linear) -> None:
    layer.forward = lambda x: x  # type: ignore[method-assign]


def weight_norm(layer: nn.Linear) -> None:
    weight = layer.weight
    del layer.weight
    layer.raw, layer.weight = nn.Parameter(weight.detach()), weight.detach()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (own_forward, "it has a forward of its own"),
        (weight_norm, "its weight is computed in every call"),
        (lambda m: m.register_buffer("more", torch.ones(1)), "more than a weight and a bias"),
        (lambda m: m.add_module("adapter", nn.Linear(32, 2)), "more than a weight and a bias"),
        (lambda m: m.register_state_dict_post_hook(lambda *a: None), "hooks of its state dict"),
    ],
)
def test_a_layer_that_does_more_is_kept_and_said(change: Any, reason: str) -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    change(model[1])
    small, report = quantize(model, "int8", "?")
    assert "1" not in [layer.name for layer in report.layers]
    assert any(kept.name == "1" and reason in kept.reason for kept in report.kept)
    assert type(small[1]) is nn.Linear


def test_an_optimized_copy_keeps_hooked_layers() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)).eval()
    model[1].register_forward_hook(lambda m, x, y: 2 * y)
    with torch.inference_mode():
        assert_close(optimize(model)(X.detach()), model(X.detach()), rtol=1e-5, atol=1e-5)


def test_a_compiled_model_is_timed_as_compiled() -> None:
    whole = torch.compile(nn.Linear(32, 32), backend="eager")
    parts = nn.Sequential(nn.Linear(32, 32))
    parts[0].compile(backend="eager")
    for model, form in ((whole, True), (parts, True), (nn.Linear(32, 32), False)):
        timed = latency(model, X.detach(), runs=1, warmup=1)
        assert (timed.form == "compiled") is form
        assert ("compiled" if form else "eager") in str(timed)
