"""Gated unit with a convolution over the grid: neighbours, frames, front tokens, refusals."""

from __future__ import annotations

import pytest
import torch
from effformer.models.layouts.sana import MIX_FFN
from torch import nn
from torch.nn import functional as F

import effformer
from effformer.checks import CapabilityError
from effformer.context import Context, Packing, Stream
from effformer.ffn import GLUMBConv
from effformer.site import Site

DIM = 12


def make(**options: object) -> GLUMBConv:
    part = GLUMBConv(GLUMBConv.Config.from_dict(options), Site(dim=DIM)).eval()
    for p in part.parameters():
        nn.init.normal_(p, std=0.5)
    return part


def test_equation() -> None:
    part, x = make(), torch.randn(2, 20, DIM)
    image = F.silu(part.fc1(x)).transpose(1, 2).unflatten(2, (4, 5))
    h = F.conv2d(image, part.conv.weight, part.conv.bias, padding=1, groups=60)
    value, gate = h.flatten(2).transpose(1, 2).chunk(2, dim=-1)
    torch.testing.assert_close(part(x, Context(grid=(4, 5))), part.fc2(value * F.silu(gate)))


def test_a_token_sees_its_neighbours_only() -> None:
    part, x = make(), torch.randn(1, 25, DIM)
    other = x.clone()
    other[:, 12] += 1  # the middle of 5 x 5
    grid = Context(grid=(5, 5))
    changed = (part(x, grid) != part(other, grid)).any(-1).reshape(5, 5)
    expected = torch.zeros(5, 5, dtype=torch.bool)
    expected[1:4, 1:4] = True
    assert torch.equal(changed, expected)


def test_frames_and_front_tokens_stand_alone() -> None:
    part, x = make(), torch.randn(2, 2 + 24, DIM)
    out = part(x, Context(grid=(2, 3, 4)))
    for start in (2, 14):
        frame = x[:, start : start + 12]
        torch.testing.assert_close(out[:, start : start + 12], part(frame, Context(grid=(3, 4))))
    for i in range(2):
        torch.testing.assert_close(out[:, i : i + 1], part(x[:, i : i + 1], Context(grid=(1, 1))))


@pytest.mark.parametrize("attn", ["sana", "softmax"])
def test_models_with_a_grid_take_it(attn: str) -> None:
    for name in ("dit-nano", "vit-nano"):
        model = effformer.build_model(name, attn=attn, ffn="glumbconv")
        model(**model.example_inputs(2)).sum().backward()


def test_models_without_a_grid_refuse_it() -> None:
    with pytest.raises(CapabilityError, match=r"'glumbconv' needs a token grid.*choices: .*mlp"):
        effformer.build_model("bert-tiny", ffn="glumbconv")


def test_context_that_it_cannot_honour() -> None:
    part, x = make(), torch.randn(1, 6, DIM)
    mask = torch.ones(1, 6, dtype=torch.bool)
    for more in ({"mask": mask}, {"packing": Packing.from_mask(mask)}, {"stream": Stream({})}):
        with pytest.raises(CapabilityError, match=rf"cannot honour {next(iter(more))}; .*mlp"):
            part(x, Context(grid=(2, 3), **more))
    for grid in (None, (6,)):
        with pytest.raises(CapabilityError, match=r"needs ctx\.grid with rows and columns"):
            part(x, Context(grid=grid))
    with pytest.raises(ValueError, match=r"grid \(3, 3\) does not fit 6 tokens"):
        part(x, Context(grid=(3, 3)))
    with pytest.raises(ValueError, match=r"kernel must be one of 1, 3, 5, \.\.\., got 4"):
        GLUMBConv.Config(kernel=4)


def test_library_keys_round_trip() -> None:
    part, other = make(), make()
    theirs = MIX_FFN.from_ours(dict(part.state_dict()), None)
    assert theirs["conv_point.weight"].shape == (DIM, 30, 1, 1)
    effformer.load_weights(other, theirs, MIX_FFN)
    torch.testing.assert_close(dict(other.state_dict()), dict(part.state_dict()))
