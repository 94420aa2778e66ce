"""The steps of a recipe: verbs of compress with their options, read and checked before anything runs."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from effformer.calls import bind
from effformer.checks import unknown
from effformer.config import Config
from effformer.train import Classification, Dataset, Generation, TrainConfig, train
from effformer.values import NonNegative, Positive

from ..adapt import LoRA, adapt, merge
from ..distill import Distillation
from ..dynamic import AdaptiveScheme, DynamicScheme, acmize, dynamize
from ..linearize import LinearizeScheme, linearize
from ..prune import (
    ApproximateScheme,
    PruneScheme,
    SparseScheme,
    approximate,
    prune,
    sparsify,
)
from ..quant.mixed import MixedScheme
from ..quant.quantize import quantize
from ..quant.schemes import make_scheme
from ..quant.within import quantize_within
from ..sensitivity import sensitivity
from ..upcycle import ExpertScheme, upcycle
from ..where import Where
from .quality import Quality, metric_of

__all__ = ["STEPS", "Acmize", "Dynamize", "Place", "Step", "Upcycle", "read_step"]

_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")


@dataclass(frozen=True, slots=True)
class Place:
    """What a step works with beside the model.

    Attributes:
        dense: the model with which the recipe began, the teacher and the measure of quality.
        data: calibration data, None if there are none.
        samples: the samples that they were made of, for losses.
        train: the samples to train on, None if there are none.
        folder: where a training keeps its checkpoints.
    """

    dense: nn.Module
    data: Any
    samples: Any
    train: Dataset | None
    folder: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What a training came to.

    Attributes:
        steps: optimizer steps.
        seconds: spent on them.
        loss: at the end.
    """

    steps: int
    seconds: float
    loss: float

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.steps} steps in {self.seconds:.1f} s, loss {self.loss:.4g}"


class Step(ABC):
    """One verb with its options.

    Args:
        options: as they were written.

    Raises:
        ValueError: an unknown option, or a value outside of its range.
        TypeError: a value of the wrong type.
    """

    verb: ClassVar[str]
    does: ClassVar[str]
    trains: ClassVar[bool] = False

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.options = dict(options)
        self.read(dict(options))

    @property
    def where(self) -> str:
        """The step in messages about its options."""
        return self.verb

    @abstractmethod
    def read(self, options: dict[str, Any]) -> None:
        """Check the options."""

    @abstractmethod
    def run(self, model: nn.Module, place: Place) -> tuple[Any, Any]:
        """The changed model and a report."""

    def __str__(self) -> str:
        given = ", ".join(f"{name}={value}" for name, value in self.options.items())
        return f"{self.verb}({given}): {self.does}"


class Prune(Step):
    """Units go for good."""

    verb = "prune"
    does = (
        "heads, channels or blocks that matter least go for good: less work on every machine; train or "
        "distill afterwards"
    )

    def read(self, options: dict[str, Any]) -> None:
        self.paths: Where = options.pop("where", "*")
        self.scheme = PruneScheme.from_dict(options or {"macs": 0.5}, where=self.where)

    def run(self, model: nn.Module, place: Place) -> tuple[Any, Any]:
        by_gradient = self.scheme.importance in ("taylor", "gradient", "sides")
        if not by_gradient:
            return prune(model, self.scheme, self.paths, data=place.data)
        task = _task(model, place)
        return prune(model, self.scheme, self.paths, data=place.samples, objective=task)


class Upcycle(Step):
    """Mixtures of experts."""

    verb = "upcycle"
    does = "FFNs become mixtures of experts that compute the same: train or distill afterwards"

    def read(self, options: dict[str, Any]) -> None:
        self.paths: Where = options.pop("where", "*")
        self.scheme = ExpertScheme.from_dict(options, where=self.where)

    def run(self, model: nn.Module, place: Place) -> tuple[Any, Any]:
        return upcycle(model, self.scheme, self.paths)


class Approximate(Step):
    """What the loss does not miss goes."""

    verb = "approximate"
    does = (
        "attentions, FFNs, heads and channels go that the loss on labelled samples does not miss, and queries "
        "attend to fewer keys: one pass for each"
    )

    def read(self, options: dict[str, Any]) -> None:
        self.paths: Where = options.pop("where", "*")
        self.scheme = ApproximateScheme.from_dict(options, where=self.where)

    def run(self, model: nn.Module, place: Place) -> tuple[Any, Any]:
        task = _task(model, place)
        if task is None:
            raise ValueError(f"recipe: {self.verb}: the loss needs data with labels y")
        return approximate(model, self.scheme, self.paths, data=place.samples, objective=task)


class Sparsify(Step):
    """Zeros, which stay in place."""

    verb = "sparsify"
    does = "weights that matter least become 0, shapes stay: for runtimes and files that know zeros"

    def read(self, options: dict[str, Any]) -> None:
        self.paths: Where = options.pop("where", "*")
        self.scheme = SparseScheme.from_dict(options, where=self.where)

    def run(self, model: nn.Module, place: Place) -> tuple[Any, Any]:
        data = place.data if self.scheme.kind == "wanda" else None
        return sparsify(model, self.scheme, self.paths, data=data)


class Adapt(Step):
    """A frozen model with small trainable changes."""

    verb = "adapt"
    does = "weights are frozen, small changes beside them are trained by the steps that follow, until merge"

    def read(self, options: dict[str, Any]) -> None:
        self.paths: Where = options.pop("where", "*")
        self.scheme = LoRA.from_dict(options, where=self.where)

    def run(self, model: nn.Module, place: Place) -> tuple[Any, Any]:
        return adapt(model, self.scheme, self.paths)


class Merge(Step):
    """The changes of `Adapt` become part of the weights."""

    verb = "merge"
    does = "the trained changes become part of the weights, which are trainable as a whole again"

    def read(self, options: dict[str, Any]) -> None:
        if options:
            raise unknown("option", next(iter(options)), [], where=self.where)

    def run(self, model: nn.Module, place: Place) -> tuple[Any, Any]:
        return merge(model), None


class Converting(Step):
    """Other parts in the place of those of the model, trained in stages of their own."""

    scheme: ClassVar[type[Config]]
    change: ClassVar[Callable[..., tuple[Any, Any]]]
    trains = True

    def read(self, options: dict[str, Any]) -> None:
        self.paths: Where = options.pop("where", "*")
        self.chosen = self.scheme.from_dict(options, where=self.where)

    def run(self, model: nn.Module, place: Place) -> tuple[Any, Any]:
        return type(self).change(
            model, self.chosen, self.paths, data=_samples(place, self.verb),
            objective=_task(model, place), out=place.folder, progress=False,
        )  # fmt: skip


class Linearize(Converting):
    """Linear attention."""

    verb = "linearize"
    does = "softmax becomes an attention whose work grows with the tokens, fitted mixer by mixer, then whole"
    scheme = LinearizeScheme
    change = staticmethod(linearize)


class Acmize(Converting):
    """Adaptive computation modules."""

    verb = "acmize"
    does = "FFNs and projections become sums of learners, of which easy tokens run few: trained in three stages"
    scheme = AdaptiveScheme
    change = staticmethod(acmize)


class Dynamize(Converting):
    """Gates over time and tokens."""

    verb = "dynamize"
    does = "gates over the time and over tokens switch heads, channels and FFNs off: fine-tuned to a share of the work"
    scheme = DynamicScheme
    change = staticmethod(dynamize)


class Distill(Step):
    """Training that follows the dense model."""

    verb = "distill"
    does = "the model is trained to follow the one with which the recipe began"
    trains = True

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Options(Config):
        """How it is followed.

        Attributes:
            losses: see `Distillation`; None: "logits" of a classifier, "output" of a generator.
            weight: of the loss that the model was trained with; 0: the teacher alone.
        """

        losses: Any = None
        weight: NonNegative = 0.0

    def read(self, options: dict[str, Any]) -> None:
        names = ("losses", "weight")
        own: dict[str, Any] = {name: options.pop(name) for name in names if name in options}
        self.own = self.Options.from_dict(own, where=self.where)
        start = {"ema": None, "warmup": min(20, int(options.get("steps", 1000)))}
        self.config = TrainConfig.from_dict(start | options, where=self.where)
        Distillation(teacher=nn.Identity(), losses=self.own.losses or "logits")

    def run(self, model: nn.Module, place: Place) -> tuple[Any, Any]:
        data, task = _samples(place, self.verb), _task(model, place)
        losses = self.own.losses or ("logits" if _classifies(model) else "output")
        objective = Distillation(
            teacher=place.dense, losses=losses, task=task, weight=self.own.weight
        )
        done = train(
            model, data, objective, self.config, out=place.folder, resume=True, progress=False
        )
        return model, Trained(steps=done.steps, seconds=done.seconds, loss=done.loss)


class Quantize(Step):
    """Weights in few bits."""

    verb = "quantize"
    does = "weights are stored in few bits: a small file and little memory"

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Options(Config):
        """How.

        Attributes:
            scheme: one format, or formats by pattern ({"schemes": {...}}).
            schemes: formats among which ``budget`` chooses by layer.
            budget: one of bits=, bytes=, error=, latency=, see `Sensitivity.budget`.
            where: patterns of layers to pack.
            skip: patterns of layers to leave.
            max_drop: put layers back until ``metric`` falls by no more.
            metric: of the result: "accuracy" on labelled data, "agreement" of the classes with those of
                the dense model, or the relative "error" of the output.
        """

        scheme: Any = "int8"
        schemes: tuple[Any, ...] | None = None
        budget: Mapping[str, Positive] | None = None
        where: Where = "*"
        skip: Where = ()
        max_drop: NonNegative | None = None
        metric: Quality = "error"

        def check(self) -> None:
            if (self.schemes is None) != (self.budget is None):
                raise ValueError(
                    "Quantize.Options: schemes and budget go together: budget chooses among schemes"
                )
            goals = ("bits", "bytes", "error", "latency")
            if self.budget is not None and (
                len(self.budget) != 1 or not {*self.budget} <= {*goals}
            ):
                raise ValueError(f"Quantize.Options: budget takes one of {', '.join(goals)}")
            nested = isinstance(self.scheme, Mapping) and "schemes" in self.scheme
            if nested:
                MixedScheme.from_dict(self.scheme, where="Quantize.Options: scheme")
            for spec in self.schemes or (() if nested else (self.scheme,)):
                make_scheme(spec, where="Quantize.Options: scheme")

    def read(self, options: dict[str, Any]) -> None:
        self.own = self.Options.from_dict(options, where=self.where)

    def run(self, model: nn.Module, place: Place) -> tuple[Any, Any]:
        own, scheme = self.own, self.own.scheme
        if own.schemes is not None and own.budget is not None:
            seen = sensitivity(model, list(own.schemes), own.where, skip=own.skip, data=place.data)
            goal: dict[str, Any] = dict(own.budget)
            scheme = seen.budget(**goal)
        if own.max_drop is None:
            inputs = bind(model, None, where=self.where).arguments if place.data is None else None
            return quantize(model, scheme, own.where, skip=own.skip, data=place.data, inputs=inputs)
        metric, best = metric_of(own.metric, place.dense, place.data, place.samples)
        return quantize_within(
            model, scheme, metric, own.where, skip=own.skip, data=place.data, max_drop=own.max_drop,
            best=best,
        )  # fmt: skip


def _samples(place: Place, verb: str) -> Dataset:
    """What a step trains on."""
    if place.train is None:
        raise ValueError(f"recipe: {verb}: there are no samples to train on; give data=")
    return place.train


def _classifies(model: nn.Module) -> bool:
    return getattr(model, "CONVENTION", None) is None


def _task(model: nn.Module, place: Place) -> Any:
    """The loss that a model is trained with; None for one whose data have no labels."""
    if not _classifies(model):
        return Generation()
    labelled = isinstance(place.samples, Mapping) and "y" in place.samples
    return Classification() if labelled else None


_EVERY: tuple[type[Step], ...] = (
    Linearize, Acmize, Dynamize, Upcycle, Approximate, Prune, Distill, Quantize, Sparsify, Adapt, Merge,
)  # fmt: skip
STEPS: dict[str, type[Step]] = {step.verb: step for step in _EVERY}
"""Steps by the verbs that a recipe names."""


def read_step(entry: Any, where: str) -> Step:
    """One entry of a recipe's list: ``{"prune": {"macs": 0.5}}``, or ``"merge"``.

    Raises:
        ValueError: an unknown verb, or options that do not fit.
        TypeError: another shape.
    """
    if isinstance(entry, str):
        entry = {entry: None}
    if not isinstance(entry, Mapping) or len(entry) != 1:
        raise TypeError(
            f"{where}: expected one verb with its options, such as 'prune: {{macs: 0.5}}', got {entry!r}"
        )
    ((verb, options),) = entry.items()
    if verb not in STEPS:
        raise unknown("verb", str(verb), [*STEPS], where=where)
    if options is not None and not isinstance(options, Mapping):
        raise TypeError(f"{where}: {verb}: expected options such as {{macs: 0.5}}, got {options!r}")
    try:
        return STEPS[verb](_numbers(options or {}))
    except (ValueError, TypeError) as error:
        raise type(error)(f"{where}: {error}") from error


def _numbers(value: Any) -> Any:
    """YAML reads 1e-3, which has no point, as a word."""
    if isinstance(value, Mapping):
        return {str(key): _numbers(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_numbers(one) for one in value]
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        return float(value)
    return value
