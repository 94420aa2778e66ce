"""Calibration data: batches of named tensors, checked before anything is measured."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from effformer.calls import Call, Inputs, bind, half_of, match
from effformer.checks import check_values, shown
from effformer.train.datasets import Dataset, halved

__all__ = ["Data", "batches", "calls", "check_tensors", "listed"]

Data = Inputs | Dataset | Iterable[Inputs]
"""Named tensors whose first axis counts samples, a data set, or batches of such."""

_CHUNK = 32  # samples per call, where the data are one piece


def batches(data: Data, *, where: str) -> Iterator[Inputs]:
    """The batches of calibration data; named tensors and data sets are cut into some.

    Raises:
        ValueError: no sample, or tensors of different lengths.
        TypeError: nothing that holds tensors.
    """
    if isinstance(data, Dataset):
        data = data.tensors
    if isinstance(data, Mapping):
        yield from _cut(data, where)
        return
    if isinstance(data, Tensor) or (isinstance(data, tuple) and _positional(data)):
        yield data
        return
    if not isinstance(data, Iterable) or isinstance(data, str | bytes):
        raise TypeError(
            f"{where}: expected a dict of named tensors, a data set or batches of such, got "
            f"{type(data).__name__}"
        )
    empty = True
    for batch in data:
        empty = False
        yield batch
    if empty:
        raise ValueError(f"{where}: there are no samples; give at least one batch")


def _positional(data: Sequence[Any]) -> bool:
    return all(isinstance(x, Tensor) for x in data) and len(data) > 0


def _cut(data: Mapping[str, Any], where: str) -> Iterator[dict[str, Any]]:
    tensors = {k: x for k, x in data.items() if isinstance(x, Tensor) and x.dim() > 0}
    lengths = {len(x) for x in tensors.values()}
    if not lengths or 0 in lengths:
        raise ValueError(f"{where}: there are no samples; give at least one")
    if len(lengths) > 1:
        shapes = {k: tuple(x.shape) for k, x in tensors.items()}
        raise ValueError(
            f"{where}: expected tensors with one row for every sample, got lengths {shown(shapes)}"
        )
    count = lengths.pop()
    for start in range(0, count, _CHUNK):
        yield dict(data) | {k: x[start : start + _CHUNK] for k, x in tensors.items()}


def check_tensors(tensors: Mapping[str, Any], *, where: str) -> None:
    """Refuse tensors that say nothing of a model.

    Raises:
        ValueError: one is empty, has no values, or some that are NaN or infinite.
    """
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            continue
        check_values(x, where=f"{where}: {name}")
        if not x.numel():
            raise ValueError(f"{where}: {name} {tuple(x.shape)} is empty")
        if x.is_floating_point() and not x.isfinite().all():
            bad = int((~x.isfinite()).sum())
            raise ValueError(
                f"{where}: {bad} of {x.numel()} values of {name} are NaN or infinite; drop these samples"
            )


def suited(model: nn.Module, data: Data, *, where: str) -> Iterator[Any]:
    """The batches of calibration data in the numbers of a model: float32 becomes half precision where the
    weights are; recorded calls stay.

    Raises:
        ValueError: see `batches`.
        TypeError: nothing that holds tensors.
    """
    half = half_of(model)
    for batch in batches(data, where=where):
        if isinstance(batch, Mapping):
            yield {name: halved(x, half) for name, x in batch.items()}
        elif isinstance(batch, (tuple, list)):
            yield [halved(x, half) for x in batch]
        else:
            yield halved(batch, half)


def listed(model: nn.Module, data: Data, *, where: str) -> list[Any]:
    """All batches, for those who look at them several times, in the numbers of the model and checked.

    Raises:
        ValueError: see `batches` and `check_tensors`.
        TypeError: nothing that holds tensors.
    """
    found = list(suited(model, data, where=where))
    for index, batch in enumerate(found):
        named: Any = getattr(batch, "tensors", batch)
        if not isinstance(named, Mapping):
            several = named if isinstance(named, (tuple, list)) else (named,)
            named = {f"argument {i}": x for i, x in enumerate(several)}
        check_tensors(named, where=f"{where}: batch {index}")
    return found


def calls(model: nn.Module, data: Data, *, where: str) -> Iterator[Call]:
    """Calibration data as calls of a model.

    Raises:
        ValueError: a value is NaN or infinite, or there are no samples.
        TypeError: an argument that the model needs is missing.
    """
    for index, batch in enumerate(suited(model, data, where=where)):
        made: Any = batch
        if isinstance(made, Call):
            call = made
        elif isinstance(batch, Mapping):
            call = match(model, batch, where=where)
        else:
            call = bind(model, batch, where=where)
        check_tensors(call.tensors, where=f"{where}: batch {index}")
        yield call
