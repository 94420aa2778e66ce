"""`explore`: run recipes towards a target, measure them, and choose."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from effformer.arguments import checked
from effformer.calls import check_parts, evaluating
from effformer.checks import CapabilityError, FormatError, reason
from effformer.files import atomic_path, check_folder, mark, write_json
from effformer.io import load_model, save_pretrained
from effformer.profile import Benchmark, Candidate, benchmark, breakdown, profile
from effformer.train import Dataset, load_data
from effformer.values import Natural, NonNegative, Portion, Threads, Times
from effformer.wrapped import unwrapping

from ..quant.control import Goal
from ..recipe import run_recipe
from ..recipe.quality import Quality, metric_of
from ..recipe.run import calibration_of, first_samples, trainable
from ..report import file_bytes
from ..samples import Data, listed
from .result import EXPLORATION, Exploration, Tried

__all__ = ["explore", "loaded"]

Told = Callable[[str], None]
Target = Literal["latency", "size", "macs"]
_FACTS = "exploration.json"


@checked
@unwrapping
def explore(
    model: nn.Module,
    target: Target,
    share: Portion,
    out: str | Path,
    *,
    data: Data | str | None = None,
    quality: Quality = "error",
    max_drop: NonNegative = 0.02,
    steps: Natural = 200,
    samples: Times = 256,
    threads: Threads = 1,
    rounds: Times = 3,
    told: Told | None = None,
    force: bool = False,
) -> tuple[nn.Module, Exploration]:
    """Compress a model in several ways, and choose the best that meets a target.

    Towards a size: int8, int4, both under a budget by layer, and each behind pruning. Towards work and
    time: pruning by several measures. Where there are samples to train on, every pruned model is distilled.
    Candidates are recipes in folders of their own (`run_recipe`), so that a run that was stopped goes on.
    Their times are measured one per process, in turns (`effformer.profile.benchmark`).

    Args:
        model: a model of ours; it stays as it is.
        target: "latency", "size" of the file, or "macs".
        share: of the dense model's, at most 1.
        out: folder for candidates, ``report.html``, ``report.json`` and the chosen ``model``.
        data: named tensors, a data set or its name, batches; None: the model's own example, on which only
            the "error" of the output can be measured.
        quality: share of right classes ("accuracy"), of the dense model's classes ("agreement"), or the
            relative "error" of the output.
        max_drop: by how much that may be worse than for the dense model.
        steps: of distillation; 0: none.
        samples: that quality is measured and calibration done on.
        threads: of the measurement.
        rounds: processes of every candidate.
        told: called with a sentence on the way.
        force: begin anew where ``out`` holds candidates of another model or data.

    Returns:
        The chosen model, and what was tried.

    Raises:
        ValueError: no candidate meets the target within the drop; the best that does is named, and the
            report stands in ``out``. Data that do not fit.
        CapabilityError: a model that cannot be saved.
        FormatError: ``out`` cannot be written, or holds something else.
    """
    check_parts(model, where="explore")
    if not hasattr(model, "example_inputs") or not hasattr(model, "config"):
        raise CapabilityError(
            f"explore: {type(model).__name__} is no model of ours, whose forms could be saved"
        )
    folder = Path(out)
    if not (folder / _FACTS).exists():
        check_folder(folder, marker=_FACTS)
    given = _given(model, data)
    first = first_samples(given, samples)
    metric, best = metric_of(quality, model, calibration_of(model, first), first)
    goal = Goal(reference=_value(metric, model), max_drop=max_drop, relative=False, best=best)
    write_json(folder / _FACTS, {"generator": mark(EXPLORATION), "target": target, "share": share})
    forms: dict[str, nn.Module] = {"dense": model}
    save_pretrained(model, folder / "candidates/dense", by="explore", force=True)  # type: ignore[arg-type]
    trains = steps > 0 and trainable(given) is not None
    refused: dict[str, str] = {}
    plans = dict(_candidates(target, share, steps if trains else 0, data is not None))
    for name, plan in plans.items():
        if told is not None:
            told(f"candidate: {name}")
        place = folder / "candidates" / name.replace(" ", "-")
        try:
            forms[name], _ = run_recipe(
                model, {"steps": plan, "samples": samples}, place, data=given, force=force
            )
        except FormatError:
            raise  # of the place, not of the candidate
        except ValueError as error:
            refused[name] = reason(error)
    times = _timed(model, forms, folder, threads, rounds)
    rows = tuple(
        _tried(n, plans.get(n, []), m, model, metric, goal, times) for n, m in forms.items()
    )
    found = Exploration(
        target=target, share=share, quality=quality, goal=goal, rows=rows, refused=refused,
        how=times.how(),
    )  # fmt: skip
    chosen = found.chosen
    if chosen is not None:
        both = [model, forms[chosen.name]]
        found = dataclasses.replace(
            found, boxes=breakdown(both, names=["before", chosen.name], runs=rounds)
        )
    for name in ("report.json", "report.html"):
        found.save(folder / name, force=True)
    if chosen is None:
        raise ValueError(f"explore: {found.verdict()}; all candidates: {folder / 'report.html'}")
    save_pretrained(forms[chosen.name], folder / "model", by="explore", force=True)  # type: ignore[arg-type]
    return forms[chosen.name], found


def _given(model: nn.Module, data: Data | str | None) -> Any:
    if data is None:
        example: Any = model
        return listed(model, [example.example_inputs(8)], where="explore: data")
    if isinstance(data, str):
        return load_data(data)
    return (
        data if isinstance(data, (Dataset, Mapping)) else listed(model, data, where="explore: data")
    )


def _candidates(
    target: Target, share: float, steps: int, measured: bool
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Recipes towards a target, by name."""
    training = {"distill": {"steps": steps, "batch": 32, "lr": 1e-3}}
    recover: list[dict[str, Any]] = [training] if steps else []
    if target == "size":
        ways: dict[str, dict[str, Any]] = {"int8": {"scheme": "int8"}, "int4": {"scheme": "int4"}}
        for name, way in ways.items():
            yield name, [{"quantize": way}]
        way = {"schemes": [*ways], "budget": {"bytes": share}}
        yield f"mixed for {share:.3g}", [{"quantize": way}]
        for name, bits in (("int8", 8.4), ("int4", 4.9)):
            left = round(share * 32 / bits, 3)
            if left < 1:
                cut = {"prune": {"params": left}}
                yield f"pruned to {left:g} in {name}", [cut, *recover, {"quantize": ways[name]}]
        return
    shares = (share,) if target == "macs" else (share, 0.8 * share, 0.6 * share)
    for part in shares:
        for importance in ("magnitude", *(("activation",) if measured else ())):
            for scope in ("uniform", "global"):
                way = {"macs": round(part, 3), "importance": importance, "scope": scope}
                yield f"pruned to {part:.3g} by {importance} {scope}", [{"prune": way}, *recover]


def loaded(folder: str, inputs: str) -> Callable[[], Any]:
    """A saved model, ready to be called, in a process of its own."""
    from safetensors.torch import load_file

    model, given = load_model(folder).eval(), load_file(inputs)
    return lambda: model(**given)


def _timed(
    model: Any, forms: Mapping[str, nn.Module], folder: Path, threads: int, rounds: int
) -> Benchmark:
    """Times of all forms at one sample."""
    from safetensors.torch import save_file

    inputs = folder / "candidates" / "inputs.safetensors"
    with atomic_path(inputs) as temporary:
        save_file({k: x.contiguous() for k, x in model.example_inputs(1).items()}, temporary)
    places = {
        name: folder / "candidates/dense" if name == "dense"
        else folder / "candidates" / name.replace(" ", "-") / "model"
        for name in forms
    }  # fmt: skip
    candidates = [
        Candidate(name=name, load=loaded, options={"folder": str(place), "inputs": str(inputs)})
        for name, place in places.items()
    ]
    return benchmark(candidates, threads=(threads,), rounds=rounds)


def _tried(
    name: str,
    plan: list[dict[str, Any]],
    form: nn.Module,
    dense: nn.Module,
    metric: Callable[[nn.Module], float],
    goal: Goal,
    times: Benchmark,
) -> Tried:
    """What came of a candidate, by what the dense model has."""
    (side,) = times.sides.values()
    value = goal.reference if form is dense else _value(metric, form)
    macs = profile(form, memory=False).total / profile(dense, memory=False).total
    return Tried(
        name=name, steps=tuple(plan), latency=side.ratios[name], seconds=side.rows[name].median,
        size=file_bytes(form.state_dict()) / file_bytes(dense.state_dict()), macs=macs, value=value,
        drop=goal.drop(value),
    )  # fmt: skip


def _value(metric: Callable[[nn.Module], float], model: nn.Module) -> float:
    with evaluating(model), torch.no_grad():
        return metric(model)
