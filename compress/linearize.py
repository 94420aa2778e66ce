"""`linearize`: a trained model whose softmax attention became one that costs less with many tokens."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from effformer import registry
from effformer.arguments import checked
from effformer.attention import Mixer
from effformer.blocks import BackboneConfig, Joint
from effformer.calls import check_parts, evaluating
from effformer.checks import CapabilityError
from effformer.config import Config, resolve
from effformer.context import EMPTY, Context, Ledger
from effformer.notebook import Shown
from effformer.profile.profiler import count_parameters, profile
from effformer.train import Objective, TrainConfig
from effformer.values import Count, Natural, NonNegative, Positive, Seed
from effformer.wrapped import bare, unwrapping

from .distill import Distillation
from .samples import Data
from .stages import (
    Asking,
    Training,
    described,
    fingerprint,
    first,
    gathered,
    output_error,
    trainable,
    transferred,
)
from .where import Where, check, covers

__all__ = ["LinearizeReport", "LinearizeScheme", "LinearizedLayer", "linearize"]

M = TypeVar("M", bound=nn.Module)
_QUADRATIC = "n^2"


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearizeScheme(Config):
    """What `linearize` puts in the place of softmax attention, and how long it is fitted.

    Attributes:
        attn: the new token mixer: a name, a dict or a config.
        steps: optimizer steps of the new mixers, each of which follows the old one on its inputs.
        whole: steps of the whole model after that, 0 for none.
        batch: samples per step.
        lr: peak learning rate of the mixers.
        whole_lr: and of the whole model.
        losses: what the whole model follows, names of `effformer.compress.distill.LOSSES`.
        task: weight of the objective beside these.
        seed: of what the new mixers do not take over from the old ones, and of the training.
    """

    attn: str | Mapping[str, Any] | Config
    steps: Count = 300
    whole: Natural = 300
    batch: Count = 64
    lr: Positive = 1e-3
    whole_lr: Positive = 5e-4
    losses: tuple[str, ...] = ("output",)
    task: NonNegative = 0.0
    seed: Seed = 0

    def training(self, *, whole: bool) -> TrainConfig:
        """How one of the two stages is trained."""
        steps, lr = (self.whole, self.whole_lr) if whole else (self.steps, self.lr)
        return TrainConfig(
            steps=steps, batch=self.batch, lr=lr, warmup=steps // 10, ema=None, seed=self.seed
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearizedLayer:
    """One token mixer that was replaced.

    Attributes:
        name: path in the model.
        before: the old mixer.
        after: the new one.
        copied: relative error of its output with what it took over from the old one.
        fitted: and after it was fitted alone.
    """

    name: str
    before: str
    after: str
    copied: float
    fitted: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearizeReport(Shown):
    """What `linearize` did.

    Attributes:
        layers: what was replaced.
        macs_before: multiply-adds of one forward on the model's own example.
        macs_after: and after.
        params_before: parameters.
        params_after: and after.
        fitted_error: relative error of the model's output after the mixers were fitted.
        output_error: and after the whole was.
    """

    layers: tuple[LinearizedLayer, ...]
    macs_before: int
    macs_after: int
    params_before: int
    params_after: int
    fitted_error: float
    output_error: float

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        wide = max(len(name) for name in ("layer", *(one.name for one in self.layers)))
        lines = [f"{'layer':<{wide}}  {'before':<10}  {'after':<10}  {'copied':>8}  {'fitted':>8}"]
        lines += [
            f"{one.name:<{wide}}  {one.before:<10}  {one.after:<10}  {one.copied:>8.2%}  "
            f"{one.fitted:>8.2%}"
            for one in self.layers
        ]
        macs = self.macs_after / self.macs_before
        lines.append(f"MACs: {self.macs_before:,} -> {self.macs_after:,} ({macs:.3f}x)")
        lines.append(f"parameters: {self.params_before:,} -> {self.params_after:,}")
        lines.append(
            f"relative output error: {self.fitted_error:.2%} layer by layer, {self.output_error:.2%} "
            "as a whole"
        )
        return "\n".join(lines)


@checked
@unwrapping
def linearize(
    model: M,
    scheme: str | Mapping[str, Any] | LinearizeScheme,
    where: Where = "*",
    *,
    data: Data,
    objective: Objective | None = None,
    out: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> tuple[M, LinearizeReport]:
    """A copy of a trained model with another attention in place of softmax, and a report.

    The new mixers take over the projections of the old ones; each is fitted to what the old one
    makes of the same inputs; then the whole model follows the old one. The copy is an ordinary model
    whose config says what it is made of.

    Args:
        model: a model whose config is a `effformer.blocks.BackboneConfig`; it stays as it is.
        scheme: a token mixer whose cost is less than quadratic ("flow", "sana", ...: ``effformer list
            attention``), the options of a `LinearizeScheme` as a dict, or one.
        where: glob patterns of module paths to replace ("blocks.0", "blocks.*.attn").
        data: a data set, named tensors whose first axis counts samples, or batches of them.
        objective: what calls the model on a batch: (model, batch, generator, ledger) -> loss. A generator
            needs one for its times; None: the batches are the arguments of the model.
        out: a folder that keeps checkpoints: the same call goes on with what was interrupted. None
            keeps everything in memory.
        progress: as in `effformer.train.train`.

    Returns:
        The new model, in the mode of the old one, and what was done.

    Raises:
        ValueError: a pattern covers no softmax attention; data that are empty or not finite; ``out``
            holds another run.
        CapabilityError: the model's blocks are not described by its config, it was changed since it
            was built, the new mixer compares all pairs of tokens, or cannot stand in the model.

    Example:
        >>> import effformer
        >>> from effformer.compress import linearize
        >>> model = effformer.build_model("vit-nano")
        >>> scheme = {"attn": "flow", "steps": 2, "whole": 1, "batch": 2}
        >>> linear, report = linearize(model, scheme, data=model.example_inputs(4), progress=False)
        >>> linear.config.attn.core.entry.name
        'flow'
    """
    check_parts(model, where="linearize")
    chosen = _scheme(scheme)
    if chosen.task and objective is None:
        raise ValueError(f"linearize: task={chosen.task:g} weighs an objective, and none was given")
    student, places = _replaced(model, chosen, where)
    asking = Asking(task=objective, verb="linearize")
    training = Training(
        data=gathered(model, data, objective, "linearize"),
        out=None if out is None else Path(out),
        progress=progress,
    )
    shown = first(model, training.data)
    fit = _LayerFit(
        teacher=model, scheme=chosen, source=fingerprint(model), places=places, task=objective
    )
    errors = [fit.errors(student, shown)]
    with trainable(student, lambda name: any(name.startswith(f"{path}.") for path in places)):
        training.run(student, fit, chosen.training(whole=False), "layers")
    errors.append(fit.errors(student, shown))
    distances = [output_error(model, student, shown, asking)]
    if chosen.whole:
        follow = Distillation(
            teacher=model, losses=chosen.losses, task=objective, weight=chosen.task
        )
        training.run(student, follow, chosen.training(whole=True), "whole")
    distances.append(output_error(model, student, shown, asking))
    layers = tuple(
        LinearizedLayer(
            name=path, before=_title(model, path), after=_title(student, path),
            copied=errors[0][path], fitted=errors[1][path],
        )
        for path in places
    )  # fmt: skip
    report = LinearizeReport(
        layers=layers,
        macs_before=profile(model, memory=False).total, macs_after=profile(student, memory=False).total,
        params_before=count_parameters(model), params_after=count_parameters(student),
        fitted_error=distances[0], output_error=distances[1],
    )  # fmt: skip
    return student, report


def _scheme(given: str | Mapping[str, Any] | LinearizeScheme) -> LinearizeScheme:
    if isinstance(given, str):
        given = {"attn": given}
    if isinstance(given, Mapping):
        given = LinearizeScheme.from_dict(given, where="linearize: scheme")
    found = resolve("attention", given.attn, where="linearize: attn")
    if found.caps().cost == _QUADRATIC:
        able = ", ".join(e.name for e in registry.attention if e.caps.cost != _QUADRATIC)
        raise CapabilityError(
            f"linearize: {found.title!r} compares all pairs of tokens, as softmax does; choices: {able}"
        )
    return given


# -- the new model


def _replaced(model: Any, scheme: LinearizeScheme, where: Where) -> tuple[Any, tuple[str, ...]]:
    """The model with new mixers, which have the projections of the old ones, and their paths."""
    name, config = getattr(model, "name", type(model).__name__), described(model, "linearize")
    able = {path: block for path, block in _mixers(model) if _place(config, block) is not None}
    if not able:
        raise CapabilityError(f"linearize: {name} has no {_missing(model)}")
    check(
        where, dict(model.named_modules()), able=able, what="softmax attention",
        where="linearize: where",
    )  # fmt: skip
    _check_alone(model, able, where)
    for block in sorted({able[path] for path in able if covers(where, path)}):
        config = config.put(str(_place(config, block)), scheme.attn)
    student, _ = transferred(model, config, scheme.seed)
    return student, tuple(path for path in able if covers(where, path))


def _mixers(model: nn.Module) -> Iterator[tuple[str, int]]:
    """Paths of what mixes the tokens of the blocks with each other, the outermost, and the blocks."""
    taken = ""
    for path, module in model.named_modules():
        found = re.match(r"blocks\.(\d+)\.", path)
        if not found or not isinstance(module, Mixer) or module.site.memories:
            continue
        if not (taken and path.startswith(f"{taken}.")):
            taken = path
            yield path, int(found[1])


def _missing(model: nn.Module) -> str:
    """What a model lacks without an attention to replace."""
    if hasattr(model, "blocks"):
        return "softmax attention in its blocks"
    stacks = {p.partition(".")[0]: 0 for p, m in model.named_modules() if isinstance(m, Mixer)}
    return (
        "single stack of blocks, whose attentions could be replaced: its own stand in "
        f"{', '.join(stacks)}; build it with another attention"
    )


def _check_alone(model: nn.Module, able: Mapping[str, int], where: Where) -> None:
    """Refuse blocks whose streams meet in one attention: none has one that could be fitted alone."""
    joint = {b for b in able.values() if isinstance(model.get_submodule(f"blocks.{b}"), Joint)}
    if covered := sorted(joint & {block for path, block in able.items() if covers(where, path)}):
        others = [f"blocks.{b}" for b in sorted({*able.values()} - joint)]
        can = f"where={others} leaves them out" if others else "build it with another attention"
        raise CapabilityError(
            f"linearize: {getattr(model, 'name', type(model).__name__)}: two streams meet in the attention of "
            f"{', '.join(f'blocks.{b}' for b in covered)}, which cannot be fitted to one of them; {can}"
        )


def _place(config: BackboneConfig, block: int) -> str | None:
    """Where the config names the softmax attention of a block, inside of the views around it."""
    path = f"blocks.{block}.attn"
    while inner := config.at(path).parts("attention"):
        path = f"{path}.{next(iter(inner))}"
    cores = config.at(path).nested("core")
    return path if any(core.entry.name == "softmax" for core in cores) else None


def _title(model: nn.Module, path: str) -> str:
    mixer: Any = model.get_submodule(path)
    return str(mixer.config.title)


# -- fitting


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class _LayerFit:
    """Objective of the first stage: mean over the new mixers of ``||y' - y||^2 / ||y||^2``, where y is
    what the old one makes of its inputs in the old model, and y' what the new one makes of the same.

    So the mixers do not depend on each other.

    Attributes:
        teacher: the old model.
        scheme: with ``source`` what a run is known by.
        source: digest of the old model's weights.
        places: paths of the mixers.
        task: calls the model; None: batches are its arguments.
    """

    teacher: nn.Module
    scheme: LinearizeScheme
    source: str
    places: tuple[str, ...]
    task: Objective | None = None

    def __call__(
        self, model: nn.Module, batch: Any, generator: torch.Generator, ledger: Ledger
    ) -> Tensor:
        return torch.stack(list(self.squares(model, batch, generator).values())).mean()

    def squares(
        self, model: nn.Module, batch: Any, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Relative squared error of every new mixer."""
        seen: dict[str, tuple[Tensor, Context, Tensor]] = {}
        with ExitStack() as hooks, torch.no_grad(), evaluating(self.teacher):
            for path in self.places:
                mixer = self.teacher.get_submodule(path)
                note = _note(seen, path)
                hooks.callback(mixer.register_forward_hook(note, with_kwargs=True).remove)
            asking = Asking(task=self.task, verb="linearize")
            asking(self.teacher, batch, generator, Ledger())
        if unseen := [path for path in self.places if path not in seen]:
            raise CapabilityError(
                f"linearize: the objective never ran {unseen[0]} of its model, which could be watched"
            )
        return {path: _error(bare(model).get_submodule(path), *seen[path]) for path in self.places}

    def errors(self, model: nn.Module, batch: Any) -> dict[str, float]:
        """Relative errors of the outputs of the new mixers."""
        with torch.no_grad():
            squares = self.squares(model, batch, torch.Generator().manual_seed(0))
        return {path: float(square) ** 0.5 for path, square in squares.items()}


def _note(seen: dict[str, tuple[Tensor, Context, Tensor]], path: str) -> Any:
    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
        ctx = args[1] if len(args) > 1 else kwargs.get("ctx", EMPTY)
        seen[path] = (args[0].detach(), ctx, out.detach())

    return note


def _error(mixer: nn.Module, x: Tensor, ctx: Context, target: Tensor) -> Tensor:
    """``||y' - y||^2 / ||y||^2`` over real tokens."""
    with evaluating(mixer):  # no dropout: there is none in what it follows
        out = mixer(x, ctx)
    square, size = (out - target).float().square().mean(-1), target.float().square().mean(-1)
    if ctx.mask is not None and ctx.mask.shape == square.shape:
        square, size = (torch.where(ctx.mask, value, 0.0) for value in (square, size))
    return square.sum() / size.sum().clamp_min(torch.finfo(size.dtype).tiny)
