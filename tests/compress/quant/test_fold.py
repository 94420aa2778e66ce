from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from effformer.compress import quantize, quantize_
from effformer.compress.quant.fold import Point, points
from torch import Tensor, nn
from torch.nn import functional as F

import effformer
from effformer.calls import bind, evaluating


def stirred(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.double().eval()


def divided(model: nn.Module, call: effformer.calls.Call) -> tuple[float, list[Point]]:
    """Relative change of the output when every point is divided and its readers are multiplied."""
    with evaluating(model):
        before = call.run(model)
    found = points(model, call)
    for point in found:
        s = torch.rand(point.readers[0].in_features).double() * 3 + 0.2
        point.divide(s)
        for reader in point.readers:
            reader.weight.data *= s
    with evaluating(model):
        after = call.run(model)
    pairs = zip(after, before, strict=True)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs), found


@pytest.mark.parametrize(
    ("preset", "changes", "count"),
    [
        ("dit-tiny", {}, 7),
        ("sit-tiny", {"block": "parallel"}, 7),
        ("sit-tiny", {"block": "macaron"}, 10),
        ("vit-tiny", {}, 8),
        ("mmdit-tiny", {}, 12),
        ("flux-tiny", {}, 7),
        ("dydit-tiny", {}, 7),
        ("bert-tiny", {}, 0),  # norms stand behind the sum, which is the residual stream
    ],
)
def test_norms_and_modulations_take_the_division_exactly(
    preset: str, changes: dict[str, str], count: int
) -> None:
    model = stirred(effformer.build_model(preset, **changes))
    inputs = {
        k: x.double() if x.is_floating_point() else x for k, x in model.example_inputs(2).items()
    }
    change, found = divided(model, bind(model, inputs, where="here"))
    assert len(found) == count
    assert change < 1e-10


class Block(nn.Module):
    """One norm and two readers, with a use of the tensor between them."""

    def __init__(self, use: Callable[[Block, Tensor], Tensor]) -> None:
        super().__init__()
        self.norm, self.a, self.b = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return self.a(h) + self.use(self, h)


@pytest.mark.parametrize(
    ("use", "able"),
    [
        (lambda m, h: m.b(h), True),
        (lambda m, h: m.b(h.contiguous()), True),
        (lambda m, h: h, False),
        (lambda m, h: m.b(h.relu()), False),
        (lambda m, h: m.b(h[:, :1]), False),
        (lambda m, h: m.a(h * 1), False),  # the reader sees something else, too
        (lambda m, h: F.linear(h, m.a.weight[:, :8]), False),
        (lambda m, h: F.linear(h, h.new_ones(8, 8)), False),
        (lambda m, h: h.add_(1.0), False),
        (lambda m, h: h.mean().expand(8), False),
    ],
)
def test_a_tensor_that_something_else_reads_stays(
    use: Callable[[Block, Tensor], Tensor], able: bool
) -> None:
    model = stirred(Block(use))
    call = bind(model, torch.randn(3, 4, 8).double(), where="here")
    change, found = divided(model, call)
    assert bool(found) is able
    assert change < 1e-10


class Modulated(nn.Module):
    """As diffusers writes it, with a row that may have a second use."""

    def __init__(self, shared: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8, elementwise_affine=False)
        self.rows, self.fc, self.shared = nn.Linear(5, 24), nn.Linear(8, 8), shared

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale, gate = self.rows(F.silu(c)).chunk(3, dim=1)
        h = self.norm(x) * (1 + scale[:, None]) + shift[:, None]
        y = x + gate[:, None] * self.fc(h)
        return y * scale[:, None] if self.shared else y


@pytest.mark.parametrize("shared", [False, True])
def test_modulations_of_other_libraries(shared: bool) -> None:
    model = stirred(Modulated(shared))
    inputs = (torch.randn(3, 4, 8).double(), torch.randn(3, 5).double())
    change, found = divided(model, bind(model, inputs, where="here"))
    assert len(found) == (0 if shared else 1)
    assert change < 1e-10


def test_folded_layers_keep_no_factor_and_compute_the_same() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 8)).eval()
    x = torch.randn(40, 16) * torch.linspace(0.1, 5, 16)
    spec = {"name": "smoothquant", "scheme": {"name": "w8a8", "inputs": "float"}}
    folded, report = quantize(model, spec, data=x)
    plain, other = quantize(model, spec | {"fold": False}, data=x)
    assert [one.layers[0].scheme for one in (report, other)] == [
        "smoothquant, folded",
        "smoothquant",
    ]
    assert "smooth" not in folded[1].tensors()
    assert "smooth" in plain[1].tensors()
    torch.testing.assert_close(folded(x), plain(x), rtol=1e-4, atol=1e-4)
    assert not torch.equal(folded[0].weight, model[0].weight)


def test_a_refusal_gives_norms_their_values_back() -> None:
    model = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 8), nn.Linear(8, 4)).eval()
    before = model[0].weight.detach().clone()
    model[2].weight.data[0, 0] = float("nan")
    x = torch.randn(40, 16)
    with pytest.raises(ValueError, match=r"2\.weight: 1 NaN"):
        quantize_(model, {"name": "smoothquant"}, data=x)
    assert torch.equal(model[0].weight, before)
