"""Leaky integrate-and-fire neurons, whose time axis is the token axis."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch._higher_order_ops.scan import scan

from effformer.config import Config as BaseConfig
from effformer.values import Positive, Range, Real

from .precision import widened

__all__ = ["LIF"]

_TOKENS = 256
"""Tokens whose potentials are gathered at once: few enough to be still in cache."""


class LIF(nn.Module):
    """Leaky integrate-and-fire neuron along the tokens, one per channel.

    With v the membrane potential, 0 before the first token (or ``reset``)::

        v' = v + (x - v) / tau           charge; decay_input=False: v' = v - v / tau + x
        s  = 1 if v' >= threshold else 0
        v  = (1 - s) v' + s reset        reset=None: v = v' - s threshold

    A spike has no derivative. Its gradient is the derivative of ``sigmoid(alpha (v' - threshold))``;
    with ``detach_reset`` no gradient passes through the reset. The loop and its backward pass (two
    operations per token) are one operator each, so that a compiled graph serves every number of
    tokens; an exported one holds a loop (ONNX: Scan).

    Args:
        config: the knobs.

    Example:
        >>> spikes, v = LIF(LIF.Config())(torch.full((1, 4, 1), 1.6))
        >>> spikes.flatten().tolist()
        [0.0, 1.0, 0.0, 1.0]

    Reference: SpikingJelly: An open-source machine learning infrastructure platform for spike-based
    intelligence, 2023, arXiv 2310.16620.
    """

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(BaseConfig):
        """Knobs of `LIF`.

        Attributes:
            tau: time constant in tokens, above 1.
            threshold: potential at which the neuron fires.
            reset: potential after a spike; None subtracts the threshold instead.
            decay_input: the input is divided by tau, too.
            detach_reset: no gradient passes through the reset.
            alpha: steepness of the surrogate gradient.
        """

        tau: Annotated[float, Range(1, above=True)] = 2.0
        threshold: Real = 1.0
        reset: Real | None = 0.0
        decay_input: bool = True
        detach_reset: bool = True
        alpha: Positive = 4.0

        def check(self) -> None:
            if self.threshold <= (self.reset or 0.0):
                raise ValueError(
                    f"lif: threshold must exceed the reset potential, got threshold={self.threshold}, "
                    f"reset={self.reset}"
                )

    def __init__(self, config: LIF.Config) -> None:
        super().__init__()
        self.config = config

    def init_state(self, batch: int, channels: int, *, like: Tensor) -> Tensor:
        """Potential (B, D) before the first token, in float32 at least."""
        return widened(like.new_full((batch, channels), self.config.reset or 0.0))

    def forward(self, x: Tensor, v: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Spikes of every token.

        Args:
            x: (B, N, ...) input.
            v: (B, ...) potential before the first token, None for the initial one.

        Returns:
            Spikes (B, N, ...), 0 or 1 in the dtype of x, and the potential (B, ...) after the last
            token, in float32 at least.
        """
        dtype, x = x.dtype, widened(x)
        if v is None:
            v = torch.full_like(x[:, 0], self.config.reset or 0.0)
        spikes, last = self._fired(x, widened(v))
        return spikes.to(dtype), last

    def _fired(self, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Potentials are sums over many tokens: x and v in float32 at least, and of one type."""
        if torch.compiler.is_exporting():
            return self.scanned(x, v)
        c = self.config
        spikes, last, _ = fire(
            x, v, c.tau, c.threshold, c.reset, c.decay_input, c.detach_reset, c.alpha
        )
        return spikes, last

    def scanned(self, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The loop as one operator, whose graph serves every number of tokens; inference only."""

        def one(v: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
            charged = _charge(token, v, self.config)
            spike = (charged >= self.config.threshold).to(token.dtype)
            return _reset(charged, spike, self.config), spike

        v, spikes = scan(one, v.contiguous(), x.transpose(0, 1).contiguous())
        return spikes.transpose(0, 1), v

    def extra_repr(self) -> str:
        return f"tau={self.config.tau:g}, threshold={self.config.threshold:g}"


def _charge(x: Tensor, v: Tensor, c: LIF.Config) -> Tensor:
    """Potential before firing."""
    above_rest = v - c.reset if c.reset else v
    if c.decay_input:
        return v + (x - above_rest) / c.tau
    return v - above_rest / c.tau + x


def _reset(charged: Tensor, spike: Tensor, c: LIF.Config) -> Tensor:
    """Potential after firing."""
    if c.reset is None:
        return charged - spike * c.threshold
    kept = (1 - spike) * charged
    return kept + spike * c.reset if c.reset else kept


def _settle(charged: Tensor, c: LIF.Config) -> Tensor:
    """`_reset` where the potential says itself who fires, in fewer passes."""
    fires = charged >= c.threshold
    if c.reset is None:
        return torch.where(fires, charged - c.threshold, charged)
    return charged.masked_fill(fires, c.reset)


@torch.library.custom_op("effformer::fire", mutates_args=())
def fire(
    x: Tensor, v: Tensor, tau: float, threshold: float, reset: float | None, decay_input: bool,
    detach_reset: bool, alpha: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The loop of `LIF`, whose knobs follow x and v.

    Returns:
        Spikes (B, N, ...), the potential (B, ...) after the last token, and the potentials
        (B, N, ...) before firing.
    """
    c = LIF.Config(tau=tau, threshold=threshold, reset=reset, decay_input=decay_input)
    charges, v = torch.empty_like(x), v.clone()
    for tokens, place in zip(x.split(_TOKENS, dim=1), charges.split(_TOKENS, dim=1), strict=True):
        charged = []
        for token in tokens.unbind(1):
            charged.append(_charge(token, v, c))
            v = _settle(charged[-1], c)
        place.copy_(torch.stack(charged, dim=1))
    return (charges >= threshold).to(x.dtype), v, charges


@fire.register_fake
def _(x: Tensor, v: Tensor, *knobs: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(v), torch.empty_like(x)


@torch.library.custom_op("effformer::fire_backward", mutates_args=())
def _fire_backward(
    grad_spikes: Tensor, grad_last: Tensor, charges: Tensor, tau: float, threshold: float,
    reset: float | None, detach_reset: bool, alpha: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The surrogate gradient of `fire` as a loop backward in time, and what reaches the potential
    before the first token.

    With G_t the gradient of v'_t and d_t the derivative of the surrogate,
    ``G_t = d_t g_t + (1 - 1 / tau) G_(t+1) dv_t / dv'_t``.
    """
    soft = torch.sigmoid(alpha * (charges - threshold))
    slope = alpha * soft * (1 - soft)
    spikes = (charges >= threshold).to(charges.dtype)
    if reset is None:
        kept = torch.ones_like(spikes) if detach_reset else 1 - threshold * slope
    else:
        kept = 1 - spikes
        if not detach_reset:
            kept = kept + (reset - charges) * slope
    direct, carry, leak, total = slope * grad_spikes, grad_last.clone(), 1 - 1 / tau, []
    for own, share in zip(reversed(direct.unbind(1)), reversed(kept.unbind(1)), strict=True):
        total.append(torch.addcmul(own, carry, share))
        carry = total[-1] * leak
    return torch.stack(total[::-1], dim=1), carry


@_fire_backward.register_fake
def _(
    grad_spikes: Tensor, grad_last: Tensor, charges: Tensor, *knobs: Any
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(charges), torch.empty_like(grad_last)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, _, *ctx.knobs = inputs
    ctx.save_for_backward(output[2])
    ctx.set_materialize_grads(True)


def _differentiate(
    ctx: Any, grad_spikes: Tensor, grad_last: Tensor, _: Tensor
) -> tuple[Tensor | None, ...]:
    tau, threshold, reset, decay_input, detach_reset, alpha = ctx.knobs
    total, carry = _fire_backward(
        grad_spikes, grad_last, *ctx.saved_tensors, tau, threshold, reset, detach_reset, alpha
    )
    return total / tau if decay_input else total, carry, *[None] * len(ctx.knobs)


fire.register_autograd(_differentiate, setup_context=_save)
