"""The edge bundle: graphs, facts and a runner in one folder that needs only numpy and
onnxruntime.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from effformer.arguments import checked
from effformer.cache import cached
from effformer.calls import device_of, evaluating
from effformer.checks import FormatError, unknown
from effformer.config import Config, Spec, resolve
from effformer.files import atomic_folder, read_json, write_json
from effformer.flow.conventions import (
    EFFFORMER,
    FlowConvention,
    Trained,
    VelocityField,
    adapt,
    get_convention,
    recorded,
    trained_of,
)
from effformer.flow.samplers import sample
from effformer.notebook import Shown
from effformer.values import Count, Natural, NonNegative, Real
from effformer.version import VERSION
from effformer.wrapped import unwrapping

from . import pictures, run
from .packed import step_of
from .quantize import QuantizeReport
from .velocity import (
    Carrying,
    Decoder,
    Velocity,
    examples,
    guidance_of,
    quantize_form,
    seen,
    write_graph,
)
from .verify import VerificationError, VerifyReport

__all__ = ["BundleReport", "export_bundle"]

Quantize = Literal[
    "dynamic", "dynamic-uint8", "dynamic-int8", "static", "static-uint8", "static-int8", "int8", "int4"
]  # fmt: skip
"""Names of `QUANTIZED`."""


def _objection(folder: Path) -> str:
    """Why a folder with a ``bundle.json`` is not replaced by a bundle."""
    try:
        facts = read_json(folder / "bundle.json")
    except FormatError:
        facts = None
    ours = isinstance(facts, dict) and {"effformer", "graphs", "files"} <= facts.keys()
    return "" if ours else "holds a bundle.json that effformer did not write"


_FOLDER: Any = {
    "marker": "bundle.json",
    "own": (
        "run.py",
        "pictures.py",
        "light.onnx*",
        "self_test.npy",
        "self_test_sample.npy",
        "velocity.onnx*",
        "decoder.onnx*",
        "__pycache__",
    ),
    "objection": _objection,
}
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class BundleReport(Shown):
    """What `export_bundle` wrote.

    Attributes:
        folder: the bundle.
        bytes: size of all its files.
        parity: the comparison of the written velocity graph, quantized or not, with torch; None if
            it was not wanted.
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


@checked
@unwrapping
def export_bundle(
    model: nn.Module,
    folder: str | Path,
    *,
    sampler: str = "euler",
    steps: Count | None = None,
    guidance: Real | None = None,
    guidance_channels: Count | None = None,
    convention: FlowConvention | str | None = None,
    cache: Spec | None = None,
    quantize: Quantize | None = None,
    max_error: NonNegative | None = None,
    verify: bool = True,
    shape: tuple[Count, Count, Count] | None = None,
    num_classes: Count | None = None,
    null_label: Natural | None = None,
    value_range: tuple[float, float] | None = None,
    decoder: nn.Module | None = None,
    force: bool = False,
) -> BundleReport:
    """Write a class-conditional flow or diffusion model as a folder that samples by itself.

    The folder holds ``velocity.onnx`` (our velocity in our time, whatever the network's
    convention), ``decoder.onnx`` if there is a decoder, ``bundle.json``, ``run.py`` and the record
    for ``run.py --self-test``. Sizes are fixed, the batch is not. What the weights were trained to
    predict (`trained_of`) decides where nothing else is said, and is written down as well. A short
    sample of the runner is compared with torch's.

    Args:
        model: ``network(x, t, y)``.
        folder: new, empty, or an earlier bundle, which is replaced when the new one is complete.
        sampler: "euler", "midpoint", "heun" or "rk4".
        steps: number of equal steps, None for 10, or those that the weights were distilled to.
        guidance: scale of classifier-free guidance, 1 for none; None for 2, or 1 without a null
            class.
        guidance_channels: number of guided leading channels (3 in DiT's published samples), None
            for all.
        convention: how the network counts, or the name of it; None: as its weights were trained.
            One that contradicts the record of the weights is followed, with a warning.
        cache: "reuse" or "newton" (`effformer.cache`): a second graph, ``light.onnx``, takes the change of
            all blocks in place of the blocks, and the runner skips them at the steps that the policy
            leaves out. None: no cache.
        quantize: of the graphs, by ONNX Runtime: "dynamic-uint8", "static-int8", ..., or blockwise "int8"
            and "int4" (which of them is faster: see `quantize_onnx`). Static ones are calibrated on what
            the sampler of the bundle asks. Models quantized by `effformer.compress` are exported as
            they are.
        max_error: with ``quantize``: products go back into floating point, those first that regain most,
            until the relative error of the velocity at times of the sampler is at most this. Measures
            as often as there are products.
        verify: compare the graph with torch at three batch sizes (also after ``quantize``), and a
            sample of two steps.
        shape: (C, H, W) of a sample; like the next two, read from the config of our models if None.
        num_classes: number of classes.
        null_label: the class that stands for "no label"; only needed for guidance.
        value_range: values of a sample that are black and white; None: as in the training data, or
            -1 and 1.
        decoder: maps samples, latents as the network saw them in training, to pictures (B, 1 or 3,
            H, W) in ``value_range``.
        force: replace a bundle that others wrote as well.

    Raises:
        ValueError: an unknown sampler, convention or quantization, or guidance without a null class.
        TypeError: shape or number of classes are neither given nor in the model's config, or neither
            the model nor ``convention`` says what the network predicts.
        ExportError: the model cannot be exported.
        VerificationError: the graph does not compute what the model computes.
        FormatError: the folder holds something else or cannot be written.
    """
    if sampler not in run.SAMPLERS:
        raise unknown("sampler", sampler, list(run.SAMPLERS), where="export_bundle")
    if max_error is not None and quantize is None:
        raise ValueError(
            "export_bundle: max_error is that of a quantized graph; give quantize, too"
        )
    record = _record_of(model, convention)
    size, classes, null = _describe(model, record, shape, num_classes, null_label)
    record = record.replace(null=null is not None)
    steps, guidance = _settings(record, steps, guidance)
    policy = _policy(cache)
    facts: dict[str, Any] = {
        "format": run.FORMAT,
        "effformer": VERSION,
        "model": str(getattr(model, "name", type(model).__name__)),
        "shape": list(size),
        "num_classes": classes,
        "null_label": null,
        "value_range": list(value_range or record.value_range or (-1.0, 1.0)),
        "sampler": {
            "name": sampler, "steps": steps, "guidance": guidance,
            "guidance_channels": guidance_channels,
            **({} if policy is None else {"cache": _schedule(policy)}),
        },
        "convention": EFFFORMER.to_dict(),
        "network_convention": record.convention.to_dict(),
        "trained": record.to_dict(),
        "quantization": quantize,
    }  # fmt: skip
    form: dict[str, Any] = {"quantize": quantize, "max_error": max_error, "verify": verify}
    with atomic_folder(folder, **_FOLDER, force=force) as temporary, evaluating(model):
        network = Velocity(model, record.convention)
        told = network if policy is None else Carrying(model, record.convention, given=False)
        inputs, data = examples(size, classes), _data(network, facts, quantize, max_error)
        parity, quantized = _write(told, temporary / "velocity.onnx", inputs, data, **form)
        facts["graphs"] = {"velocity": "velocity.onnx", "decoder": None}
        if policy is not None:
            inputs, data = _with_change(told, inputs), [_with_change(told, one) for one in data]
            given = Carrying(model, record.convention, given=True)
            _write(given, temporary / "light.onnx", inputs, data, **form)
            facts["graphs"]["light"] = "light.onnx"
        if decoder is not None:
            example = {"x": inputs["x"]}
            write_graph(Decoder(decoder), temporary / "decoder.onnx", example, verify=verify)
            facts["graphs"]["decoder"] = "decoder.onnx"
        for source in (run, pictures):
            shutil.copyfile(str(source.__file__), temporary / Path(str(source.__file__)).name)
        field: VelocityField = network
        if policy is not None:
            field = cached(adapt(model, record.convention), policy, forced=True)
        _record(temporary, facts, (network, field) if verify else None, exact=quantize is None)
        total = sum(f.stat().st_size for f in temporary.iterdir())
    path = Path(folder) / "velocity.onnx"  # the reports name the file where it was checked
    return BundleReport(
        folder=Path(folder),
        bytes=total,
        parity=None if parity is None else replace(parity, path=path),
        quantized=None if quantized is None else replace(quantized, path=path),
    )


def _settings(record: Trained, steps: int | None, guidance: float | None) -> tuple[int, float]:
    """Steps and guidance that a bundle records."""
    steps, guidance = record.settings(steps, guidance)
    if not 1 <= steps <= run.MOST or not -run.STRONGEST <= guidance <= run.STRONGEST:
        raise ValueError(
            f"export_bundle: steps must lie in 1..{run.MOST} and guidance in "
            f"{-run.STRONGEST}..{run.STRONGEST}, got {steps} and {guidance}"
        )
    if guidance != 1.0 and not record.null:
        raise ValueError(
            f"export_bundle: guidance {guidance} needs a null class; give null_label or guidance=1"
        )
    return steps, guidance


def _record_of(model: nn.Module, convention: FlowConvention | str | None) -> Trained:
    """What the weights were trained to predict, as it is recorded, with the given convention."""
    name, record = getattr(model, "name", type(model).__name__), trained_of(model)
    if convention is None:
        if record is None:
            raise TypeError(
                f"export_bundle: {name} does not say what it was trained to predict; give convention, "
                "'effformer' for a velocity with t = 0 noise, t = 1 data"
            )
        return record
    given = get_convention(convention)
    if record is None:
        return Trained(convention=given)
    if recorded(model) is not None and given != record.convention:
        warnings.warn(
            f"export_bundle: the weights of {name} were trained to predict {record.convention}; the "
            f"bundle takes them for {given}, as convention says",
            stacklevel=3,
        )
    return record.replace(convention=given)


def _describe(
    model: nn.Module,
    record: Trained,
    shape: Sequence[int] | None,
    num_classes: int | None,
    null_label: int | None,
) -> tuple[tuple[int, int, int], int, int | None]:
    """Shape of a sample, number of classes and null class: as given, or as our configs say."""
    config: Any = getattr(model, "config", None)
    if shape is None and hasattr(config, "input_size") and hasattr(config, "channels"):
        size = config.input_size
        shape = (config.channels, *((size, size) if isinstance(size, int) else size))
    if num_classes is None and hasattr(config, "num_classes"):
        num_classes = config.num_classes
        if null_label is None and record.null and getattr(config, "label_dropout", 0) > 0:
            null_label = num_classes
    if shape is None or num_classes is None:
        absent = "shape=(C, H, W)" if shape is None else "num_classes"
        raise TypeError(
            f"export_bundle: {type(model).__name__} does not say its {absent.split('=')[0]}; "
            f"give {absent}"
        )
    channels, height, width = shape
    return (channels, height, width), num_classes, null_label


def _policy(cache: Spec | None) -> Config | None:
    """The policy of a bundle, whose runner knows schedules over all blocks alone.

    Raises:
        ValueError: another policy.
    """
    if cache is None:
        return None
    policy = resolve("cache", cache, where="export_bundle: cache")
    if policy.entry.name not in ("reuse", "newton") or _schedule(policy)["over"] != "stack":
        raise ValueError(
            f"export_bundle: cache {policy.entry.name!r} has no form in a bundle; choices: reuse and newton, "
            "over the stack of blocks"
        )
    return policy


def _schedule(policy: Config) -> dict[str, Any]:
    return {"order": 0} | policy.to_dict()


def _data(
    network: Velocity, facts: dict[str, Any], quantize: str | None, max_error: float | None
) -> list[dict[str, Tensor]]:
    """What the graphs are asked, if the form of a bundle hangs on it."""
    if quantize is None or not (quantize.startswith("static") or max_error is not None):
        return []
    return [call.tensors for call in seen(network, facts)]


def _with_change(told: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    with torch.no_grad():
        return {**inputs, "change": told(**inputs)[1]}


def _write(
    network: nn.Module, path: Path, inputs: dict[str, Tensor], data: list[dict[str, Tensor]], *,
    quantize: str | None, max_error: float | None, verify: bool,
) -> tuple[VerifyReport | None, QuantizeReport | None]:  # fmt: skip
    """Write a graph in its form; what was compared and quantized is what was written."""
    parity = write_graph(network, path, inputs, verify=verify)
    if quantize is None:
        return parity, None
    compared = (network, inputs) if verify else None
    packed = quantize_form(path, path, quantize, data=data, max_error=max_error, compared=compared)
    return packed.parity, replace(packed, parity=None)


def _record(
    folder: Path,
    facts: dict[str, Any],
    network: tuple[Velocity, VelocityField] | None,
    *,
    exact: bool,
) -> None:
    """Checksums of the files, and what the graph computes here, for `run.Bundle.self_test`
    elsewhere; a short sample of torch, with which the runner's is compared here already.
    """
    import numpy as np

    labels = [0] if facts["null_label"] is None else [0, facts["null_label"]]
    tolerance = 1e-3 if exact else 5e-2  # 8-bit kernels round differently from machine to machine
    if network is not None:
        tolerance = max(tolerance, step_of(network[0]))
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
    if network is not None:
        facts["self_test"]["sample"] = _drawn(folder, facts, *network, bundle, tolerance)
    _finish(folder, facts)


def _drawn(
    folder: Path, facts: dict[str, Any], network: Velocity, field: VelocityField,
    bundle: run.Bundle, tolerance: float,
) -> dict[str, Any]:  # fmt: skip
    """Draw two samples in at most two steps by torch, under a cache in as many as show one that is
    skipped, and compare the runner's with them.

    Raises:
        VerificationError: the runner draws something else.
    """
    import numpy as np

    own, labels, shape = facts["sampler"], [0, facts["num_classes"] - 1], bundle.shape
    cache = own.get("cache") or {"warm": 0, "every": 0}
    steps = min(own["steps"], 2 + cache["warm"] + cache["every"])
    rule = guidance_of(own, facts["null_label"])
    noise = np.random.default_rng(0).standard_normal((len(labels), *shape), dtype=np.float32)
    device = device_of(network)
    expected = sample(
        field, torch.from_numpy(noise).to(device), sampler=own["name"], steps=steps, guidance=rule,
        y=torch.tensor(labels, device=device),
    ).x.cpu().numpy()  # fmt: skip
    actual = bundle.sample(labels, steps=steps, noise=noise)
    largest = float(np.abs(expected).max())
    error = float(np.abs(actual - expected).max()) / max(largest, 1e-12)
    exact = facts["quantization"] is None
    if exact and not error <= tolerance:
        raise VerificationError(
            f"export_bundle: what the runner draws differs by {error:.1e} from what torch draws "
            f"(allowed {tolerance:.0e})"
        )
    black, white = facts["value_range"]
    if expected.std() > 10 * max(abs(black), abs(white)):
        _log.warning(
            "%s: samples have a standard deviation of %.0f, as weights that were trained to predict "
            "something else, or not at all; see effformer.flow.trained_of", facts["model"], expected.std(),
        )  # fmt: skip
    np.save(folder / "self_test_sample.npy", expected, allow_pickle=False)
    return {
        "file": "self_test_sample.npy", "seed": 0, "labels": labels, "steps": steps,
        "tolerance": tolerance if exact else error + tolerance,
    }  # fmt: skip


def _finish(folder: Path, facts: dict[str, Any]) -> None:
    files = sorted(f for f in folder.iterdir() if f.name != "bundle.json")
    facts["files"] = {
        f.name: {"bytes": f.stat().st_size, "sha256": hashlib.sha256(f.read_bytes()).hexdigest()}
        for f in files
    }
    write_json(folder / "bundle.json", facts)
