"""What `sensitivity` found, as text, table, page and plot, and formats that keep a budget."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path
from typing import Any, Literal, Self

from effformer.arguments import checked
from effformer.checks import FormatError
from effformer.files import read_json
from effformer.notebook import html_table
from effformer.profile.html import page
from effformer.profile.plots import Curves
from effformer.profile.save import Saved
from effformer.profile.tables import size, table
from effformer.values import Positive

from ..quant.mixed import MixedScheme
from .budget import Option, pick

__all__ = ["SENSITIVITY", "Expected", "Sensitivity", "SensitivityRow"]

SENSITIVITY = "sensitivity"
_GOALS = ("bits", "bytes", "error", "latency")
_Loss = Literal["mse", "kl"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SensitivityRow:
    """One unit in one format, everything else dense.

    Attributes:
        name: path of its first layer, and the last names of the others.
        layers: paths of its layers.
        scheme: name of the format in `Sensitivity.schemes`.
        params: weights.
        bytes_before: of the dense weights.
        bytes_after: of the packed ones.
        header: by which the header of the model's file grows.
        mse: ``|y' - y|^2 / |y|^2`` of the output.
        cosine: mean cosine of the outputs of a sample.
        kl: mean KL divergence of rows of classes; None if the output has none.
        seconds_before: that the dense layers take in a forward, None if they are not called.
        seconds_after: that the packed ones take.
    """

    name: str
    layers: tuple[str, ...]
    scheme: str
    params: int
    bytes_before: int
    bytes_after: int
    header: int
    mse: float
    cosine: float
    kl: float | None
    seconds_before: float | None
    seconds_after: float | None

    @property
    def bits(self) -> float:
        """Bits of a weight, scales included."""
        return 8 * self.bytes_after / self.params

    @property
    def error(self) -> float:
        """Relative error of the output, ``|y' - y| / |y|``."""
        return math.sqrt(self.mse)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What a choice of formats is expected to give, errors and times of layers added up.

    Attributes:
        bits: mean bits of the weights that were looked at.
        bytes: size of the model's file.
        ratio: that by the dense one's.
        error: relative error of the output.
        latency: time of these layers by that of the dense ones; None if none is called.
    """

    bits: float
    bytes: int
    ratio: float
    error: float
    latency: float | None

    def __str__(self) -> str:
        time = "" if self.latency is None else f", {self.latency:.3g}x of these layers' time"
        return (
            f"expected: {self.bits:.3g} bits per weight, {size(self.bytes)} ({self.ratio:.3f}x of the "
            f"file), relative output error {self.error:.2%}{time}"
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Sensitivity(Saved):
    """What `sensitivity` found.

    Attributes:
        rows: one for every unit and format, unit by unit.
        schemes: name -> options of the format.
        file_bytes: size of the dense model's file.
        samples: that the outputs were compared on.
        machine: where the times were measured.
    """

    KIND = SENSITIVITY

    rows: tuple[SensitivityRow, ...]
    schemes: Mapping[str, Mapping[str, Any]]
    file_bytes: int
    samples: int
    machine: str

    @property
    def units(self) -> dict[str, list[SensitivityRow]]:
        """Rows of every unit by its name, in the order of the model."""
        found: dict[str, list[SensitivityRow]] = {}
        for row in self.rows:
            found.setdefault(row.name, []).append(row)
        return found

    @checked
    def budget(
        self,
        *,
        bits: Positive | None = None,
        bytes: Positive | None = None,
        error: Positive | None = None,
        latency: Positive | None = None,
        by: _Loss = "mse",
    ) -> MixedScheme:
        """Formats of the layers, of which some may stay dense, for exactly one of these targets.

        Errors of layers are taken to add up: roundings of different layers are nearly uncorrelated, so
        that ``|y' - y|^2`` of all is about the sum of that of each. Under a limit of bits, bytes or
        latency the sum of the errors is made small, under a limit of the error the bytes; the choice
        is a multiple-choice knapsack, see `effformer.compress.sensitivity.budget.pick`.

        Args:
            bits: mean bits of the weights that were looked at, scales included.
            bytes: size of the model's file; up to 1: share of the dense one's.
            error: relative error of the output.
            latency: time of the layers that were looked at, by that of the dense ones.
            by: the error: squared error or KL divergence of the output.

        Returns:
            What `quantize` takes as its scheme.

        Raises:
            ValueError: none or several targets, or one that these formats cannot meet; the best that
                they can is told. "kl" of outputs that have no rows of classes.
        """
        given = {"bits": bits, "bytes": bytes, "error": error, "latency": latency}
        targets = {name: value for name, value in given.items() if value is not None}
        if len(targets) != 1:
            raise ValueError(
                f"budget: give one of {', '.join(_GOALS)}, got {', '.join(targets) or 'none'}"
            )
        ((goal, target),) = targets.items()
        loss = self._losses(by)
        options = [self._options(goal, rows, loss) for rows in self.units.values()]
        limit = self._limit(goal, target)
        found = pick(options, limit * (1 + 1e-12))
        if found is None:
            least = self._reached(goal, sum(min(o.cost for o in own) for own in options))
            raise ValueError(
                f"budget: {goal}={target:g} cannot be met with {', '.join(self.schemes)}; the least "
                f"that they reach is {goal}={least:.4g}"
            )
        schemes: dict[str, Any] = {}
        for rows, index in zip(self.units.values(), found, strict=True):
            spec = None if index == 0 else dict(self.schemes[rows[index - 1].scheme])
            schemes |= dict.fromkeys(rows[0].layers, spec)
        return MixedScheme(schemes=schemes)

    def _losses(self, by: _Loss) -> dict[tuple[str, str], float]:
        if by == "kl" and any(row.kl is None for row in self.rows):
            raise ValueError(
                "budget: by='kl': the output has no rows of classes (B, C) or (B, N, C); take 'mse'"
            )
        return {
            (r.name, r.scheme): max(0.0, (r.kl or 0.0) if by == "kl" else r.mse) for r in self.rows
        }

    def _options(
        self, goal: str, rows: list[SensitivityRow], losses: Mapping[tuple[str, str], float]
    ) -> list[Option]:
        """The dense form, then the formats."""
        first = rows[0]
        found = [(first.bytes_before, 0, first.seconds_before, 0.0)]
        found += [
            (r.bytes_after, r.header, r.seconds_after, losses[r.name, r.scheme]) for r in rows
        ]
        made = []
        for held, header, seconds, loss in found:
            filed = held if goal == "bits" else held + header
            cost = {"error": loss, "latency": seconds or 0.0}.get(goal, filed)
            made.append(Option(cost, filed if goal == "error" else loss))
        return made

    def _limit(self, goal: str, target: float) -> float:
        """The target as the sum of the units' costs."""
        firsts = [rows[0] for rows in self.units.values()]
        if goal == "bits":
            return target * sum(row.params for row in firsts) / 8
        if goal == "bytes":
            whole = target * self.file_bytes if target <= 1 else target
            return whole - (self.file_bytes - sum(row.bytes_before for row in firsts))
        if goal == "error":
            return target**2
        return target * sum(row.seconds_before or 0.0 for row in firsts)

    def _reached(self, goal: str, cost: float) -> float:
        """The sum of the units' costs as a target."""
        firsts = [rows[0] for rows in self.units.values()]
        if goal == "bits":
            return 8 * cost / sum(row.params for row in firsts)
        if goal == "bytes":
            rest = self.file_bytes - sum(row.bytes_before for row in firsts)
            return (cost + rest) / self.file_bytes
        if goal == "error":
            return math.sqrt(cost)
        return cost / (sum(row.seconds_before or 0.0 for row in firsts) or 1.0)

    @checked
    def expected(self, scheme: MixedScheme) -> Expected:
        """What a choice that `budget` made is expected to give.

        Raises:
            ValueError: it has a layer or a format that was not looked at.
        """
        held = header = mse = after = before = 0.0
        for rows in self.units.values():
            row = self._row_of(rows, scheme)
            before += rows[0].seconds_before or 0.0
            held += rows[0].bytes_before if row is None else row.bytes_after
            header += 0 if row is None else row.header
            mse += 0.0 if row is None else row.mse
            after += (rows[0].seconds_before if row is None else row.seconds_after) or 0.0
        ratio = self._reached("bytes", held + header)
        return Expected(
            bits=self._reached("bits", held), bytes=round(ratio * self.file_bytes), ratio=ratio,
            error=math.sqrt(mse), latency=after / before if before else None,
        )  # fmt: skip

    def _row_of(self, rows: list[SensitivityRow], scheme: MixedScheme) -> SensitivityRow | None:
        path = rows[0].layers[0]
        if path not in scheme.schemes:
            raise ValueError(
                f"expected: the scheme names no format for {path!r}; take one of budget()"
            )
        spec = scheme.schemes[path]
        if spec is None:
            return None
        found = [row for row in rows if dict(self.schemes[row.scheme]) == spec]
        if not found:
            raise ValueError(f"expected: {spec!r} was not tried; known: {', '.join(self.schemes)}")
        return found[0]

    def curves(self) -> Curves:
        """Relative error of the output for every unit, one line a format."""
        lines: dict[str, list[tuple[float, float]]] = {name: [] for name in self.schemes}
        for index, rows in enumerate(self.units.values()):
            for row in rows:
                lines[row.scheme].append((float(index), row.error))
        return Curves(lines, "layer, in the order of the model", "relative output error", log=True)

    def table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Header and cells, one row for every unit and format."""
        header = ("layer", "scheme", "bits", "error", "cosine", "KL", "dense", "packed")
        return header, [tuple(_cells(row)) for row in self.rows]

    def __str__(self) -> str:
        return f"{table(*self.table())}\n{self.how()}"

    def how(self) -> str:
        """One sentence about the way it was measured."""
        return f"{self.samples} samples; times of the layers alone, in one process; {self.machine}"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; errors that are infinite are "inf"."""
        data = dataclasses.asdict(self)
        for row in data["rows"]:
            row |= {key: "inf" for key in ("mse", "kl") if row[key] == math.inf}
        return data

    @classmethod
    @checked
    def read(cls, path: str | Path) -> Self:
        """What `save` wrote as .json.

        Raises:
            FormatError: the file is missing, or is no such result.
        """
        data = read_json(path)
        names = [field.name for field in dataclasses.fields(cls)]
        own = [field.name for field in dataclasses.fields(SensitivityRow)]
        try:
            read: list[dict[str, Any]] = [
                {name: math.inf if row[name] == "inf" else row[name] for name in own}
                for row in data["rows"]
            ]
            rows = tuple(SensitivityRow(**row | {"layers": tuple(row["layers"])}) for row in read)
            return cls(rows=rows, **{name: data[name] for name in names if name != "rows"})
        except (KeyError, TypeError) as error:
            raise FormatError(f"{path}: is no result of sensitivity as .json") from error

    def _body(self) -> str:
        said = f"<p>{escape(self.how())}</p>"
        return f'<div class="plot">{self.curves().svg()}</div>{html_table(*self.table())}{said}'

    def _page(self) -> str:
        title = "Sensitivity of layers"
        return page(title, f"<h1>{title}</h1>{self._body()}", SENSITIVITY)


def _cells(row: SensitivityRow) -> Iterator[str]:
    yield from (row.name, row.scheme, f"{row.bits:.3g}", f"{row.error:.2%}", f"{row.cosine:.5f}")
    yield "-" if row.kl is None else f"{row.kl:.2e}"
    for seconds in (row.seconds_before, row.seconds_after):
        yield "-" if seconds is None else f"{1e3 * seconds:.3g} ms"
