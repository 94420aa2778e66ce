"""`effformer bench`: models and their forms side by side."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..checks import unknown
from .common import (
    Batch,
    Device,
    Dtype,
    Force,
    Json,
    Out,
    check_report,
    emit,
    load,
    moved,
    overrides,
    pairs_of,
    placed,
    stages,
    steps_bar,
)
from .forms import FORMS, GRAPHS, TORCH, candidate, graph_of, keep_inputs, write_graph

if TYPE_CHECKING:
    from torch import Tensor

    from effformer.models.base import Model
    from effformer.profile import Benchmark, Candidate, Comparison, Profile


@dataclass(slots=True, kw_only=True)
class _Row:
    """A candidate and what is known of it.

    Attributes:
        spec: what was typed.
        form: how it runs.
        candidate: what is timed.
        profile: its cost on paper.
        bytes: its weights or file.
        quality: what share it gets right.
    """

    spec: str
    form: str
    candidate: Candidate
    profile: Profile | None = None
    bytes: int | None = None
    quality: float | None = None


@dataclass(slots=True, kw_only=True)
class _Source:
    """One argument: a model, or a graph that lies on the disk."""

    spec: str
    label: str
    changes: dict[str, Any] = field(default_factory=dict)
    model: Model | None = None
    graph: Path | None = None
    quality: float | None = None

    @property
    def name(self) -> str:
        """The name or folder of a model."""
        return self.spec.partition(":")[0]


def bench(
    models: Annotated[
        list[str],
        typer.Argument(
            help="Model names, folders, bundles or .onnx files; parts after a colon: dit-b "
            "dit-b:attn=flow,depth=6. Ratios are relative to the first."
        ),
    ],
    attn: Annotated[
        str | None,
        typer.Option(
            help="One model with each of these token mixers: softmax,flow,sana.", metavar="NAMES"
        ),
    ] = None,
    sweep: Annotated[
        str | None,
        typer.Option(
            help="All models at several values of one option, with curves and where they cross.",
            metavar="KEY=A,B,...",
        ),
    ] = None,
    forms: Annotated[
        str,
        typer.Option(help=f"How models run: all, or of {', '.join(FORMS)} with commas between."),
    ] = "eager",
    threads: Annotated[
        str | None, typer.Option(help="Numbers of threads, for instance 1,2; default: all cores.")
    ] = None,
    batch: Batch = 1,
    rounds: Annotated[int, typer.Option(help="Processes of each.", min=1, max=1000)] = 3,
    runs: Annotated[int, typer.Option(help="Timed calls in a process.", min=1, max=10**6)] = 7,
    warmup: Annotated[int, typer.Option(help="Untimed calls before.", min=0, max=10**6)] = 2,
    quality: Annotated[
        str | None,
        typer.Option(
            help="Evaluate runs, models and bundles on these data, and draw times against errors.",
            metavar="DATA",
        ),
    ] = None,
    device: Device = "cpu",
    dtype: Dtype = None,
    out: Out = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Time models, one per process in turns, beside what they cost on paper.

    Examples: `effformer bench dit-s dit-s:attn=flow --threads 1,2`,
    `effformer bench runs/digits --forms all -o forms.html`,
    `effformer bench runs/softmax runs/flow --quality digits -o pareto.html`,
    `effformer bench dit-s --attn softmax,flow --sweep input_size=16,32,64 -o curves.html`
    """
    from ..profile import Sweep

    check_report(out, "comparison", force=force)
    plan = Plan(
        batch=batch, forms=_forms(forms), threads=_numbers(threads), rounds=rounds, runs=runs,
        warmup=warmup, device=device, dtype=dtype, quality=quality,
    )  # fmt: skip
    plan.check(models)
    specs = _with_mixers(models, attn)
    if sweep is None:
        made, verdict = measure(specs, plan)
        result: Comparison | Sweep = made
    else:
        key, values = _swept(sweep)
        result = Sweep(key, {v: measure(at_value(specs, key, v), plan)[0] for v in values})
        verdict = f"next: effformer bench {next(iter(specs.values()))} --forms all"
    if out is not None:
        result.save(out, force=force)
    emit(result.to_dict(), f"{result}\n{verdict}", as_json)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How everything is measured, see the options of `bench`."""

    batch: int
    forms: tuple[str, ...]
    threads: tuple[int, ...]
    rounds: int
    runs: int
    warmup: int
    device: str = "cpu"
    dtype: str | None = None
    quality: str | None = None

    def check(self, models: list[str]) -> None:
        """Refuse a device or numbers that are not here, or that graphs do not have.

        Raises:
            ValueError: that is so.
        """
        graphs = [form for form in self.forms if form in GRAPHS]
        graphs += [spec for spec in models if graph_of(spec) is not None]
        if graphs and (self.device, self.dtype) != ("cpu", None):
            raise ValueError(
                f"bench: {graphs[0]} runs on the CPU, in the numbers of its file; --device and --dtype "
                f"are for --forms {','.join(TORCH)}"
            )
        placed(self.device, self.dtype)
        if self.quality is None:
            return
        if built := [spec for spec in models if not Path(spec).is_dir()]:
            raise ValueError(
                f"bench: --quality needs folders of runs, models or bundles, {built[0]} is none"
            )
        if quantized := [form for form in self.forms if GRAPHS.get(form)]:
            raise ValueError(
                f"bench: --quality is that of the weights, which {quantized[0]} changes; export a bundle "
                "--quantize and name it"
            )


def measure(specs: Mapping[str, str], plan: Plan) -> tuple[Comparison, str]:
    """Models by their labels, and what is fastest and smallest."""
    from ..profile import benchmark

    sources = [_source(spec, label, plan.dtype) for label, spec in specs.items()]
    with tempfile.TemporaryDirectory(prefix="effformer.") as folder:
        inputs = _inputs(sources, plan.batch)
        with stages() as stage:
            _evaluate(sources, plan, stage)
            rows = _rows(sources, plan, inputs, Path(folder), stage)
        with steps_bar("measuring") as progress:
            found = benchmark(
                [row.candidate for row in rows], threads=plan.threads, rounds=plan.rounds,
                runs=plan.runs, warmup=plan.warmup, compared=len(sources) == 1, progress=progress,
            )  # fmt: skip
    return _comparison(rows, found), _verdict(rows, found)


def _evaluate(sources: list[_Source], plan: Plan, stage: Any) -> None:
    from .evaluate import quality_of

    for source in sources if plan.quality is not None else ():
        stage(f"evaluating {source.label}")
        found = quality_of(
            Path(source.spec), str(plan.quality), device=plan.device, dtype=plan.dtype, stage=stage
        )
        source.quality = found.recognised


def _with_mixers(models: list[str], attn: str | None) -> dict[str, str]:
    """Label -> model with its parts; the mixers of ``--attn`` are labels of their own.

    Raises:
        ValueError: mixers for several models, or for what is no model by name.
    """
    if attn is None:
        return dict(zip(_unique(models), models, strict=True))
    if len(models) > 1 or graph_of(models[0]) is not None or Path(models[0]).exists():
        raise ValueError(
            f"bench: --attn gives mixers to one model by name, got {', '.join(models)}; write "
            "them behind a colon, dit-s:attn=flow"
        )
    if "attn=" in models[0].partition(":")[2]:
        raise ValueError(
            f"bench: {models[0]} has an attn=, and --attn gives it others; leave one out"
        )
    names = list(dict.fromkeys(attn.split(",")))
    return {name: _added(models[0], f"attn={name}") for name in names}


def _added(spec: str, change: str) -> str:
    return f"{spec}{',' if ':' in spec else ':'}{change}"


def at_value(specs: Mapping[str, str], key: str, value: float) -> dict[str, str]:
    """The models with one more option."""
    return {label: _added(spec, f"{key}={value}") for label, spec in specs.items()}


def _swept(text: str) -> tuple[str, list[float]]:
    """The option and its values in rising order.

    Raises:
        ValueError: something else.
    """
    key, _, values = text.partition("=")
    try:
        found = sorted({int(v) if v.strip().isdecimal() else float(v) for v in values.split(",")})
    except ValueError:
        found = []
    if not key or len(found) < 2 or not all(0 < v < 1e9 for v in found):
        raise ValueError(f"--sweep {text}: write KEY=A,B,..., for instance input_size=16,32,64")
    return key, list(found)


def _numbers(text: str | None) -> tuple[int, ...]:
    """Numbers of threads.

    Raises:
        ValueError: something else.
    """
    if text is None:
        from ..profile import machine

        return (machine().cores,)
    parts = text.split(",")
    if not all(re.fullmatch(r" *0*[1-9][0-9]{0,3} *", p) and int(p) <= 1024 for p in parts):
        raise ValueError(f"--threads {text}: numbers from 1 to 1024, for instance 1 or 1,2")
    return tuple(dict.fromkeys(map(int, parts)))


def _forms(text: str) -> tuple[str, ...]:
    if text == "all":
        return FORMS
    for name in (given := tuple(dict.fromkeys(text.split(",")))):
        if name not in FORMS:
            raise unknown("form", name, [*FORMS, "all"], where="--forms")
    return given


def _source(spec: str, label: str, dtype: str | None) -> _Source:
    name, _, changes = spec.partition(":")
    if (graph := graph_of(spec)) is not None:
        return _Source(spec=spec, label=label, graph=graph)
    options = overrides(pairs=pairs_of(changes), flag=spec)
    model = moved(load(name, options), "cpu", dtype)  # it is counted here, and timed elsewhere
    return _Source(spec=spec, label=label, changes=options, model=model)


def _inputs(sources: list[_Source], batch: int) -> dict[str, Tensor]:
    """Inputs that all models take.

    Raises:
        ValueError: they take different ones, so that their times say nothing about each other, or
            there are graphs only, which do not say all sizes.
    """
    models = [s.model for s in sources if s.model is not None]
    if not models:
        graphs = ", ".join(s.spec for s in sources)
        raise ValueError(
            f"bench: {graphs} leave sizes open; name the model that was exported, too, which has inputs"
        )
    first, *others = (m.example_inputs(batch) for m in models)
    sizes = {k: tuple(x.shape) for k, x in first.items()}
    for model, inputs in zip(models[1:], others, strict=True):
        if {k: tuple(x.shape) for k, x in inputs.items()} != sizes:
            raise ValueError(
                f"bench: {model.name} takes {_shapes(inputs)}, {models[0].name} takes "
                f"{_shapes(first)}; compare models of equal inputs, or profile each alone"
            )
    return first


def _rows(
    sources: list[_Source],
    plan: Plan,
    inputs: dict[str, Tensor],
    folder: Path,
    stage: Any,
) -> list[_Row]:
    """Every source in every form."""
    from ..profile import profile

    place = keep_inputs(inputs, folder / "inputs.safetensors")
    rows = []
    for i, source in enumerate(sources):
        if source.graph is not None:
            made = candidate(source.label, "onnx", source.graph, place)
            size = source.graph.stat().st_size
            rows.append(
                _Row(
                    spec=source.spec,
                    form="file",
                    candidate=made,
                    bytes=size,
                    quality=source.quality,
                )
            )
            continue
        assert source.model is not None
        stage(f"counting {source.label}")
        cost = profile(source.model, inputs)
        for form in plan.forms:
            name = source.label if len(plan.forms) == 1 else f"{source.label} {form}"
            origin, size = source.name, _bytes(source.model)
            if form in GRAPHS:
                stage(f"exporting {name}")
                path = write_graph(source.model, form, folder / f"{i}.{form}.onnx", inputs)
                origin, size = str(path), path.stat().st_size
            made = candidate(
                name, form, origin, place, source.changes, device=plan.device, dtype=plan.dtype
            )
            rows.append(
                _Row(
                    spec=source.spec,
                    form=form,
                    candidate=made,
                    profile=cost,
                    bytes=size,
                    quality=source.quality,
                )
            )
    return rows


def _bytes(model: Model) -> int:
    """Bytes of the weights, tied ones once."""
    kept = {
        x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()
        for x in model.state_dict().values()
    }
    return sum(kept.values())


def _comparison(rows: list[_Row], found: Benchmark) -> Comparison:
    from ..profile import Comparison, ComparisonRow

    made = []
    for row in rows:
        name = row.candidate.name
        times = tuple((side.rows[name], side.ratios[name]) for side in found.sides.values())
        made.append(
            ComparisonRow(name, row.profile, times, row.bytes, found.errors.get(name), row.quality)
        )
    return Comparison(tuple(made), found.how())


def _verdict(rows: list[_Row], found: Benchmark) -> str:
    """What is fastest and smallest here, and what to type next."""
    lines = []
    for threads, side in found.sides.items():
        name = min(side.ratios, key=side.ratios.__getitem__)
        count = f"{threads} thread{'s' * (threads > 1)}"
        lines.append(f"fastest with {count}: {name} ({side.ratios[name]:.2f}x of the first)")
    smallest = min(rows, key=lambda row: row.bytes or 0)
    lines.append(f"smallest: {smallest.candidate.name}")
    ratios = next(iter(found.sides.values())).ratios
    best = next(row for row in rows if row.candidate.name == min(ratios, key=ratios.__getitem__))
    return "\n".join([*lines, f"next: {_next(best)}"])


def _next(best: _Row) -> str:
    """The command that makes the fastest form."""
    name, _, changes = best.spec.partition(":")
    words = " ".join(f"--set {change}" for change in pairs_of(changes))
    model = f"{name} {words}".strip()
    if best.form == "file":
        return f"effformer show {name}"
    if best.form in GRAPHS:
        scheme = GRAPHS[best.form]
        return f"effformer export {model}{f' --quantize {scheme}' if scheme else ''} -o model.onnx"
    if best.form == "eager":
        return f"effformer bench {best.spec} --forms all"
    call = "effformer.optimize(model)" if best.form == "optimized" else "torch.compile(model)"
    return f"{call} in Python"


def _shapes(inputs: dict[str, Tensor]) -> str:
    return ", ".join(f"{k} {tuple(x.shape)}" for k, x in inputs.items())


def _unique(names: list[str]) -> list[str]:
    """Number the repeated ones, so that a model can be timed against itself."""
    return [
        n if names.count(n) == 1 else f"{n} #{names[: i + 1].count(n)}" for i, n in enumerate(names)
    ]
