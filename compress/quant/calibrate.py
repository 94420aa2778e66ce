"""Statistics of the inputs of layers: one pass over calibration data serves every scheme that asks for
some.

What is kept does not grow with the number of samples, and does not depend on how they are cut into
batches, except for the rounding of sums.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from effformer.arguments import checked
from effformer.calls import Call, bound, evaluating
from effformer.checks import is_refusal, reason

from ..samples import Data, calls
from .histogram import Histogram

__all__ = [
    "TIMES", "Seen", "Want", "attempt", "observe", "recording",
]  # fmt: skip

Want = Literal["second", "mean", "peak", "times", "range", "sample"]

TIMES = 8
"""Number of parts of the time axis that are told apart."""

SAMPLE = 256
"""Tokens that are kept of all that a layer has seen."""

_TIME = ("t", "timestep", "timesteps", "time")


class Seen:
    """Statistics of the inputs x (tokens, K) of one linear layer.

    Args:
        k: input features.
        wants: which statistics are kept.

    Attributes:
        tokens: number of tokens.
        second: sum of ``x x^T`` (K, K), or None if nobody wants it.
        total: sum of ``|x|`` (K,).
        peak: largest ``|x|`` (K,).
        times: largest ``|x|`` in each part of the time axis (`TIMES`, K), -1 where none was seen; the
            axis is cut from 0 to a power of two.
        histogram: of all values.
        sample: tokens (at most `SAMPLE`, K), spread over all that came.
    """

    def __init__(self, k: int, wants: Iterable[Want]) -> None:
        wants = set(wants)
        self.tokens = 0
        self.second = torch.zeros(k, k) if "second" in wants else None
        self.total = torch.zeros(k) if "mean" in wants else None
        self.peak = torch.zeros(k) if "peak" in wants else None
        self.times = torch.full((TIMES, k), -1.0) if "times" in wants else None
        self.end = 1.0
        self.histogram = Histogram() if "range" in wants else None
        self.sample = torch.zeros(0, k) if "sample" in wants else None
        self._ranks = torch.zeros(0, dtype=torch.int64)

    @property
    def mean(self) -> Tensor:
        """Mean of ``|x|`` (K,)."""
        assert self.total is not None
        return self.total / max(self.tokens, 1)

    def add(self, x: Tensor, t: Tensor | None = None) -> None:
        """Count inputs.

        Args:
            x: (B, ..., K); more rows than samples are those of each sample in turn.
            t: (B,) times, not negative; None or of another length: x counts for all times.
        """
        rows = x.detach().flatten(0, -2).float()
        if self.sample is not None:
            self._add_sample(rows.cpu())
        self.tokens += len(rows)
        if self.second is not None:
            self.second.addmm_(rows.t().cpu(), rows.cpu())
        if self.total is not None:
            self.total += rows.abs().sum(0).cpu()
        if self.peak is not None:
            self.peak = torch.maximum(self.peak, rows.abs().amax(0).cpu())
        if self.times is not None:
            self._add_times(x.detach().float().cpu(), t)
        if self.histogram is not None:
            self.histogram.add(rows)

    def _add_sample(self, rows: Tensor) -> None:
        """A token's rank is a scrambled form of its number: the choice does not hang on batches."""
        assert self.sample is not None
        number = torch.arange(self.tokens, self.tokens + len(rows))
        ranks = torch.cat([self._ranks, number * 2654435761 % 2**32])
        kept = ranks.argsort()[:SAMPLE]
        self.sample, self._ranks = torch.cat([self.sample, rows])[kept], ranks[kept]

    def _add_times(self, x: Tensor, t: Tensor | None) -> None:
        assert self.times is not None
        samples = x.flatten(1, -2) if x.dim() > 2 else x[:, None]
        peaks = samples.abs().amax(1)
        if t is None or t.dim() != 1 or len(peaks) % len(t):
            self.times = torch.maximum(self.times, peaks.amax(0))
            return
        t = t.detach().float().cpu()
        while float(t.max()) > self.end:  # two neighbours become one part: the same in any order
            pairs = self.times.unflatten(0, (-1, 2)).amax(1)
            self.times = torch.cat([pairs, torch.full_like(pairs, -1.0)])
            self.end *= 2
        place = (t / self.end * TIMES).long().clamp(0, TIMES - 1)
        place = place.repeat_interleave(len(peaks) // len(t))
        self.times.scatter_reduce_(0, place[:, None].expand_as(peaks), peaks, "amax")

    def scaled(self, scale: Tensor) -> Seen:
        """The statistics of ``x / scale``, scale (K,)."""
        s = scale.detach().float().cpu()
        out = Seen(len(s), ())
        out.tokens, out.end = self.tokens, self.end
        out.second = None if self.second is None else self.second / (s[:, None] * s)
        for name in ("total", "peak", "times", "sample"):
            value = getattr(self, name)
            setattr(out, name, None if value is None else value / s)
        return out

    def saliences(self) -> Tensor:
        """Largest ``|x|`` (T, K) in those parts of the time axis that were seen."""
        assert self.times is not None
        return self.times[self.times.amax(1) >= 0]

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Seen:
        """The statistics of ``change(x)``, linear in rows (..., K) -> (..., L): second moments and the
        sample, from which alone they follow.
        """
        out = Seen(0, ())
        out.tokens = self.tokens
        if self.second is not None:
            out.second = change(change(self.second).t()).contiguous()
        out.sample = None if self.sample is None else change(self.sample)
        return out


def observe(
    model: nn.Module,
    units: Iterable[Sequence[nn.Module]],
    wants: Mapping[nn.Module, Iterable[Want]],
    data: Data,
    *,
    where: str,
) -> Iterator[dict[nn.Module, Seen | None]]:
    """Run a model over data and keep statistics of what some of its linear layers are given.

    Statistics that would together be larger than a quarter of the model are gathered in several
    passes, if the data can be read several times.

    Args:
        model: the model; it stays as it is, and must do so until the last pass.
        units: linear layers; those of a unit are looked at in one pass.
        wants: what is wanted of each.
        data: see `Data`.
        where: verb and argument for messages, "quantize: data".

    Yields:
        For every pass its layers with their statistics, None for those that were not called.

    Raises:
        ValueError: data without samples, with NaN or infinite values, or that do not fit the model.
    """
    most = sum(p.numel() * p.element_size() for p in model.parameters()) // 4
    names = {module: name for name, module in model.named_modules()}
    for group in _passes(units, wants, None if isinstance(data, Iterator) else most):
        made = {m: Seen(m.in_features, wants[m]) for m in group}  # type: ignore[arg-type]
        _fill(model, made, data, where)
        for module, seen in made.items():
            sums = [x for x in (seen.second, seen.total, seen.peak) if x is not None]
            if not all(x.isfinite().all() for x in sums):
                raise ValueError(
                    f"{where}: the inputs of {names[module]!r} become NaN or infinite on these data; "
                    "its statistics would mean nothing. Leave it out with skip=, or mend the model"
                )
        yield {module: seen if seen.tokens else None for module, seen in made.items()}


def _passes(
    units: Iterable[Sequence[nn.Module]],
    wants: Mapping[nn.Module, Iterable[Want]],
    most: int | None,
) -> Iterator[list[nn.Module]]:
    group: list[nn.Module] = []
    size = 0
    for unit in units:
        widths = [int(m.in_features) for m in unit if "second" in wants[m]]  # type: ignore[arg-type]
        own = sum(4 * width**2 for width in widths)
        if group and most is not None and size + own > most:
            yield group
            group, size = [], 0
        group += unit
        size += own
    if group:
        yield group


def _fill(model: nn.Module, made: Mapping[nn.Module, Seen], data: Data, where: str) -> None:
    times: list[Tensor | None] = [None]

    def hook(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        made[module].add(args[0] if args else named["input"], times[0])

    handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module in made]
    try:
        with evaluating(model):
            for index, call in enumerate(calls(model, data, where=where)):
                known = call.tensors
                times[0] = next((known[n] for n in _TIME if n in known), None)
                attempt(model, call, where=f"{where}: batch {index}")
    finally:
        for handle in handles:
            handle.remove()


def attempt(model: nn.Module, call: Call, *, where: str) -> list[Tensor]:
    """What a model makes of a call.

    Raises:
        ValueError: the call does not fit it.
    """
    try:
        return call.run(model)
    except Exception as error:
        if not is_refusal(error) and not isinstance(error, RuntimeError | IndexError):
            raise
        raise ValueError(f"{where} does not fit the model: {reason(error)}") from error


class Recorder(list[Call]):
    """Calls of a model, at most ``limit``: a uniform choice of all that were made."""

    def __init__(self, limit: int, generator: torch.Generator) -> None:
        super().__init__()
        self.limit, self.generator, self.offered = limit, generator, 0

    def offer(self, call: Call) -> None:
        """One more call; it takes the place of a random one when the record is full."""
        self.offered += 1
        if len(self) < self.limit:
            self.append(call.map(lambda x: x.detach().clone()))
            return
        place = int(torch.randint(self.offered, (), generator=self.generator))
        if place < self.limit:
            self[place] = call.map(lambda x: x.detach().clone())


@contextmanager
@checked
def recording(
    model: nn.Module, limit: int = 32, *, generator: torch.Generator | None = None
) -> Iterator[Recorder]:
    """Keep a uniform choice of the calls that a model gets inside the block, as calibration data.

    A sampler that runs in the block gives data of all its times and of both branches of guidance.

    Args:
        model: the model that is called.
        limit: number of calls to keep; memory does not grow beyond.
        generator: source of randomness, seed 0 by default.

    Example:
        >>> import torch
        >>> from effformer.compress import quantize, recording
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU())
        >>> with recording(model) as data:
        ...     _ = model(torch.randn(8, 64))
        >>> small, report = quantize(model, "gptq", data=data)
    """
    record = Recorder(limit, generator or torch.Generator().manual_seed(0))

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        record.offer(bound(module, args, kwargs, "recording"))

    handle = model.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield record
    finally:
        handle.remove()
