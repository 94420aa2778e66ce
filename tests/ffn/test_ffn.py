"""Position-wise networks: equations, widths, shares, bad configs."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from effformer.ffn import GEGLU, MLP, FFNConfig, SwiGLU
from effformer.site import Site

SITE = Site(dim=12)


def test_mlp() -> None:
    net, x = MLP(MLP.Config(act="relu"), SITE), torch.randn(2, 5, 12)
    y = F.linear(F.relu(F.linear(x, net.fc1.weight, net.fc1.bias)), net.fc2.weight, net.fc2.bias)
    torch.testing.assert_close(net(x), y)


@pytest.mark.parametrize(("kind", "act"), [(SwiGLU, F.silu), (GEGLU, F.gelu)])
def test_gated(kind: type[SwiGLU] | type[GEGLU], act: object) -> None:
    net, x = kind(kind.Config(), SITE), torch.randn(2, 5, 12)
    gate, value = net.fc1(x).split(net.hidden, dim=-1)
    assert callable(act)
    torch.testing.assert_close(net(x), net.fc2(act(gate) * value))


def test_a_gated_unit_has_the_parameters_of_an_mlp() -> None:
    site = Site(dim=48)
    counts = [
        sum(p.numel() for p in kind(config, site).parameters())
        for kind, config in ((MLP, MLP.Config(bias=False)), (SwiGLU, SwiGLU.Config(bias=False)))
    ]
    assert counts[0] == counts[1]


@pytest.mark.parametrize(
    ("config", "width"),
    [(FFNConfig(), 48), (FFNConfig(ratio=2.5), 30), (FFNConfig(ratio=2.0, hidden=7), 7)],
)
def test_width(config: FFNConfig, width: int) -> None:
    assert config.width(12) == width


def test_scaled_keeps_everything_but_the_width() -> None:
    half = MLP.Config(hidden=10, act="silu", bias=False).scaled(0.5)
    assert half == MLP.Config(ratio=2.0, hidden=5, act="silu", bias=False)
    assert MLP.Config(ratio=4.0).scaled(0.5).width(12) == 24


@pytest.mark.parametrize("kind", [MLP, SwiGLU, GEGLU])
def test_tokens_do_not_see_each_other(kind: type[MLP]) -> None:
    net, x = kind(kind.Config(), SITE), torch.randn(2, 5, 12)
    torch.testing.assert_close(net(x)[:, 2:3], net(x[:, 2:3]))


def test_dropout_only_in_training() -> None:
    net, x = MLP(MLP.Config(), Site(dim=12, dropout=0.5)), torch.randn(2, 50, 12)
    assert (net.train()(x) == 0).float().mean() > 0.3
    torch.testing.assert_close(net.eval()(x), net.fc2(net.act(net.fc1(x))))


def test_bad_configs() -> None:
    with pytest.raises(ValueError, match="ratio must be positive, got 0"):
        MLP.Config(ratio=0.0)
    with pytest.raises(ValueError, match="hidden must be at least 1, got 0"):
        MLP.Config(hidden=0)
    with pytest.raises(ValueError, match="unknown value 'gleu'; did you mean 'gelu'"):
        MLP.Config.from_dict({"act": "gleu"})
