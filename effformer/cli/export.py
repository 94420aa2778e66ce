"""`effformer export`: a model as an ONNX file or as an edge bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from .common import (
    FFN,
    Attn,
    Block,
    Json,
    Out,
    Set,
    convention,
    emit,
    load,
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
    target: Annotated[str, typer.Option(help="onnx: effformer list targets.")] = "onnx-cpu",
    tolerance: Annotated[float, typer.Option(help="onnx: largest relative difference.")] = 1e-4,
    verify: Annotated[bool, typer.Option(help="Compare with torch at three other shapes.")] = True,
    sampler: Annotated[str, typer.Option(help="bundle: its sampler.")] = "euler",
    steps: Annotated[
        int, typer.Option(help="bundle: steps of the sampler.", min=1, max=10_000)
    ] = 10,
    guidance: Annotated[float, typer.Option(help="bundle: scale of the guidance.")] = 2.0,
    attn: Attn = None,
    ffn: FFN = None,
    block: Block = None,
    pairs: Set = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Export a model, verified against torch.

    A bundle is a folder that samples with numpy and onnxruntime alone: `python FOLDER/run.py`.

    Examples: `effformer export runs/digits/model -o digits.onnx`,
    `effformer export runs/digits/model --quantize int8 -o bundle`
    """
    place = save_to(out, "export")
    form = form or ("onnx" if place.suffix == ".onnx" else "bundle")
    network = load(model, overrides(attn, ffn, block, pairs))
    with stages() as stage:
        stage(f"exporting {network.name}")
        if form == "bundle":
            options = {"sampler": sampler, "steps": steps, "guidance": guidance}
            data, size = _bundle(network, place, quantize, options, verify)
        else:
            options = {"opset": opset, "target": target, "tolerance": tolerance, "verify": verify}
            data, size = _onnx(network, place, quantize, options, batch)
    parity = data["parity"]
    lines = [f"{place}: {form}, {size / 1e6:.2f} MB"]
    lines.append(_verified(parity) if parity else "not verified")
    if packed := data.get("quantized"):
        lines.append(
            f"quantized by ONNX Runtime: {packed['quantized']} products, {packed['ratio']:.2f}x"
        )
    emit(data, "\n".join(lines), as_json)


def _verified(parity: dict[str, Any]) -> str:
    lengths = ", ".join(f"{s} {'/'.join(map(str, n))}" for s, n in parity["lengths"].items())
    return f"verified: relative difference {parity['max_rel']:.1e}" + (
        f" at {lengths}" if lengths else ""
    )


def _bundle(
    model: Model, place: Path, quantize: Quantize | None, options: dict[str, Any], verify: bool
) -> tuple[dict[str, Any], int]:
    from ..export import export_bundle

    report = export_bundle(
        model, place, **options, convention=convention(model), quantize=quantize, verify=verify
    )
    return report.to_dict(), report.bytes


def _onnx(
    model: Model, place: Path, quantize: Quantize | None, options: dict[str, Any], batch: int
) -> tuple[dict[str, Any], int]:
    from ..export import export_onnx, quantize_onnx

    report = export_onnx(model, place, model.example_inputs(batch), **options)
    data, size = report.to_dict() | {"quantized": None}, report.graph.bytes
    if quantize is not None:
        packed = (
            quantize_onnx(place, place, "dynamic-uint8")
            if quantize == "dynamic-uint8"
            else quantize_onnx(place, place, "matmul-nbits", bits=8 if quantize == "int8" else 4)
        )
        data["quantized"], size = packed.to_dict(), packed.bytes_after
    return data, size
