"""Which layer gets which format: one scheme with an exception for sensitive layers, or one of each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from effformer.config import Config, Spec

from ..where import Where, covers
from .schemes import Scheme, make_scheme

__all__ = ["MixedScheme", "Rule", "decide", "read_rules"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MixedScheme(Config):
    """A scheme for every layer, as `quantize` takes it in place of a single one.

    Attributes:
        schemes: glob pattern of module paths -> name, dict or Config of a scheme; None: these layers
            stay in floating point. The first pattern that covers a layer decides; layers under none
            stay as well.
    """

    schemes: Mapping[str, Any]

    def check(self) -> None:
        """At least one pattern, each with a scheme that exists."""
        if not self.schemes:
            raise ValueError("MixedScheme.schemes: empty; give at least one pattern with a scheme")
        for pattern, spec in self.schemes.items():
            if spec is not None:
                make_scheme(spec, where=f"MixedScheme.schemes[{pattern!r}]")


@dataclass(frozen=True, slots=True)
class Rule:
    """What a group of layers becomes.

    Attributes:
        where: patterns of their paths.
        scheme: their format, None if they stay in floating point.
        backend: who rounds and decodes.
    """

    where: Where
    scheme: Scheme | None
    backend: str


def read_rules(
    spec: Spec, *, sensitive: Spec | None, careful: Where, backend: str
) -> tuple[list[Rule], Sequence[str]]:
    """The rules of a scheme in their order, and the patterns that a user has named in it.

    Args:
        spec: a scheme, a `MixedScheme` or its options.
        sensitive: scheme of the layers under ``careful`` if a single scheme has fewer than 8 bits; torch
            rounds and decodes them.
        careful: patterns of these.
        backend: of the others.
    """
    if isinstance(spec, Mapping) and "schemes" in spec and "name" not in spec:
        spec = MixedScheme.from_dict(spec, where="quantize: scheme")
    if isinstance(spec, MixedScheme):
        made = [
            Rule(p, None if one is None else make_scheme(one), backend)
            for p, one in spec.schemes.items()
        ]
        return made, [*spec.schemes]
    main = make_scheme(spec, where="quantize: scheme")
    if sensitive is None or main.bits >= 8:
        return [Rule("*", main, backend)], []
    exception = Rule(careful, make_scheme(sensitive, where="quantize: sensitive"), "torch")
    return [exception, Rule("*", main, backend)], []


def decide(rules: Iterable[Rule], names: Iterable[str]) -> Rule | None:
    """The first rule that covers one of the names of a weight, None if none does."""
    names = list(names)
    return next((r for r in rules if any(covers(r.where, name) for name in names)), None)
