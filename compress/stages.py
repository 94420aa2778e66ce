"""What verbs share that put other parts into a trained model and train them in stages."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from effformer.blocks import BackboneConfig
from effformer.calls import evaluating, half_of, match, outputs, takes
from effformer.checks import CapabilityError
from effformer.config import Config
from effformer.context import Ledger
from effformer.train import Dataset, Objective, TrainConfig, train
from effformer.train.datasets import placed

from .rebuild import shortened
from .report import relative_error
from .samples import Data, calls, listed

__all__ = [
    "Asking",
    "Stage",
    "Training",
    "described",
    "fingerprint",
    "first",
    "gathered",
    "output_error",
    "trainable",
    "transferred",
]  # fmt: skip

_SHOWN = 64  # samples on which errors are measured


def described(model: nn.Module, verb: str) -> BackboneConfig:
    """The config of a model that says what its blocks are made of.

    Raises:
        CapabilityError: it does not, or the model was changed since it was built.
    """
    name = getattr(model, "name", type(model).__name__)
    config = getattr(model, "config", None)
    if not isinstance(config, BackboneConfig):
        raise CapabilityError(
            f"{verb}: {name} is not a stack of equally wide blocks; such are the families vit, dit, "
            "sit and bert"
        )
    if getattr(model, "transforms", ()):
        raise CapabilityError(f"{verb}: {name} was changed before; {verb} first, then quantize")
    return config


def transferred(model: Any, config: Config, seed: int) -> tuple[Any, int]:
    """The model of another config, which is written short, with all tensors of the old one that fit, in
    its mode, and how many those are; the rest is drawn from the seed.
    """
    with torch.random.fork_rng(devices=[]):
        config = shortened(model, config)
        torch.manual_seed(seed)
        # what `Model` promises: its class, config and name rebuild it
        student = type(model)(config, model.name)
    state, own = model.state_dict(), student.state_dict()
    kept = {k: v for k, v in state.items() if k in own and v.shape == own[k].shape}
    student.load_state_dict(kept, strict=False)
    student.to(next(model.parameters()))
    student.trained = model.trained
    return student.train(model.training), len(kept)


# -- the data


def gathered(model: nn.Module, data: Data, objective: Objective | None, verb: str) -> Dataset:
    """Everything that there is to learn from, named as the objective or the model names it.

    Raises:
        ValueError: there is nothing, values are not finite, or samples have several shapes.
        TypeError: an objective is given, and tensors without names.
    """
    if isinstance(data, Dataset):
        return data
    where = f"{verb}: data"
    if objective is None:
        found: list[Any] = [call.tensors for call in calls(model, data, where=where)]
    else:
        found = listed(model, data, where=where)
    for batch in found:
        if not isinstance(batch, Mapping):
            raise TypeError(
                f"{where}: an objective needs named tensors, got {type(batch).__name__}"
            )
        if _shapes(batch) != _shapes(found[0]):
            raise ValueError(
                f"{where}: expected batches of the same tensors, got {_shapes(found[0])} and "
                f"{_shapes(batch)} for a sample; pad them to one length and give the model its mask"
            )
    return Dataset("data", {name: torch.cat([b[name] for b in found]) for name in found[0]})


def _shapes(batch: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(x.shape[1:]) for name, x in batch.items() if isinstance(x, Tensor)}


def first(model: nn.Module, data: Dataset) -> dict[str, Tensor]:
    """The samples on which errors are measured, where the model is and in its numbers."""
    rows = data.rows(torch.arange(min(len(data), _SHOWN)))
    return placed(rows, next(model.parameters()).device, half_of(model))


# -- what the model is asked


@dataclass(frozen=True, slots=True, kw_only=True)
class Asking:
    """Calls a model as training does, for what can be watched meanwhile; its value means nothing.

    Attributes:
        task: calls the model; None: batches are its arguments.
        verb: for messages.
    """

    task: Objective | None
    verb: str

    def __call__(
        self, model: nn.Module, batch: Any, generator: torch.Generator, ledger: Ledger
    ) -> Tensor:
        if self.task is not None:
            return self.task(model, batch, generator, ledger)
        call = match(model, batch, where=f"{self.verb}: data")
        call(model, **({"ledger": ledger} if takes(model, "ledger") else {}))
        return torch.zeros(())

    def still(self, model: nn.Module, batch: Any) -> Ledger:
        """Ask a model in evaluation mode, without gradients, with the same randomness every time."""
        ledger = Ledger()
        with torch.no_grad(), evaluating(model):
            self(model, batch, torch.Generator().manual_seed(0), ledger)
        return ledger


def output_error(model: nn.Module, student: nn.Module, batch: Any, asking: Asking) -> float:
    """Relative error of the first output on a batch."""
    answers = []
    for one in (student, model):
        seen: list[Tensor] = []
        hook = one.register_forward_hook(
            lambda _, args, out, seen=seen: seen.append(outputs(out)[0])
        )
        asking.still(one, batch)
        hook.remove()
        answers.append(seen)
    return relative_error(*answers)


# -- training


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Stage:
    """An objective of one stage, known by what the whole call was given: a folder of another call is
    refused.

    Attributes:
        task: the objective.
        scheme: of the verb.
        source: digest of the old model's weights.
        places: paths of what is trained.
    """

    task: Objective
    scheme: Config
    source: str
    places: tuple[str, ...]

    def __call__(
        self, model: nn.Module, batch: Any, generator: torch.Generator, ledger: Ledger
    ) -> Tensor:
        return self.task(model, batch, generator, ledger)


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """How stages are trained: on what, where checkpoints stand, and who watches.

    Attributes:
        data: the samples.
        out: folder of all stages, which go on with what was interrupted; None: in memory.
        progress: as in `effformer.train.train`.
    """

    data: Dataset
    out: Path | None
    progress: bool | None

    def run(self, model: nn.Module, objective: Any, config: TrainConfig, stage: str) -> None:
        """Train a model in place by one stage."""
        out = None if self.out is None else self.out / stage
        resume = out is not None
        train(model, self.data, objective, config, out=out, resume=resume, progress=self.progress)


@contextmanager
def trainable(model: nn.Module, wanted: Callable[[str], bool]) -> Iterator[None]:
    """Nothing but parameters of the names that are wanted is trained inside the block."""
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(before[name] and wanted(name))
    try:
        yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(before[name])


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of the weights."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(name.encode())
        flat = parameter.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(flat.numpy().tobytes())
    return digest.hexdigest()
