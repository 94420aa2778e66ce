"""Which lengths of a graph are numbers, and what it costs to ask."""

from __future__ import annotations

import subprocess
import sys

import torch
from torch import Tensor, nn

from effformer.nn.lengths import is_fixed


class Asks(nn.Module):
    """Adds what it knows of its length."""

    def forward(self, x: Tensor) -> Tensor:
        return x + (1 if is_fixed(x.shape[0]) else 2)


def test_lengths_that_a_graph_leaves_open() -> None:
    x, axes = torch.zeros(4), {"x": {0: torch.export.Dim("n", min=2, max=64)}}
    assert is_fixed(4)
    assert torch.export.export(Asks(), (x,)).module()(x)[0] == 1
    assert torch.export.export(Asks(), (x,), dynamic_shapes=axes).module()(torch.zeros(7))[0] == 2
    for dynamic, said in ((False, 1), (True, 2)):
        call = torch.compile(Asks(), backend="eager", dynamic=dynamic, fullgraph=True)
        assert call(torch.zeros(5 + dynamic))[0] == said


def test_running_a_model_loads_no_sympy() -> None:
    code = (
        "import sys, effformer; m = effformer.build_model('sit-nano', attn='flow').eval(); "
        "m(**m.example_inputs(1)); assert 'sympy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
