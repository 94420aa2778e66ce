"""`run_recipe`: every finished step stands in a folder, and a run that was killed goes on behind them."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from effformer.arguments import checked
from effformer.calls import check_parts, evaluating, takes
from effformer.checks import CapabilityError, FormatError
from effformer.context import Ledger
from effformer.files import check_folder, mark, read_json, write_json
from effformer.io import load_model, save_pretrained
from effformer.notebook import Shown
from effformer.train import Dataset, Generation, load_data
from effformer.values import plain
from effformer.wrapped import unwrapping

from ..quant import recording
from ..report import file_bytes, size_text
from ..samples import Data, listed
from .recipe import Recipe
from .steps import Place

__all__ = ["RecipeReport", "calibration_of", "first_samples", "run_recipe", "trainable"]

FACTS = "recipe.json"
MODEL = "model"
_STEP = {"step", "folder", "seconds", "bytes"}
Told = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeReport(Shown):
    """What a recipe did.

    Attributes:
        steps: name, seconds, bytes of the model's file and report of every step, as JSON values.
        bytes_before: size of the model's file.
        bytes_after: and after.
        resumed: steps that an earlier run had finished.
        saved: folder of the result.
    """

    steps: tuple[Mapping[str, Any], ...]
    bytes_before: int
    bytes_after: int
    resumed: int
    saved: Path

    @property
    def ratio(self) -> float:
        """File bytes after / before."""
        return self.bytes_after / self.bytes_before

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "steps": [dict(step) for step in self.steps], "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after, "ratio": self.ratio, "resumed": self.resumed,
            "saved": str(self.saved),
        }  # fmt: skip

    def __str__(self) -> str:
        lines = []
        for i, step in enumerate(self.steps):
            done = ", from an earlier run" if i < self.resumed else ""
            lines.append(
                f"{i + 1}. {step['step']}: {size_text(step['bytes'])}, {step['seconds']:.1f} s{done}"
            )
        lines.append(
            f"file: {size_text(self.bytes_before)} -> {size_text(self.bytes_after)} ({self.ratio:.3f}x)"
        )
        return "\n".join([*lines, f"saved in {self.saved}"])


@checked
@unwrapping
def run_recipe(
    model: nn.Module,
    recipe: Recipe | Mapping[str, Any] | str | Path,
    out: str | Path,
    *,
    data: Data | None = None,
    told: Told | None = None,
    force: bool = False,
) -> tuple[nn.Module, RecipeReport]:
    """Compress a model by a recipe.

    The model of every finished step is saved in a folder of its own in ``out``, the last one in
    ``out/model``, each complete or not at all. The same call again goes on behind the finished steps;
    a step that trains goes on at its last checkpoint.

    Args:
        model: a model of ours; it stays as it is.
        recipe: a `Recipe`, its options, or a YAML file.
        out: folder: new, empty, or that of an earlier run of the same recipe on the same model and data.
        data: named tensors whose first axis counts samples, a data set or batches; None: the data set
            that the recipe names. Calibration looks at the first ``samples`` of them.
        told: called with a sentence before and after every step.
        force: begin anew where ``out`` holds the run of another recipe, model or data.

    Returns:
        The model and what was done.

    Raises:
        ValueError: a recipe that does not fit, data that are missing, empty or not finite, or a step that
            cannot do what it is asked for; earlier steps stay.
        CapabilityError: a model that cannot be saved.
        FormatError: ``out`` cannot be written, or holds something else.

    Example:
        >>> import effformer, tempfile
        >>> from effformer.compress import run_recipe
        >>> steps = [{"prune": {"macs": 0.6}}, {"quantize": {"scheme": "int8"}}]
        >>> model, folder = effformer.build_model("vit-nano"), tempfile.mkdtemp()
        >>> small, report = run_recipe(model, {"steps": steps}, folder)
        >>> report.ratio < 0.3
        True
    """
    check_parts(model, where="run_recipe")
    if not hasattr(model, "example_inputs") or not hasattr(model, "config"):
        raise CapabilityError(
            f"run_recipe: {type(model).__name__} is no model of ours, whose steps could be saved; call the "
            "verbs one by one"
        )
    read = _recipe(recipe)
    folder = Path(out)
    given = _given(model, read, data)
    identity = {"recipe": read.to_dict(), "model": _digest(model), "data": _digest(given)}
    with _begun(folder, identity, force) as finished:
        return _run(model, read, folder, given, identity, finished, told)


def _run(
    model: nn.Module,
    recipe: Recipe,
    folder: Path,
    data: Any,
    identity: Mapping[str, Any],
    finished: list[dict[str, Any]],
    told: Told | None,
) -> tuple[nn.Module, RecipeReport]:
    """The steps behind the finished ones."""
    key = hashlib.blake2b(json.dumps(plain(identity)).encode(), digest_size=4).hexdigest()
    first, samples = first_samples(data, recipe.samples), trainable(data)
    calibration = calibration_of(model, first)
    now: Any = copy.deepcopy(model)
    done = list(finished)
    if finished:
        now = load_model(folder / finished[-1]["folder"])
    for index in range(len(finished), len(recipe.steps)):
        step = recipe.steps[index]
        if told is not None:
            told(f"step {index + 1} of {len(recipe.steps)}: {step}")
        name, start = f"{index + 1}-{step.verb}", time.perf_counter()
        run = folder / f"{name}-{key}"  # a training that was killed; of this identity
        now, report = step.run(now, Place(model, calibration, first, samples, run))
        save_pretrained(now, folder / name, by="recipe", force=True)
        said = report.to_dict() if hasattr(report, "to_dict") else plain(report)
        done.append(
            {
                "step": step.verb, "folder": name, "seconds": time.perf_counter() - start,
                "bytes": file_bytes(now.state_dict()), "report": said,
            }
        )  # fmt: skip
        _note(folder, identity, done)
        shutil.rmtree(run, ignore_errors=True)
        if told is not None and report is not None:
            told(str(report))
    save_pretrained(now, folder / MODEL, by="recipe", force=True)
    return now, RecipeReport(
        steps=tuple(done), bytes_before=file_bytes(model.state_dict()),
        bytes_after=file_bytes(now.state_dict()), resumed=len(finished), saved=folder / MODEL,
    )  # fmt: skip


def _recipe(given: Recipe | Mapping[str, Any] | str | Path) -> Recipe:
    if isinstance(given, Recipe):
        return given
    return Recipe.from_dict(given) if isinstance(given, Mapping) else Recipe.read(given)


def _given(model: nn.Module, recipe: Recipe, data: Data | None) -> Any:
    """What is calibrated and trained on; streams are kept."""
    if data is None and recipe.data is not None:
        return load_data(recipe.data)
    if data is None or isinstance(data, (Dataset, Mapping)):
        return data
    return listed(model, data, where="run_recipe: data")


def first_samples(data: Any, samples: int) -> Any:
    """The first samples."""
    named = data.tensors if isinstance(data, Dataset) else data
    if not isinstance(named, Mapping):
        return named
    return {k: x[:samples] if isinstance(x, Tensor) and x.dim() else x for k, x in named.items()}


def calibration_of(model: nn.Module, named: Any) -> Any:
    """What the model is called with: of a generator, for which there are only images, what its training
    asks it, at random times.
    """
    if not isinstance(named, Mapping) or "t" in named or not takes(model, "t"):
        return named
    task, generator = Generation(), torch.Generator().manual_seed(0)
    with recording(model) as record, evaluating(model), torch.no_grad():
        for batch in listed(model, named, where="recipe: data"):
            task(model, batch, generator, Ledger())
    return record


def trainable(data: Any) -> Dataset | None:
    """What can be trained on."""
    if isinstance(data, Dataset) or data is None:
        return data
    return Dataset("recipe", dict(data)) if isinstance(data, Mapping) else None


def _digest(value: Any) -> str | None:
    """What weights or data are told by."""
    if value is None:
        return None
    named = value.state_dict() if isinstance(value, nn.Module) else getattr(value, "tensors", value)
    made = hashlib.blake2b(digest_size=16)

    def add(path: str, one: Any) -> None:
        if isinstance(one, Tensor):
            made.update(f"{path} {one.dtype} {tuple(one.shape)}".encode())
            made.update(one.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        elif isinstance(one, Mapping):
            for key in sorted(one):
                add(f"{path}.{key}", one[key])
        elif isinstance(one, (list, tuple)):
            for i, inner in enumerate(one):
                add(f"{path}.{i}", inner)
        elif hasattr(one, "tensors"):
            add(path, one.tensors)

    add("", named)
    if isinstance(value, nn.Module):
        made.update(repr(getattr(value, "transforms", ())).encode())
    return made.hexdigest()


@contextmanager
def _begun(
    folder: Path, identity: Mapping[str, Any], force: bool
) -> Iterator[list[dict[str, Any]]]:
    """The finished steps of an earlier run of the same; of a first one that fails before it has any,
    nothing stays.
    """
    new, made = (
        not (folder / FACTS).exists(),
        [p for p in (folder, *folder.parents) if not p.exists()],
    )
    finished = _begin(folder, identity, force)
    try:
        yield finished
    except BaseException:
        if new and [p.name for p in folder.iterdir()] == [FACTS]:
            (folder / FACTS).unlink()
            with suppress(OSError):  # others may have put something there
                for one in made:
                    one.rmdir()
        raise


def _begin(folder: Path, identity: Mapping[str, Any], force: bool) -> list[dict[str, Any]]:
    """The finished steps of an earlier run of the same; the folder is made."""
    facts = folder / FACTS
    if not facts.exists():
        check_folder(folder, marker=FACTS)
        _note(folder, identity, [])
        return []
    data = read_json(facts)
    if not isinstance(data, Mapping) or data.get("generator") != mark("recipe"):
        raise FormatError(
            f"{folder}: holds a {FACTS} that effformer did not write; choose another folder"
        )
    other = [key for key in identity if plain(identity[key]) != data.get(key)]
    if other and not force:
        raise FormatError(
            f"{folder}: holds the run of another {' and '.join(other)}; choose another folder, or begin anew "
            "with --force (force=True in Python)"
        )
    if other:
        _note(folder, identity, [])
        return []
    done = data.get("done")
    if not isinstance(done, list) or not all(
        isinstance(one, Mapping) and {*one} >= _STEP for one in done
    ):
        raise FormatError(f"{folder}: its {FACTS} is damaged; choose another folder")
    whole = [one for one in done if (folder / one["folder"] / "config.json").exists()]
    return list(whole) if len(whole) == len(done) else []


def _note(folder: Path, identity: Mapping[str, Any], done: list[dict[str, Any]]) -> None:
    facts = {"generator": mark("recipe"), **plain(dict(identity)), "done": done}
    write_json(folder / FACTS, facts)
