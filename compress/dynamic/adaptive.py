"""From a trained dense model to adaptive computation modules, in four phases.

1. `acmize` puts learners and gates in place of FFNs and projections; everything else is copied.
2. `LearnerDistillation`: every module learns to imitate the one it stands for, alone, on the
   teacher's activations.
3. `GatePretraining`: every gate learns how many learners a token needs for that.
4. `Budgeted`: the whole model is trained on the task under a budget.

The last three are objectives for `effformer.train.train`.

Reference: Adaptive Computation Modules: Granular Conditional Computation For Efficient Inference,
2023, arXiv 2312.10193.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effformer.arguments import checked
from effformer.attention import AdaptiveProjections, Attention
from effformer.blocks import BackboneConfig
from effformer.calls import evaluating
from effformer.checks import CapabilityError
from effformer.config import Config
from effformer.context import Ledger
from effformer.ffn import ACM, FFNConfig
from effformer.nn.learners import Gate, Learners
from effformer.notebook import Shown
from effformer.values import Count, NonNegative, Portion, Positive, checker
from effformer.wrapped import unwrapped, unwrapping

from .adaptive_losses import acm_losses, distillation_loss, gate_labels, gate_loss

if TYPE_CHECKING:
    from effformer.train import Objective

__all__ = [
    "AdaptiveReport", "AdaptiveScheme", "Budgeted", "GatePretraining", "LearnerDistillation", "acmize",
]  # fmt: skip

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptiveScheme(Config):
    """What `acmize` replaces, and by what.

    Attributes:
        ffn: the FFNs.
        projections: query, key, value and output projections of multi-head attentions.
        learners: K of each.
        size: parameters of all learners of a module, relative to those that they replace.
        gate: knobs of the gates.
    """

    ffn: bool = True
    projections: bool = True
    learners: Count = 4
    size: Positive = 1.0
    gate: Gate.Config = Gate.Config()

    def check(self) -> None:
        if not self.ffn and not self.projections:
            raise ValueError("acmize: nothing to replace; set ffn or projections")


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptiveReport(Shown):
    """What `acmize` did.

    Attributes:
        places: paths of the new learners in the model.
        copied: number of tensors that were copied.
        params_before: number of parameters.
        params_after: number of parameters.
    """

    places: tuple[str, ...]
    copied: int
    params_before: int
    params_after: int


@checked
@unwrapping
def acmize(model: M, scheme: AdaptiveScheme | None = None) -> tuple[M, AdaptiveReport]:
    """A copy of a model with adaptive computation modules in place of FFNs and projections.

    The learners start at random; distil them from the original before anything else.

    Args:
        model: a model whose config is a `effformer.blocks.BackboneConfig`.
        scheme: what to replace; None means everything, by four learners.

    Returns:
        The new model, in the mode of the old one, and what was done.

    Raises:
        CapabilityError: the model's blocks are not described by one FFN and one attention, its
            attention has no projections, it was quantized, or it is adaptive already.

    Example:
        >>> model = effformer.build_model("vit-nano")
        >>> student, report = acmize(model, AdaptiveScheme(projections=False))
        >>> report.places
        ('blocks.0.ffn.part.learners', 'blocks.1.ffn.part.learners')
    """
    scheme = AdaptiveScheme() if scheme is None else scheme
    config = _adaptive_config(model, scheme)
    # what `Model` promises: its class, config and name rebuild it
    student: Any = type(model)(config, name=model.name)
    state, own = model.state_dict(), student.state_dict()
    kept = {k: v for k, v in state.items() if k in own and v.shape == own[k].shape}
    learners = {n: m for n, m in student.named_modules() if isinstance(m, Learners)}
    for module in learners.values():
        module.reset_parameters()
    student.load_state_dict(kept, strict=False)
    student.to(next(model.parameters())).train(model.training)
    student.trained = getattr(model, "trained", None)
    report = AdaptiveReport(
        places=tuple(learners),
        copied=len(kept),
        params_before=sum(p.numel() for p in model.parameters()),
        params_after=sum(p.numel() for p in student.parameters()),
    )
    return student, report


def _adaptive_config(model: nn.Module, scheme: AdaptiveScheme) -> Config:
    config, name = getattr(model, "config", None), getattr(model, "name", type(model).__name__)
    if not isinstance(config, BackboneConfig):
        raise CapabilityError(
            f"acmize: {name} is not a stack of equally wide blocks; such are the families vit, dit, "
            "sit and bert"
        )
    if getattr(model, "transforms", ()):
        raise CapabilityError(f"acmize: {name} was changed before; acmize first, then quantize")
    changed = [k for k, v in config.layers.items() if v.keys() & {"attn", "ffn"}]
    if changed:
        raise CapabilityError(
            f"acmize: {name} has blocks of its own kind, layers {changed}; build those adaptive: "
            "layers={'0:4': {'ffn': 'acm'}}"
        )
    changes: dict[str, Any] = {}
    if scheme.ffn:
        changes["ffn"] = _adaptive_ffn(config, scheme, name)
    if scheme.projections:
        attn = config.attn
        if not attn.caps().multihead or attn.at("projections") is not None:
            raise CapabilityError(
                f"acmize: {name}: this attention has no plain projections; give projections=False"
            )
        projections = AdaptiveProjections(
            learners=scheme.learners, size=scheme.size, gate=scheme.gate,
            least=min(1, scheme.learners - 1),
        )  # fmt: skip
        changes["attn"] = attn.replace(projections=projections)
    return config.replace(where=name, **changes)


def _adaptive_ffn(config: BackboneConfig, scheme: AdaptiveScheme, name: str) -> ACM.Config:
    old = config.ffn
    if not isinstance(old, FFNConfig) or old.entry.name == "acm":
        found = None if old is None else old.to_dict().get("name")
        raise CapabilityError(f"acmize: {name}: {found!r} is not a plain FFN; give ffn=False")
    width = max(1, round(scheme.size * old.width(config.dim) / scheme.learners))
    return ACM.Config(
        hidden=width * scheme.learners, act=old.act, learners=scheme.learners, gate=scheme.gate
    )


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class LearnerDistillation:
    """Objective of the second phase: mean over modules of `distillation_loss`.

    The teacher runs once; what each of its modules received and returned trains the learners in its
    place. So the modules do not depend on each other, nor on the rest of the student.

    Attributes:
        teacher: the dense model.
        task: an objective that calls its model as training does; it runs the teacher, and its value
            is not used.
        detach: learner k fits only what the learners before it left over.
    """

    teacher: nn.Module
    task: Objective
    detach: bool = True

    def __post_init__(self) -> None:
        checker(nn.Module)(self.teacher, "LearnerDistillation.teacher")
        checker(Callable[..., Any])(self.task, "LearnerDistillation.task")
        checker(bool)(self.detach, "LearnerDistillation.detach")

    def __call__(
        self, model: nn.Module, batch: Any, generator: torch.Generator, ledger: Ledger
    ) -> Tensor:
        losses = [
            distillation_loss(learners, x, y, detach=self.detach)
            for learners, x, y in _watched(self.teacher, model, self.task, batch, generator)
        ]
        return torch.stack(losses).mean()


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class GatePretraining:
    """Objective of the third phase: mean over modules of the gates' likelihood loss.

    The label of a token is the number of learners after which the distance to the teacher's output
    stops shrinking, see `gate_labels`. The learners get no gradient.

    Attributes:
        teacher: the dense model.
        task: as in `LearnerDistillation`.
        threshold: an improvement by less than this ratio is none.

    Differs from the paper: the loss takes the log-softmax of the gate's logits instead of the
    logarithm of a sampled one-hot vector.
    """

    teacher: nn.Module
    task: Objective
    threshold: float = 1.2

    def __post_init__(self) -> None:
        checker(nn.Module)(self.teacher, "GatePretraining.teacher")
        checker(Callable[..., Any])(self.task, "GatePretraining.task")
        checker(Positive)(self.threshold, "GatePretraining.threshold")

    def __call__(
        self, model: nn.Module, batch: Any, generator: torch.Generator, ledger: Ledger
    ) -> Tensor:
        losses = []
        for learners, x, y in _watched(self.teacher, model, self.task, batch, generator):
            with torch.no_grad():
                errors = (learners.every(x) - y.unsqueeze(-2)).norm(dim=-1)
            gate = learners.gate
            labels = gate_labels(errors, self.threshold).clamp_min(gate.least) - gate.least
            losses.append(gate_loss(F.log_softmax(gate.logits(x), dim=-1), labels))
        return torch.stack(losses).mean()


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Budgeted:
    """Objective of the last phase: a task and the three auxiliary losses of `acm_losses`.

    Attributes:
        task: the objective; it must hand the ledger to the model.
        target: wanted share of the learners' work, in (0, 1].
        budget: weight of `budget_loss`.
        entropy: weight of `entropy_loss`.
        diversity: weight of `diversity_loss`.
    """

    task: Objective
    target: float
    budget: float = 0.1
    entropy: float = 0.05
    diversity: float = 0.05

    def __post_init__(self) -> None:
        checker(Callable[..., Any])(self.task, "Budgeted.task")
        checker(Portion)(self.target, "Budgeted.target")
        for name in ("budget", "entropy", "diversity"):
            checker(NonNegative)(getattr(self, name), f"Budgeted.{name}")

    def __call__(
        self, model: nn.Module, batch: Any, generator: torch.Generator, ledger: Ledger
    ) -> Tensor:
        value = self.task(model, batch, generator, ledger)
        if not ledger.choices:
            raise CapabilityError(
                "acm: no gate reported to the ledger, so that there is nothing to budget; build the "
                "model with ffn='acm' or attn={'projections': {}}, without fixed="
            )
        acm_losses(
            ledger, self.target, budget=self.budget, entropy=self.entropy, diversity=self.diversity
        )
        return value


@dataclass(slots=True)
class _Place:
    """Learners, the teacher's module that they stand for, and which of its outputs."""

    learners: Learners
    teacher: nn.Module
    part: int = 0
    sizes: tuple[int, ...] = ()
    seen: tuple[Tensor, Tensor] | None = None

    def watch(self, module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
        y = out.split(self.sizes, dim=-1)[self.part] if self.sizes else out
        self.seen = (args[0].detach(), y.detach())


def _watched(
    teacher: nn.Module, student: nn.Module, task: Objective, batch: Any, generator: torch.Generator
) -> Iterator[tuple[Learners, Tensor, Tensor]]:
    """Learners of the student with the teacher's inputs and outputs at their place."""
    with ExitStack() as hooks, unwrapped(teacher) as teacher, torch.no_grad():
        places = list(_places(teacher, student))
        if not places:
            raise CapabilityError("acm: the student has no learners; make it by acmize(teacher)")
        hooks.enter_context(evaluating(teacher))
        for place in places:
            hooks.callback(place.teacher.register_forward_hook(place.watch).remove)
        task(teacher, batch, generator, Ledger())
    for place in places:
        assert place.seen is not None
        yield place.learners, *place.seen


def _places(teacher: nn.Module, student: nn.Module) -> Iterator[_Place]:
    dense = dict(teacher.named_modules())
    with unwrapped(student) as plain:
        adaptive = dict(plain.named_modules())
    for path, module in adaptive.items():
        if isinstance(module, ACM) and not isinstance(dense[path], ACM):
            yield _Place(module.learners, dense[path])
        if isinstance(module, Attention) and module.config.projections is not None:
            old: Any = dense[path]
            if old.config.projections is None:
                yield from _projections(module, old)


def _projections(new: Any, old: Any) -> Iterator[_Place]:
    sizes = (new.q.out_dim, new.k.out_dim, new.v.out_dim)
    if old.cross:
        yield _Place(new.q, old.q)
        for i, learners in enumerate((new.k, new.v)):
            yield _Place(learners, old.kv, i, sizes[1:])
    else:
        for i, learners in enumerate((new.q, new.k, new.v)):
            yield _Place(learners, old.qkv, i, sizes)
    yield _Place(new.proj, old.proj)
