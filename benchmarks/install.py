"""What the default install weighs: each dependency with what nothing else asks for."""

from __future__ import annotations

import re
from importlib.metadata import Distribution, PackageNotFoundError, distribution

from markdown import Row, write

from effformer.profile import machine

OWN = "effformer"
SOMETIMES = ("bitsandbytes", "fvcore", "matplotlib", "onnx", "onnxruntime", "onnxscript", "timm")
"""Packages that some verbs import, where they use them."""
CUDA = ("nvidia", "triton", "cuda")


def name_of(requirement: str) -> str | None:
    """The package of a requirement that holds here, None for one of an extra."""
    if "extra ==" in requirement:
        return None
    found = re.match(r"[A-Za-z0-9._-]+", requirement)
    return None if found is None else re.sub(r"[-_.]+", "-", found[0]).lower()


def found(name: str) -> Distribution | None:
    try:
        return distribution(name)
    except PackageNotFoundError:  # of another platform
        return None


def closure(names: list[str], without: frozenset[str] = frozenset()) -> set[str]:
    """These packages and what they need, as far as it is installed."""
    seen: set[str] = set()
    todo = [name for name in names if name not in without]
    while todo:
        name = todo.pop()
        package = found(name)
        if package is None or name in seen:
            continue
        seen.add(name)
        todo += [n for r in package.requires or [] if (n := name_of(r)) is not None]
    return seen


def weight(names: set[str]) -> int:
    """Bytes of the files of these packages."""
    total = 0
    for name in names:
        package = found(name)
        for file in (package.files or []) if package is not None else []:
            path = file.locate()
            total += path.stat().st_size if path.exists() else 0
    return total


def main() -> None:
    own = found(OWN)
    assert own is not None
    direct = sorted({n for r in own.requires or [] if (n := name_of(r)) is not None})
    everything = closure(direct)
    whole, rows = weight(everything), []

    def row(what: str, bytes_: int, of: int = whole) -> Row:
        return Row(what=what, value=f"{bytes_ / 1e6:,.1f} MB", ratio=bytes_ / of)

    for name in SOMETIMES:
        alone = everything - closure(direct, frozenset({name}))
        rows.append(
            row(f"{name}, with {len(alone - {name})} packages that only it asks for", weight(alone))
        )
    some = weight(everything - closure(direct, frozenset(SOMETIMES)))
    rows.append(row("these together", some))
    rows.append(row("all of the default install, CUDA included", whole))
    cuda = weight({name for name in everything if name.startswith(CUDA)})
    rows.append(row("all of it without the packages of CUDA", whole - cuda))
    rows.append(row("the packages above, of the latter", some, whole - cuda))
    notes = [
        "a row is what disappears if that package alone is left out (what others share stays); the ratio is its share",
        "`import effformer` loads torch and none of them (startup.md, tests/test_imports.py), so they cost no time to start",
        "torch itself is the build with CUDA; its libraries are within the package and count in both totals",
    ]
    write("install", "Size of the default install", rows, machine(), notes)


if __name__ == "__main__":
    main()
