"""`effformer export`: a model as an ONNX file or as an edge bundle."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

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

if TYPE_CHECKING:
    from effformer.models.base import Model

Quantize = Literal["dynamic-uint8", "int8", "int4"]


def export(
    model: Annotated[str, typer.Argument(help="Folder of a saved model, or a model name.")],
    form: Annotated[
        Literal["onnx", "bundle"] | None,
        typer.Option("--format", help="Default: onnx if --out ends in .onnx, else bundle."),
    ] = None,
    quantize: Annotated[
        Quantize | None, typer.Option(help="Quantize the graph by ONNX Runtime.")
    ] = None,
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
    attn: Attn = None,
    ffn: FFN = None,
    block: Block = None,
    pairs: Set = None,
    out: Out = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Export a model, verified against torch.

    A bundle is a folder that samples with numpy and onnxruntime alone: `python FOLDER/run.py`. With
    `--target web` it also holds a page, which verifies itself and draws in a browser.

    Examples: `effformer export runs/digits/model -o digits.onnx`,
    `effformer export runs/digits/model --quantize int8 -o bundle`,
    `effformer export runs/digits --target web -o site`
    """
    place = save_to(out, "export")
    form = form or ("onnx" if place.suffix == ".onnx" else "bundle")
    own = {"--sampler": sampler, "--steps": steps, "--guidance": guidance, "--cache": cache}
    site = form == "bundle" and target == "web"
    graph = {"--opset": opset, "--target": None if site else target}
    ignored: dict[str, object] = {
        **(own if form == "onnx" else graph),
        "--runtime": None if site else runtime,
    }
    if given := [option for option, value in ignored.items() if value is not None]:
        other = ", or add --format bundle --target web" if "--runtime" in given else ""
        if form == "bundle" and "--target" in given:
            other = ", or choose --target web for a page"
        raise ValueError(
            f"export: {', '.join(given)} means nothing to --format {form}; leave it out{other}"
        )
    network = load(model, overrides(attn, ffn, block, pairs))
    with stages() as stage:
        stage(f"exporting {network.name}")
        if form == "bundle":
            options: dict[str, Any] = {"steps": steps, "guidance": guidance, "force": force}
            options["sampler"] = "euler" if sampler is None else sampler
            options["cache"] = None if cache is None else named(cache)
            if site:
                data, size = _web(network, place, quantize, options, verify, runtime)
            else:
                data, size = _bundle(network, place, quantize, options, verify)
        else:
            options = {
                "opset": opset,
                "target": "onnx-cpu" if target is None else target,
                "tolerance": tolerance,
                "verify": verify,
            }
            data, size = _onnx(network, place, quantize, options, batch, force=force)
    parity = data["parity"]
    lines = [f"{place}: {'site' if site else form}, {size / 1e6:.2f} MB"]
    lines.append(_verified(parity) if parity else "not verified")
    lines += _held(data if "ranges" in data else parity or {})
    if packed := data.get("quantized"):
        lines.append(
            f"quantized by ONNX Runtime: {packed['quantized']} products, {packed['ratio']:.2f}x"
        )
    if site:
        lines.append(f"{data['runtime']} and graphs of {data['graphs'] / 1e6:.2f} MB; to see it: ")
        lines[-1] += (
            f"python -m http.server -d {shlex.quote(str(place))}, then http://localhost:8000"
        )
    emit(data, "\n".join(lines), as_json)


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


def _bundle(
    model: Model, place: Path, quantize: Quantize | None, options: dict[str, Any], verify: bool
) -> tuple[dict[str, Any], int]:
    from ..export import export_bundle

    report = export_bundle(model, place, **options, quantize=quantize, verify=verify)
    return report.to_dict(), report.bytes


def _web(
    model: Model,
    place: Path,
    quantize: Quantize | None,
    options: dict[str, Any],
    verify: bool,
    runtime: Path | None,
) -> tuple[dict[str, Any], int]:
    from ..export import export_web
    from ..export.web import check_site, find_runtime
    from ..files import workspace

    if not all(hasattr(model.config, name) for name in ("input_size", "channels", "num_classes")):
        raise ValueError(
            f"export: --target web draws pictures of classes, which {model.name} does not; leave --target "
            f"out and export a graph, -o {place}.onnx"
        )
    package, force = find_runtime(runtime), options["force"]
    check_site(place, force=force)
    with workspace(place) as folder:
        bundle = folder / "bundle"
        data, _ = _bundle(model, bundle, quantize, options, verify)
        report = export_web(bundle, place, runtime=package.folder, force=force)
    for name in ("parity", "quantized"):
        if data[name] is not None:
            data[name]["path"] = str(place / "velocity.onnx")
    return data | report.to_dict(), report.bytes


def _onnx(
    model: Model,
    place: Path,
    quantize: Quantize | None,
    options: dict[str, Any],
    batch: int,
    *,
    force: bool,
) -> tuple[dict[str, Any], int]:
    from ..export import export_onnx, quantize_onnx
    from ..export.quantize import QUANTIZED
    from ..files import check_file, workspace

    inputs = model.example_inputs(batch)
    if quantize is None:
        report = export_onnx(model, place, inputs, **options, force=force)
        return report.to_dict() | {"quantized": None}, report.graph.bytes
    check_file(place, "graph", force=force)
    compared = (model, inputs) if options["verify"] else None
    with workspace(place) as folder:
        # what is at the place stays until there is something quantized to replace it
        dense = folder / "dense.onnx"
        report = export_onnx(model, dense, inputs, **options)
        packed = quantize_onnx(dense, place, **QUANTIZED[quantize], compared=compared, force=force)
    data = report.to_dict() | {"quantized": packed.to_dict(), "path": str(place)}
    data["parity"] = data["quantized"].pop("parity")
    return data, packed.bytes_after
