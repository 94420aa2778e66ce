"""Forms in which a model runs: what a process of `effformer.profile.benchmark` loads, and how the files
for it are made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import load, moved

if TYPE_CHECKING:
    from torch import Tensor

    from effformer.models.base import Model
    from effformer.profile import Candidate

__all__ = ["FORMS", "GRAPHS", "TORCH", "candidate", "graph_of", "keep_inputs", "write_graph"]

TORCH = ("eager", "optimized", "compiled")
GRAPHS = {
    "onnx": None, "onnx-uint8": "dynamic-uint8", "onnx-static": "static", "onnx-int8": "int8",
    "onnx-int4": "int4",
}  # fmt: skip
"""Form -> how `effformer export --quantize` calls it."""
FORMS = (*TORCH, *GRAPHS)


def candidate(
    name: str,
    form: str,
    source: str | Path,
    inputs: Path,
    changes: Mapping[str, Any] | None = None,
    *,
    device: str = "cpu",
    dtype: str | None = None,
) -> Candidate:
    """A form of a model as a candidate.

    Args:
        name: its name in the results.
        form: one of `FORMS`.
        source: a model's name or folder, for graphs the file.
        inputs: file with the inputs.
        changes: options of a model that is built by name.
        device: where a model runs.
        dtype: its numbers, None for those of its weights; not of graphs.
    """
    from ..profile import Candidate

    options: dict[str, Any] = {"source": str(source), "inputs": str(inputs)}
    if form in GRAPHS:
        return Candidate(name=name, load=exported, options=options, form="onnxruntime")
    options |= {"changes": dict(changes or {}), "form": form, "device": device, "dtype": dtype}
    return Candidate(
        name=name,
        load=modelled,
        options=options,
        form=form,
        dtype=dtype or "float32",
        device=device,
    )


def modelled(
    source: str, inputs: str, changes: Mapping[str, Any], form: str, device: str, dtype: str | None
) -> Callable[[], Any]:
    """A model under torch, ready to be called."""
    import torch
    from safetensors.torch import load_file

    model: torch.nn.Module = moved(load(source, dict(changes)), device, dtype)
    if form == "optimized":
        from ..compress import optimize

        model = optimize(model)
    call: Callable[..., Any] = torch.compile(model) if form == "compiled" else model
    given = {name: x.to(device) for name, x in load_file(inputs).items()}
    return lambda: call(**given)


def exported(source: str, inputs: str) -> Callable[[], Any]:
    """A graph under ONNX Runtime, ready to be called."""
    import torch
    from safetensors.numpy import load_file

    from ..export import Session

    session = Session(source, threads=torch.get_num_threads(), spinning=False)
    given = load_file(inputs)
    return lambda: {k: torch.from_numpy(v) for k, v in session.run(given).items()}


def keep_inputs(inputs: Mapping[str, Tensor], path: Path) -> Path:
    """Write inputs for the processes."""
    from safetensors.torch import save_file

    save_file({name: x.contiguous() for name, x in inputs.items()}, path)
    return path


def write_graph(model: Model, form: str, path: Path, inputs: Mapping[str, Tensor]) -> Path:
    """Export a model, quantized as the form says, static ones on the inputs; it is compared by whoever times
    it.
    """
    from ..export import export_onnx
    from ..export.within import quantize_form

    scheme = GRAPHS[form]
    dense = path if scheme is None else path.with_suffix(".dense.onnx")
    export_onnx(model, dense, dict(inputs), verify=False)
    if scheme is not None:
        quantize_form(dense, path, scheme, data=[dict(inputs)] if scheme == "static" else None)
    return path


def graph_of(source: str) -> Path | None:
    """The graph behind a source that is an .onnx file or a bundle, None for a model."""
    from ..export.run import Bundle

    place = Path(source)
    if place.suffix == ".onnx":
        return place
    if (place / "bundle.json").is_file():
        return place / str(Bundle(place).graphs["velocity"])
    return None
