"""Who counts time which way: one object that turns any flow or diffusion network into our velocity.

Inside effformer t = 0 is noise, t = 1 is data and v = dx/dt. Published networks count the other
way, scale or flip the time that they are told, change the sign, or predict something else. A
`FlowConvention` says all of it explicitly; nothing is inferred.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from effformer.values import Real

from ..checks import unknown
from ..config import Config
from .paths import DDPM, Linear, Path, Prediction, get_path

__all__ = [
    "CONVENTIONS", "DIT", "EFFFORMER", "FLOW_MATCHING", "FLUX", "INSTAFLOW", "LIGHTNINGDIT", "MDT_DIST",
    "RECTIFIED_DIFFUSION", "RECTIFIED_FLOW", "RFPP", "SD3", "SIT", "SIT_PAPER", "SLIMFLOW",
    "SLIMFLOW_PAPER", "TORCHCFM", "TRELLIS", "TRIPOSG", "FlowConvention", "Velocity",
    "VelocityField", "adapt", "batch_times", "flip", "get_convention",
]  # fmt: skip


class VelocityField(Protocol):
    """What every sampler takes: ``v(x, t, **cond)`` with x (B, ...) and t (B,), returning dx/dt."""

    def __call__(self, x: Tensor, t: Tensor, /, **cond: Any) -> Tensor: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowConvention(Config):
    """How a network and its authors write a flow.

    With u the authors' own time (u = t if ``data_at`` is 1, else 1 - t), the network is told
    ``scale * f(u or 1 - u) + offset`` and a velocity network answers ``sign * dx/du``.

    Attributes:
        data_at: the authors' time of data; noise stands at the other end.
        label_scale: factor on the time told to the network.
        label_offset: added after scaling.
        label_flip: the network is told 1 - u instead of u.
        label_log: f is the log-odds ln(u / (1 - u)) (log of sigma = u / (1 - u)), else the
            identity.
        label_round: the label is rounded to the nearest integer and kept at or above 0.
        sign: -1 if a velocity network answers -dx/du.
        path: x_t = alpha x1 + sigma x0, written in our time.
        prediction: what the network answers.
        variance: the network answers 2C channels and the second half (a learned variance) is
            dropped.
    """

    data_at: Literal[0, 1]
    label_scale: Real = 1.0
    label_offset: Real = 0.0
    label_flip: bool = False
    label_log: bool = False
    label_round: bool = False
    sign: Literal[1, -1] = 1
    path: Path = Linear()
    prediction: Prediction = "velocity"
    variance: bool = False

    def time(self, t: Tensor) -> Tensor:
        """The authors' time of our time t. The map is its own inverse."""
        return t if self.data_at == 1 else 1 - t

    def label(self, t: Tensor) -> Tensor:
        """What the network is told at our time t, shape of t."""
        u = self.time(t)
        u = 1 - u if self.label_flip else u
        # 1e-5 keeps the log-odds finite at both ends, as the authors' time interval does.
        u = torch.logit(u, eps=1e-5) if self.label_log else u
        label = u * self.label_scale + self.label_offset
        return label.round().clamp_min(0) if self.label_round else label

    def velocity(self, v: Tensor) -> Tensor:
        """Our dx/dt from the authors' velocity, or back (the map is its own inverse)."""
        return v if self.data_at * 2 - 1 == self.sign else -v

    def flip(self) -> FlowConvention:
        """The same network described with time running the other way: t' = 1 - t and v' = -v."""
        return self.replace(
            data_at=1 - self.data_at, label_flip=not self.label_flip, sign=-self.sign
        )


EFFFORMER = FlowConvention(data_at=1)
RECTIFIED_FLOW = FlowConvention(data_at=1, label_scale=999.0)
SLIMFLOW = RECTIFIED_FLOW
SLIMFLOW_PAPER = FlowConvention(data_at=0)
RFPP = FlowConvention(data_at=0, label_scale=0.25, label_log=True)
INSTAFLOW = FlowConvention(data_at=1, label_scale=1000.0, label_flip=True)
RECTIFIED_DIFFUSION = FlowConvention(
    data_at=0, label_scale=1000.0, label_offset=-1.0, label_round=True, prediction="noise",
    path=DDPM(beta_start=0.00085, beta_end=0.012, schedule="linear"),
)  # fmt: skip
MDT_DIST = FlowConvention(data_at=0, label_scale=1000.0, path=Linear(sigma_min=1e-5))
TRELLIS = MDT_DIST
SD3 = FlowConvention(data_at=0, label_scale=1000.0)
FLUX = SD3
TRIPOSG = FlowConvention(data_at=0, label_scale=1000.0, sign=-1)
TORCHCFM = EFFFORMER
FLOW_MATCHING = EFFFORMER
SIT = EFFFORMER
LIGHTNINGDIT = EFFFORMER
SIT_PAPER = FlowConvention(data_at=0)
DIT = FlowConvention(
    data_at=0, label_scale=1000.0, label_offset=-1.0, label_round=True,
    path=DDPM(), prediction="noise", variance=True,
)  # fmt: skip

CONVENTIONS: dict[str, FlowConvention] = {
    "effformer": EFFFORMER, "rectified-flow": RECTIFIED_FLOW, "slimflow": SLIMFLOW,
    "slimflow-paper": SLIMFLOW_PAPER, "rfpp": RFPP, "instaflow": INSTAFLOW,
    "rectified-diffusion": RECTIFIED_DIFFUSION, "mdt-dist": MDT_DIST, "trellis": TRELLIS,
    "sd3": SD3, "flux": FLUX, "triposg": TRIPOSG, "torchcfm": TORCHCFM,
    "flow-matching": FLOW_MATCHING, "sit": SIT, "lightningdit": LIGHTNINGDIT, "sit-paper": SIT_PAPER, "dit": DIT,
}  # fmt: skip


def get_convention(convention: FlowConvention | str) -> FlowConvention:
    """Resolve a convention by name; a `FlowConvention` is returned as it is.

    Raises:
        ValueError: unknown name.
        TypeError: neither a name nor a `FlowConvention`.
    """
    if isinstance(convention, FlowConvention):
        return convention
    if not isinstance(convention, str):
        raise TypeError(
            f"convention: expected a name or a FlowConvention, got {type(convention).__name__}"
        )
    if convention not in CONVENTIONS:
        raise unknown("convention", convention, list(CONVENTIONS))
    return CONVENTIONS[convention]


def batch_times(t: Tensor | float, x: Tensor) -> Tensor:
    """Times (B,) for a batch, at least float32.

    Labels like 999 t lose their integers in half precision.

    Raises:
        ValueError: t is neither a number nor (B,).
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    times = torch.as_tensor(t, device=x.device, dtype=dtype)
    if times.dim() == 0:
        return times.expand(x.shape[0])
    if times.shape != x.shape[:1]:
        raise ValueError(f"t: expected a number or ({x.shape[0]},), got {tuple(times.shape)}")
    return times


class Velocity:
    """A network seen as our velocity field ``v(x, t, **cond)``; made by `adapt`.

    Attributes:
        network: called as ``network(x, label, **cond)``.
        convention: how it counts.
    """

    def __init__(self, network: Callable[..., Tensor], convention: FlowConvention) -> None:
        self.network = network
        self.convention = convention

    def __call__(self, x: Tensor, t: Tensor | float, /, **cond: Any) -> Tensor:
        times = batch_times(t, x)
        convention = self.convention
        value = self.network(x, convention.label(times), **cond)
        if convention.variance:
            if value.shape[1] != 2 * x.shape[1]:
                raise ValueError(
                    f"adapt: variance=True expects {2 * x.shape[1]} channels for "
                    f"{x.shape[1]} of x, the network answered {tuple(value.shape)}"
                )
            value = value.chunk(2, dim=1)[0]
        if convention.prediction == "velocity":
            return convention.velocity(value)
        return convention.path.convert(value, x, times, convention.prediction, "velocity")

    def __repr__(self) -> str:
        return f"Velocity({type(self.network).__name__}, {self.convention})"


def adapt(
    network: Callable[..., Tensor],
    convention: FlowConvention | str,
    *,
    path: Path | str | None = None,
    prediction: Prediction | None = None,
) -> Velocity:
    """See a network of any convention as our velocity: t = 0 noise, t = 1 data, v = dx/dt.

    Args:
        network: called as ``network(x, label, **cond)`` with x (B, ...), label (B,) at least
            float32.
        convention: its convention or the name of one.
        path: replaces the convention's path.
        prediction: replaces the convention's prediction.

    Raises:
        ValueError: unknown convention, path or prediction.

    Example:
        >>> import torch
        >>> from effformer.flow import adapt
        >>> def network(x, label):  # an SD3-style network that predicts noise - data for data = 0
        ...     return x / (label / 1000).view(-1, 1)
        >>> adapt(network, "sd3")(torch.ones(1, 2), 0.5)
        tensor([[-2., -2.]])
    """
    changes: dict[str, Any] = {}
    if path is not None:
        changes["path"] = get_path(path)
    if prediction is not None:
        changes["prediction"] = prediction
    found = get_convention(convention)
    return Velocity(network, found.replace(where="adapt", **changes) if changes else found)


def flip(velocity: VelocityField) -> VelocityField:
    """Turn time around: ``v'(x, t) = -v(x, 1 - t)``; twice is the identity."""

    def flipped(x: Tensor, t: Tensor | float, /, **cond: Any) -> Tensor:
        return -velocity(x, 1 - batch_times(t, x), **cond)

    return flipped
