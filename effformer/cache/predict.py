"""What a skipped evaluation gives: values of computed evaluations, carried on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from math import factorial

import torch
from torch import Tensor

from effformer.nn.precision import widened

__all__ = ["Newton", "Predictor", "Taylor"]


class Predictor(ABC):
    """Remembers the values of computed evaluations of one place, in float32 at least."""

    @property
    @abstractmethod
    def ready(self) -> bool:
        """There is something to predict from."""

    @abstractmethod
    def learn(self, value: Tensor, index: int, time: Tensor) -> None:
        """Take the value (B, ...) of evaluation ``index`` at the times (B,)."""

    @abstractmethod
    def predict(self, index: int, time: Tensor) -> Tensor:
        """The value (B, ...) at another evaluation."""

    @abstractmethod
    def put(self, rows: Tensor, value: Tensor) -> None:
        """Replace the last value of some samples (B',) in a copy."""


class Newton(Predictor):
    """The polynomial through the last ``order + 1`` computed values, in time: exact for values that
    are polynomials of that degree, however the times lie. Order 0 holds the last value.

    Args:
        order: degree.
    """

    def __init__(self, order: int) -> None:
        self.order = order
        self._points: list[tuple[Tensor, Tensor]] = []

    @property
    def ready(self) -> bool:
        return bool(self._points)

    def learn(self, value: Tensor, index: int, time: Tensor) -> None:
        # two stages of a solver may share a time, and a polynomial has one value there
        kept = [(t, v) for t, v in self._points if not bool((t == time).any())]
        self._points = [*kept, (time, widened(value))][-self.order - 1 :]

    def predict(self, index: int, time: Tensor) -> Tensor:
        if len(self._points) == 1:
            return self._points[0][1]
        total: Tensor | float = 0.0
        for j, (here, value) in enumerate(self._points):
            weight = torch.ones_like(time, dtype=torch.float64)
            for i, (there, _) in enumerate(self._points):
                if i != j:
                    weight = weight * (time.double() - there.double())
                    weight = weight / (here.double() - there.double())
            total = total + weight.to(value.dtype).view(-1, *(1,) * (value.dim() - 1)) * value
        assert isinstance(total, Tensor)
        return total

    def put(self, rows: Tensor, value: Tensor) -> None:
        time, last = self._points[-1]
        self._points[-1] = time, last.index_copy(0, rows, widened(value))


class Taylor(Predictor):
    """``sum_j F_j d^j / j!``, d evaluations behind the last computed one, whose backward differences
    stand for derivatives: ``F_0`` is its value, ``F_{j+1} = (F_j - F_j before) / gap``.

    The differences belong to the middle between computed evaluations, so that degrees above 1 are not
    exact; `Newton` is.

    Args:
        order: largest j.

    Reference: From Reusing to Forecasting: Accelerating Diffusion Models with TaylorSeers, 2025,
    arXiv 2503.06923.
    """

    def __init__(self, order: int) -> None:
        self.order = order
        self._factors: list[Tensor] = []
        self._index = 0

    @property
    def ready(self) -> bool:
        return bool(self._factors)

    def learn(self, value: Tensor, index: int, time: Tensor) -> None:
        factors, gap = [widened(value)], index - self._index
        for before in self._factors[: self.order]:
            factors.append((factors[-1] - before) / gap)
        self._factors, self._index = factors, index

    def predict(self, index: int, time: Tensor) -> Tensor:
        distance, out = index - self._index, self._factors[0]
        for j, factor in enumerate(self._factors[1:], 1):
            out = out + factor * (distance**j / factorial(j))
        return out

    def put(self, rows: Tensor, value: Tensor) -> None:
        self._factors = [self._factors[0].index_copy(0, rows, widened(value))]
