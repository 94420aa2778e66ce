"""The edge bundle: graphs, facts and a runner in one folder that needs only numpy and
onnxruntime.
"""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from effformer.calls import evaluating
from effformer.checks import unknown
from effformer.files import atomic_folder, write_json
from effformer.flow.conventions import EFFFORMER, FlowConvention, adapt, get_convention
from effformer.version import VERSION

from . import run
from .onnx import export_onnx
from .quantize import QuantizeReport, quantize_onnx
from .verify import VerifyReport

__all__ = ["BundleReport", "export_bundle"]

Quantize = Literal["dynamic-uint8", "int8", "int4"]
_FOLDER: Any = {
    "marker": "bundle.json",
    "own": ("run.py", "self_test.npy", "velocity.onnx*", "decoder.onnx*", "__pycache__"),
}
_NBITS: dict[str, Literal[4, 8]] = {"int8": 8, "int4": 4}


@dataclass(frozen=True, slots=True, kw_only=True)
class BundleReport:
    """What `export_bundle` wrote.

    Attributes:
        folder: the bundle.
        bytes: size of all its files.
        parity: the comparison of the velocity graph with torch, None if it was not wanted.
        quantized: what was quantized in the graph, None if nothing.
    """

    folder: Path
    bytes: int
    parity: VerifyReport | None
    quantized: QuantizeReport | None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "folder": str(self.folder), "bytes": self.bytes,
            "parity": None if self.parity is None else self.parity.to_dict(),
            "quantized": None if self.quantized is None else self.quantized.to_dict(),
        }  # fmt: skip


class _Velocity(nn.Module):
    """A network of any convention as ``v(x, t, y)`` with t = 0 noise, t = 1 data, so that runners
    need no algebra.
    """

    def __init__(self, network: nn.Module, convention: FlowConvention | None) -> None:
        super().__init__()
        self.network = network
        self.field = None if convention is None else adapt(self._labelled, convention)

    def _labelled(self, x: Tensor, label: Tensor, *, y: Tensor) -> Tensor:
        out: Tensor = self.network(x, label, y)
        return out

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self._labelled(x, t, y=y) if self.field is None else self.field(x, t, y=y)


class _Decoder(nn.Module):
    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.decoder(x)
        return out


def export_bundle(
    model: nn.Module,
    folder: str | Path,
    *,
    sampler: str = "euler",
    steps: int = 10,
    guidance: float = 2.0,
    guidance_channels: int | None = None,
    convention: FlowConvention | str | None = None,
    quantize: Quantize | None = None,
    verify: bool = True,
    shape: Sequence[int] | None = None,
    num_classes: int | None = None,
    null_label: int | None = None,
    value_range: tuple[float, float] = (-1.0, 1.0),
    decoder: nn.Module | None = None,
) -> BundleReport:
    """Write a class-conditional flow or diffusion model as a folder that samples by itself.

    The folder holds ``velocity.onnx`` (our velocity in our time, whatever the network's
    convention), ``decoder.onnx`` if there is a decoder, ``bundle.json``, ``run.py`` and the record
    for ``run.py --self-test``. Sizes are fixed, the batch is not.

    Args:
        model: ``network(x, t, y)``.
        folder: new, empty, or an earlier bundle, which is replaced when the new one is complete.
        sampler: "euler", "midpoint", "heun" or "rk4".
        steps: number of equal steps.
        guidance: scale of classifier-free guidance, 1 for none.
        guidance_channels: number of guided leading channels (3 in DiT's published samples), None
            for all.
        convention: how the network counts, or the name of it; None: as we do, t = 0 noise, t = 1
            data, velocity.
        quantize: of the graph, by ONNX Runtime: "dynamic-uint8", or blockwise "int8" and "int4"
            (which of them is faster: see `quantize_onnx`). Models quantized by `effformer.compress`
            are exported as they are.
        verify: compare the graph with torch at three batch sizes (before ``quantize``).
        shape: (C, H, W) of a sample; like the next two, read from the config of our models if None.
        num_classes: number of classes.
        null_label: the class that stands for "no label"; only needed for guidance.
        value_range: values of a sample that are black and white.
        decoder: maps samples (latents) to pictures (B, 1 or 3, H, W) in ``value_range``.

    Raises:
        ValueError: an unknown sampler, convention or quantization, or guidance without a null class.
        TypeError: shape or number of classes are neither given nor in the model's config.
        ExportError: the model cannot be exported.
        VerificationError: the graph does not compute what the model computes.
        FormatError: the folder holds something else or cannot be written.
    """
    if sampler not in run.SAMPLERS:
        raise unknown("sampler", sampler, list(run.SAMPLERS), where="export_bundle")
    if quantize not in (None, "dynamic-uint8", *_NBITS):
        raise unknown(
            "quantization", str(quantize), ["dynamic-uint8", *_NBITS], where="export_bundle"
        )
    if steps < 1 or not math.isfinite(guidance):
        raise ValueError(
            "export_bundle: steps must be at least 1 and guidance a finite number, "
            f"got {steps} and {guidance}"
        )
    counts = None if convention is None else get_convention(convention)
    size, classes, null = _describe(model, shape, num_classes, null_label)
    if guidance != 1.0 and null is None:
        raise ValueError(
            f"export_bundle: guidance {guidance} needs a null class; give null_label or guidance=1"
        )
    facts: dict[str, Any] = {
        "format": run.FORMAT,
        "effformer": VERSION,
        "model": str(getattr(model, "name", type(model).__name__)),
        "shape": list(size),
        "num_classes": classes,
        "null_label": null,
        "value_range": list(value_range),
        "sampler": {
            "name": sampler, "steps": steps, "guidance": guidance,
            "guidance_channels": guidance_channels,
        },
        "convention": EFFFORMER.to_dict(),
        "network_convention": None if counts is None else counts.to_dict(),
        "quantization": quantize,
    }  # fmt: skip
    with atomic_folder(folder, **_FOLDER) as temporary, evaluating(model):
        network = _Velocity(model, counts)
        parity, quantized = _write_velocity(
            network, temporary / "velocity.onnx", size, classes, quantize, verify
        )
        facts["graphs"] = {"velocity": "velocity.onnx", "decoder": None}
        if decoder is not None:
            example, axes = (
                torch.randn(2, *size, generator=torch.Generator().manual_seed(0)),
                {"x": {0: "batch"}},
            )
            export_onnx(
                _Decoder(decoder), temporary / "decoder.onnx", example, dynamic=axes, verify=verify
            )
            facts["graphs"]["decoder"] = "decoder.onnx"
        shutil.copyfile(str(run.__file__), temporary / "run.py")
        _record(temporary, facts, exact=quantize is None)
        total = sum(f.stat().st_size for f in temporary.iterdir())
    path = (
        Path(folder) / "velocity.onnx"
    )  # the reports name the file as it was while it was checked
    return BundleReport(
        folder=Path(folder),
        bytes=total,
        parity=None if parity is None else replace(parity, path=path),
        quantized=None if quantized is None else replace(quantized, path=path),
    )


def _describe(
    model: nn.Module, shape: Sequence[int] | None, num_classes: int | None, null_label: int | None
) -> tuple[tuple[int, int, int], int, int | None]:
    """Shape of a sample, number of classes and null class: as given, or as our configs say."""
    config: Any = getattr(model, "config", None)
    if shape is None and hasattr(config, "input_size") and hasattr(config, "channels"):
        shape = (config.channels, config.input_size, config.input_size)
    if num_classes is None and hasattr(config, "num_classes"):
        num_classes = config.num_classes
        if null_label is None and getattr(config, "label_dropout", 0) > 0:
            null_label = num_classes
    if shape is None or num_classes is None:
        absent = "shape=(C, H, W)" if shape is None else "num_classes"
        raise TypeError(
            f"export_bundle: {type(model).__name__} does not say its {absent.split('=')[0]}; "
            f"give {absent}"
        )
    channels, height, width = shape
    return (channels, height, width), num_classes, null_label


def _write_velocity(
    network: nn.Module,
    path: Path,
    size: tuple[int, int, int],
    classes: int,
    quantize: str | None,
    verify: bool,
) -> tuple[VerifyReport | None, QuantizeReport | None]:
    draws = torch.Generator().manual_seed(0)
    inputs = {
        "x": torch.randn(2, *size, generator=draws),
        "t": torch.rand(2, generator=draws),
        "y": torch.randint(0, classes, (2,), generator=draws),
    }
    report = export_onnx(
        network, path, inputs, dynamic={n: {0: "batch"} for n in inputs}, verify=verify
    )
    if quantize is None:
        return report.parity, None
    if quantize == "dynamic-uint8":
        return report.parity, quantize_onnx(path, path, "dynamic-uint8")
    return report.parity, quantize_onnx(path, path, "matmul-nbits", bits=_NBITS[quantize])


def _record(folder: Path, facts: dict[str, Any], *, exact: bool) -> None:
    """Checksums of the files, and what the graph computes here, for `run.Bundle.self_test`
    elsewhere.
    """
    import numpy as np

    labels = [0] if facts["null_label"] is None else [0, facts["null_label"]]
    tolerance = 1e-3 if exact else 5e-2  # 8-bit kernels round differently from machine to machine
    facts["self_test"] = {
        "file": "self_test.npy",
        "seed": 0,
        "t": 0.5,
        "labels": labels,
        "tolerance": tolerance,
    }
    (folder / "self_test.npy").touch()  # a bundle lists what it names; filled below
    _finish(folder, facts)
    bundle = run.Bundle(folder)
    noise = np.random.default_rng(0).standard_normal((len(labels), *bundle.shape), dtype=np.float32)
    np.save(
        folder / "self_test.npy",
        bundle.velocity(noise, 0.5, np.asarray(labels)),
        allow_pickle=False,
    )
    _finish(folder, facts)


def _finish(folder: Path, facts: dict[str, Any]) -> None:
    files = sorted(f for f in folder.iterdir() if f.name != "bundle.json")
    facts["files"] = {
        f.name: {"bytes": f.stat().st_size, "sha256": hashlib.sha256(f.read_bytes()).hexdigest()}
        for f in files
    }
    write_json(folder / "bundle.json", facts)
