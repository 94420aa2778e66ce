"""The folder of a training run. Only safetensors and JSON are written.

::

    run.json                            config, model, objective and data of the run
    metrics.jsonl                       one JSON object per line
    checkpoints/step-00000500.safetensors
    samples/, report.html               what a training on the command line shows
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from effformer.arguments import checked

from ..checks import FormatError, reason
from ..files import atomic_path, check_finite, disk_errors, sweep, write_json
from ..loading import tell_not_finite, unlike
from ..retired import rename
from ..weights import unshared
from ..wrapped import unwrapping
from .lock import hold, release

__all__ = ["RunFolder", "load_checkpoint", "read_checkpoint", "read_metrics", "read_run"]

FORMAT = 1
_RUN, _METRICS, _CHECKPOINTS, _LOCK = "run.json", "metrics.jsonl", "checkpoints", "run.lock"
_SHOWN = {"samples", "report.html"}
_SUM, _ABOUT = "sha256", "about"
_NAME = re.compile(r"step-\d+\.safetensors")
Checkpoint = tuple[dict[str, Tensor], dict[str, Any]]


class RunFolder:
    """A folder that belongs to one training run, and to one process until it is closed.

    A run without a checkpoint is none: it failed or was killed before it came to something, and
    another one begins in its place.

    Args:
        path: the folder; made if it is missing.
        identity: everything that decides the weights, as JSON values. A run is only resumed under
            the same.
        resume: continue the run that the folder holds, if any.
        renew: brings what an older version wrote about a run up to date; it may raise ValueError.
        about: what else is written down of the run when it begins, JSON values.

    Raises:
        ValueError: the folder cannot be written, is in use by another process, holds a run and
            ``resume`` is False, or holds a different run.
        FormatError: the folder holds something else, or a run of a newer version.
    """

    def __init__(
        self,
        path: Path,
        identity: Mapping[str, Any],
        *,
        resume: bool,
        renew: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        self.path = path
        try:
            self._about = json.loads(json.dumps(about))
        except (TypeError, ValueError, RecursionError) as error:
            raise TypeError(f"train: about: expected JSON values ({error})") from error
        self.metrics = path / _METRICS
        identity = {"format": FORMAT, **json.loads(json.dumps(identity))}
        self._made = [folder for folder in (path, *path.parents) if not folder.exists()]
        try:
            self._read_identity()  # a foreign folder is left before anything is written to it
            path.mkdir(parents=True, exist_ok=True)
            lock = hold(path / _LOCK)
            self.close = weakref.finalize(self, release, lock, path / _LOCK, os.getpid())
            try:
                self._enter(identity, resume, renew)
            except BaseException:
                self.close()
                raise
        except OSError as error:
            raise ValueError(
                f"train: cannot write a run to {path} ({reason(error)}); choose another folder"
            ) from error

    def _enter(
        self,
        identity: dict[str, Any],
        resume: bool,
        renew: Callable[[dict[str, Any]], dict[str, Any]] | None,
    ) -> None:
        present = self._read_identity()
        if present is not None and self._begun():
            self._check(present if renew is None else renew(present), identity, resume)
        else:
            write_json(self.path / _RUN, identity | {_ABOUT: self._about})
        (self.path / _CHECKPOINTS).mkdir(exist_ok=True)
        sweep(self.path / _CHECKPOINTS)
        for leftover in (self.path / _CHECKPOINTS).glob("*.part"):  # of earlier versions
            leftover.unlink()

    def abandon(self) -> None:
        """Close a run that failed; of one without a checkpoint and a record nothing stays."""
        places = self.path / _CHECKPOINTS
        if self._entries() == {_CHECKPOINTS} and not any(places.iterdir()):
            places.rmdir()
            (self.path / _RUN).unlink()
        self.close()
        with suppress(OSError):  # others may have put something there
            for folder in self._made:
                folder.rmdir()

    def newest(self) -> Path | None:
        """The latest checkpoint."""
        return max(_checkpoints(self.path), key=_step, default=None)

    def restore(self) -> tuple[Path, Checkpoint] | None:
        """The latest checkpoint that is whole, and what `read_checkpoint` gives for it; None if there
        is no checkpoint. Damaged later ones are renamed, and metrics after it dropped.

        Raises:
            FormatError: none is whole.
        """
        found, damaged = _latest(self.path)
        for path in damaged:
            os.replace(path, path.with_suffix(".damaged"))
        self.rewind(0 if found is None else _step(found[0]))
        return found

    def save(
        self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], *, keep: int
    ) -> Path:
        """Write a checkpoint, which appears complete or not at all; only the last ``keep`` stay."""
        path = self.path / _CHECKPOINTS / f"step-{step:08d}.safetensors"
        own, words = unshared(tensors), json.dumps(state)
        with atomic_path(path) as part:
            save_file(own, part, metadata={"effformer": words, _SUM: _digest(own, words)})
        for old in sorted(_checkpoints(self.path), key=_step)[:-keep]:
            old.unlink()
        return path

    def log(self, record: Mapping[str, float]) -> None:
        """Append a line to the metrics."""
        with disk_errors(self.metrics), self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def rewind(self, step: int) -> None:
        """Drop metrics after ``step``, which a resumed run measures again."""
        if self.metrics.exists():
            kept = [record for record in read_metrics(self.metrics) if record["step"] <= step]
            with atomic_path(self.metrics) as part:
                lines = "".join(json.dumps(record) + "\n" for record in kept)
                part.write_text(lines, encoding="utf-8")

    def _entries(self) -> set[str]:
        """What lies in the folder beside the description of the run, its lock and what a killed
        process left.
        """
        passing = re.compile(rf"{_RUN}(\.part)?|{_LOCK}|\.effformer-.*")
        return {p.name for p in self.path.iterdir() if not passing.fullmatch(p.name)}

    def _begun(self) -> bool:
        """Whether there is anything that a run under another description would destroy."""
        places = self.path / _CHECKPOINTS
        kept = [p for p in places.glob("*") if p.suffix != ".part" and not p.is_dir()]
        return bool(kept or self._entries() - {_METRICS, _CHECKPOINTS, *_SHOWN})

    def _read_identity(self) -> dict[str, Any] | None:
        found = _identity(self.path)
        if found is None and self.path.exists() and (others := sorted(self._entries())):
            raise FormatError(
                f"train: {self.path} holds other things ({', '.join(others[:3])}) but no "
                f"{_RUN}; choose a new or an empty folder"
            )
        return found

    def _check(self, present: dict[str, Any], identity: dict[str, Any], resume: bool) -> None:
        if not resume:
            raise ValueError(
                f"train: {self.path} already holds a run; --resume (resume=True in Python) continues it, or "
                "choose another folder"
            )
        present.pop(_ABOUT, None)
        there, now = dict(_flat(present)), dict(_flat(identity))
        changed = [
            f"{key} was {there.get(key, 'absent')!r} and is {now.get(key, 'absent')!r}"
            for key in sorted(there.keys() | now.keys())
            if there.get(key) != now.get(key)
        ]
        if changed:
            raise ValueError(
                f"train: {self.path} holds a different run, which cannot be resumed: "
                + "; ".join(changed)
            )


def _identity(run: Path) -> dict[str, Any] | None:
    """What ``run.json`` holds, None if there is none."""
    if not run.exists():
        return None
    if not run.is_dir():
        raise FormatError(f"train: {run} is a file; a run needs a folder")
    file = run / _RUN
    if not file.exists():
        return None
    check_finite(file)
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        version = int(found["format"])
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(f"train: {file} is not the description of a run ({error!r})") from error
    if version > FORMAT:
        raise FormatError(f"train: {file} has format {version}; this version reads up to {FORMAT}")
    return dict(found)


@checked
def read_run(source: str | os.PathLike[str]) -> dict[str, Any]:
    """What ``run.json`` says about a run.

    Raises:
        FormatError: the folder holds no run, or one of a newer version.
    """
    found = _identity(Path(source))
    if found is None:
        raise FormatError(f"{source}: holds no training run ({_RUN} is missing)")
    return found


@checked
def read_metrics(source: str | os.PathLike[str]) -> list[dict[str, float]]:
    """Read the metrics of a run: records with step, loss, lr, grad_norm, seconds.

    Args:
        source: the run folder or its ``metrics.jsonl``. A half-written last line is passed over.

    Raises:
        FormatError: another line is not a record.
    """
    path = Path(source)
    path = path / _METRICS if path.is_dir() else path
    check_finite(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except UnicodeDecodeError as error:
        raise FormatError(f"{path}: no metrics of a run ({reason(error)})") from error
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                raise ValueError("no step")
        except (ValueError, RecursionError) as error:
            if number == len(lines) and not line.endswith("\n"):
                break
            raise FormatError(
                f"{path}, line {number}: not a metrics record ({reason(error)})"
            ) from error
        records.append(record)
    return records


@checked
def read_checkpoint(source: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a checkpoint.

    Args:
        source: a checkpoint file, or a run folder (its latest checkpoint; a damaged one is passed
            over with a warning where there is an older one).

    Returns:
        Tensors named ``model.*``, ``ema.*``, ``optimizer.*``, and the JSON state with ``step``,
        ``seconds`` and ``trained``, what the weights are trained to predict.

    Raises:
        FileNotFoundError: there is no checkpoint.
        FormatError: the file is damaged or not a checkpoint of a training run.
    """
    path = Path(source)
    if not path.is_dir():
        return _read(path)
    found, _ = _latest(path)
    if found is None:
        raise FileNotFoundError(f"{path}: no checkpoint in {_CHECKPOINTS}/")
    return found[1]


def _read(path: Path) -> Checkpoint:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    try:
        with safe_open(path, framework="pt") as file:
            facts = file.metadata() or {}
            state = _read_state(facts["effformer"], path)
            # cloned: mapped memory has another alignment, with which products may round differently
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise FormatError(
            f"{path}: not a readable checkpoint of a training run ({error!r})"
        ) from error
    # checkpoints of earlier versions have no checksum
    if _SUM in facts and facts[_SUM] != _digest(tensors, facts["effformer"]):
        raise FormatError(f"{path}: is damaged (its checksum differs); use an older checkpoint")
    return tensors, state


def _checkpoints(run: Path) -> list[Path]:
    return [p for p in (run / _CHECKPOINTS).glob("*") if _NAME.fullmatch(p.name)]


def _latest(run: Path) -> tuple[tuple[Path, Checkpoint] | None, list[Path]]:
    """The latest checkpoint that is whole, None if there is no checkpoint, and damaged later ones.

    Raises:
        FormatError: none is whole.
    """
    failures: dict[Path, FormatError] = {}
    for path in sorted(_checkpoints(run), key=_step, reverse=True):
        try:
            found = _read(path)
        except FormatError as error:
            failures[path] = error
            continue
        for why in failures.values():
            warnings.warn(f"{why}; going on from {path.name}", stacklevel=3)
        return (path, found), list(failures)
    if failures:
        raise next(iter(failures.values()))
    return None, []


@checked
@unwrapping
def load_checkpoint(
    source: str | os.PathLike[str], model: nn.Module, weights: Literal["ema", "raw"] = "ema"
) -> int:
    """Load the weights of a training run into a model, and what they are trained to predict into
    ``model.trained``.

    Args:
        source: a checkpoint file, or a run folder (its latest checkpoint).
        model: a model of the configuration that was trained.
        weights: "ema" (averaged; what one samples from) or "raw" (what the optimizer holds).

    Returns:
        The step of the checkpoint.

    Raises:
        ValueError: the run has no averaged weights, or the weights do not fit the model.
    """
    tensors, state = read_checkpoint(source)
    raw, averaged = parts(tensors, "model"), parts(tensors, "ema")
    if weights == "ema" and not averaged:
        raise ValueError(f"load_checkpoint: {source} has no averaged weights; load weights='raw'")
    raw, averaged = (_renewed(found, model) for found in (raw, averaged))
    # tied weights are averaged under one name, buffers outside the state dict as well
    own = dict((*model.named_parameters(), *model.named_buffers()))
    check_fit(raw, model.state_dict(), f"load_checkpoint: {source}")
    if weights == "ema":
        check_fit(averaged, own, f"load_checkpoint: the averaged weights of {source}")
    model.load_state_dict(raw)
    if weights == "ema":
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(averaged[name])
    tell_not_finite(
        model, averaged if weights == "ema" else raw, where=f"load_checkpoint: {source}"
    )
    if state.get("trained") is not None:
        model.trained = state["trained"]
    return int(state["step"])


def check_fit(found: Mapping[str, Tensor], own: Mapping[str, Tensor], where: str) -> None:
    """Whether the tensors of a checkpoint are those of a model, by name, shape and kind.

    Raises:
        ValueError: they are not; the message names the first differences.
    """
    both = sorted(found.keys() & own.keys())
    wrong = [f"{key} {why}" for key in both if (why := unlike(found[key], own[key]))]
    wrong += [
        f"{key} is {tuple(found[key].shape)}, the model has {tuple(own[key].shape)}"
        for key in both
        if found[key].shape != own[key].shape
    ]
    sides = {"wrong": wrong, "missing": own.keys() - found.keys()}
    sides["unexpected"] = found.keys() - own.keys()
    if words := [f"{side}: {_some(sorted(keys))}" for side, keys in sides.items() if keys]:
        raise ValueError(
            f"{where} does not fit the model: {'; '.join(words)}; build the model with the width, depth "
            "and parts that were trained"
        )


def _some(items: list[str]) -> str:
    return ", ".join(items[:3]) + (f" and {len(items) - 3} more" if len(items) > 3 else "")


def parts(tensors: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    """Tensors of one part of a checkpoint: "model", "ema" or "optimizer"."""
    prefix = f"{part}."
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _read_state(text: str, path: Path) -> dict[str, Any]:
    """What a checkpoint says of itself.

    Raises:
        ValueError: it cannot be so.
    """
    state = json.loads(text)
    step, seconds = state["step"], state["seconds"]
    if type(step) is not int or step < 0:
        raise ValueError(f"step {step!r} is no number of steps")
    if type(seconds) not in (int, float) or not 0 <= seconds < math.inf:
        raise ValueError(f"seconds {seconds!r} are no time")
    if re.fullmatch(r"step-\d+", path.stem) and _step(path) != step:
        raise ValueError(f"it was written at step {step}, its name says {_step(path)}")
    return dict(state)


def _step(path: Path) -> int:
    return int(path.stem.removeprefix("step-"))


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(inner, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix, value


def _digest(tensors: Mapping[str, Tensor], state: str) -> str:
    """SHA-256 over the tensors, with their names, types and shapes, and the state."""
    digest = hashlib.sha256(state.encode())
    for key in sorted(tensors):
        tensor = tensors[key].detach().cpu().contiguous()
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _renewed(tensors: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Weights under the names that the model has for them now."""
    new = rename(tensors, model.state_dict().keys())
    return {new.get(key, key): tensor for key, tensor in tensors.items()}
