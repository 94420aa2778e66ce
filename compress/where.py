"""Where in a model: glob patterns of module paths, read in one way by every verb.

A pattern covers what it matches and everything below: ``"blocks.*.ffn"`` covers
``"blocks.3.ffn.part.fc1"``.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Collection, Iterable, Sequence

__all__ = ["Where", "check", "covers", "patterns"]

Where = str | Sequence[str]
"""One glob pattern of module paths or several."""


def patterns(given: Where) -> tuple[str, ...]:
    """The patterns of an argument ``where`` or ``skip``."""
    return (given,) if isinstance(given, str) else tuple(given)


def covers(given: Where, path: str) -> bool:
    """True if a pattern matches the path or any module above it.

    Example:
        >>> covers("blocks.*.ffn", "blocks.3.ffn.part.fc1"), covers("blocks", "head")
        (True, False)
    """
    return any(fnmatch.fnmatchcase(p, g) for g in patterns(given) for p in _with_parents(path))


def check(
    given: Where, paths: Iterable[str], *, able: Collection[str], what: str, where: str
) -> None:
    """Check that every pattern covers something that the verb can work on.

    Args:
        given: the patterns.
        paths: every module of the model.
        able: paths of those that the verb can work on.
        what: these in words, "linear layer".
        where: the verb and its option for messages, "quantize: where".

    Raises:
        ValueError: a pattern covers none; the message names paths near it.
    """
    for pattern in patterns(given):
        if any(covers(pattern, path) for path in able):
            continue
        found = any(fnmatch.fnmatchcase(path, pattern) for path in paths)
        reason = f"matches modules, but no {what} is in them" if found else "matches no module"
        known = sorted({parent for path in able for parent in _with_parents(path)})
        near = difflib.get_close_matches(pattern.replace("*", "0"), known, n=4, cutoff=0.3)
        listed = ", ".join(near or known[:4])
        raise ValueError(f"{where}={pattern!r} {reason}; layers near it: {listed}")


def _with_parents(path: str) -> list[str]:
    """``"a.b.c"`` -> ``["a", "a.b", "a.b.c"]``."""
    parts = path.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]
