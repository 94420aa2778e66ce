"""From a trained dense model to one whose work follows the time and the tokens, as DyDiT does it.

Reference: Dynamic Diffusion Transformer, 2024, arXiv 2410.03456; DyDiT++: Dynamic Diffusion
Transformers for Efficient Visual Generation, 2025, arXiv 2504.06803.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from effformer.arguments import checked
from effformer.blocks import BackboneConfig
from effformer.blocks.dynamic import DynamicTokens, DynamicWidth
from effformer.calls import check_parts
from effformer.checks import CapabilityError
from effformer.config import Config, part
from effformer.notebook import Shown
from effformer.train import Objective, TrainConfig
from effformer.values import Count, Fraction, Natural, NonNegative, Portion, Positive, Seed
from effformer.wrapped import unwrapping

from ..adapt import LoRA, adapt
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
    transferred,
)
from ..where import Where, check, covers
from .gates import Frugal, sort_by_magnitude
from .work import WorkTarget, executed_ratio

__all__ = ["DynamicReport", "DynamicScheme", "dynamize"]

M = TypeVar("M", bound=nn.Module)
_BIAS = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DynamicScheme(Config):
    """Which gates `dynamize` gives a model, and how it is fine-tuned to a share of its work.

    Attributes:
        width: what switches heads and channels, None for nothing. The bias of the gates is published
            as 15, for 10^5 steps; the fewer steps, the smaller it has to be.
        tokens: what chooses the tokens of an FFN, None for nothing; the published bias is 35.
        sort: heads and channels are sorted first, so that what matters most is never switched off.
        target: share of the work of the dynamic parts.
        course: part of the training in which the share sinks to the target.
        weight: of the loss on the work; 1 in the paper.
        lora: options of a `LoRA`: its changes of attentions and FFNs are trained with the gates, and
            nothing else; {"kind": "td"} lets them follow the time. They stay beside the weights until
            `merge`. None: everything is trained.
        complete: first steps that train the complete model as well; 30,000 for XL in the paper.
        steps: optimizer steps.
        lr: peak learning rate.
        batch: samples per step.
        seed: of the gates, and of the training.
    """

    width: Config | None = part("width", DynamicWidth.Config(bias=_BIAS), optional=True)
    tokens: Config | None = part("tokens", DynamicTokens.Config(bias=_BIAS), optional=True)
    sort: bool = True
    target: Portion = 0.5
    course: Fraction = 0.33
    weight: NonNegative = 10.0
    lora: Mapping[str, Any] | None = None
    complete: Natural = 0
    steps: Count = 1000
    lr: Positive = 1e-3
    batch: Count = 64
    seed: Seed = 0

    def check(self) -> None:
        if self.width is None and self.tokens is None:
            raise ValueError("dynamize: nothing becomes dynamic; set width or tokens")
        if self.lora is not None:
            LoRA.from_dict(self.lora, where="dynamize: lora")

    def training(self) -> TrainConfig:
        """How the model is fine-tuned."""
        return TrainConfig(
            steps=self.steps, batch=self.batch, lr=self.lr, warmup=min(20, self.steps // 10), ema=None,
            seed=self.seed,
        )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class DynamicReport(Shown):
    """What `dynamize` did.

    Attributes:
        places: paths of the gates in the model.
        params_before: number of parameters.
        params_after: number of parameters.
        output_error: relative error of the model's output after the training, None without data.
        executed: share of the work of the dynamic parts that is done then, None without data.
    """

    places: tuple[str, ...]
    params_before: int
    params_after: int
    output_error: float | None = None
    executed: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [
            f"{len(self.places)} gates",
            f"parameters: {self.params_before:,} -> {self.params_after:,}",
        ]
        if self.output_error is None or self.executed is None:
            lines.append("the gates are untrained and open; data= trains them")
        else:
            lines.append(
                f"relative output error: {self.output_error:.2%}, with {self.executed:.1%} of the work "
                "of the dynamic parts"
            )
        return "\n".join(lines)


@checked
@unwrapping
def dynamize(
    model: M,
    scheme: DynamicScheme | Mapping[str, Any] | None = None,
    where: Where = "*",
    *,
    data: Data | None = None,
    objective: Objective | None = None,
    out: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> tuple[M, DynamicReport]:
    """A copy of a model whose blocks have gates over the time and over tokens.

    Gates start open: without data the copy computes what the model does. With data it is trained to do
    a share of the work (`Frugal`).

    Args:
        model: a model whose config is a `effformer.blocks.BackboneConfig`; it stays as it is.
        scheme: which gates, and how they are trained; None means both kinds.
        where: glob patterns of the blocks ("blocks.*").
        data: a data set, named tensors whose first axis counts samples, or batches of them.
        objective: the loss beside that on the work: (model, batch, generator, ledger) -> loss; it must
            hand the ledger to the model. None: the batches are the arguments of the model, whose output
            follows that of the old one.
        out: a folder that keeps checkpoints: the same call goes on with what was interrupted. None
            keeps everything in memory.
        progress: as in `effformer.train.train`.

    Returns:
        The new model, in the mode of the old one, and what was done.

    Raises:
        ValueError: a pattern covers no block; data that are empty or not finite; ``out`` holds another
            run.
        CapabilityError: the model's blocks are not described by its config, have such gates already, or
            have parts that cannot be taken apart; a width that follows the time in a model without one.

    Example:
        >>> import effformer
        >>> from effformer.compress import dynamize
        >>> dynamic, report = dynamize(effformer.build_model("sit-nano"), {"tokens": None})
        >>> report.places[0], len(report.places)
        ('blocks.0.width.gates.attn', 4)
    """
    check_parts(model, where="dynamize")
    if not isinstance(scheme, DynamicScheme):
        scheme = DynamicScheme.from_dict(scheme or {}, where="dynamize: scheme")
    config = _dynamic_config(model, scheme, where)
    source = copy.deepcopy(model)
    if scheme.sort:
        sort_by_magnitude(source)
    student, _ = transferred(source, config, scheme.seed)
    slots = ("width.gates", "tokens.gates")
    places = tuple(n for n, _ in student.named_modules() if n.rpartition(".")[0].endswith(slots))
    sizes = [sum(p.numel() for p in one.parameters()) for one in (model, student)]
    report = DynamicReport(places=places, params_before=sizes[0], params_after=sizes[1])
    if scheme.lora is not None:
        blocks = [p for p in (f"blocks.{i}" for i in range(config.depth)) if covers(where, p)]
        parts = [f"{path}.*{slot}.part" for path in blocks for slot in ("attn", "ffn")]
        lora = LoRA.from_dict({"also": ("*.gates",), **scheme.lora})
        student, _ = adapt(student, lora, parts)
    if data is None:
        return student, report
    training = Training(
        data=gathered(model, data, objective, "dynamize"),
        out=None if out is None else Path(out),
        progress=progress,
    )
    task: Any = Distillation(teacher=model, losses="output") if objective is None else objective
    course = WorkTarget(share=scheme.target, warmup=round(scheme.course * scheme.steps), hold=0)
    frugal = Frugal(task=task, target=course, weight=scheme.weight, complete=scheme.complete)
    known = Stage(task=frugal, scheme=scheme, source=fingerprint(model), places=places)
    training.run(student, known, scheme.training(), "dynamic")
    asking, shown = Asking(task=objective, verb="dynamize"), first(model, training.data)
    return student, DynamicReport(
        places=places, params_before=sizes[0], params_after=sizes[1],
        output_error=output_error(model, student, shown, asking),
        executed=float(executed_ratio(asking.still(student, shown).shares).mean()),
    )  # fmt: skip


def _dynamic_config(model: nn.Module, scheme: DynamicScheme, where: Where) -> BackboneConfig:
    """The config with gates in the blocks that are covered."""
    config, name = described(model, "dynamize"), getattr(model, "name", type(model).__name__)
    able = [f"blocks.{i}" for i in range(config.depth)]
    paths = [path for path, _ in model.named_modules()]
    check(where, paths, able=able, what="block", where="dynamize: where")
    for path in able:
        for slot in ("width", "tokens"):
            new = getattr(scheme, slot)
            if new is None or not covers(where, path):
                continue
            if (old := config.at(f"{path}.{slot}")) is not None:
                raise CapabilityError(
                    f"dynamize: {name}: {path} has {slot}={old.entry.name!r} already; give {slot}=None, "
                    "or other blocks with where="
                )
            config = config.put(f"{path}.{slot}", new)
    return config
