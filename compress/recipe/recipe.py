"""A recipe as it is written down."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from effformer.arguments import checked
from effformer.checks import FormatError, need, reason, unknown
from effformer.files import check_finite
from effformer.values import plain

from .steps import Acmize, Dynamize, Step, Upcycle, read_step

__all__ = ["Recipe"]

_KEYS = ("data", "samples", "steps")
_REBUILD = ("linearize", "acmize", "dynamize", "upcycle", "approximate")
_UNDONE = {"adapt": "merge"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Verbs of compress in their order.

    Attributes:
        steps: the verbs with their options.
        data: name of a data set or file, as the command line takes it; None: whoever runs the recipe
            gives data, or there are none.
        samples: how many of them calibration looks at.
    """

    steps: tuple[Step, ...]
    data: str | None = None
    samples: int = 64

    @classmethod
    @checked
    def from_dict(cls, given: Mapping[str, Any], *, where: str = "recipe") -> Self:
        """Check and read: ``{"data": "digits", "steps": [{"prune": {"macs": 0.5}}, {"quantize": {}}]}``.

        Raises:
            ValueError: unknown keys, verbs or options, no steps, or steps in an order that undoes one.
            TypeError: values of the wrong type.
        """
        for key in given:
            if key not in _KEYS:
                raise unknown("key", str(key), _KEYS, where=where)
        listed = given.get("steps")
        if not isinstance(listed, Sequence) or isinstance(listed, str) or not listed:
            raise ValueError(
                f"{where}: steps: expected a list of verbs, such as '- prune: {{macs: 0.5}}'"
            )
        data, samples = given.get("data"), given.get("samples", 64)
        if data is not None and not isinstance(data, str):
            raise TypeError(f"{where}: data: expected the name of a data set or file, got {data!r}")
        if not isinstance(samples, int) or isinstance(samples, bool) or samples < 1:
            raise ValueError(
                f"{where}: samples must be a whole number of at least 1, got {samples!r}"
            )
        steps = tuple(read_step(one, f"{where}: steps[{i}]") for i, one in enumerate(listed))
        _check_order(steps, where)
        return cls(steps=steps, data=data, samples=samples)

    @classmethod
    @checked
    def read(cls, path: str | Path) -> Self:
        """Read a YAML file; JSON is YAML as well.

        Raises:
            FormatError: the file is missing or is no YAML.
            ValueError: as in `from_dict`; the message names the file.
            TypeError: values of the wrong type.
        """
        yaml = need("yaml")
        check_finite(path)
        try:
            given = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise FormatError(f"{path}: no such file") from error
        except (OSError, ValueError, RecursionError) as error:
            raise FormatError(f"{path}: is no readable recipe ({reason(error)})") from error
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            line = "" if mark is None else f" in line {mark.line + 1}"
            said = getattr(error, "problem", None) or "its syntax"
            raise FormatError(f"{path}: is no readable YAML{line} ({said})") from error
        if not isinstance(given, Mapping):
            raise FormatError(f"{path}: expected keys such as 'steps:', got {type(given).__name__}")
        return cls.from_dict(given, where=str(path))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, from which `from_dict` makes the same recipe."""
        steps = [{step.verb: plain(step.options)} for step in self.steps]
        return {"data": self.data, "samples": self.samples, "steps": steps}

    def explain(self) -> str:
        """What will be done, and why, step by step."""
        data = (
            "no data" if self.data is None else f"data: {self.data}, {self.samples} to calibrate on"
        )
        lines = [f"{i + 1}. {step}" for i, step in enumerate(self.steps)]
        return "\n".join([data, *lines])


def _check_order(steps: Sequence[Step], where: str) -> None:
    """Refuse steps that undo, or cannot follow, an earlier one.

    Raises:
        ValueError: there are such.
    """
    verbs = [step.verb for step in steps]
    for i, step in enumerate(steps):
        before = verbs[:i]
        late = [
            v
            for v in ("quantize", "adapt", "approximate")
            if before.count(v) > before.count(_UNDONE.get(v, ""))
        ]
        if step.verb in _REBUILD and late:
            raise ValueError(
                f"{where}: steps[{i}]: {step.verb} changes what the model is built of; put it before "
                f"{late[0]}"
            )
        if step.trains and "sparsify" in before:
            raise ValueError(
                f"{where}: steps[{i}]: {step.verb} after sparsify would fill its zeros; put it before"
            )
        if "quantize" in before and step.verb in ("prune", "sparsify", "distill", "merge"):
            raise ValueError(
                f"{where}: steps[{i}]: {step.verb} needs dense weights; put it before quantize"
            )
        if step.verb == "merge" and "adapt" not in before:
            raise ValueError(
                f"{where}: steps[{i}]: merge follows adapt, which there is none before it"
            )
        for other in steps[:i]:
            if why := _clash(other, step):
                raise ValueError(f"{where}: steps[{i}]: {step.verb} after {other.verb}: {why}")


def _clash(before: Step, step: Step) -> str | None:
    """Why what two steps put into the same blocks cannot stand there together; None: it can."""
    pair: dict[type[Step], Any] = {type(one): one for one in (before, step)}
    if len({str(getattr(one, "paths", None)) for one in pair.values()}) > 1:
        return None  # patterns that differ may mean other blocks
    gates, acm = pair.get(Dynamize), pair.get(Acmize)
    summed = acm is not None and acm.chosen.ffn
    if gates is not None and summed:
        return "FFNs with gates cannot be sums of learners; acmize with ffn=False would do"
    if Upcycle in pair and (gates is not None or (summed and step is not acm)):
        return "copies of plain FFNs become experts; where= can name other blocks for each"
    width = None if gates is None else gates.chosen.width
    if acm is not None and acm.chosen.projections and width is not None and width.over == "all":
        return "heads with gates cannot share learners; dynamize with a width over='ffn' would do"
    return None
