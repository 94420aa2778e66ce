"""One call that says whether a part keeps the contract."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from effformer import registry
from effformer.arguments import checked
from effformer.checks import unknown
from effformer.config import resolve

from . import contract, pairs, work
from .report import Check, Finding, PartReport, found
from .subjects import subjects

__all__ = ["CHECKS", "KINDS", "check_part"]

CHECKS: tuple[Check, ...] = (*contract.CHECKS, *pairs.CHECKS, *work.CHECKS)
KINDS = ("attention", "ffn", "block")


@checked
def check_part(
    name: str,
    kind: str | None = None,
    *,
    options: Mapping[str, Any] | None = None,
    skip: Sequence[str] = (),
) -> PartReport:
    """Check that a registered attention, FFN or block keeps the contract of its kind.

    Shapes, learning, independent samples, exact gradients, saved weights, compiling, counted work, half
    precision, sentences for wrong inputs; and what it declares: causal order, masks, packing, streaming,
    rotary positions, a memory, linear cost, ONNX. What it does not declare it must refuse. The tests of
    this library run the same checks over every part that it has.

    Args:
        name: as ``attn=``, ``ffn=`` or ``block=`` take it.
        kind: "attention", "ffn" or "block"; None finds it.
        options: of its config, for instance a window that a dozen tokens fill.
        skip: names of checks to leave out. What has no derivative, such as a spike, leaves out
            "gradients-are-exact".

    Returns:
        What was found; ``print`` shows a line for every check.

    Raises:
        AssertionError: something does not hold; the message says what and, for each, why.
        ValueError: unknown name, kind, option or check.

    Example:
        >>> report = check_part("mlp", skip=["its-graph-agrees"])
        >>> report.failed
        ()
    """
    kind = _kind(name, kind)
    resolve(kind, {"name": name, **(options or {})})
    known = [check.name for check in CHECKS]
    for one in skip:
        if one not in known:
            raise unknown("check", one, known, where="check_part: skip")
    findings = []
    for subject in subjects(kind, name, options):
        for check in CHECKS:
            if check.name in skip:
                findings.append(Finding(str(subject), check.name, "left out", "as asked"))
            elif check.applies(subject):
                findings.append(found(check, subject))
    report = PartReport(name, tuple(findings))
    if report.failed:
        raise AssertionError(f"{len(report.failed)} checks fail\n{report}")
    return report


def _kind(name: str, kind: str | None) -> str:
    """The kind of a name.

    Raises:
        ValueError: no such kind, or no part of that name.
    """
    if kind is not None and kind not in KINDS:
        raise unknown("kind", kind, KINDS, where="check_part")
    kinds = [k for k in KINDS if name in registry.KINDS[k]] if kind is None else [kind]
    if not kinds:
        names = [n for k in KINDS for n in registry.KINDS[k].names()]
        hint = "attention, ffn or block; effformer list shows them"
        raise unknown("part", name, names, where="check_part", hint=hint)
    registry.KINDS[kinds[0]].get(name, where="check_part")
    return kinds[0]
