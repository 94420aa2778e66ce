"""What a check of a part says, and how it says it."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from effformer.checks import MissingExtra
from effformer.notebook import Shown

from .subjects import Subject

__all__ = ["Check", "Finding", "Outcome", "PartReport", "demand", "found"]

Outcome = Literal["holds", "fails", "left out"]
_FAULTS = (
    ArithmeticError, AttributeError, LookupError, NameError, OSError, RuntimeError, TypeError, ValueError,
)  # fmt: skip
"""What a wrong part raises; its author is told which, and the other checks go on."""
_SIGNS: dict[Outcome, str] = {"holds": "ok", "fails": "FAILS", "left out": "left out"}


def demand(condition: bool, otherwise: str) -> None:
    """Fail with a sentence unless a condition holds, also where Python skips ``assert``.

    Raises:
        AssertionError: it does not hold.
    """
    if not condition:
        raise AssertionError(otherwise)


@dataclass(frozen=True, slots=True)
class Check:
    """One clause of the contract.

    Attributes:
        run: raises an `AssertionError` that says what does not hold; its docstring says what should.
        applies: whether a part promises it.
    """

    run: Callable[[Subject], None]
    applies: Callable[[Subject], bool]

    @property
    def name(self) -> str:
        """The name of the function, as words."""
        return self.run.__name__.replace("_", "-")

    def __call__(self, subject: Subject) -> None:
        """Try a part, from the same seed every time."""
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            # forward mode loads what torch itself calls old; half inputs and float32 weights, as autocast
            # leaves them, have no fused norm on a CPU
            warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)
            warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")
            torch.default_generator.manual_seed(3)
            self.run(subject)


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found.

    Attributes:
        subject: the form of the part.
        check: name of the check.
        outcome: "holds", "fails", or "left out" (asked for, or a package is missing).
        words: why it fails or was left out.
    """

    subject: str
    check: str
    outcome: Outcome
    words: str = ""

    def __str__(self) -> str:
        said = f": {self.words}" if self.words else ""
        return f"{_SIGNS[self.outcome]:>8}  {self.subject}: {self.check}{said}"


@dataclass(frozen=True, slots=True)
class PartReport(Shown):
    """What `check_part` found.

    Attributes:
        name: the part.
        findings: one for every check of every form.
    """

    name: str
    findings: tuple[Finding, ...]

    @property
    def failed(self) -> tuple[Finding, ...]:
        """What does not hold."""
        return tuple(f for f in self.findings if f.outcome == "fails")

    def __str__(self) -> str:
        counts = {o: sum(f.outcome == o for f in self.findings) for o in _SIGNS}
        said = ", ".join(f"{count} {outcome}" for outcome, count in counts.items() if count)
        return "\n".join([f"{self.name}: {said}", *map(str, self.findings)])


def found(check: Check, subject: Subject) -> Finding:
    """Try one check; whatever is raised becomes words, with the line of the part that raised it."""
    try:
        check(subject)
    except AssertionError as error:
        return Finding(str(subject), check.name, "fails", " ".join(str(error).split()))
    except MissingExtra as error:
        return Finding(str(subject), check.name, "left out", str(error))
    except _FAULTS as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        words = f"{type(error).__name__}: {error} ({last.filename}:{last.lineno})"
        return Finding(str(subject), check.name, "fails", " ".join(words.split()))
    return Finding(str(subject), check.name, "holds")
