"""The edge bundle: graphs, facts and a runner in one folder that needs only numpy and
onnxruntime.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from effformer.arguments import checked
from effformer.cache import cached
from effformer.calls import evaluating, half_of, takes
from effformer.checks import FormatError, unknown
from effformer.config import Config, Spec, resolve
from effformer.files import atomic_folder, read_json
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
from effformer.notebook import Shown
from effformer.values import Count, Natural, NonNegative, Real
from effformer.version import VERSION
from effformer.wrapped import unwrapping

from . import choice, opened, pictures, run
from . import facts as checks
from .onnx import IN_FLOATS
from .quantize import QuantizeReport, named_form
from .record import record_forms, record_graphs
from .velocity import (
    Carrying,
    Decoder,
    Graphs,
    Velocity,
    examples,
    seen,
    write_graph,
)
from .verify import VerifyReport
from .work import multiply_adds

__all__ = ["FOLDER", "BundleReport", "check_draws", "export_bundle", "session_options"]

Form = str | Mapping[str, Any]
"""A form of a graph by its name, or with its options."""
SESSION = {"threads": None, "spinning": False, "denormals_to_zero": True, "arena": True}
"""How the graphs of a bundle run where nothing else is said."""


def _objection(folder: Path) -> str:
    """Why a folder with a ``bundle.json`` is not replaced by a bundle."""
    try:
        facts = read_json(folder / "bundle.json")
    except FormatError:
        facts = None
    ours = isinstance(facts, dict) and {"effformer", "graphs", "files"} <= facts.keys()
    return "" if ours else "holds a bundle.json that effformer did not write"


FOLDER: Any = {
    "marker": "bundle.json",
    "own": (
        "run.py",
        "facts.py",
        "opened.py",
        "choice.py",
        "choice.json",
        "pictures.py",
        "encoder.onnx*",
        "light.*onnx*",
        "step.onnx*",
        "vocab.txt",
        "wordpiece.py",
        "self_test_*.npy",
        "self_test.npy",
        "velocity.*onnx*",
        "decoder.onnx*",
        "__pycache__",
    ),
    "objection": _objection,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class BundleReport(Shown):
    """What `export_bundle` wrote.

    Attributes:
        folder: the bundle.
        bytes: size of all its files.
        parity: the comparison of the written velocity graph, quantized or not, with torch; None if
            it was not wanted. Of several forms, the first one's.
        quantized: what was quantized in the graph, None if nothing.
        forms: further forms, and how far their velocity is from the first one's, relative to its largest
            value, on a CPU that adds products of bytes exactly.
    """

    folder: Path
    bytes: int
    parity: VerifyReport | None
    quantized: QuantizeReport | None
    forms: Mapping[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "folder": str(self.folder), "bytes": self.bytes,
            "parity": None if self.parity is None else self.parity.to_dict(),
            "quantized": None if self.quantized is None else self.quantized.to_dict(),
            "forms": dict(self.forms),
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
    quantize: Form | Sequence[Form] | None = None,
    max_error: NonNegative | None = None,
    session: Mapping[str, int | bool | None] | None = None,
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
        quantize: of the graphs, by ONNX Runtime: "dynamic-int8", "static-int8", ..., or blockwise "int8"
            and "int4" (see `quantize_onnx`; the runner adds products of bytes exactly on every CPU).
            Static ones are calibrated on what the sampler of the bundle asks. Models quantized by
            `effformer.compress` are exported as they are. Of several, such as ``("float32",
            "static-int8", "static-int7")``, the bundle holds a graph each, and the runner takes the one
            that is fastest on its machine. With options, ``{"name": "int4", "block": 64}``.
        max_error: with ``quantize``: products go back into floating point, those first that regain most,
            until the relative error of the velocity at times of the sampler is at most this. Measures
            as often as there are products.
        session: options of ONNX Runtime that the runner sets: ``threads`` (None: its choice), ``spinning``
            (threads wait actively; off), ``denormals_to_zero`` (by a runner that has its process for
            itself; on), ``arena`` (memory is kept; on).
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
        ValueError: an unknown sampler, convention, quantization or option of the session, guidance
            without a null class, or a model of ours that draws no pictures of classes.
        TypeError: shape or number of classes are neither given nor in the model's config, or neither
            the model nor ``convention`` says what the network predicts.
        ExportError: the model cannot be exported.
        VerificationError: the graph does not compute what the model computes.
        FormatError: the folder holds something else or cannot be written.
    """
    knobs = _forms(quantize, max_error)
    forms = [*knobs]
    check_draws(model, shape, num_classes)
    record = _record_of(model, convention)
    size, classes, null = _describe(model, record, shape, num_classes, null_label)
    record = record.replace(null=null is not None)
    steps, guidance = _settings(record, sampler, steps, guidance)
    policy = _policy(cache)
    facts: dict[str, Any] = {
        "format": 1,  # that of pictures, which earlier runners read, too
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
        "quantization": None if forms[0] == "float32" else forms[0],
        "session": session_options(session),
    }  # fmt: skip
    with atomic_folder(folder, **FOLDER, force=force) as temporary, evaluating(model):
        network = Velocity(model, record.convention)
        told = network if policy is None else Carrying(model, record.convention, given=False)
        given = None if policy is None else Carrying(model, record.convention, given=True)
        inputs, data = examples(size, classes), _data(network, facts, forms, max_error)
        written = Graphs(temporary, max_error, verify, knobs)
        parity, quantized = written.forms(told, "velocity", inputs, data, forms)
        if given is not None:
            inputs, data = _with_change(told, inputs), [_with_change(told, one) for one in data]
            written.forms(given, "light", inputs, data, forms)
        facts["graphs"] = {"velocity": None, "decoder": None} | written.of(forms[0])
        facts["macs"] = {"velocity": multiply_adds(told, examples(size, classes))}
        if given is not None:
            facts["macs"]["light"] = multiply_adds(given, inputs)
        if decoder is not None:
            example = {"x": inputs["x"]}
            write_graph(Decoder(decoder), temporary / "decoder.onnx", example, verify=verify)
            facts["graphs"]["decoder"] = "decoder.onnx"
            facts["macs"]["decoder"] = multiply_adds(decoder, inputs["x"])
        for source in (run, opened, pictures, checks, choice):
            shutil.copyfile(str(source.__file__), temporary / Path(str(source.__file__)).name)
        drawn: VelocityField = network
        if policy is not None:
            drawn = cached(adapt(model, record.convention), policy, forced=True)
        record_graphs(temporary, facts, (network, drawn) if verify else None)
        others = {} if len(forms) == 1 else record_forms(temporary, facts, written, forms)
        total = sum(f.stat().st_size for f in temporary.iterdir())
    path = Path(folder) / "velocity.onnx"  # the reports name the file where it was checked
    return BundleReport(
        folder=Path(folder), bytes=total, forms=others,
        parity=None if parity is None else replace(parity, path=path),
        quantized=None if quantized is None else replace(quantized, path=path),
    )  # fmt: skip


def _forms(
    quantize: Form | Sequence[Form] | None, max_error: float | None
) -> dict[str, dict[str, Any]]:
    """The forms of a bundle, and their options. Its runner is exact and fast where signs make a
    difference, so that signed weights suit every CPU.

    Raises:
        ValueError: none, an unknown one, one twice, or an error of what is not quantized.
    """
    one = isinstance(quantize, str | Mapping | None)
    given: list[Any] = [quantize or "float32"] if one else [*quantize]  # type: ignore[misc]
    named = [named_form(form, where="export_bundle: quantize") for form in given]
    forms = {
        f"{form}-int8" if form in ("dynamic", "static") else form: options
        for form, options in named
    }
    if not forms or len(forms) < len(given):
        raise ValueError(
            f"export_bundle: quantize: expected one form or several, each once, got {given}"
        )
    if max_error is not None and [*forms] == ["float32"]:
        raise ValueError(
            "export_bundle: max_error is that of a quantized graph; give quantize, too"
        )
    return forms


def session_options(given: Mapping[str, Any] | None) -> dict[str, Any]:
    """Options of the runtime, all of them.

    Raises:
        ValueError: an unknown option, or a value that is none of it.
    """
    options = SESSION | dict(given or {})
    for name, value in options.items():
        if name not in SESSION:
            raise unknown("option", name, [*SESSION], where="export_bundle: session")
        whole = value is None or (type(value) is int and 1 <= value <= 1024)
        if not (whole if name == "threads" else isinstance(value, bool)):
            kind = "1..1024 or None" if name == "threads" else "True or False"
            raise ValueError(f"export_bundle: session: {name} must be {kind}, got {value!r}")
    return options


def _settings(
    record: Trained, sampler: str, steps: int | None, guidance: float | None
) -> tuple[int, float]:
    """Steps and guidance that a bundle records beside its sampler."""
    if sampler not in checks.SAMPLERS:
        raise unknown("sampler", sampler, list(checks.SAMPLERS), where="export_bundle")
    steps, guidance = record.settings(steps, guidance)
    if not 1 <= steps <= checks.MOST or not -checks.STRONGEST <= guidance <= checks.STRONGEST:
        raise ValueError(
            f"export_bundle: steps must lie in 1..{checks.MOST} and guidance in "
            f"{-checks.STRONGEST}..{checks.STRONGEST}, got {steps} and {guidance}"
        )
    if guidance != 1.0 and not record.null:
        raise ValueError(
            f"export_bundle: guidance {guidance} needs a null class; give null_label or guidance=1"
        )
    return steps, guidance


def check_draws(
    model: nn.Module, shape: Sequence[int] | None = None, num_classes: int | None = None
) -> None:
    """Refuse a model of ours that does something else than a bundle.

    Raises:
        ValueError: its config has no size of pictures, or no number of classes, it takes no times, or computes in
            half precision.
    """
    config = getattr(model, "config", None)
    if not isinstance(config, Config):
        return
    name = getattr(model, "name", "the model")
    if hasattr(config, "input_size") and not takes(model, "t"):
        raise ValueError(
            f"export_bundle: a bundle integrates a velocity of samples and times, and "
            f"{name} has no times; effformer.flow.invert draws with a normalizing flow, and export_onnx "
            "(-o NAME.onnx on the command line) writes its graph"
        )
    given = shape is not None and num_classes is not None
    if not given and not all(
        hasattr(config, name) for name in ("input_size", "channels", "num_classes")
    ):
        raise ValueError(
            f"export_bundle: a bundle draws pictures of classes, which {name} does not; export_text_bundle and export_stream_bundle write those of text encoders and streaming "
            "models, export_onnx (-o NAME.onnx on the command line) the graph of any"
        )
    if (half := half_of(model)) is not None:
        raise ValueError(
            f"export_bundle: a bundle computes in float32, and {name} in {half}; {IN_FLOATS}"
        )


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
    network: Velocity, facts: dict[str, Any], forms: Sequence[str], max_error: float | None
) -> list[dict[str, Tensor]]:
    """What the graphs are asked, if a form of the bundle hangs on it."""
    if max_error is None and not any(form.startswith("static") for form in forms):
        return []
    return [call.tensors for call in seen(network, facts)]


def _with_change(told: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    with torch.no_grad():
        return {**inputs, "change": told(**inputs)[1]}
