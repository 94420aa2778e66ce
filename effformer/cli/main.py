"""The entry point: every verb, and nothing that is slow to import."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from ..values import QUIET
from ..version import VERSION
from . import (
    bench,
    build,
    card,
    compress,
    convert,
    demo,
    doctor,
    evaluate,
    export,
    linearize,
    new,
    profile,
    prune,
    sample,
    sensitivity,
    show,
    train,
    verify,
)
from . import list as list_parts
from .common import guard

__all__ = ["app", "main"]

app = typer.Typer(
    name="effformer",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)

_NOTHING = "nothing was written"
_OLD = "the target holds what it held before, or the whole new result"
_VERBS: tuple[tuple[str, Callable[..., None], str | Callable[..., str]], ...] = (
    ("demo", demo.demo, "run the same command again: finished steps are kept"),
    ("list", list_parts.list_parts, _NOTHING),
    ("show", show.show, _NOTHING),
    ("card", card.card, _OLD),
    ("build", build.build, _OLD),
    ("profile", profile.profile, _OLD),
    ("bench", bench.bench, _OLD),
    ("train", train.train, train.left),
    ("sample", sample.sample, _OLD),
    ("evaluate", evaluate.evaluate, _OLD),
    ("compress", compress.compress, compress.left),
    ("prune", prune.prune, _OLD),
    ("linearize", linearize.linearize, linearize.left),
    ("sensitivity", sensitivity.sensitivity, _OLD),
    ("export", export.export, _OLD),
    ("verify", verify.verify, _NOTHING),
    ("convert", convert.convert, _OLD),
    ("new", new.new, _OLD),
    ("doctor", doctor.doctor, _NOTHING),
)
for _name, _verb, _intact in _VERBS:
    app.command(_name)(guard(_verb, intact=_intact))


def _version(wanted: bool) -> None:
    if wanted:
        print(VERSION)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Efficient transformers from interchangeable parts: build, train, measure, compress, export.

    Start with `effformer demo`, `effformer list attention` or `effformer doctor`.
    """


def main() -> None:
    """Run the command line, whose threads sleep when they wait: other programs run beside it."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by whoever started the program
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):  # a terminal may lack characters of a message
            stream.reconfigure(errors="backslashreplace")
    try:
        app()
    except KeyboardInterrupt:  # before the verb began, or after its end
        print("effformer: interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
