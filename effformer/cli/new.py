"""`effformer new`: a package of your own with a part in it."""

from __future__ import annotations

from typing import Annotated

import typer

from .common import Json, Out, emit


def new(
    kind: Annotated[str, typer.Argument(help="attention, ffn or block.")],
    name: Annotated[str, typer.Argument(help="Of the part: lower-case words joined by hyphens.")],
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Write a small package that adds an attention, FFN or block of your own, with tests that pass.

    Examples: `effformer new attention cosine-window`, `effformer new ffn squared -o ../squared`
    """
    from ..testing.packages import STARTS, new_package

    folder = new_package(kind, name, out)
    written = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    lines = [
        f"{folder}: {', '.join(written)}",
        f'next: cd {folder} && pip install -e ".[test]" && pytest',
        f"then: {STARTS[kind]}={name!r} works in build_model, and effformer show {name} --compat says where",
    ]
    emit({"folder": str(folder), "files": written}, "\n".join(lines), as_json)
