"""Channel mixers of LMUFormer."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from effformer import registry
from effformer.checks import CapabilityError
from effformer.context import Context, Packing
from effformer.ffn import ConvChannel, SpikingConvChannel
from effformer.nn.lif import LIF
from effformer.site import Site

SITE = Site(dim=6)


def spiking() -> SpikingConvChannel:
    config = SpikingConvChannel.Config(ratio=3.0, lif=LIF.Config(threshold=0.4))
    part = SpikingConvChannel(config, SITE)
    with torch.no_grad():
        for _ in range(30):
            part(torch.randn(4, 20, 6))
    return part.eval()


@pytest.mark.parametrize("training", [True, False])
def test_it_is_convolutions_and_a_norm(training: bool) -> None:
    part = ConvChannel(ConvChannel.Config(hidden=10), SITE).train(training)
    x = torch.randn(3, 7, 6)
    mean, variance = part.norm.running_mean.clone(), part.norm.running_var.clone()
    h = F.conv1d(x.transpose(1, 2), part.fc1.weight[..., None], part.fc1.bias)
    h = F.batch_norm(h, mean, variance, part.norm.weight, part.norm.bias, training=training)
    h = F.conv1d(F.gelu(h), part.fc2.weight[..., None], part.fc2.bias)
    torch.testing.assert_close(part(x), h.transpose(1, 2))
    torch.testing.assert_close(part.norm.running_mean, mean)
    torch.testing.assert_close(part.norm.running_var, variance)


def test_the_spiking_form_written_out() -> None:
    part, x = spiking(), torch.randn(3, 12, 6)
    spikes, _ = LIF(LIF.Config(threshold=0.4))(part.norm(part.fc1(x)))
    assert 0.01 < spikes.mean() < 0.99
    torch.testing.assert_close(part(x), part.fc2(spikes))


def test_the_spiking_form_streams_and_is_causal() -> None:
    part, x = spiking().double(), torch.randn(2, 12, 6, dtype=torch.float64)
    whole, state, pieces = part(x), part.init_state(2, like=x), []
    for piece in x.split([1, 7, 4], dim=1):
        out, state = part.step(piece, state)
        pieces.append(out)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole)
    changed = x.clone()
    changed[:, 5:] += 2
    torch.testing.assert_close(part(changed)[:, :5], whole[:, :5], rtol=0, atol=0)
    assert not torch.allclose(part(changed)[:, 5:], whole[:, 5:])
    assert registry.ffn.names(streaming=True) == ["spiking-conv-channel"]


def test_masks_and_packed_rows_are_refused() -> None:
    part, x, mask = spiking(), torch.randn(1, 5, 6), torch.ones(1, 5, dtype=torch.bool)
    words = r"carries potentials .* cannot honour {}; choices that can: .*conv-channel.*mlp"
    with pytest.raises(CapabilityError, match=words.format("mask")) as caught:
        part(x, Context(mask=mask))
    offered = str(caught.value).rpartition(": ")[2].split(", ")
    assert "glumbconv" not in offered
    assert "spiking-conv-channel" not in offered
    with pytest.raises(CapabilityError, match=words.format("packing")):
        part(x, Context(packing=Packing.from_mask(mask)))
