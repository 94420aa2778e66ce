"""The folder of a training run. Only safetensors and JSON are written.

::

    run.json                            config, model, objective and data of the run
    metrics.jsonl                       one JSON object per line
    checkpoints/step-00000500.safetensors
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..checks import FormatError, unknown
from ..retired import rename

__all__ = ["RunFolder", "load_checkpoint", "read_checkpoint", "read_metrics"]

FORMAT = 1
_RUN, _METRICS, _CHECKPOINTS = "run.json", "metrics.jsonl", "checkpoints"


class RunFolder:
    """A folder that belongs to one training run.

    Args:
        path: the folder; made if it is missing.
        identity: everything that decides the weights, as JSON values. A run is only resumed under
            the same.
        resume: continue the run that the folder holds, if any.
        renew: brings what an older version wrote about a run up to date; it may raise ValueError.

    Raises:
        ValueError: the folder cannot be written, holds a run and ``resume`` is False, or holds a
            different run.
        FormatError: the folder holds something else, or a run of a newer version.
    """

    def __init__(
        self,
        path: Path,
        identity: Mapping[str, Any],
        *,
        resume: bool,
        renew: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    ) -> None:
        self.path = path
        self.metrics = path / _METRICS
        identity = {"format": FORMAT, **json.loads(json.dumps(identity))}
        try:
            present = self._read_identity()
            if present is not None:
                self._check(present if renew is None else renew(present), identity, resume)
            path.mkdir(parents=True, exist_ok=True)
            if present is None:
                _write_text(path / _RUN, json.dumps(identity, indent=1) + "\n")
            (path / _CHECKPOINTS).mkdir(exist_ok=True)
            for leftover in (path / _CHECKPOINTS).glob("*.part"):
                leftover.unlink()
        except OSError as error:
            raise ValueError(
                f"train: cannot write a run to {path} ({error}); choose another folder"
            ) from error
        self.rewind(0 if (newest := self.newest()) is None else _step(newest))

    def newest(self) -> Path | None:
        """The latest checkpoint."""
        return max(self._all(), key=_step, default=None)

    def save(
        self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], *, keep: int
    ) -> Path:
        """Write a checkpoint, which appears complete or not at all; only the last ``keep`` stay."""
        path = self.path / _CHECKPOINTS / f"step-{step:08d}.safetensors"
        part = path.with_suffix(".part")
        try:
            save_file(_unshared(tensors), part, metadata={"effformer": json.dumps(state)})
            _sync(part)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
        for old in sorted(self._all(), key=_step)[:-keep]:
            old.unlink()
        return path

    def log(self, record: Mapping[str, float]) -> None:
        """Append a line to the metrics."""
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def rewind(self, step: int) -> None:
        """Drop metrics after ``step``, which a resumed run measures again."""
        if self.metrics.exists():
            kept = [record for record in read_metrics(self.metrics) if record["step"] <= step]
            _write_text(self.metrics, "".join(json.dumps(record) + "\n" for record in kept))

    def _all(self) -> list[Path]:
        return list((self.path / _CHECKPOINTS).glob("step-*.safetensors"))

    def _read_identity(self) -> dict[str, Any] | None:
        if not self.path.exists():
            return None
        if not self.path.is_dir():
            raise FormatError(f"train: {self.path} is a file; a run needs a folder")
        file = self.path / _RUN
        if not file.exists():
            if others := sorted(p.name for p in self.path.iterdir() if p.name != f"{_RUN}.part"):
                raise FormatError(
                    f"train: {self.path} holds other things ({', '.join(others[:3])}) but no "
                    f"{_RUN}; choose a new or an empty folder"
                )
            return None
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            version = int(found["format"])
        except (ValueError, KeyError, TypeError) as error:
            raise FormatError(
                f"train: {file} is not the description of a run ({error!r})"
            ) from error
        if version > FORMAT:
            raise FormatError(
                f"train: {file} has format {version}; this version reads up to {FORMAT}"
            )
        return dict(found)

    def _check(self, present: dict[str, Any], identity: dict[str, Any], resume: bool) -> None:
        if not resume:
            raise ValueError(
                f"train: {self.path} already holds a run; pass resume=True to continue it, or "
                "choose another folder"
            )
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


def read_metrics(source: str | os.PathLike[str]) -> list[dict[str, float]]:
    """Read the metrics of a run: records with step, loss, lr, grad_norm, seconds.

    Args:
        source: the run folder or its ``metrics.jsonl``. A half-written last line is passed over.

    Raises:
        FormatError: another line is not a record.
    """
    path = Path(source)
    path = path / _METRICS if path.is_dir() else path
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                raise ValueError("no step")
        except ValueError as error:
            if number == len(lines) and not line.endswith("\n"):
                break
            raise FormatError(f"{path}, line {number}: not a metrics record ({error})") from error
        records.append(record)
    return records


def read_checkpoint(source: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a checkpoint.

    Args:
        source: a checkpoint file, or a run folder (its latest checkpoint).

    Returns:
        Tensors named ``model.*``, ``ema.*``, ``optimizer.*``, and the JSON state with ``step``,
        ``seconds`` and ``trained``, what the weights are trained to predict.

    Raises:
        FileNotFoundError: there is no checkpoint.
        FormatError: the file is truncated or not a checkpoint of a training run.
    """
    path = Path(source)
    if path.is_dir():
        newest = max((path / _CHECKPOINTS).glob("step-*.safetensors"), key=_step, default=None)
        if newest is None:
            raise FileNotFoundError(f"{path}: no checkpoint in {_CHECKPOINTS}/")
        path = newest
    try:
        with safe_open(path, framework="pt") as file:
            state = json.loads((file.metadata() or {})["effformer"])
            # cloned: mapped memory has another alignment, with which products may round differently
            return {key: file.get_tensor(key).clone() for key in file.keys()}, state  # noqa: SIM118
    except (SafetensorError, KeyError, ValueError) as error:
        raise FormatError(
            f"{path}: not a readable checkpoint of a training run ({error!r})"
        ) from error


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
    if weights not in ("ema", "raw"):
        raise unknown("weights", str(weights), ["ema", "raw"], where="load_checkpoint")
    tensors, state = read_checkpoint(source)
    raw, averaged = parts(tensors, "model"), parts(tensors, "ema")
    if weights == "ema" and not averaged:
        raise ValueError(f"load_checkpoint: {source} has no averaged weights; load weights='raw'")
    raw, averaged = (_renewed(found, model) for found in (raw, averaged))
    try:
        model.load_state_dict(raw)
    except RuntimeError as error:
        raise ValueError(f"load_checkpoint: {source} does not fit the model: {error}") from error
    if weights == "ema":
        # tied weights are averaged under one name, buffers outside the state dict as well
        with torch.no_grad():
            for name, tensor in (*model.named_parameters(), *model.named_buffers()):
                tensor.copy_(averaged[name])
    if state.get("trained") is not None:
        model.trained = state["trained"]
    return int(state["step"])


def parts(tensors: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    """Tensors of one part of a checkpoint: "model", "ema" or "optimizer"."""
    prefix = f"{part}."
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _step(path: Path) -> int:
    return int(path.stem.removeprefix("step-"))


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors with storage of their own: safetensors refuses tied weights."""
    seen: set[int] = set()
    out = {}
    for key, value in tensors.items():
        own = value.detach().contiguous()
        own = own.clone() if own.untyped_storage().data_ptr() in seen else own
        seen.add(own.untyped_storage().data_ptr())
        out[key] = own
    return out


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(inner, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix, value


def _write_text(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    _sync(part)
    os.replace(part, path)


def _sync(path: Path) -> None:
    """Force a file to the disk before it is renamed: a power cut cannot leave an empty one."""
    with contextlib.closing(path.open("rb+")) as file:
        os.fsync(file.fileno())


def _renewed(tensors: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Weights under the names that the model has for them now."""
    new = rename(tensors, model.state_dict().keys())
    return {new.get(key, key): tensor for key, tensor in tensors.items()}
