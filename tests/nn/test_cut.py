from __future__ import annotations

import pytest
import torch
from torch import nn

from effformer.context import Context
from effformer.ffn import MLP
from effformer.nn.cut import Forms, cut_linear, twin
from effformer.site import Site


def _mlp() -> MLP:
    torch.manual_seed(0)
    return MLP(MLP.Config(hidden=12), Site(dim=6)).eval()


def test_a_cut_layer_has_rows_or_columns_of_the_whole() -> None:
    linear, index = nn.Linear(5, 4), torch.tensor([2, 0])
    rows, columns = cut_linear(linear, rows=index), cut_linear(linear, columns=index)
    x = torch.randn(3, 5)
    torch.testing.assert_close(rows(x), linear(x)[:, index])
    expected = x[:, index] @ linear.weight[:, index].T + linear.bias
    torch.testing.assert_close(columns(x[:, index]), expected)
    assert (rows.in_features, rows.out_features) == (5, 2)
    assert (columns.in_features, columns.out_features) == (2, 4)
    assert linear.weight.shape == (4, 5)
    assert not list(rows.parameters())


def test_gradients_reach_the_whole_weights() -> None:
    mlp, x = _mlp(), torch.randn(1, 2, 6)
    mlp.select(torch.tensor([1, 5]))(x).sum().backward()
    assert mlp.fc1.weight.grad is not None
    assert mlp.fc1.weight.grad.any(dim=1).nonzero().flatten().tolist() == [1, 5]


def test_a_twin_has_no_hooks_and_leaves_the_original_alone() -> None:
    seen = []
    mlp = _mlp()
    mlp.register_forward_hook(lambda *args: seen.append(args))
    other = twin(mlp)
    other(torch.randn(1, 2, 6))
    other.fc1 = nn.Linear(6, 3)
    assert not seen
    assert mlp.fc1.out_features == 12


@torch.no_grad()
def test_as_many_forms_are_kept_as_wanted() -> None:
    mlp, forms = _mlp(), Forms(limit=2)
    patterns = [
        torch.tensor(p) for p in ([True, False, False], [True, True, False], [True, False, True])
    ]
    made = [forms.form(mlp, p) for p in patterns]
    assert forms.form(mlp, patterns[2]) is made[2]
    assert forms.form(mlp, patterns[1]) is made[1]
    assert forms.form(mlp, patterns[0]) is not made[0]
    assert forms.form(mlp, torch.tensor([True] * 3)) is mlp


@torch.no_grad()
def test_changed_weights_are_noticed() -> None:
    mlp, forms, x = _mlp(), Forms(), torch.randn(2, 3, 6)
    ctx = Context(width=torch.tensor([[1.0, 0, 1], [1, 1, 0]]))
    for change in (lambda: None, lambda: mlp.fc1.weight.mul_(2), lambda: mlp.double().float()):
        change()
        torch.testing.assert_close(forms.run(mlp, x, ctx), mlp(x, ctx))


@pytest.mark.parametrize("batch", [1, 4])
@torch.no_grad()
def test_layers_that_are_no_plain_matrices_multiply(batch: int) -> None:
    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    mlp = _mlp()
    mlp.fc1 = Doubled(6, 12)
    forms, x = Forms(), torch.randn(batch, 3, 6)
    ctx = Context(width=torch.tensor([[1.0, 0, 1]]).expand(batch, -1))
    torch.testing.assert_close(forms.run(mlp, x, ctx), mlp(x, ctx), rtol=0, atol=0)
    assert not forms._kept
