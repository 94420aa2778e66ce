from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from effformer.compress import prune, quantize, quantize_, recording
from effformer.compress.quant.calibrate import SAMPLE, TIMES, Seen, observe
from effformer.compress.samples import batches
from torch import Tensor, nn

import effformer
from effformer.train import Dataset

WANTS = ("second", "mean", "peak", "times", "range", "sample")


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 8)).eval()


def test_statistics_are_those_of_the_definition() -> None:
    torch.manual_seed(0)
    x, t = torch.randn(6, 5, 12), torch.tensor([0.01, 0.2, 0.2, 0.6, 0.99, 1.0])
    seen = Seen(12, WANTS)
    seen.add(x, t)
    rows = x.flatten(0, 1)
    assert seen.tokens == 30
    torch.testing.assert_close(seen.second, rows.t() @ rows)
    torch.testing.assert_close(seen.mean, rows.abs().mean(0))
    torch.testing.assert_close(seen.peak, rows.abs().amax(0))
    assert seen.times is not None
    torch.testing.assert_close(seen.times[1], x[1:3].abs().amax((0, 1)))
    torch.testing.assert_close(seen.times[TIMES - 1], x[4:].abs().amax((0, 1)))
    assert len(seen.saliences()) == 4
    assert seen.sample is not None
    assert torch.equal(seen.sample.sort(0).values, rows.sort(0).values)


@pytest.mark.parametrize("size", [1, 7, 64])
def test_statistics_do_not_hang_on_the_cut_into_batches(size: int) -> None:
    torch.manual_seed(1)
    x, t = torch.randn(64, 9, 8), torch.randint(0, 900, (64,))
    whole, parts = Seen(8, WANTS), Seen(8, WANTS)
    whole.add(x, t)
    for start in range(0, 64, size):
        parts.add(x[start : start + size], t[start : start + size])
    for name in ("peak", "times", "sample"):
        assert torch.equal(getattr(parts, name), getattr(whole, name)), name
    assert len(whole.sample) == SAMPLE  # type: ignore[arg-type]
    assert whole.end == parts.end == 1024
    torch.testing.assert_close(parts.second, whole.second)
    torch.testing.assert_close(parts.mean, whole.mean)
    assert parts.histogram is not None
    assert whole.histogram is not None
    assert torch.equal(parts.histogram.counts, whole.histogram.counts)


def test_scaled_and_mapped_statistics_are_those_of_other_inputs() -> None:
    torch.manual_seed(2)
    x, s = torch.randn(40, 6), torch.rand(6) + 0.5
    turn = torch.linalg.qr(torch.randn(6, 6)).Q
    seen = Seen(6, WANTS)
    seen.add(x)
    for made, inputs, names in (
        (seen.scaled(s), x / s, ("second", "mean", "peak", "sample")),
        (seen.mapped(lambda rows: rows @ turn), x @ turn, ("second", "sample")),
    ):
        direct = Seen(6, WANTS)
        direct.add(inputs)
        for name in names:
            torch.testing.assert_close(getattr(made, name), getattr(direct, name))


def test_memory_does_not_grow_with_the_number_of_samples() -> None:
    seen = Seen(16, WANTS)

    def size() -> int:
        held = [x for x in vars(seen).values() if isinstance(x, Tensor)]
        return sum(x.numel() for x in [*held, seen.histogram.counts])  # type: ignore[union-attr]

    seen.add(torch.randn(50, 16, 16), torch.rand(50))
    first = size()
    for _ in range(5):
        seen.add(100 * torch.randn(50, 16, 16), 1000 * torch.rand(50))
    assert size() == first


def _seen(model: nn.Module, layers: list[nn.Module], data: Any) -> dict[nn.Module, Any]:
    """Second moments of all layers, over all passes."""
    wants: Any = {layer: ["second"] for layer in layers}
    passes = observe(model, [[layer] for layer in layers], wants, data, where="here")
    return {layer: seen for one in passes for layer, seen in one.items()}


def test_every_shape_of_data_gives_the_same_statistics() -> None:
    model = small()
    x = torch.randn(40, 32)
    named: dict[str, Any] = {"input": x, "unused": torch.zeros(40)}
    forms = [
        named, {"x": x}, Dataset("set", named), x, (x,), [x[:7], x[7:]], [{"x": x[:9]}, {"x": x[9:]}],
        iter([{"x": x[:9]}, {"x": x[9:]}]),
    ]  # fmt: skip
    with recording(model) as record:
        model(x[:20])
        model(input=x[20:])
    for data in (*forms, record):
        seen = _seen(model, [model[0]], data)[model[0]]
        assert seen.tokens == 40
        torch.testing.assert_close(seen.second, x.t() @ x)


def test_verbs_take_data_sets() -> None:
    data = Dataset("set", {"x": torch.randn(40, 32)})
    _, report = quantize(small(), "smoothquant", data=data)
    assert report.output_error is not None
    vit = effformer.build_model("vit-nano", depth=1)
    _, pruned = prune(vit, {"keep": 0.5}, data=Dataset("images", vit.example_inputs(4)))
    assert pruned.output_error is not None


def test_layers_that_are_called_by_keyword_and_several_times_are_seen() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.fc(input=x))

    model, x = Twice(), torch.randn(5, 8)
    seen = _seen(model, [model.fc], x)[model.fc]
    inner = model.fc(x).detach()
    assert seen.tokens == 10
    torch.testing.assert_close(seen.second, x.t() @ x + inner.t() @ inner)


def test_large_statistics_take_several_passes_and_are_the_same() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 4), nn.Linear(4, 256), nn.Linear(256, 2))
    passes, x = [], torch.randn(4, 256)

    class Data:
        def __iter__(self) -> Any:
            passes.append(1)
            return iter([x])

    found = _seen(model, list(model), Data())
    assert len(passes) > 1
    once = _seen(model, list(model), itertools.chain([x]))
    for layer in model:
        assert torch.equal(found[layer].second, once[layer].second)  # type: ignore[arg-type]


def test_a_record_is_a_uniform_choice_of_bounded_size() -> None:
    model = nn.Linear(1, 1)
    with recording(model, 8) as record:
        for i in range(400):
            model(torch.full((1, 1), float(i)))
    kept = sorted(float(call.args[0]) for call in record)
    assert len(kept) == 8
    assert len(set(kept)) == 8
    assert kept[0] < 200 < kept[-1]
    model(torch.zeros(1, 1))
    assert record.offered == 400


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (None, "no calibration data; give data="),
        ({}, "no samples"),
        ([], "no samples"),
        ({"x": torch.zeros(0, 32)}, "no samples"),
        ({"x": torch.zeros(3, 32), "y": torch.zeros(2)}, "one row for every sample"),
        ({"x": torch.full((3, 32), float("nan"))}, "96 of 96 values of input are NaN or infinite"),
        ({"x": torch.zeros(3, 31)}, "batch 0 does not fit the model"),
        (7, "data: expected .* got 7"),
        ({"other": torch.zeros(3, 32)}, "missing a required argument"),
    ],
)
def test_data_that_cannot_be_used(data: Any, words: str) -> None:
    model = small()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises((ValueError, TypeError), match=words) as refusal:
        quantize_(model, "gptq", data=data)
    assert "\n" not in str(refusal.value)
    assert all(type(m) is not nn.Module for m in model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not hasattr(model, "transforms")


def test_a_layer_that_overflows_is_named() -> None:
    model = small()
    model[0].weight.data.fill_(3e38)
    with pytest.raises(ValueError, match=r"'2' become NaN or infinite"):
        quantize(model, "gptq", data=torch.full((4, 32), 3e38), skip="0")


def test_tensors_are_cut_along_their_samples() -> None:
    pieces = list(batches({"x": torch.zeros(70, 2), "scale": torch.tensor(2.0)}, where="here"))
    assert [len(piece["x"]) for piece in pieces] == [32, 32, 6]  # type: ignore[call-overload]
    assert all(piece["scale"] == 2 for piece in pieces)  # type: ignore[call-overload]


def test_wrapped_models_are_calibrated_as_they_are_without() -> None:
    model = effformer.build_model("sit-nano", input_size=8, channels=1, patch=2).eval()
    torch.nn.init.normal_(model.final.linear.weight)  # zero until it is trained
    data = model.example_inputs(3)
    plain, _ = quantize(model, {"name": "gptq", "block": 16}, data=data)
    wrapped, _ = quantize(
        torch.compile(model, backend="eager"), {"name": "gptq", "block": 16}, data=data
    )
    assert torch.equal(wrapped(**data), plain(**data))
