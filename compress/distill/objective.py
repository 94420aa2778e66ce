"""Distillation as an objective: what `effformer.train.train` minimises so that a student follows a teacher."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from torch import Tensor, nn

from effformer.blocks import Block
from effformer.calls import evaluating, match, outputs, takes
from effformer.checks import CapabilityError, unknown
from effformer.config import Config
from effformer.context import Ledger, Tap
from effformer.values import Count, NonNegative, Positive, Range, checker
from effformer.wrapped import bare, unwrapped

from .losses import (
    cosine_loss,
    hidden_loss,
    logits_loss,
    mse_loss,
    relation_loss,
    score_loss,
    split_heads,
)

if TYPE_CHECKING:
    from effformer.train import Objective

__all__ = ["LOSSES", "Attention", "Distillation", "Hidden", "Logits", "MiniLM", "Output", "Seen"]


@dataclass(slots=True)
class Seen:
    """What one forward showed.

    Attributes:
        outputs: the tensors that the model returned.
        hidden: tokens before the first block and behind every block, (B, N, D).
        places: queries, keys and values by place, ``blocks.3.attn.q``.
        mask: (B, N) real tokens, None: all are.
    """

    outputs: list[Tensor]
    hidden: list[Tensor]
    places: dict[str, Tensor]
    mask: Tensor | None = None

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.hidden) - 1

    def heads(self, name: str, block: int) -> Tensor:
        """Queries "q", keys "k" or values "v" of a block, (B, H, N, K)."""
        place = f"blocks.{block}.attn.{name}"
        if place not in self.places:
            raise CapabilityError(
                f"distill: block {block} has no {place}; losses on heads need blocks with a multi-head "
                "attention 'attn', 'hidden' and 'logits' do not"
            )
        return self.places[place]


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillLoss(Config):
    """A term of the distance.

    Attributes:
        weight: of the term.
    """

    weight: NonNegative = 1.0

    def __call__(self, student: Seen, teacher: Seen) -> Tensor:
        """A scalar."""
        raise CapabilityError("distill: a loss says how it compares")


@dataclass(frozen=True, slots=True, kw_only=True)
class Logits(DistillLoss):
    """The first output as logits, see `logits_loss`.

    Attributes:
        temperature: T.
    """

    temperature: Positive = 2.0

    def __call__(self, student: Seen, teacher: Seen) -> Tensor:
        return logits_loss(student.outputs[0], teacher.outputs[0], self.temperature)


@dataclass(frozen=True, slots=True, kw_only=True)
class Output(DistillLoss):
    """Mean square of the difference of the first outputs: velocities of generators, features."""

    def __call__(self, student: Seen, teacher: Seen) -> Tensor:
        return mse_loss(student.outputs[0], teacher.outputs[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class Hidden(DistillLoss):
    """Tokens before the blocks and behind each of the student's: state i follows the teacher's state
    ``i L_t / L_s``. Sum over the states.

    Attributes:
        kind: "mse", or "cosine".
        which: "all" states, or the "last".
    """

    kind: Literal["mse", "cosine"] = "mse"
    which: Literal["all", "last"] = "all"

    def __call__(self, student: Seen, teacher: Seen) -> Tensor:
        pairs = [(i, i * teacher.depth // student.depth) for i in range(student.depth + 1)]
        distance = hidden_loss if self.kind == "mse" else cosine_loss
        total = torch.zeros(())
        for i, j in pairs if self.which == "all" else pairs[-1:]:
            s, t = student.hidden[i], teacher.hidden[j]
            if s.shape != t.shape:
                raise CapabilityError(
                    f"distill: 'hidden' compares states of equal shape, got {tuple(s.shape)} and "
                    f"{tuple(t.shape)}; 'minilm' and 'logits' compare models of other widths"
                )
            total = total.to(s.device) + distance(s, t, student.mask)
        return total


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention(DistillLoss):
    """Attention scores before the softmax: block i follows the teacher's block ``(i + 1) L_t / L_s - 1``;
    see `score_loss`. Sum over the blocks.
    """

    def __call__(self, student: Seen, teacher: Seen) -> Tensor:
        total = torch.zeros(())
        for i in range(student.depth):
            j = (i + 1) * teacher.depth // student.depth - 1
            scores = [_scores(seen, block) for seen, block in ((student, i), (teacher, j))]
            if scores[0].shape != scores[1].shape:
                raise CapabilityError(
                    f"distill: 'attention' compares heads one by one, but there are "
                    f"{scores[0].shape[1]} and {scores[1].shape[1]}; 'minilm' with heads= compares others"
                )
            total = total.to(scores[0].device) + score_loss(scores[0], scores[1], student.mask)
        return total


def _scores(seen: Seen, block: int) -> Tensor:
    q, k = seen.heads("q", block), seen.heads("k", block)
    return q @ k.mT / q.shape[-1] ** 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class MiniLM(DistillLoss):
    """Relations of one block, see `relation_loss`: widths and depths may differ.

    Attributes:
        version: 1 compares the attention and the relations of the values, head by head; 2 the
            relations of queries, of keys and of values, all heads cut anew.
        heads: number of relation heads of version 2 (48 for a teacher of 12 heads of 64 in the paper).
        block: the teacher's block, -1 for the last; of the student it is the last.
    """

    version: Literal[1, 2] = 2
    heads: Count = 12
    block: Annotated[int, Range(-4096, 4095)] = -1

    def __call__(self, student: Seen, teacher: Seen) -> Tensor:
        if not -teacher.depth <= self.block < teacher.depth:
            raise ValueError(
                f"distill: block={self.block} is none of the teacher's {teacher.depth} blocks"
            )
        own, other = student.depth - 1, self.block % teacher.depth
        parts = [{n: x.heads(n, i) for n in "qkv"} for x, i in ((student, own), (teacher, other))]
        if self.version == 1:
            pairs = [("q", "k"), ("v", "v")]
        else:
            parts = [{n: split_heads(x, self.heads) for n, x in one.items()} for one in parts]
            pairs = [(n, n) for n in "qkv"]
        s, t = parts
        terms = [relation_loss((s[a], s[b]), (t[a], t[b]), student.mask) for a, b in pairs]
        return torch.stack(terms).sum()


LOSSES: dict[str, type[DistillLoss]] = {
    "logits": Logits, "output": Output, "hidden": Hidden, "attention": Attention, "minilm": MiniLM,
}  # fmt: skip
"""Losses by the names that `Distillation` takes."""


Loss = str | Mapping[str, Any] | DistillLoss
"""A name, a name with options, or a config."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Distillation:
    """Objective for `effformer.train.train`: ``task(student) + sum weight * distance(student, teacher)``.

    Both see the same samples; of a task that draws times and noise, the same times and noise. The
    teacher runs in evaluation mode without gradients.

    Attributes:
        teacher: the model to follow.
        losses: names of `LOSSES`, dicts with a name and options, or their configs:
            ``("logits", {"name": "minilm", "heads": 24})``.
        task: an objective that calls its model as training does and adds its own value; None: the models
            are called with the tensors of the batch that they take.
        weight: of the task.

    Raises:
        ValueError: no losses, or unknown ones.

    Example:
        >>> import effformer
        >>> from effformer.compress import Distillation, prune
        >>> teacher = effformer.build_model("vit-nano")
        >>> student, _ = prune(teacher, {"macs": 0.5})
        >>> objective = Distillation(teacher=teacher, losses=("logits",))
        >>> batch = teacher.example_inputs(2)
        >>> bool(objective(student, batch, torch.Generator(), effformer.Ledger()) > 0)
        True
    """

    teacher: nn.Module
    losses: Loss | Sequence[Loss] = ("logits",)
    task: Objective | None = None
    weight: float = 1.0

    def __post_init__(self) -> None:
        kinds = {"teacher": nn.Module, "losses": Loss | Sequence[Loss], "weight": NonNegative}
        for name, kind in (kinds | {"task": Callable[..., Any] | None}).items():
            kept = checker(kind)(getattr(self, name), f"Distillation: {name}")
            object.__setattr__(self, name, kept)
        given = (
            (self.losses,) if isinstance(self.losses, (str, Mapping, DistillLoss)) else self.losses
        )
        object.__setattr__(self, "losses", tuple(_loss(one) for one in given))
        if not self.losses:
            raise ValueError(f"Distillation: no losses; choices: {', '.join(LOSSES)}")

    def __call__(
        self, model: nn.Module, batch: Any, generator: torch.Generator, ledger: Ledger
    ) -> Tensor:
        state = generator.get_state()
        with unwrapped(self.teacher) as teacher, torch.no_grad(), evaluating(teacher):
            target, _ = self._watched(teacher, batch, generator, Ledger())
        generator.set_state(state)
        seen, value = self._watched(model, batch, generator, ledger)
        terms = [loss.weight * loss(seen, target) for loss in self.losses]  # type: ignore[union-attr,operator]
        distance = torch.stack([term.to(seen.outputs[0].device) for term in terms]).sum()
        return distance if value is None else self.weight * value + distance

    def _watched(
        self, model: nn.Module, batch: Any, generator: torch.Generator, ledger: Ledger
    ) -> tuple[Seen, Tensor | None]:
        """What a model shows, and the value of the task."""
        seen = Seen([], [], {}, batch.get("mask"))
        watched: Any = _Watched(model, seen)
        with ExitStack() as hooks:
            for name, block in _blocks(model):
                hooks.callback(block.register_forward_hook(_note(seen, first=name == "0")).remove)
            if self.task is not None:
                value = self.task(watched, batch, generator, ledger)
            else:
                value = None
                call = match(model, batch, where="Distillation")
                watched(
                    *call.args,
                    **call.kwargs,
                    **({"ledger": ledger} if takes(model, "ledger") else {}),
                )
        if not seen.outputs:
            raise CapabilityError("Distillation: the task never called its model")
        return seen, value


class _Watched:
    """A model that remembers what it was asked and what it answered."""

    def __init__(self, model: nn.Module, seen: Seen) -> None:
        self.model, self.seen = model, seen
        self.forward = bare(model).forward  # the names that it takes

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        tap = Tap(keep=("blocks.*.attn.[qkv]",))
        more = {"tap": tap} if takes(self.model, "tap") else {}
        self.seen.hidden.clear()  # a task may call twice; the last call counts
        out = self.model(*args, **kwargs, **more)
        self.seen.outputs[:] = outputs(out)
        self.seen.places.update(tap.seen)
        return out


def _blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    blocks = getattr(bare(model), "blocks", None)
    if not isinstance(blocks, nn.ModuleList):
        return []
    return [(name, block) for name, block in blocks.named_children() if isinstance(block, Block)]


def _note(seen: Seen, *, first: bool) -> Any:
    def note(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        if first:
            seen.hidden.append(args[0])
        seen.hidden.append(out[0] if isinstance(out, tuple) else out)

    return note


def _loss(given: str | Mapping[str, Any] | DistillLoss) -> DistillLoss:
    if isinstance(given, DistillLoss):
        return given
    options = {"name": given} if isinstance(given, str) else dict(given)
    name = options.pop("name", None)
    if name not in LOSSES:
        raise unknown("loss", str(name), list(LOSSES), where="Distillation: losses")
    return LOSSES[name].from_dict(options, where=f"Distillation: {name}")
