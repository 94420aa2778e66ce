"""What each phase of training adaptive computation modules minimises, for `effformer.train.train`.

Reference: Adaptive Computation Modules: Granular Conditional Computation For Efficient Inference,
2023, arXiv 2312.10193.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effformer.attention import Attention
from effformer.calls import evaluating
from effformer.checks import CapabilityError
from effformer.context import Ledger
from effformer.ffn import ACM
from effformer.nn.learners import Learners
from effformer.values import NonNegative, Portion, Positive, checker
from effformer.wrapped import unwrapped

from ..report import relative_error
from .adaptive_losses import acm_losses, distillation_loss, gate_labels, gate_loss

if TYPE_CHECKING:
    from effformer.train import Objective

__all__ = ["Budgeted", "GatePretraining", "LearnerDistillation", "learner_errors"]


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


@torch.no_grad()
def learner_errors(
    teacher: nn.Module, student: nn.Module, task: Objective, batch: Any
) -> tuple[float, ...]:
    """``||y' - y|| / ||y||`` of all learners of every module that stands for one of the teacher's."""
    found = _watched(teacher, student, task, batch, torch.Generator().manual_seed(0))
    return tuple(relative_error([learners.every(x)[..., -1, :]], [y]) for learners, x, y in found)


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
        if place.seen is None:
            raise CapabilityError(
                "acm: the objective never called its model, which could be watched"
            )
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
