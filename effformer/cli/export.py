"""`effformer export`: a model as an ONNX file or as an edge bundle."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from .bundles import kind_of_bundle, write_bundle
from .common import (
    FFN,
    Attn,
    Block,
    Force,
    Json,
    Out,
    Set,
    emit,
    load,
    named,
    overrides,
    save_to,
    stages,
)
from .compress import Samples, calibration
from .report import Report, check_place

if TYPE_CHECKING:
    from effformer.models.base import Model
    from effformer.profile import Breakdown


def export(
    model: Annotated[str, typer.Argument(help="Folder of a saved model, or a model name.")],
    form: Annotated[
        Literal["onnx", "bundle"] | None,
        typer.Option("--format", help="Default: onnx if --out ends in .onnx, else bundle."),
    ] = None,
    quantize: Annotated[
        list[str] | None,
        typer.Option(
            help="Quantize the graph by ONNX Runtime: dynamic or static, with weights that suit the CPU here or "
            "as named (static-int8, ...-int7, ...-uint8); int8 and int4, weights alone. static takes ranges of "
            "activations from --data. With options int4:block=64. Bundles: may be repeated, also with float32; the runner takes the form "
            "that is fastest on its machine.",
            metavar="FORM[:KEY=VALUE,...]",
        ),
    ] = None,
    max_error: Annotated[
        float | None,
        typer.Option(
            help="With --quantize: products go back into floating point until the relative error of the "
            "outputs is at most this.",
            min=0,
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="onnx: what --quantize static and --max-error look at, as of compress; default: 'sampler' for "
            "generators. Bundles look at what their sampler asks."
        ),
    ] = None,
    samples: Samples = 64,
    batch: Annotated[
        int, typer.Option(help="onnx: samples of the traced call.", min=1, max=10**6)
    ] = 2,
    opset: Annotated[int | None, typer.Option(help="onnx: default is the target's.")] = None,
    target: Annotated[
        str | None,
        typer.Option(
            help="web: a bundle with a page that draws in browsers; onnx: effformer list targets, default: "
            "onnx-cpu."
        ),
    ] = None,
    runtime: Annotated[
        Path | None,
        typer.Option(
            help="web: unpacked npm package onnxruntime-web; default: node_modules/onnxruntime-web.",
            metavar="FOLDER",
        ),
    ] = None,
    tolerance: Annotated[float, typer.Option(help="onnx: largest relative difference.")] = 1e-4,
    verify: Annotated[
        bool, typer.Option(help="Compare with torch at the example and three other shapes.")
    ] = True,
    sampler: Annotated[
        str | None, typer.Option(help="bundle: its sampler; default: euler.")
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            help="bundle: steps of the sampler; default: 10, or as distilled.", min=1, max=10_000
        ),
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(help="bundle: scale of the guidance; default: 2, or 1 without a null class."),
    ] = None,
    cache: Annotated[
        str | None,
        typer.Option(
            help="bundle: skip all blocks at some steps: newton, reuse:every=3, ...; default: none.",
            metavar="POLICY",
        ),
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            help="bundle: of a text encoder, whose runner embeds texts: the folder of the published model, its "
            "tokenizer.json or its vocab.txt.",
            metavar="FOLDER",
        ),
    ] = None,
    attn: Attn = None,
    ffn: FFN = None,
    block: Block = None,
    pairs: Set = None,
    report: Report = None,
    out: Out = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Export a model, verified against torch.

    A bundle is a folder that samples with numpy and onnxruntime alone: `python FOLDER/run.py`. With
    `--target web` it also holds a page, which verifies itself and draws in a browser. A text encoder with
    `--tokenizer` becomes one that embeds texts, and a streaming model one that reads step by step.

    Examples: `effformer export runs/digits/model -o digits.onnx`,
    `effformer export runs/digits/model --quantize float32 --quantize static-int8 -o bundle`,
    `effformer export runs/digits --target web -o site`
    """
    place = save_to(out, "export")
    form = form or ("onnx" if place.suffix == ".onnx" else "bundle")
    own = {"--sampler": sampler, "--steps": steps, "--guidance": guidance, "--cache": cache}
    site = form == "bundle" and target == "web"
    graph = {"--opset": opset, "--target": None if site else target, "--data": data}
    ignored: dict[str, object] = {
        **({**own, "--tokenizer": tokenizer} if form == "onnx" else graph),
        "--runtime": None if site else runtime,
    }
    if given := [option for option, value in ignored.items() if value is not None]:
        other = ", or add --format bundle --target web" if "--runtime" in given else ""
        if form == "bundle" and "--target" in given:
            other = ", or choose --target web for a page"
        raise ValueError(
            f"export: {', '.join(given)} means nothing to --format {form}; leave it out{other}"
        )
    check_place(report, force=force)
    forms = [named(form) for form in quantize or ["float32"]]
    _check_forms(forms, max_error)
    network = load(model, overrides(attn, ffn, block, pairs))
    with stages() as stage:
        stage(f"exporting {network.name}")
        if form == "bundle":
            options: dict[str, Any] = {"steps": steps, "guidance": guidance, "force": force}
            options["sampler"] = "euler" if sampler is None else sampler
            options["cache"] = None if cache is None else named(cache)
            options |= {"quantize": forms, "max_error": max_error, "verify": verify}
            others = {
                "--quantize": quantize, "--max-error": max_error, "--report": report,
                "--target": target, "--no-verify": not verify,
            }  # fmt: skip
            kind = kind_of_bundle(network, tokenizer, own | others)
            if kind != "pictures":
                found, size = write_bundle(kind, network, place, tokenizer, options)
            elif site:
                found, size = _web(network, place, options, runtime)
            else:
                found, size = _bundle(network, place, options)
        else:
            options = {
                "opset": opset,
                "target": "onnx-cpu" if target is None else target,
                "tolerance": tolerance,
                "verify": verify,
            }
            how = _how(network, forms, max_error, data, samples)
            found, size = _onnx(network, place, how, options, batch, force=force)
        if report is not None:
            stage("measuring modules")
            cost = _boxes(network, place, form, batch, cached=cache is not None)
            cost.save(report, force=force)
    lines = _lines(place, "site" if site else form, found, size)
    lines += [] if report is None else [f"module by module: {report}"]
    emit(found, "\n".join(lines), as_json)


def _lines(place: Path, kind: str, found: dict[str, Any], size: int) -> list[str]:
    """What was written, in words."""
    parity = found["parity"]
    lines = [f"{place}: {kind}, {size / 1e6:.2f} MB"]
    if "error" in found:  # of texts or streams, whose runner was compared as a whole
        lines.append(f"verified: the runner differs by {found['error']:.1e} from torch")
    else:
        lines.append(_verified(parity) if parity else "not verified")
    lines += _held(found if "ranges" in found else parity or {})
    if packed := found.get("quantized"):
        left = f", {len(packed['left'])} left in floating point" if packed["left"] else ""
        lines.append(
            f"quantized by ONNX Runtime ({packed['scheme']}): {packed['quantized']} products{left}, "
            f"{packed['ratio']:.2f}x"
        )
    lines += [
        f"also {form}: differs by {error:.1e}" for form, error in found.get("forms", {}).items()
    ]
    if kind == "site":
        serve = f"python -m http.server -d {shlex.quote(str(place))}, then http://localhost:8000"
        graphs = found["graphs"] / 1e6
        lines.append(f"{found['runtime']} and graphs of {graphs:.2f} MB; to see it: {serve}")
    return lines


def _check_forms(forms: list[str | dict[str, Any]], max_error: float | None) -> None:
    from ..export.quantize import named_form

    for form in forms:
        named_form(form, where="export: --quantize")
    if max_error is not None and forms == ["float32"]:
        raise ValueError("export: --max-error is that of a quantized graph; add --quantize")


def _held(data: dict[str, Any]) -> list[str]:
    """The lengths that a graph was traced for, if not for all."""
    ranges = data.get("ranges", {})
    held = [f"{s} {a} to {'any' if b is None else b}" for s, (a, b) in ranges.items()]
    held += data.get("conditions", [])
    return [f"holds for: {', '.join(held)}"] if held else []


def _verified(parity: dict[str, Any]) -> str:
    lengths = ", ".join(f"{s} {'/'.join(map(str, n))}" for s, n in parity["lengths"].items())
    return f"verified: relative difference {parity['max_rel']:.1e}" + (
        f" at {lengths}" if lengths else ""
    )


def _bundle(model: Model, place: Path, options: dict[str, Any]) -> tuple[dict[str, Any], int]:
    from ..export import export_bundle

    report = export_bundle(model, place, **options)
    return report.to_dict(), report.bytes


def _web(
    model: Model,
    place: Path,
    options: dict[str, Any],
    runtime: Path | None,
) -> tuple[dict[str, Any], int]:
    from ..export import export_web
    from ..export.bundle import check_draws
    from ..export.web import check_site, find_runtime
    from ..files import workspace

    check_draws(model)
    package, force = find_runtime(runtime), options["force"]
    check_site(place, force=force)
    with workspace(place) as folder:
        bundle = folder / "bundle"
        data, _ = _bundle(model, bundle, options)
        report = export_web(bundle, place, runtime=package.folder, force=force)
    for name in ("parity", "quantized"):
        if data[name] is not None:
            data[name]["path"] = str(place / "velocity.onnx")
    return data | report.to_dict(), report.bytes


def _boxes(model: Model, place: Path, form: str, batch: int, *, cached: bool) -> Breakdown:
    """A model and its graph, module by module; that of a bundle is a velocity."""
    from ..export import graph_breakdown
    from ..export.velocity import Carrying, Velocity
    from ..flow import trained_of

    inputs, record = model.example_inputs(batch), trained_of(model)
    if form == "onnx" or record is None:
        return graph_breakdown(place, model, inputs)
    drawn = (
        Carrying(model, record.convention, given=False)
        if cached
        else Velocity(model, record.convention)
    )
    return graph_breakdown(place / "velocity.onnx", drawn, inputs)


def _how(
    model: Model,
    forms: list[str | dict[str, Any]],
    max_error: float | None,
    data: str | None,
    samples: int,
) -> dict[str, Any]:
    """Options of `quantize_form`, none for a graph as the model is.

    Raises:
        ValueError: several forms; data are needed and none are given, or the other way round.
    """
    from ..export.quantize import named_form
    from ..flow import trained_of

    if len(forms) > 1:
        raise ValueError(
            "export: --quantize: a file holds one form; several go into a --format bundle"
        )
    quantize, knobs = named_form(forms[0], where="export: --quantize")
    wanted = quantize.startswith("static") or max_error is not None
    if data is None and wanted and trained_of(model) is not None:
        data = "sampler"
    if (data is not None) != wanted:
        why = "takes ranges from data" if quantize.startswith("static") else "is measured on data"
        raise ValueError(
            f"export: --{'quantize ' + quantize if max_error is None else 'max-error'} {why}; add --data"
            if wanted
            else f"export: --data means nothing to --quantize {quantize}; leave it out"
        )
    if quantize == "float32":
        return {}
    found = None if data is None else calibration(model, data, samples, "export")
    return {"name": quantize, "more": knobs, "max_error": max_error, "data": found}


def _onnx(
    model: Model, place: Path, how: dict[str, Any], options: dict[str, Any], batch: int, *, force: bool
) -> tuple[dict[str, Any], int]:  # fmt: skip
    from ..export import export_onnx
    from ..export.within import quantize_form
    from ..files import check_file, workspace

    inputs = model.example_inputs(batch)
    if not how:
        report = export_onnx(model, place, inputs, **options, force=force)
        return report.to_dict() | {"quantized": None}, report.graph.bytes
    check_file(place, "graph", force=force)
    compared = (model, inputs) if options["verify"] else None
    with workspace(place) as folder:
        # what is at the place stays until there is something quantized to replace it
        dense = folder / "dense.onnx"
        report = export_onnx(model, dense, inputs, **options)
        packed = quantize_form(dense, place, **how, compared=compared, force=force)
    data = report.to_dict() | {"quantized": packed.to_dict(), "path": str(place)}
    data["parity"] = data["quantized"].pop("parity")
    return data, packed.bytes_after
