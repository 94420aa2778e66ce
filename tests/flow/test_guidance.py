from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from effformer.flow import Guidance, Weak, forward_with_cfg, guided, reference


class Net(nn.Module):
    def __init__(self, channels: int = 4, out: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out, 3, padding=1)
        self.label = nn.Embedding(6, out)
        self.batches: list[int] = []

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        self.batches.append(len(x))
        label = self.label(y) * (1 + t[:, None].to(x))
        return torch.tanh(self.conv(x) + label[:, :, None, None])


@pytest.fixture
def case() -> tuple[Net, Tensor, Tensor, Tensor]:
    return Net(), torch.randn(3, 4, 5, 5), torch.rand(3), torch.tensor([0, 3, 2])


@pytest.mark.parametrize("channels", ["all", 1, 3])
@pytest.mark.parametrize("interval", [None, (0.2, 0.7)])
def test_batched_equals_two_passes_forward_and_backward(
    case: Any, channels: Any, interval: Any
) -> None:
    net, x, t, y = case
    net, x = net.double(), x.double()  # a batch of another size is summed in another order
    outs, grads = [], []
    for batched in (True, False):
        field = guided(
            net, 3.0, null={"y": 5}, channels=channels, interval=interval, batched=batched
        )
        out = field(x, t, y=y)
        outs.append(out)
        grads.append(torch.autograd.grad(out.square().sum(), list(net.parameters())))
    torch.testing.assert_close(outs[0], outs[1])
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_equals_the_reference(case: Any, channels: int) -> None:
    net, x, t, y = case
    ours = guided(net, 2.5, null={"y": 5}, channels=channels)(x, t, y=y)
    slow = reference.guide(net(x, t, y), net(x, t, torch.full_like(y, 5)), 2.5, channels)
    torch.testing.assert_close(ours, slow)


def test_scale_one_is_conditional_and_zero_unconditional(case: Any) -> None:
    net, x, t, y = case
    cond, null = net(x, t, y), net(x, t, torch.full_like(y, 5))
    for channels in ("all", 3):
        at = {
            s: guided(net, s, null={"y": 5}, channels=channels)(x, t, y=y)  # type: ignore[arg-type]
            for s in (0.0, 1.0)
        }
        torch.testing.assert_close(at[1.0], cond, rtol=0, atol=0)
        torch.testing.assert_close(at[0.0][:, :3], null[:, :3])
        torch.testing.assert_close(at[0.0][:, 3:], (null if channels == "all" else cond)[:, 3:])


def test_interval_guides_inside_and_saves_the_pass_outside(case: Any) -> None:
    net, x, _, y = case
    field = guided(net, 3.0, null={"y": 5}, interval=(0.2, 0.7))
    t = torch.tensor([0.1, 0.5, 0.9])
    out, free = field(x, t, y=y), guided(net, 3.0, null={"y": 5})(x, t, y=y)
    torch.testing.assert_close(out[1], free[1])
    torch.testing.assert_close(out[::2], net(x, t, y)[::2])
    net.batches.clear()
    field(x, 0.9, y=y)
    assert net.batches == [3]


def test_null_may_be_a_tensor_and_other_conditions_stay(case: Any) -> None:
    net, x, t, y = case

    def velocity(x: Tensor, t: Tensor, *, text: Tensor, y: Tensor, mode: str) -> Tensor:
        assert mode == "plain"
        assert len(text) == len(x) == len(y)
        return net(x, t, y) + text.mean((1, 2))[:, None, None, None]

    text, empty = torch.randn(3, 7, 2), torch.randn(7, 2)
    field = guided(velocity, 2.0, null={"text": empty})
    ours = field(x, t, text=text, y=y, mode="plain")
    cond = velocity(x, t, text=text, y=y, mode="plain")
    null = velocity(x, t, text=empty.expand(3, 7, 2), y=y, mode="plain")
    torch.testing.assert_close(ours, null + 2 * (cond - null))


def test_forward_with_cfg_quirks() -> None:
    net = Net(4, 8)
    x, t = torch.randn(4, 4, 5, 5), torch.tensor([7.0, 9.0, 7.0, 9.0])
    y = torch.tensor([1, 2, 5, 5])
    out = forward_with_cfg(net, x, t, 4.0, y=y)
    ignored = torch.cat([x[:2], torch.randn(2, 4, 5, 5)])
    torch.testing.assert_close(forward_with_cfg(net, ignored, t, 4.0, y=y), out)
    both = net(torch.cat([x[:2], x[:2]]), t, y)
    mixed = both[2:, :3] + 4 * (both[:2, :3] - both[2:, :3])
    torch.testing.assert_close(out[:2, :3], mixed)
    torch.testing.assert_close(out[2:, :3], mixed)
    torch.testing.assert_close(out[:, 3:], both[:, 3:])
    everything = forward_with_cfg(net, x, t, 4.0, channels="all", y=y)
    torch.testing.assert_close(everything[:2, 3], both[2:, 3] + 4 * (both[:2, 3] - both[2:, 3]))
    torch.testing.assert_close(everything[:, 4:], both[:, 4:])
    # scale 1 is the conditional pass on every channel
    torch.testing.assert_close(forward_with_cfg(net, x, t, 1.0, y=y)[:2], both[:2])


def test_forward_with_cfg_lets_the_first_time_decide() -> None:
    net = Net(4, 8)
    x, y = torch.randn(4, 4, 5, 5), torch.tensor([1, 2, 5, 5])
    early, late = torch.tensor([0.1, 0.9] * 2), torch.tensor([0.9, 0.1] * 2)
    free = forward_with_cfg(net, x, late, 4.0, y=y)
    inside = forward_with_cfg(net, x, late, 4.0, interval=(0.3, 1.0), y=y)
    torch.testing.assert_close(inside, free, rtol=0, atol=0)
    outside = forward_with_cfg(net, x, early, 4.0, interval=(0.3, 1.0), y=y)
    both = net(torch.cat([x[:2], x[:2]]), early, y)
    torch.testing.assert_close(outside[:2, :3], both[:2, :3], rtol=0, atol=0)
    torch.testing.assert_close(outside[2:, :3], both[:2, :3], rtol=0, atol=0)
    torch.testing.assert_close(outside[:, 3:], both[:, 3:], rtol=0, atol=0)


def test_the_quirk_and_guided_agree_on_the_conditional_half() -> None:
    net = Net()
    x, t, y = torch.randn(2, 4, 5, 5), torch.rand(2), torch.tensor([1, 2])
    cat = torch.cat
    quirk = forward_with_cfg(net, cat([x, x]), cat([t, t]), 3.0, y=cat([y, torch.full_like(y, 5)]))
    torch.testing.assert_close(guided(net, 3.0, null={"y": 5}, channels=3)(x, t, y=y), quirk[:2])


def test_errors(case: Any) -> None:
    net, x, t, y = case
    with pytest.raises(ValueError, match=r"did you mean 'y'|choices: y"):
        guided(net, 2.0, null={"Y": 5})(x, t, y=y)
    with pytest.raises(TypeError, match="'y' is a int, not a tensor"):
        guided(net, 2.0, null={"y": 5})(x, t, y=3)
    with pytest.raises(ValueError, match="null is empty"):
        Guidance(2.0, {})
    with pytest.raises(ValueError, match="channels must be at least 1, got 0"):
        Guidance(2.0, {"y": 5}, channels=0)
    with pytest.raises(ValueError, match="is empty"):
        Guidance(2.0, {"y": 5}, interval=(0.7, 0.2))
    with pytest.raises(ValueError, match="5 guided channels, but x has 4"):
        guided(net, 2.0, null={"y": 5}, channels=5)(x, t, y=y)
    with pytest.raises(ValueError, match="even batch"):
        forward_with_cfg(net, x, t, 2.0, y=y)


class Skipping(Net):
    """A network that is weaker without one of its parts."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor, skip: bool = False) -> Tensor:
        return super().forward(x, t, y) * (0.5 if skip else 1.0)


@pytest.mark.parametrize("channels", ["all", 2])
@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("interval", [None, (0.2, 0.7)])
@torch.no_grad()
def test_guidance_away_from_a_weaker_network(channels: Any, scale: float, interval: Any) -> None:
    net, x, y = Skipping(), torch.randn(3, 4, 5, 5), torch.tensor([0, 3, 2])
    t = torch.tensor([0.1, 0.5, 0.9])
    weak = Weak(2.5, {"skip": True}, interval=interval)
    out = guided(net, scale, null={"y": 5}, channels=channels, weak=weak)(x, t, y=y)
    v, null = net(x, t, y), net(x, t, torch.full_like(y, 5))
    inside = torch.tensor([interval is None, True, interval is None])[:, None, None, None]
    expected = null + scale * (v - null) + torch.where(inside, 2.5 * 0.5 * v, 0.0)
    n = 4 if channels == "all" else channels
    torch.testing.assert_close(out[:, :n], expected[:, :n])
    torch.testing.assert_close(out[:, n:], v[:, n:])


def test_a_weaker_network_is_asked_only_where_it_counts() -> None:
    net, x, y = Skipping(), torch.randn(1, 4, 5, 5), torch.tensor([2])
    field = guided(net, 1.0, null={"y": 5}, weak=Weak(2.5, {"skip": True}, interval=(0.2, 0.7)))
    field(x, 0.1, y=y)
    assert net.batches == [1]
    field(x, 0.2, y=y)
    assert net.batches == [1, 1, 1]
    with pytest.raises(ValueError, match="nothing makes the network weaker"):
        Weak(2.5, {})
    with pytest.raises(ValueError, match=r"interval \(0.7, 0.2\) is empty"):
        Weak(2.5, {"skip": True}, interval=(0.7, 0.2))


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("channels", ["all", 2])
def test_half_precision_answers_are_mixed_in_float32(channels: Any, batched: bool) -> None:
    v_cond, v_null = (torch.randn(4, 3, 5).bfloat16() for _ in range(2))

    def network(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        assert x.dtype == torch.bfloat16
        return torch.cat([v_cond, v_null])[y]

    y, x = torch.arange(4), torch.zeros(4, 3, 5, dtype=torch.bfloat16)
    null = {"y": torch.arange(4, 8)}
    mixed = v_null.double() + 7.3 * (v_cond.double() - v_null.double())
    if channels != "all":
        mixed[:, channels:] = v_cond[:, channels:].double()
    rule: dict[str, Any] = {"null": null, "channels": channels, "batched": batched}
    for scale, interval, expected in (
        (7.3, None, mixed), (7.3, (0.4, 0.6), mixed), (7.3, (0.6, 1.0), v_cond.double()),
        (1.0, None, v_cond.double()),
    ):  # fmt: skip
        out = guided(network, scale, interval=interval, **rule)(x, 0.5, y=y)
        assert out.dtype == torch.float32
        torch.testing.assert_close(out.double(), expected, rtol=1e-6, atol=1e-6)
    both = torch.cat([y, null["y"]])
    out = forward_with_cfg(network, torch.cat([x, x]), both * 0.0, 7.3, channels=channels, y=both)
    torch.testing.assert_close(out[:4].double(), mixed, rtol=1e-6, atol=1e-6)
