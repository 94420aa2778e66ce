"""How training times are drawn, and at which times a sampler stands."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Self

import torch
from torch import Tensor

from effformer.arguments import checked
from effformer.values import (
    Chance,
    Checked,
    Count,
    Fraction,
    Natural,
    NonNegative,
    Positive,
    Range,
    Real,
)

from ..checks import check_device, unknown
from ..config import Config
from .paths import Clock

__all__ = [
    "TIME_LAWS", "CosMap", "Fixed", "KStep", "LogitNormal", "Mode", "Shifted", "Stratified", "TimeGrid",
    "TimeLaw", "UShaped", "Uniform", "get_time_law", "shift_of_length",
]  # fmt: skip


Steps = Annotated[int, Range(1, 10**6)]


class TimeLaw(Config):
    """Base of the distributions of training times; t = 0 noise, t = 1 data."""

    name: ClassVar[str]

    @property
    def steps(self) -> int | None:
        """Number of equal steps that a network trained at these times alone can be sampled in, None
        for any.
        """
        return None

    @checked
    def sample(
        self,
        n: Natural,
        *,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Draw n independent times, float32 (n,).

        Args:
            n: how many.
            generator: source of randomness; None is torch's default generator.
            device: where the times are wanted; they are drawn on the generator's device.
        """
        device = check_device(device, where=f"{type(self).__name__}.sample: device")
        drawn_on = device if generator is None else generator.device
        return self.draw(n, generator, drawn_on).to(device)

    @abstractmethod
    def draw(
        self, n: int, generator: torch.Generator | None, device: torch.device | str | None
    ) -> Tensor:
        """Draw on the generator's device."""

    @classmethod
    @checked
    def from_dict(cls, data: Mapping[str, Any], *, where: str = "") -> Self:
        """Build from plain values; ``"name"`` chooses the law when called on `TimeLaw` itself."""
        if cls is TimeLaw:
            rest = {k: v for k, v in data.items() if k != "name"}
            return _class(str(data.get("name")), where).from_dict(rest, where=where)  # type: ignore[return-value]
        return super().from_dict(data, where=where)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values with the name of the law."""
        return {"name": self.name} | super().to_dict()


@dataclass(frozen=True, slots=True, kw_only=True)
class Uniform(TimeLaw):
    """t ~ U(low, high). Rectified flow's code uses low = 1e-3.

    Attributes:
        low: smallest time.
        high: largest time.
    """

    name: ClassVar[str] = "uniform"
    low: Fraction = 0.0
    high: Fraction = 1.0

    def draw(
        self, n: int, generator: torch.Generator | None, device: torch.device | str | None
    ) -> Tensor:
        return torch.rand(n, generator=generator, device=device) * (self.high - self.low) + self.low


@dataclass(frozen=True, slots=True, kw_only=True)
class Stratified(TimeLaw):
    """Uniform times of which every batch has equally many in each of k equal parts of the interval:
    ``t_j = low + (high - low) (j mod k + u_j) / k``.

    DyDiT trains so (k = 4, on steps 0..999), because its work differs from time to time.

    Attributes:
        strata: k.
        low: smallest time.
        high: largest time.

    Reference: Dynamic Diffusion Transformer, 2024, arXiv 2410.03456.
    """

    name: ClassVar[str] = "stratified"
    strata: Count = 4
    low: Fraction = 0.0
    high: Fraction = 1.0

    def draw(
        self, n: int, generator: torch.Generator | None, device: torch.device | str | None
    ) -> Tensor:
        part = torch.arange(n, device=device) % self.strata
        u = (part + torch.rand(n, generator=generator, device=device)) / self.strata
        return u * (self.high - self.low) + self.low


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitNormal(TimeLaw):
    """t = sigmoid(mean + std n), n ~ N(0, 1): the middle of the path more often than its ends.

    Attributes:
        mean: positive values favour the data end (the noise end in SD3, which counts the other
            way).
        std: width.

    Reference: Scaling Rectified Flow Transformers for High-Resolution Image Synthesis, 2024, arXiv
    2403.03206.
    """

    name: ClassVar[str] = "logit-normal"
    mean: Real = 0.0
    std: Positive = 1.0

    def draw(
        self, n: int, generator: torch.Generator | None, device: torch.device | str | None
    ) -> Tensor:
        return self.time(torch.randn(n, generator=generator, device=device))

    def time(self, z: Tensor) -> Tensor:
        """The time of a standard normal number z."""
        return torch.sigmoid(z * self.std + self.mean)

    def density(self, t: Tensor) -> Tensor:
        """Density of t in (0, 1)."""
        away = (torch.logit(t) - self.mean) / self.std
        return torch.exp(-away.square() / 2) / (self.std * math.sqrt(2 * math.pi) * t * (1 - t))


@dataclass(frozen=True, slots=True, kw_only=True)
class Mode(TimeLaw):
    """``t = u + s (cos^2(pi u / 2) - 1 + u)``, u ~ U(0, 1): the middle of the path more often (s > 0) or
    less (s < 0) than its ends. The law is symmetric.

    Attributes:
        scale: s, 0 is uniform.

    Reference: Scaling Rectified Flow Transformers for High-Resolution Image Synthesis, 2024, arXiv
    2403.03206.
    """

    name: ClassVar[str] = "mode"
    scale: Annotated[float, Range(-1, 2 / (math.pi - 2))] = 1.29

    def draw(
        self, n: int, generator: torch.Generator | None, device: torch.device | str | None
    ) -> Tensor:
        return self.time(torch.rand(n, generator=generator, device=device)).clamp(0, 1)

    def time(self, u: Tensor) -> Tensor:
        """The time of a uniform number u in [0, 1]; it grows with u."""
        return u + self.scale * (torch.cos(u * (math.pi / 2)).square() - 1 + u)

    def density(self, u: Tensor) -> Tensor:
        """Density of the time of u."""
        return 1 / (1 + self.scale * (1 - math.pi / 2 * torch.sin(math.pi * u))).abs()


@dataclass(frozen=True, slots=True, kw_only=True)
class CosMap(TimeLaw):
    """``t = 1 - 1 / (1 + tan(pi u / 2))``, u ~ U(0, 1): the log-odds of the times are spread as those
    of the cosine schedule of diffusion. The law is symmetric.

    Reference: Scaling Rectified Flow Transformers for High-Resolution Image Synthesis, 2024, arXiv
    2403.03206.
    """

    name: ClassVar[str] = "cosmap"

    def draw(
        self, n: int, generator: torch.Generator | None, device: torch.device | str | None
    ) -> Tensor:
        return self.time(torch.rand(n, generator=generator, device=device))

    def time(self, u: Tensor) -> Tensor:
        """The time of a uniform number u in [0, 1]; it grows with u."""
        sine, cosine = torch.sin(u * (math.pi / 2)), torch.cos(u * (math.pi / 2))
        return sine / (sine + cosine)

    def density(self, t: Tensor) -> Tensor:
        """Density of t in [0, 1]."""
        return 2 / (math.pi * (1 - 2 * t + 2 * t.square()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Shifted(TimeLaw):
    """Times of another law nearer to the noise, as `TimeGrid.shifted` shifts those of a sampler.

    Attributes:
        law: the other law, or its name.
        shift: a; 1 changes nothing. SD3 trains images of 1024 x 1024 pixels with 3.

    Reference: Scaling Rectified Flow Transformers for High-Resolution Image Synthesis, 2024, arXiv
    2403.03206, section 5.3.2.
    """

    name: ClassVar[str] = "shifted"
    law: TimeLaw | str = "logit-normal"
    shift: Positive = 3.0

    def check(self) -> None:
        get_time_law(self.law)

    def draw(
        self, n: int, generator: torch.Generator | None, device: torch.device | str | None
    ) -> Tensor:
        t = get_time_law(self.law).draw(n, generator, device)
        return t / (t + self.shift * (1 - t))


@dataclass(frozen=True, slots=True, kw_only=True)
class UShaped(TimeLaw):
    """Both ends of the path more often than its middle, for reflow pairs.

    Density ``C/2 (e^(a u) + e^(a (1 - u)))`` of u in [0, 1], C = a / (e^a - 1).

    Half of the probability is the exponential law on [0, 1] with inverse distribution function
    ``ln(1 + q (e^a - 1)) / a``, half its mirror image; then t = low + (high - low) u.

    Attributes:
        a: steepness; 0 is uniform.
        low: smallest time.
        high: largest time.

    Differs from the paper: its formula e^(a u) + e^(-a u) read literally on [0, 1] rises
    monotonically; this is the symmetric density of its code. A fair coin per sample chooses the
    half, so that times are independent.

    Reference: Improving the Training of Rectified Flows, 2024, arXiv 2405.20320.
    """

    name: ClassVar[str] = "u-shaped"
    a: NonNegative = 4.0
    low: Fraction = 1e-5
    high: Fraction = 1 - 1e-5

    def draw(
        self, n: int, generator: torch.Generator | None, device: torch.device | str | None
    ) -> Tensor:
        q, coin = torch.rand(2, n, generator=generator, device=device)
        u = q if self.a == 0 else torch.log1p(q * math.expm1(self.a)) / self.a
        return torch.where(coin < 0.5, u, 1 - u) * (self.high - self.low) + self.low

    @checked
    def density(self, u: Clock) -> Tensor:
        """Density of u in [0, 1], before it is scaled to [low, high]."""
        if self.a == 0:
            return torch.ones_like(u)
        scale = self.a / math.expm1(self.a) / 2
        return scale * (torch.exp(self.a * u) + torch.exp(self.a * (1 - u)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Fixed(TimeLaw):
    """Always the same time; distillation to one step trains at t = 1e-3 alone.

    Attributes:
        t: the time.
    """

    name: ClassVar[str] = "fixed"
    t: Fraction = 1e-3

    @property
    def steps(self) -> int | None:
        return 1

    def draw(
        self, n: int, generator: torch.Generator | None, device: torch.device | str | None
    ) -> Tensor:
        return torch.full((n,), self.t, device=device)


@dataclass(frozen=True, slots=True, kw_only=True)
class KStep(TimeLaw):
    """The k times at which a k-step Euler sampler looks, equally often.

    ``t = j (1 - eps) / k + eps``, j = 0..k-1.

    Attributes:
        k: number of steps.
        eps: first time.
    """

    name: ClassVar[str] = "k-step"
    k: Count = 4
    eps: Chance = 1e-3

    @property
    def steps(self) -> int | None:
        return self.k

    def draw(
        self, n: int, generator: torch.Generator | None, device: torch.device | str | None
    ) -> Tensor:
        j = torch.randint(self.k, (n,), generator=generator, device=device)
        return j * ((1 - self.eps) / self.k) + self.eps


TIME_LAWS: dict[str, type[TimeLaw]] = {
    c.name: c
    for c in (
        Uniform,
        Stratified,
        LogitNormal,
        Mode,
        CosMap,
        Shifted,
        UShaped,
        Fixed,
        KStep,
    )
}


@checked
def get_time_law(law: TimeLaw | str) -> TimeLaw:
    """Resolve a time law by name; a `TimeLaw` is returned as it is.

    Raises:
        ValueError: unknown name.
        TypeError: neither a name nor a `TimeLaw`.
    """
    if isinstance(law, TimeLaw):
        return law
    return _class(law, "")()


def _class(name: str, where: str) -> type[TimeLaw]:
    if name not in TIME_LAWS:
        raise unknown("time law", name, list(TIME_LAWS), where=where)
    return TIME_LAWS[name]


@dataclass(frozen=True, slots=True)
class TimeGrid(Checked):
    """The times of a fixed-step sampler: N steps, N + 1 points.

    Attributes:
        points: (N + 1) times; step i is evaluated at ``points[i]``.
        widths: (N) step widths dt; None: the differences of the points.
    """

    points: tuple[Real, ...]
    widths: tuple[Real, ...] | None = None

    def check(self) -> None:
        if len(self.points) < 2:
            raise ValueError(f"TimeGrid: at least 1 step (2 points) is needed, got {self.points}")
        if self.widths is not None and len(self.widths) != len(self.points) - 1:
            raise ValueError(
                f"TimeGrid: {len(self.points)} points need {len(self.points) - 1} widths, "
                f"got {len(self.widths)}"
            )

    @classmethod
    @checked
    def uniform(cls, steps: Steps, start: Real = 0.0, end: Real = 1.0) -> TimeGrid:
        """N equal steps from start to end. SiT counts points instead: its ``num_steps`` is N + 1.

        Raises:
            ValueError: steps < 1.
        """
        width = (end - start) / steps
        return cls((*(start + i * width for i in range(steps)), end))

    @classmethod
    @checked
    def rectified_flow(cls, steps: Steps, eps: Chance = 1e-3) -> TimeGrid:
        """The grid of the official rectified-flow code, for comparison with it.

        Evaluations at t_i = i/N (1 - eps) + eps, but steps of 1/N, not (1 - eps)/N.

        Raises:
            ValueError: steps < 1.
        """
        points = tuple(i / steps * (1 - eps) + eps for i in range(steps + 1))
        return cls(points, (1 / steps,) * steps)

    @classmethod
    @checked
    def sd3(cls, steps: Steps, shift: Positive = 3.0) -> TimeGrid:
        """The grid of SD3's official code and of diffusers' scheduler: equal steps down to the
        shifted smallest of 1,000 training times, shifted, and one more to the data. That smallest
        time is shifted twice, as it is there.

        Raises:
            ValueError: steps < 1, or the shift is not positive.
        """
        last = 1.0 if steps == 1 else cls((0.0, 1 - 1e-3)).shifted(shift).end
        width = last / max(steps - 1, 1)
        return cls((*(i * width for i in range(steps)), 1.0)).shifted(shift)

    @checked
    def shifted(self, factor: Positive) -> TimeGrid:
        """The same steps with more of them near the noise: ``t' = t / (t + a (1 - t))``, which is
        ``u' = a u / (1 + (a - 1) u)`` in the time u = 1 - t of SD3 and FLUX. Shifts multiply.

        Args:
            factor: a; 1 changes nothing. SD3: 3, FLUX: `shift_of_length`.

        Raises:
            ValueError: the factor is not positive, or the grid has widths of its own.

        Reference: Scaling Rectified Flow Transformers for High-Resolution Image Synthesis, 2024,
        arXiv 2403.03206, section 5.3.2.
        """
        if self.widths is not None:
            raise ValueError("TimeGrid: a grid with widths of its own cannot be shifted")
        return TimeGrid(tuple(t / (t + factor * (1 - t)) for t in self.points))

    @property
    def start(self) -> float:
        """First time."""
        return self.points[0]

    @property
    def end(self) -> float:
        """Last time."""
        return self.points[-1]

    def reversed(self) -> TimeGrid:
        """The same points backwards."""
        widths = None if self.widths is None else tuple(-w for w in reversed(self.widths))
        return TimeGrid(self.points[::-1], widths)

    def __len__(self) -> int:
        return len(self.points) - 1

    def __iter__(self) -> Iterator[tuple[float, float]]:
        """(time, width) of each step."""
        for i, t in enumerate(self.points[:-1]):
            yield t, self.points[i + 1] - t if self.widths is None else self.widths[i]


@checked
def shift_of_length(tokens: Count) -> float:
    """Factor of `TimeGrid.shifted` for an image of so many tokens, as FLUX.1 dev was trained:
    ``e^mu`` with mu linear in their number through (256, 0.5) and (4096, 1.15).

    Args:
        tokens: number of image tokens, (H / 16) (W / 16) for an image of H x W pixels.

    Raises:
        ValueError: no positive number.
        TypeError: no whole number.
    """
    return math.exp(0.5 + (tokens - 256) * (1.15 - 0.5) / (4096 - 256))
