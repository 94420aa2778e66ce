"""The bundle of a streaming model: one step as a graph with its state in and out, and a runner."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from effformer.arguments import checked
from effformer.calls import evaluating
from effformer.checks import CapabilityError
from effformer.files import atomic_folder
from effformer.notebook import Shown
from effformer.version import VERSION
from effformer.wrapped import unwrapping

from . import choice, opened, pictures, streams
from . import facts as checks
from .bundle import FOLDER, session_options
from .onnx import export_onnx
from .packed import step_of
from .record import error_of, finish
from .verify import VerificationError
from .work import multiply_adds

__all__ = ["Step", "StreamBundleReport", "export_stream_bundle"]

_STEPS = 24


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamBundleReport(Shown):
    """What `export_stream_bundle` wrote.

    Attributes:
        folder: the bundle.
        bytes: size of all its files.
        state: numbers that the model keeps of a sequence.
        error: difference of what the runner gives step by step from what the model gives for the whole
            sequence, relative to the largest value.
    """

    folder: Path
    bytes: int
    state: int
    error: float

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "folder": str(self.folder), "bytes": self.bytes, "state": self.state, "error": self.error,
        }  # fmt: skip


class Step(nn.Module):
    """One step of a streaming model, whose whole state is one tensor.

    Args:
        model: with ``init_state(batch)`` and ``step(x, state)``.
        example: two sequences of at least two steps.

    Attributes:
        name: of what is read.
        start: pieces of the first state: how many numbers, and their value.

    Raises:
        CapabilityError: a state that grows with the sequence, or outputs that come later than their steps.
    """

    def __init__(self, model: Any, name: str, example: Tensor) -> None:
        super().__init__()
        self.model, self.name = model, name
        self.longest: int | None = getattr(model.config, "context", None)
        first = model.init_state(len(example))
        with torch.no_grad():
            out, after = model.step(example[:, :1], first)
            later = model.step(example[:, 1:2], after)[1]
        told = [pytree.tree_flatten(one) for one in (first, after, later)]
        self._leaves, self._tree = told[1]
        self._check(told, out)
        self._shapes = [x.shape[1:] for x in self._leaves if isinstance(x, Tensor)]
        self._kinds = [x.dtype for x in self._leaves if isinstance(x, Tensor)]
        begun = [x.flatten(1)[0] for x in told[0][0] if isinstance(x, Tensor)]
        self.start: list[list[Any]] = []
        for x in begun:
            if not bool((x == x[0]).all()):
                raise CapabilityError(
                    f"export_stream_bundle: {model.name} begins with a state of unequal numbers"
                )
            self.start.append([len(x), float(x[0])])

    def _check(self, told: Sequence[tuple[list[Any], Any]], out: Tensor) -> None:
        (first, a), (after, b), (later, c) = told
        which = f"export_stream_bundle: {self.model.name}"
        shapes = [
            [tuple(x.shape) if isinstance(x, Tensor) else None for x in leaves]
            for leaves in (first, after, later)
        ]
        if not shapes[0] == shapes[1] == shapes[2] or not a == b == c:
            able = "flow, linear, sana, performer, lmu, gla, gated-delta and others keep one of constant size"
            raise CapabilityError(f"{which} has a state that grows with the sequence; {able}")
        counts = [[x for x in leaves if type(x) is int] for leaves in (first, after, later)]
        if any({*some} - {n} for n, some in enumerate(counts)) or out.shape[1] != 1:
            raise CapabilityError(
                f"{which} answers later than it reads; its steps have no one graph"
            )

    def pack(self, state: Any) -> Tensor:
        """A state as one tensor (B, S)."""
        leaves = [x for x in pytree.tree_leaves(state) if isinstance(x, Tensor)]
        return torch.cat([x.flatten(1).float() for x in leaves], dim=1)

    def _unpack(self, values: Tensor, position: Any) -> Any:
        sizes = [shape.numel() for shape in self._shapes]
        pieces = [
            x.unflatten(1, shape).to(kind) if len(shape) != 1 else x.to(kind)
            for x, shape, kind in zip(
                values.split(sizes, dim=1), self._shapes, self._kinds, strict=True
            )
        ]
        numbers = iter(pieces)
        leaves = [
            next(numbers) if isinstance(x, Tensor) else position if type(x) is int else x
            for x in self._leaves
        ]
        return pytree.tree_unflatten(leaves, self._tree)

    def advance(self, x: Tensor, position: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Output (B, V) and next state (B, S) of one step x (B, 1, ...)."""
        here: Any = position.item()
        torch._check(here >= 0)
        torch._check(here < (self.longest or streams.MOST_STEPS))
        out, after = self.model.step(x, self._unpack(state, here))
        return out[:, -1].float(), self.pack(after)


class _Tokens(Step):
    def forward(self, tokens: Tensor, position: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return self.advance(tokens, position, state)


class _Numbers(Step):
    def forward(self, x: Tensor, position: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return self.advance(x, position, state)


@checked
@unwrapping
def export_stream_bundle(
    model: nn.Module,
    folder: str | Path,
    *,
    session: Mapping[str, int | bool | None] | None = None,
    force: bool = False,
) -> StreamBundleReport:
    """Write a streaming model as a folder that reads a sequence step by step.

    The folder holds ``step.onnx``, which takes one step, the number of steps before it and the state, and
    gives an output and the next state; ``bundle.json``; and ``run.py``, which needs numpy and onnxruntime. A
    step costs the same at every position. The runner's outputs over two sequences are compared with those
    of the model on the whole sequences, and recorded for ``run.py --self-test``.

    Args:
        model: a model of ours with ``init_state`` and ``step``, whose state has a constant size.
        folder: new, empty, or an earlier bundle, which is replaced when the new one is complete.
        session: as for `export_bundle`.
        force: replace a bundle that others wrote as well.

    Raises:
        ValueError: a model that does not stream, or an unknown option of the session.
        CapabilityError: one whose state grows with the sequence, or that answers later than it reads.
        ExportError: its step cannot be exported.
        VerificationError: the runner gives something else than the model.
        FormatError: the folder holds something else or cannot be written.
    """
    name = str(getattr(model, "name", type(model).__name__))
    if not hasattr(model, "init_state") or not hasattr(model, "example_inputs"):
        raise ValueError(
            f"export_stream_bundle: {name} does not stream; such models have init_state and step, for instance "
            "flowformer-gpt-* and lmu-sequence-*"
        )
    options, given = session_options(session), dict(model.example_inputs(2))  # type: ignore[operator]
    key = next(iter(given))
    whole = given[key][:, :_STEPS]
    tokens = not whole.is_floating_point()
    if whole.shape[1] < 2:
        raise ValueError(f"export_stream_bundle: {name} reads sequences of one step only")
    with atomic_folder(folder, **FOLDER, force=force) as place, evaluating(model):
        step = (_Tokens if tokens else _Numbers)(model, key, whole)
        expected = _whole(model, whole)
        inputs = {
            "tokens" if tokens else "x": whole[:, :1].clone(),
            "position": torch.tensor(1),
            "state": step.pack(_after_one(model, whole)),
        }
        export_onnx(
            step, place / "step.onnx", inputs, dynamic={n: {0: "batch"} for n in inputs if n != "position"},
            verify=False, output_names=["output", "next_state"],
        )  # fmt: skip
        for source in (opened, pictures, checks, choice):
            shutil.copyfile(str(source.__file__), place / Path(str(source.__file__)).name)
        shutil.copyfile(str(streams.__file__), place / "run.py")
        facts = _facts(step, name, whole, expected, options)
        facts["macs"] = {"step": multiply_adds(model, {key: whole[:, :1]})}
        error = _record(place, facts, whole, expected, max(1e-3, step_of(model)))
        total = sum(f.stat().st_size for f in place.iterdir())
    return StreamBundleReport(
        folder=Path(folder), bytes=total, state=sum(n for n, _ in step.start), error=error
    )


def _whole(model: Any, x: Tensor) -> Tensor:
    """Outputs (B, N, V) of a model that reads all at once."""
    with torch.no_grad():
        out: Tensor = (getattr(model, "prefix_logits", None) or model)(x)
    return out.float()


def _after_one(model: Any, x: Tensor) -> Any:
    with torch.no_grad():
        return model.step(x[:, :1], model.init_state(len(x)))[1]


def _facts(
    step: Step, name: str, x: Tensor, expected: Tensor, session: dict[str, Any]
) -> dict[str, Any]:
    tokens = not x.is_floating_point()
    size = sum(n for n, _ in step.start)
    vocabulary = int(step.model.config.vocab) if tokens else None
    read = {
        "name": "tokens" if tokens else "x", "type": "int64" if tokens else "float32",
        "shape": ["batch", 1, *x.shape[2:]], "range": [0, vocabulary - 1] if vocabulary else None,
    }  # fmt: skip
    most = (step.longest or streams.MOST_STEPS) - 1
    state = {"name": "state", "type": "float32", "shape": ["batch", size], "range": None}
    return {
        "format": checks.FORMAT, "kind": "streams", "effformer": VERSION, "model": name,
        "graphs": {"step": "step.onnx"}, "channels": None if tokens else x.shape[2],
        "vocabulary": vocabulary, "longest": step.longest, "start": step.start,
        "inputs": [read, {"name": "position", "type": "int64", "shape": [], "range": [0, most]}, state],
        "outputs": [
            {"name": "output", "type": "float32", "shape": ["batch", expected.shape[2]]},
            {"name": "next_state", "type": "float32", "shape": ["batch", size]},
        ],
        "quantization": None, "session": session,
    }  # fmt: skip


def _record(
    place: Path, facts: dict[str, Any], x: Tensor, expected: Tensor, allowed: float
) -> float:
    """What the model gives for whole sequences, with which the runner's is compared here and elsewhere.

    Raises:
        VerificationError: they differ.
    """
    import numpy as np

    facts["self_test"] = {
        "input": "self_test_input.npy", "file": "self_test.npy", "steps": x.shape[1], "tolerance": allowed,
    }  # fmt: skip
    given = x.cpu().numpy()
    np.save(place / "self_test_input.npy", given.astype(np.float32), allow_pickle=False)
    np.save(place / "self_test.npy", expected.cpu().numpy(), allow_pickle=False)
    finish(place, facts)
    made, _ = streams.StreamBundle(place).read(given)
    error = error_of(made, expected.cpu().numpy())
    if not error <= allowed:
        raise VerificationError(
            f"export_stream_bundle: what the runner gives step by step differs by {error:.1e} from the whole "
            f"sequence (allowed {allowed:.0e})"
        )
    return error
