"""From a trained dense model to adaptive computation modules: converted, and trained in three stages.

Reference: Adaptive Computation Modules: Granular Conditional Computation For Efficient Inference,
2023, arXiv 2312.10193.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, cast

from torch import nn

from effformer.arguments import checked
from effformer.attention import AdaptiveProjections
from effformer.calls import check_parts
from effformer.checks import CapabilityError
from effformer.config import Config
from effformer.ffn import ACM, FFNConfig
from effformer.nn.learners import Gate, Learners
from effformer.notebook import Shown
from effformer.train import Objective, TrainConfig
from effformer.values import Count, Natural, NonNegative, Portion, Positive, Seed
from effformer.wrapped import unwrapping

from ..distill import Distillation
from ..samples import Data
from ..stages import (
    Asking,
    Stage,
    Training,
    described,
    fingerprint,
    first,
    gathered,
    output_error,
    trainable,
    transferred,
)
from ..where import Where, check, covers
from .adaptive_losses import used_budget
from .phases import Budgeted, GatePretraining, LearnerDistillation, learner_errors

__all__ = ["AdaptiveReport", "AdaptiveScheme", "acmize"]

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptiveScheme(Config):
    """What `acmize` replaces, by what, and how long that is trained.

    Attributes:
        ffn: the FFNs.
        projections: query, key, value and output projections of multi-head attentions.
        learners: K of each.
        size: parameters of all learners of a module, relative to those that they replace.
        gate: knobs of the gates.
        target: share of the learners' work that the last stage aims at.
        steps: optimizer steps of the three stages: learners follow the modules that they stand for,
            gates learn how many of them a token needs, the whole model learns its task under the
            budget. A stage of 0 steps is left out.
        lr: peak learning rate of each stage, as published.
        batch: samples per step.
        budget: weight of the loss on the work; 0.1 in the paper, over a hundred times as many steps.
        seed: of the learners, and of the training.
    """

    ffn: bool = True
    projections: bool = True
    learners: Count = 4
    size: Positive = 1.0
    gate: Gate.Config = Gate.Config()
    target: Portion = 0.5
    steps: tuple[Natural, Natural, Natural] = (300, 100, 600)
    lr: tuple[Positive, Positive, Positive] = (1e-3, 1e-2, 1e-4)
    batch: Count = 64
    budget: NonNegative = 1.0
    seed: Seed = 0

    def check(self) -> None:
        if not self.ffn and not self.projections:
            raise ValueError("acmize: nothing to replace; set ffn or projections")

    def training(self, stage: int) -> TrainConfig:
        """How a stage is trained."""
        steps = self.steps[stage]
        return TrainConfig(
            steps=steps, batch=self.batch, lr=self.lr[stage], warmup=steps // 10, ema=None,
            seed=self.seed,
        )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptiveReport(Shown):
    """What `acmize` did.

    Attributes:
        places: paths of the new learners in the model.
        copied: number of tensors that were copied.
        params_before: number of parameters.
        params_after: number of parameters.
        errors: relative error of all learners of each place after the first stage, on what the old
            model shows them; empty without data.
        output_error: relative error of the model's output after the last stage, None without data.
        executed: share of the learners' work that is done then, None without data.
    """

    places: tuple[str, ...]
    copied: int
    params_before: int
    params_after: int
    errors: tuple[float, ...] = ()
    output_error: float | None = None
    executed: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [
            f"{len(self.places)} modules are sums of learners now, {self.copied} tensors were copied",
            f"parameters: {self.params_before:,} -> {self.params_after:,}",
        ]
        if self.output_error is None or self.executed is None:
            lines.append("learners and gates are untrained; data= trains them")
        else:
            worst = max(self.errors)
            lines.append(f"relative error of all learners of a module: at most {worst:.2%}")
            lines.append(
                f"relative output error: {self.output_error:.2%}, with {self.executed:.1%} of the "
                "learners' work"
            )
        return "\n".join(lines)


@checked
@unwrapping
def acmize(
    model: M,
    scheme: AdaptiveScheme | Mapping[str, Any] | None = None,
    where: Where = "*",
    *,
    data: Data | None = None,
    objective: Objective | None = None,
    out: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> tuple[M, AdaptiveReport]:
    """A copy of a model with adaptive computation modules in place of FFNs and projections.

    With data, trained in the three stages of the paper (`LearnerDistillation`, `GatePretraining`,
    `Budgeted`); without, the learners start at random, and those objectives train them.

    Args:
        model: a model whose config is a `effformer.blocks.BackboneConfig`; it stays as it is.
        scheme: what to replace, and how it is trained; None means everything, by four learners.
        where: glob patterns of module paths to replace ("blocks.0", "blocks.*.ffn").
        data: a data set, named tensors whose first axis counts samples, or batches of them.
        objective: the loss that the last stage minimises beside its budget, which also calls the model
            in the others: (model, batch, generator, ledger) -> loss. None: the batches are the
            arguments of the model, whose output follows that of the old one.
        out: a folder that keeps checkpoints: the same call goes on with what was interrupted. None
            keeps everything in memory.
        progress: as in `effformer.train.train`.

    Returns:
        The new model, in the mode of the old one, and what was done.

    Raises:
        ValueError: a pattern covers nothing to replace; data that are empty or not finite; ``out``
            holds another run.
        CapabilityError: the model's blocks are not described by one FFN and one attention, its
            attention has no projections, it was quantized, or it is adaptive already.

    Example:
        >>> model = effformer.build_model("vit-nano")
        >>> student, report = acmize(model, AdaptiveScheme(projections=False))
        >>> report.places
        ('blocks.0.ffn.part.learners', 'blocks.1.ffn.part.learners')
    """
    check_parts(model, where="acmize")
    if not isinstance(scheme, AdaptiveScheme):
        scheme = AdaptiveScheme.from_dict(scheme or {}, where="acmize: scheme")
    config = _adaptive_config(model, scheme, where)
    student, copied = transferred(model, config, scheme.seed)
    places = tuple(n for n, m in student.named_modules() if isinstance(m, Learners))
    report = AdaptiveReport(
        places=places,
        copied=copied,
        params_before=sum(p.numel() for p in model.parameters()),
        params_after=sum(p.numel() for p in student.parameters()),
    )
    if data is None:
        return student, report
    training = Training(
        data=gathered(model, data, objective, "acmize"),
        out=None if out is None else Path(out),
        progress=progress,
    )
    return student, _trained(model, student, scheme, objective, training, report)


def _trained(
    model: Any, student: Any, scheme: AdaptiveScheme, objective: Objective | None,
    training: Training, report: AdaptiveReport,
) -> AdaptiveReport:  # fmt: skip
    """Train the student in place, and say what it came to."""
    asking = Asking(task=objective, verb="acmize")
    shown, places = first(model, training.data), report.places
    source = fingerprint(model)

    def run(stage: int, task: Any, name: str) -> None:
        if scheme.steps[stage]:
            known = Stage(task=task, scheme=scheme, source=source, places=places)
            training.run(student, known, scheme.training(stage), name)

    def learning(name: str, *, gates: bool) -> bool:
        inside = any(name.startswith(f"{place}.") for place in places)
        return inside and (".gate." in name) is gates

    with trainable(student, lambda name: learning(name, gates=False)):
        run(0, LearnerDistillation(teacher=model, task=asking), "learners")
    errors = learner_errors(model, student, asking, shown)
    with trainable(student, lambda name: learning(name, gates=True)):
        run(1, GatePretraining(teacher=model, task=asking), "gates")
    task = Distillation(teacher=model, losses="output") if objective is None else objective
    run(2, Budgeted(task=task, target=scheme.target, budget=scheme.budget), "whole")
    executed = float(used_budget(asking.still(student, shown).choices))
    error = output_error(model, student, shown, asking)
    return replace(report, errors=errors, output_error=error, executed=executed)


# -- the new config


def _adaptive_config(model: nn.Module, scheme: AdaptiveScheme, where: Where) -> Config:
    """The config with adaptive modules at the places that are covered."""
    config, name = described(model, "acmize"), getattr(model, "name", type(model).__name__)
    slots = [slot for slot, on in (("ffn", scheme.ffn), ("attn", scheme.projections)) if on]
    able = [f"blocks.{i}.{slot}" for i in range(config.depth) for slot in slots]
    paths = [*able, *(path for path, _ in model.named_modules())]
    check(where, paths, able=able, what="FFN or attention", where="acmize: where")
    made = config
    for path in able:
        if covers(where, path):
            old, own = config.at(path), f"{name}: {path}"
            wide = path.endswith(".attn")
            new = _projected(old, scheme, own) if wide else _summed(old, config.dim, scheme, own)
            made = made.put(path, new)
    return made


def _projected(attn: Any, scheme: AdaptiveScheme, where: str) -> Config:
    """An attention with learners for projections."""
    if not attn.caps().multihead or attn.at("projections") is not None:
        raise CapabilityError(
            f"acmize: {where}: this attention has no plain projections; give projections=False"
        )
    projections = AdaptiveProjections(
        learners=scheme.learners, size=scheme.size, gate=scheme.gate,
        least=min(1, scheme.learners - 1),
    )  # fmt: skip
    return cast(Config, attn.replace(projections=projections))


def _summed(old: Any, dim: int, scheme: AdaptiveScheme, where: str) -> Config:
    """Learners for an FFN."""
    if not isinstance(old, FFNConfig) or old.entry.name == "acm":
        found = None if old is None else old.to_dict().get("name")
        raise CapabilityError(f"acmize: {where}: {found!r} is not a plain FFN; give ffn=False")
    width = max(1, round(scheme.size * old.width(dim) / scheme.learners))
    return ACM.Config(
        hidden=width * scheme.learners, act=old.act, learners=scheme.learners, gate=scheme.gate
    )
