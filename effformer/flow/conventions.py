"""Who counts time which way: one object that turns any flow or diffusion network into our velocity.

Inside effformer t = 0 is noise, t = 1 is data and v = dx/dt. Published networks count the other
way, scale or flip the time that they are told, change the sign, or predict something else. A
`FlowConvention` says all of it explicitly; nothing is inferred.

It belongs to trained weights, not to a class of networks: a `Trained` says what weights were trained
to predict. ``model.trained`` carries it as JSON values, and with it every file of weights;
`trained_of` is the one place that reads it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, Self, cast

import torch
from torch import Tensor

from effformer.arguments import checked
from effformer.values import Count, Positive, Real

from ..checks import unknown
from ..config import Config
from ..wrapped import bare
from .paths import DDPM, Clock, Linear, Path, Point, Prediction, Times, get_path

__all__ = [
    "CONVENTIONS", "DIT", "EFFFORMER", "FLOWSEP", "FLOW_MATCHING", "FLUX", "INSTAFLOW", "LIGHTNINGDIT", "MDT_DIST",
    "RECTIFIED_DIFFUSION", "RECTIFIED_FLOW", "RFPP", "SD3", "SIT", "SIT_PAPER", "SLIMFLOW",
    "SLIMFLOW_PAPER", "TORCHCFM", "TRELLIS", "TRIPOSG", "FlowConvention", "Remembering", "Trained", "Velocity", "VelocityField",
    "adapt", "answered", "as_velocity", "batch_times", "flip", "get_convention", "recorded",
    "trained_of",
]  # fmt: skip


class VelocityField(Protocol):
    """What every sampler takes: ``v(x, t, **cond)`` with x (B, ...) and t (B,), returning dx/dt."""

    def __call__(self, x: Tensor, t: Tensor, /, **cond: Any) -> Tensor: ...


class Remembering(ABC):
    """A velocity field that remembers within a run, and is told when one begins."""

    @abstractmethod
    def restart(self, evaluations: int | None = None, samples: int | None = None) -> None:
        """Begin a run of so many evaluations (None: nobody knows) for so many samples."""


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

    def check(self) -> None:
        if self.label_scale == 0:
            raise ValueError("label_scale must not be 0: the network would be told no time")

    @classmethod
    @checked
    def from_dict(cls, data: Mapping[str, Any], *, where: str = "") -> Self:
        """Build from plain values; with ``"name"`` they are changes of the convention of that name."""
        if "name" not in data:
            return super(FlowConvention, cls).from_dict(data, where=where)
        changes = {k: v for k, v in data.items() if k != "name"}
        return cast(Self, get_convention(data["name"]).changed(changes, where=where))

    @checked
    def time(self, t: Clock) -> Tensor:
        """The authors' time of our time t. The map is its own inverse."""
        return t if self.data_at == 1 else 1 - t

    @checked
    def label(self, t: Clock) -> Tensor:
        """What the network is told at our time t, shape of t."""
        u = self.time(t)
        u = 1 - u if self.label_flip else u
        # 1e-5 keeps the log-odds finite at both ends, as the authors' time interval does.
        u = torch.logit(u, eps=1e-5) if self.label_log else u
        label = u * self.label_scale + self.label_offset
        return label.round().clamp_min(0) if self.label_round else label

    @checked
    def velocity(self, v: Clock) -> Tensor:
        """Our dx/dt from the authors' velocity, or back (the map is its own inverse)."""
        return v if self.data_at * 2 - 1 == self.sign else -v

    def __str__(self) -> str:
        """What differs from our own convention, in words."""
        own, said = EFFFORMER.to_dict(), self.to_dict()
        changed = [f"{key}={said[key]!r}" for key in own if said[key] != own[key]]
        noted = f" ({', '.join(changed)})" if changed else ", t = 0 noise, t = 1 data"
        return f"the {self.prediction}{noted}"

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
FLUX = FlowConvention(data_at=0)
TRIPOSG = FlowConvention(data_at=0, label_scale=1000.0, sign=-1)
FLOWSEP = FlowConvention(data_at=1, path=Linear(sigma_min=1e-4))
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
    "sd3": SD3, "flux": FLUX, "triposg": TRIPOSG, "flowsep": FLOWSEP, "torchcfm": TORCHCFM,
    "flow-matching": FLOW_MATCHING, "sit": SIT, "lightningdit": LIGHTNINGDIT, "sit-paper": SIT_PAPER, "dit": DIT,
}  # fmt: skip


@checked
def get_convention(convention: FlowConvention | str) -> FlowConvention:
    """Resolve a convention by name; a `FlowConvention` is returned as it is.

    Raises:
        ValueError: unknown name.
        TypeError: neither a name nor a `FlowConvention`.
    """
    if isinstance(convention, FlowConvention):
        return convention
    if convention not in CONVENTIONS:
        raise unknown("convention", convention, list(CONVENTIONS))
    return CONVENTIONS[convention]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained(Config):
    """What the weights of a generator were trained to predict, and on what.

    It travels with the weights: ``model.trained`` holds it as JSON values, copies of a model keep
    it, and folders of models, weight files, checkpoints and bundles carry it.

    Attributes:
        convention: how the network counts and what it answers, or the name of it.
        null: labels were dropped in training, so that there is a null class to guide from.
        steps: number of equal steps that the weights were distilled to, None for any number.
        value_range: values of black and white in the data, None if they are no pictures or it is
            not known.
        latent_scale: the data are latents of an autoencoder times this number, None if they are no
            latents or it is not known.
        latent_shift: what was subtracted from the latents before.
        classes: names of the classes in the order of the labels, empty if they have none.
    """

    convention: FlowConvention = field(metadata={"short": get_convention})
    null: bool = False
    steps: Count | None = None
    value_range: tuple[Real, Real] | None = None
    latent_scale: Positive | None = None
    latent_shift: Real = 0.0
    classes: tuple[str, ...] = ()

    def check(self) -> None:
        if self.value_range is not None and self.value_range[0] >= self.value_range[1]:
            low, high = self.value_range
            raise ValueError(f"value_range must increase, got {low} and {high}")

    @checked
    def settings(self, steps: Count | None, guidance: Real | None) -> tuple[int, float]:
        """Steps and scale of guidance as they are given; where not, what suits the weights: the steps
        that they were distilled to, or 10, and a scale of 2 where there is a null class, else 1.
        """
        if steps is None:
            steps = self.steps or 10
        if guidance is None:
            guidance = 2.0 if self.null else 1.0
        return steps, guidance


def trained_of(network: object) -> Trained | None:
    """What the weights of a network were trained to predict.

    That is what ``network.trained`` says, JSON values of a `Trained`. A model of ours without such a
    record (randomly initialised, or saved by a version that wrote none) is taken for one of the
    published models of its family; `effformer.models.base.Model.assumed` tells of them.

    Returns:
        None for a network that says nothing: functions, other libraries' modules, models that
        generate nothing.

    Raises:
        ValueError: the record is damaged, or a newer version wrote it.
        TypeError: a value of it has the wrong type.
    """
    facts, where = recorded(network), f"{_name_of(network)}: trained"
    assumed = getattr(bare(network), "assumed", None)
    if facts is None and callable(assumed):
        facts = assumed()
    return None if facts is None else Trained.from_dict(facts, where=where)


def as_velocity(network: VelocityField, *, where: str) -> VelocityField:
    """A network with a record as our velocity, anything else as it is.

    Raises:
        ValueError: a model without a record whose family counts another way: whether it is meant to
            be our velocity nobody can tell.
    """
    record = trained_of(network)
    if record is None or record.convention == EFFFORMER:
        return network
    if recorded(network) is None:
        raise ValueError(
            f"{where}: {_name_of(network)} does not say what its weights were trained to predict; "
            "give adapt(model) if it is what published models of its family predict, else "
            "adapt(model, convention), where 'effformer' is a velocity with t = 0 noise, t = 1 data"
        )
    return Velocity(network, record.convention)


def recorded(network: object) -> Mapping[str, Any] | None:
    """The record of a network as JSON values, None if it has none: other libraries' modules may call
    something else ``trained``.
    """
    facts = getattr(bare(network), "trained", None)
    return facts if isinstance(facts, Mapping) else None


def _name_of(network: object) -> str:
    network = bare(network)
    return str(getattr(network, "name", type(network).__name__))


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


def answered(value: Any, x: Tensor, *, where: str, channels: int | None = None) -> Tensor:
    """What a network said about x (B, C, ...), if it is a tensor of its shape, or of so many channels.

    Raises:
        TypeError: no tensor.
        ValueError: one of another shape.
    """
    expected = tuple(x.shape) if channels is None else (x.shape[0], channels, *x.shape[2:])
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{where}: the network answered {type(value).__name__} for x {tuple(x.shape)}; expected a "
            f"tensor {expected}"
        )
    if tuple(value.shape) != expected:
        raise ValueError(
            f"{where}: the network answered {tuple(value.shape)} for x {tuple(x.shape)}, expected "
            f"{expected}; one that also predicts a variance becomes a velocity by effformer.flow.adapt"
        )
    return value


class Velocity:
    """A network seen as our velocity field ``v(x, t, **cond)``; made by `adapt`.

    Attributes:
        network: called as ``network(x, label, **cond)``.
        convention: how it counts.
    """

    @checked
    def __init__(self, network: Callable[..., Tensor], convention: FlowConvention) -> None:
        self.network = network
        self.convention = convention

    @checked
    def __call__(self, x: Point, t: Times | float, /, **cond: Any) -> Tensor:
        times = batch_times(t, x)
        convention = self.convention
        value = self.network(x, convention.label(times), **cond)
        channels = (2 if convention.variance else 1) * x.shape[1] if x.dim() > 1 else None
        value = answered(value, x, where="adapt", channels=channels)
        value = value.chunk(2, dim=1)[0] if convention.variance else value
        if convention.prediction == "velocity":
            return convention.velocity(value)
        return convention.path.convert(value, x, times, convention.prediction, "velocity")

    def __repr__(self) -> str:
        return f"Velocity({type(self.network).__name__}, {self.convention})"


@checked
def adapt(
    network: Callable[..., Tensor],
    convention: FlowConvention | str | None = None,
    *,
    path: Path | str | None = None,
    prediction: Prediction | None = None,
) -> Velocity:
    """See a network of any convention as our velocity: t = 0 noise, t = 1 data, v = dx/dt.

    Args:
        network: called as ``network(x, label, **cond)`` with x (B, ...), label (B,) at least
            float32.
        convention: its convention or the name of one; None: what its weights were trained to
            predict, see `trained_of`.
        path: replaces the convention's path.
        prediction: replaces the convention's prediction.

    Raises:
        ValueError: unknown convention, path or prediction.
        TypeError: no convention is given, and the network does not say its own.

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
    if convention is None:
        record = trained_of(network)
        if record is None:
            raise TypeError(
                f"adapt: {_name_of(network)} does not say what it was trained to predict; give "
                "convention, 'effformer' for a velocity with t = 0 noise, t = 1 data"
            )
        convention = record.convention
    found = get_convention(convention)
    return Velocity(network, found.replace(where="adapt", **changes) if changes else found)


@checked
def flip(velocity: VelocityField) -> VelocityField:
    """Turn time around: ``v'(x, t) = -v(x, 1 - t)``; twice is the identity."""

    velocity = as_velocity(velocity, where="flip")

    @checked
    def flipped(x: Point, t: Times | float, /, **cond: Any) -> Tensor:
        return -answered(velocity(x, 1 - batch_times(t, x), **cond), x, where="flip")

    return flipped
