"""What the verbs share: options, part overrides, output, and errors as one sentence."""

from __future__ import annotations

import functools
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, ParamSpec

import typer

from ..checks import is_refusal
from ..retired import RetiredWarning

if TYPE_CHECKING:
    import torch
    from rich.console import RenderableType
    from rich.table import Table

    from effformer.loading import LoadReport
    from effformer.models.base import Model

__all__ = [
    "FFN", "Attn", "Averaged", "Batch", "Block", "Device", "Dtype", "Force", "Json", "Keep", "Out", "Seed", "Set", "Size", "Strict", "Threads", "check_report", "emit",
    "guard", "is_run", "load", "loaded", "moved", "named", "note", "overrides", "pairs_of", "parse_value", "placed", "save_to", "set_threads", "sides", "stages",
    "steps_bar", "table",
]  # fmt: skip

P = ParamSpec("P")

_PART = "NAME[:KEY=VALUE,...]"
Attn = Annotated[
    str | None,
    typer.Option(help="Token mixer or attention core, flow or flow:eps=1e-5.", metavar=_PART),
]
FFN = Annotated[str | None, typer.Option("--ffn", help="FFN of every block.", metavar=_PART)]
Block = Annotated[str | None, typer.Option(help="Block type.", metavar=_PART)]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="Any option of the config, value in JSON: depth=4, attn.eps=1e-5, "
        'layers=\'{"0:4": {"attn": "softmax"}}\'. May be repeated.',
        metavar="KEY=VALUE",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.", min=0, max=2**63 - 1)]
Threads = Annotated[
    int | None, typer.Option(help="CPU threads; default: torch's choice.", min=1, max=1024)
]
Size = Annotated[
    str | None,
    typer.Option(
        help="Bring images to this side, or to HEIGHTxWIDTH, and cut off what is too much.",
        metavar="SIDE",
    ),
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps.")]
Dtype = Annotated[
    Literal["float32", "float16", "bfloat16"] | None,
    typer.Option(help="Numbers in which a model computes; default: those of its weights."),
]
Batch = Annotated[int, typer.Option(help="Samples per call.", min=1, max=10**6)]
Strict = Annotated[
    Literal["yes", "no"],
    typer.Option(help="no: load what fits, although keys are missing or the network differs."),
]
Averaged = Annotated[
    str,
    typer.Option("--use", help="Which weights of a checkpoint: auto, ema, raw or an entry's name."),
]
Keep = Annotated[
    list[str] | None,
    typer.Option(
        help="A module that keeps its own values, such as a head of other classes. May be repeated.",
        metavar="NAME",
    ),
]
Force = Annotated[
    bool,
    typer.Option(
        "--force", help="Replace what is at --out, also if another verb or nobody of ours wrote it."
    ),
]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Where to write.")]

# Refusals and what the system says about files are the user's to solve, and one sentence says how;
# every other exception is a bug and keeps its traceback. The variable shows that of these as well.
TRACEBACK = "EFFFORMER_TRACEBACK"
_LONGEST = 1200  # characters of a sentence


def guard(verb: Callable[P, None], *, intact: str | Callable[..., str]) -> Callable[P, None]:
    """Turn user errors into one sentence on stderr and exit code 2, Ctrl-C into exit code 130.

    Args:
        verb: the function behind a verb.
        intact: what an interrupted run leaves behind, a sentence, or a function that tells it from
            the arguments of the verb.
    """

    def left(given: dict[str, Any]) -> str:
        return intact if isinstance(intact, str) else intact(**given)

    @functools.wraps(verb)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            with _noted():
                verb(*args, **kwargs)
        except BrokenPipeError:
            raise
        except Exception as error:
            sentence = _sentence(error, lambda: left(kwargs))
            if sentence is None or os.environ.get(TRACEBACK):
                raise
            _fail(sentence, 2)
        except KeyboardInterrupt:
            _fail(f"interrupted; {left(kwargs)}", 130)

    return guarded


@contextmanager
def _noted() -> Iterator[None]:
    """Show what users are told on the way as notes, each once: without the lines of code that Python
    shows beside it.
    """
    said = set[str]()
    with warnings.catch_warnings():
        warnings.simplefilter("always", RetiredWarning)
        show = warnings.showwarning

        def shown(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
            if not issubclass(category, UserWarning):
                show(message, category, *rest, **more)
            elif str(message) not in said:
                said.add(str(message))
                note(str(message))

        warnings.showwarning = shown
        yield


def _out_of_memory(error: BaseException) -> bool:
    # torch raises a bare RuntimeError on the CPU, a subclass of its own on other devices
    return isinstance(error, MemoryError) or any(
        words in str(error) for words in ("can't allocate memory", "out of memory")
    )


def _sentence(error: Exception, left: Callable[[], str]) -> str | None:
    """What to tell the user; None for a bug."""
    if _out_of_memory(error):
        return f"not enough memory; {left()}; choose a smaller batch or model"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'file'}: {error.strerror}"
    if isinstance(error, OSError) or is_refusal(error):
        return " ".join(str(error).split()) or type(error).__name__
    return None


def _fail(message: str, code: int) -> NoReturn:
    """End with a sentence; where it repeats a long word, its middle is left out."""
    note(message if len(message) <= _LONGEST else f"{message[:500]} ... {message[-500:]}")
    raise typer.Exit(code)


def note(message: str) -> None:
    """One sentence on stderr, beside the result."""
    print(f"effformer: {message}", file=sys.stderr)


def emit(data: Any, text: RenderableType, as_json: bool) -> None:
    """Print the result on stdout, as JSON or for people."""
    if as_json:
        print(json.dumps(data, indent=2, allow_nan=False))
        return
    from rich.console import Console

    # pipes have no width; tables that are cut at 80 columns lose data
    Console(width=None if sys.stdout.isatty() else 160, highlight=False).print(
        text, soft_wrap=isinstance(text, str), markup=False
    )


def table(headers: Sequence[str], rows: Sequence[Sequence[object]], *, title: str = "") -> Table:
    """A table whose columns of numbers are aligned right."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    made = Table(box=SIMPLE_HEAD, title=title or None, title_justify="left", pad_edge=False)
    for i, header in enumerate(headers):
        numbers = bool(rows) and all(str(row[i])[:1].isdigit() or row[i] == "" for row in rows)
        made.add_column(header, justify="right" if numbers else "left", no_wrap=i == 0)
    for row in rows:
        made.add_row(*(Text(str(cell)) for cell in row))
    return made


@contextmanager
def stages() -> Iterator[Callable[[str], None]]:
    """Yield a function that shows the present stage on stderr, if that is a terminal."""
    if not sys.stderr.isatty():
        yield lambda _stage: None
        return
    from rich.console import Console

    with Console(stderr=True).status("working") as status:
        yield status.update


@contextmanager
def steps_bar(what: str) -> Iterator[Callable[[int, int | None], None] | None]:
    """Yield a function of (steps done, steps in all) that moves a bar; None if nobody watches."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def set_threads(threads: int | None) -> None:
    """Limit torch to ``threads`` threads, None leaves its choice."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def loaded(report: LoadReport) -> str:
    """What was loaded, in words."""
    words = [f"{report.layout} layout"]
    if report.weights:
        words.append(f"{'averaged weights' if report.averaged else 'weights'} {report.weights!r}")
    for name in ("missing", "unexpected", "ignored", "kept"):
        if keys := getattr(report, name):
            words.append(f"{name} {len(keys)}: {', '.join(keys[:3])}{', ...' if keys[3:] else ''}")
    return "; ".join([*words, *(f"differs: {what}" for what in report.differs)])


def parse_value(text: str) -> Any:
    """JSON if it is JSON, else the string itself."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # also a number of more digits than Python reads
        return text


def named(text: str) -> str | dict[str, Any]:
    """A part with its options: ``flow:eps=1e-5,gate=head``; the name alone where there are none.

    Raises:
        ValueError: as in `overrides`.
    """
    name, _, options = text.partition(":")
    return {"name": name, **overrides(pairs=pairs_of(options), flag=text)} if options else name


def pairs_of(text: str) -> list[str]:
    """KEY=VALUE between commas; those inside a list, a dict or a string of JSON part nothing."""
    pairs: list[str] = []
    for piece in text.split(","):
        if pairs and _unfinished(pairs[-1].partition("=")[2]):
            pairs[-1] += f",{piece}"
        else:
            pairs.append(piece)
    return [pair for pair in pairs if pair]


def _unfinished(value: str) -> bool:
    return value[:1] in ("[", "{", '"') and parse_value(value) == value


def overrides(
    attn: str | None = None,
    ffn: str | None = None,
    block: str | None = None,
    pairs: Sequence[str] | None = None,
    *,
    flag: str = "--set",
) -> dict[str, Any]:
    """Keywords of `build_model` from the command line.

    ``--attn flow --set attn.eps=1e-5`` and ``--attn flow:eps=1e-5`` give
    ``{"attn": {"name": "flow", "eps": 1e-05}}``.

    Args:
        attn: a part, see `named`.
        ffn: a part.
        block: a part.
        pairs: KEY=VALUE.
        flag: where the pairs stand, for messages.

    Raises:
        ValueError: a pair without "=", or a key that is given a value and has options below it.
    """
    given = (("attn", attn), ("ffn", ffn), ("block", block))
    made: dict[str, Any] = {k: named(v) for k, v in given if v is not None}
    for pair in pairs or ():
        key, equals, value = pair.partition("=")
        if not equals or not all(key.split(".")):
            raise ValueError(f"{flag}: write KEY=VALUE, for instance depth=4, got {pair!r}")
        _put(made, key.split("."), parse_value(value), f"{flag} {pair}")
    return made


def _put(target: dict[str, Any], keys: list[str], value: Any, where: str) -> None:
    *above, last = keys
    for key in above:
        below = target.setdefault(key, {})
        if isinstance(below, str):
            below = target[key] = {"name": below}
        if not isinstance(below, dict):
            raise ValueError(f"{where}: {key} already has the value {below!r}")
        target = below
    if isinstance(target.get(last), dict) and isinstance(value, str):
        value = {"name": value, **target[last]}
    target[last] = value


def load(source: str, changes: dict[str, Any] | None = None, *, seed: int = 0) -> Model:
    """A saved model or that of a training run if ``source`` is a folder, else a new one by name.

    Raises:
        ValueError: unknown name, or changes to a saved model.
    """
    import torch

    from ..build import build_model
    from ..io import load_model

    if Path(source).is_dir():
        if changes:
            raise ValueError(
                f"{source} is a saved model, its parts are fixed; {', '.join(changes)} can be "
                "chosen when a model is built by name"
            )
        if not is_run(Path(source)):
            return load_model(source)
        from ..train import load_run

        model, step = load_run(source)
        if step is not None:
            note(f"{source} is unfinished: the weights are those of step {step}")
        return model
    if os.sep in source:
        raise ValueError(f"{source}: no such folder; saved models are folders with config.json")
    if changes and "name" in changes:
        raise ValueError(
            f"{source}: unknown option 'name'; a model is named in front of its options"
        )
    torch.manual_seed(seed)
    return build_model(source, **(changes or {})).eval()


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a training run."""
    return (folder / "run.json").is_file()


def placed(device: str, dtype: str | None = None) -> torch.device:
    """A device by its name, which computes with numbers of a type if one is given.

    Raises:
        ValueError: no such device, or not here, or one that does not compute with such numbers.
    """
    import torch

    try:
        found = torch.device(device)
        if found.type == "meta":
            raise RuntimeError("it holds no numbers")
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"--device {device}: cannot be used here ({_first(error)}); cpu always can"
        ) from error
    if dtype is None:
        return found
    try:
        one = torch.ones(2, 2, dtype=getattr(torch, dtype), device=found)
        (one @ one).sum().item()
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"--dtype {dtype}: {device} cannot compute with it ({_first(error)}); float32 always "
            "can"
        ) from error
    return found


def _first(error: Exception) -> str:
    """The first sentence of what torch says."""
    return re.split(r"\n|\. |; |, ", str(error), maxsplit=1)[0][:120]


def moved(model: Model, device: str, dtype: str | None = None) -> Model:
    """A model on a device, its weights as numbers of a type; None keeps theirs.

    Raises:
        ValueError: as in `placed`.
    """
    import torch

    place = placed(device, dtype)
    return model.to(place, None if dtype is None else getattr(torch, dtype))


def sides(size: str | int | None) -> int | tuple[int, int] | None:
    """The sides of images, ``32`` or ``24x32``; a run of an earlier version kept a number.

    Raises:
        ValueError: something else.
    """
    if size is None:
        return None
    found = re.fullmatch(r"([0-9]{1,5})(?:x([0-9]{1,5}))?", str(size))
    if found is None or not all(1 <= int(side) <= 2**14 for side in found.groups(found[1])):
        raise ValueError(f"--size {size}: a side of 1 to {2**14}, or HEIGHTxWIDTH such as 24x32")
    return int(found[1]) if found[2] is None else (int(found[1]), int(found[2]))


def save_to(out: Path | None, verb: str) -> Path:
    """The output path of a verb that must write.

    Raises:
        ValueError: none was given.
    """
    if out is None:
        raise ValueError(f"{verb}: where to? Add --out PATH")
    return out


def check_report(out: Path | None, kind: str, *, force: bool, option: str = "--out") -> None:
    """Refuse the place of a report before anything is measured.

    Raises:
        ValueError: a suffix that reports are not written as, or something else is there.
    """
    from ..files import check_file
    from ..profile import SUFFIXES

    if out is None:
        return
    if out.suffix not in SUFFIXES:
        raise ValueError(
            f"{option} {out}: must end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
        )
    check_file(out, kind, force=force)
