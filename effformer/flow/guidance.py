"""Classifier-free guidance as a wrapper of a velocity field."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from ..arguments import Shape, checked
from ..checks import unknown
from ..values import Checked, Count, Real
from .conventions import Remembering, VelocityField, answered, as_velocity, batch_times
from .paths import Point, Times, widened

__all__ = ["Guidance", "Guided", "Weak", "forward_with_cfg", "guided"]

Channels = Literal["all"] | Count


@dataclass(frozen=True, slots=True)
class Weak(Checked):
    """Guidance away from a weaker form of the network: ``v + scale (v_cond - v_weak)``.

    Attributes:
        scale: 0 changes nothing.
        changes: what makes the conditional network weaker, by keyword: ``{"skip_layers": (7, 8, 9)}``
            (skip-layer guidance of SD3.5 medium), or another condition.
        interval: (low, high) times, t = 0 noise, inside which it acts; None is everywhere. The
            published samples have it while the number of the step lies between 1 % and 20 % of all
            steps, which is an interval of their grid.

    Reference: Guiding a Diffusion Model with a Bad Version of Itself, 2024, arXiv 2406.02507;
    Stability-AI/sd3.5 (skip-layer guidance).
    """

    scale: Real
    changes: Mapping[str, Any]
    interval: tuple[Real, Real] | None = None

    def check(self) -> None:
        if not self.changes:
            raise ValueError(
                "guidance: nothing makes the network weaker; give changes, e.g. "
                "{'skip_layers': (7, 8, 9)}"
            )
        _check_interval(self.interval)


@dataclass(frozen=True, slots=True)
class Guidance(Checked):
    """How strongly, where and when to guide.

    ``v = v_null + scale (v_cond - v_null)`` on the guided channels, v_cond elsewhere.

    Attributes:
        scale: 1 is the conditional field alone, 0 the unconditional one.
        null: the conditions that stand for "no condition", by keyword: a number (fills the shape of
            the condition) or a tensor that broadcasts to it. Class-conditional DiTs: ``{"y":
            num_classes}``.
        channels: "all", or the number of leading channels that are guided. DiT's and SiT's
            published samples guide 3.
        interval: (low, high) times, t = 0 noise, inside which guidance acts; None is everywhere.
            Outside, only the conditional field is evaluated.
        batched: one evaluation of 2B samples (True) or two of B (False, half the memory); equal
            results.
        weak: guide away from a weaker network, too, which is one more evaluation.

    Reference: Classifier-Free Diffusion Guidance, 2022, arXiv 2207.12598; Applying Guidance in a
    Limited Interval Improves Sample and Distribution Quality in Diffusion Models, 2024, arXiv
    2404.07724.
    """

    scale: Real
    null: Mapping[str, Tensor | float]
    channels: Channels = "all"
    interval: tuple[Real, Real] | None = None
    batched: bool = True
    weak: Weak | None = None

    def check(self) -> None:
        if not self.null:
            raise ValueError("guidance: null is empty; give the null condition, e.g. {'y': 10}")
        _check_interval(self.interval)


def _check_interval(interval: tuple[float, float] | None) -> None:
    if interval is not None and not interval[0] <= interval[1]:
        raise ValueError(f"guidance: the interval {interval} is empty")


class Guided(Remembering):
    """A guided velocity field, in float32 at least; made by `guided`."""

    @checked
    def __init__(self, velocity: VelocityField, guidance: Guidance) -> None:
        self.velocity = as_velocity(velocity, where="guided")
        self.guidance = guidance

    @checked
    def __call__(self, x: Point, t: Times | float, /, **cond: Any) -> Tensor:
        rule, times = self.guidance, batch_times(t, x)
        v, v_cond = self._mixed(x, times, cond)
        weak = rule.weak
        scale = None if weak is None else _strength(weak.scale, 0.0, weak.interval, times, x)
        if weak is None or scale is None:
            return v
        away = scale * (v_cond - self._asked(x, times, {**cond, **weak.changes}))
        if rule.channels != "all":
            away[:, rule.channels :] = 0
        return v + away

    def restart(self, evaluations: int | None = None, samples: int | None = None) -> None:
        """Tell the velocity inside, if it remembers."""
        if isinstance(self.velocity, Remembering):
            self.velocity.restart(evaluations, samples)

    def _mixed(self, x: Tensor, times: Tensor, cond: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """The guided field, and the conditional one."""
        rule = self.guidance
        scale = _strength(rule.scale, 1.0, rule.interval, times, x)
        if scale is None:
            v_cond = self._asked(x, times, cond)
            return v_cond, v_cond
        null = {**cond, **_null(rule.null, cond)}
        if rule.batched:
            both = {name: _twice(value, null[name], x.shape[0]) for name, value in cond.items()}
            out = self._asked(torch.cat([x, x]), torch.cat([times, times]), both)
            v_cond, v_null = out.chunk(2)
        else:
            v_cond, v_null = self._asked(x, times, cond), self._asked(x, times, null)
        return _mix(v_cond, v_null, scale, rule.channels), v_cond

    def _asked(self, x: Tensor, times: Tensor, cond: Mapping[str, Any]) -> Tensor:
        return widened(answered(self.velocity(x, times, **cond), x, where="guided"))


@checked
def guided(
    velocity: VelocityField,
    scale: Real,
    *,
    null: Mapping[str, Tensor | float],
    channels: Channels = "all",
    interval: tuple[Real, Real] | None = None,
    batched: bool = True,
    weak: Weak | None = None,
) -> Guided:
    """Wrap a velocity field with classifier-free guidance; see `Guidance` for the arguments.

    Example:
        >>> import torch
        >>> from effformer.flow import guided
        >>> def v(x, t, y):
        ...     return x * y.view(-1, 1)
        >>> guided(v, 2.0, null={"y": 1})(torch.ones(1, 2), 0.5, y=torch.tensor([4]))
        tensor([[7., 7.]])
    """
    return Guided(velocity, Guidance(scale, null, channels, interval, batched, weak))


@checked
def forward_with_cfg(
    network: Callable[..., Tensor],
    x: Annotated[Tensor, Shape("(B, C, ...)")],
    t: Tensor,
    scale: Real,
    *,
    channels: Channels = 3,
    interval: tuple[Real, Real] | None = None,
    **cond: Any,
) -> Tensor:
    """Guidance as the ``forward_with_cfg`` of DiT, SiT and LightningDiT compute it, quirks included.

    The batch is [conditional; unconditional] in time and conditions. Only the first half of x is
    used, for both. The guided channels ``null + scale (cond - null)`` are written to both halves;
    every other channel (the fourth latent channel with the published 3, learned variances) keeps
    the value of its own half.

    Args:
        network: called as ``network(x, t, **cond)``.
        x: (2B, C, ...), its second half is ignored.
        t: (2B,) in the network's own convention.
        scale: guidance scale.
        channels: number of guided leading channels of the output, or "all" of the channels of x.
        interval: (low, high) in the network's own time, inside which guidance acts. The first
            sample's time decides for the whole batch; outside, both halves get ``cond`` on the
            guided channels. `guided` decides for every sample.
        cond: conditions (2B, ...), the null condition in the second half.

    Returns:
        (2B, Cout, ...), in float32 at least.

    Raises:
        ValueError: the batch is odd, or the times are not those of its samples.
    """
    if x.shape[0] % 2:
        raise ValueError(f"forward_with_cfg: expected an even batch [cond; null], got {x.shape[0]}")
    if t.shape != (len(x),) or t.is_complex() or t.device != x.device:
        raise ValueError(
            f"forward_with_cfg: expected times ({len(x)},) of real numbers on {x.device}, got "
            f"{tuple(t.shape)} of {t.dtype} on {t.device}"
        )
    half = x[: x.shape[0] // 2]
    out = network(torch.cat([half, half]), t, **cond)
    if not isinstance(out, Tensor) or out.dim() != x.dim() or len(out) != len(x):
        raise TypeError(
            "forward_with_cfg: expected an answer (2B, Cout, ...) of the network, got "
            f"{tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__}"
        )
    out = widened(out)
    guided_channels = x.shape[1] if channels == "all" else channels
    v_cond, v_null = out[:, :guided_channels].chunk(2)
    mixed = v_null + scale * (v_cond - v_null)
    if interval is not None:
        mixed = torch.where((t[0] >= interval[0]) & (t[0] <= interval[1]), mixed, v_cond)
    return torch.cat([torch.cat([mixed, mixed]), out[:, guided_channels:]], dim=1)


def _strength(
    scale: float, idle: float, interval: tuple[float, float] | None, times: Tensor, x: Tensor
) -> float | Tensor | None:
    """The scale of each sample, which is ``idle`` outside the interval; None if all are idle."""
    if scale == idle:
        return None
    if interval is None:
        return scale
    inside = (times >= interval[0]) & (times <= interval[1])
    if not bool(inside.any()):
        return None
    return torch.where(inside, scale, idle).to(times).view(-1, *(1,) * (x.dim() - 1))


def _mix(v_cond: Tensor, v_null: Tensor, scale: float | Tensor, channels: Channels) -> Tensor:
    v_cond, v_null = widened(v_cond), widened(v_null)
    if channels == "all":
        return v_null + scale * (v_cond - v_null)
    if channels > v_cond.shape[1]:
        raise ValueError(f"guidance: {channels} guided channels, but x has {v_cond.shape[1]}")
    head_cond, head_null = v_cond[:, :channels], v_null[:, :channels]
    return torch.cat([head_null + scale * (head_cond - head_null), v_cond[:, channels:]], dim=1)


def _null(null: Mapping[str, Tensor | float], cond: Mapping[str, Any]) -> dict[str, Tensor]:
    made = {}
    for name, value in null.items():
        if not isinstance(cond.get(name), Tensor):
            if name in cond:
                kind = type(cond[name]).__name__
                raise TypeError(f"guidance: condition {name!r} is a {kind}, not a tensor")
            raise unknown("condition", name, sorted(cond), where="guidance: null")
        given: Tensor = cond[name]
        made[name] = torch.as_tensor(value, dtype=given.dtype, device=given.device).expand_as(given)
    return made


def _twice(value: Any, null: Any, batch: int) -> Any:
    per_sample = isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == batch
    return torch.cat([value, null]) if per_sample else value
