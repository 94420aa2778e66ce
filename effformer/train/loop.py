"""The training loop: AdamW, warm-up, averaged weights, and runs that survive being killed.

Everything random in step s is a function of (seed, s): the order of the data, and the seeds of the
objective's generator and of torch's own (dropout). So a checkpoint needs no random state, and a run
that was killed and resumed ends with the very bits of an uninterrupted one (same machine, same
number of threads).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from effformer.arguments import checked
from effformer.notebook import Shown
from effformer.values import Chance, Count, Natural, NonNegative, Positive, Seed

from ..calls import half_of
from ..checks import FormatError, shown
from ..config import Config
from ..context import Ledger
from ..flow.conventions import recorded
from ..wrapped import bare, unwrapped, unwrapping
from .checkpoint import RunFolder, check_fit, parts
from .datasets import Dataset, placed
from .ema import EMA
from .objectives import Objective, trained_by
from .optim import adamw, learning_rate, optimizer_tensors, restore_optimizer
from .progress import progress_bar
from .seeding import Order, isolated_randomness, seed_for

__all__ = ["DivergenceError", "Evaluation", "TrainConfig", "TrainResult", "train"]

Evaluation = Callable[[nn.Module, int], Mapping[str, float] | None]
"""What looks at a model in training: (model, steps done) -> numbers by name."""

RECORDED = ("step", "loss", "lr", "grad_norm", "seconds")
"""Names of the numbers that every record holds."""


class DivergenceError(ValueError):
    """The loss or the gradient became infinite or not a number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig(Config):
    """What decides the weights, beside model, data and objective.

    Attributes:
        steps: optimizer steps.
        batch: samples per step.
        accumulate: forward passes that a step is divided into (gradient accumulation); divides
            ``batch``.
        lr: peak learning rate.
        warmup: steps of linear warm-up.
        schedule: after the warm-up: "cosine" to 0, or "constant".
        weight_decay: decoupled, on weight matrices only.
        betas: of AdamW.
        clip: largest norm of the gradient, None for no clipping.
        ema: decay of the averaged weights (with warm-up), None for none.
        seed: of data order, objective and dropout; the initial weights are the caller's.
    """

    steps: Count = 1000
    batch: Count = 128
    accumulate: Count = 1
    lr: Positive = 1e-3
    warmup: Natural = 100
    schedule: Literal["cosine", "constant"] = "cosine"
    weight_decay: NonNegative = 0.0
    betas: tuple[Chance, Chance] = (0.9, 0.999)
    clip: Positive | None = 1.0
    ema: Chance | None = 0.999
    seed: Seed = 0

    def check(self) -> None:
        if self.batch % self.accumulate:
            raise ValueError(
                f"TrainConfig: batch {self.batch} is not divisible by accumulate {self.accumulate}"
            )
        if self.warmup > self.steps:
            raise ValueError(
                f"TrainConfig: warmup must lie in 0..{self.steps} (steps), got {self.warmup}"
            )


@dataclass(frozen=True, slots=True)
class TrainResult(Shown):
    """What `train` returns.

    Attributes:
        steps: steps taken in all.
        seconds: time spent on them, over all resumes.
        loss: mean loss since the last record of the metrics.
        resumed: the step at which this call took over, 0 for a new run.
        history: the metrics (JSONL), None without ``out``; see `read_metrics`.
        checkpoint: the last checkpoint, None without ``out``.
    """

    steps: int
    seconds: float
    loss: float
    resumed: int
    history: Path | None
    checkpoint: Path | None


@checked
def train(
    model: nn.Module,
    data: Dataset,
    objective: Objective,
    config: TrainConfig,
    *,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    log_every: Count = 50,
    save_every: Count = 500,
    keep: Count = 2,
    evaluate: Evaluation | None = None,
    evaluate_every: Count = 500,
    about: Mapping[str, Any] | None = None,
    progress: bool | None = None,
) -> TrainResult:
    """Train a model in place.

    On return the model carries the averaged weights if ``config.ema`` is set; the last checkpoint
    holds both. What the objective trains a generator to predict is written to ``model.trained`` and
    travels with the weights. Ctrl-C waits for the end of a step, of which it leaves a checkpoint; a
    second one does not wait.

    Args:
        model: trained where it is, compiled or wrapped as it is, and named as it is without that, so
            that a run resumes with or without wrappers; batches are moved to the device of its first
            parameter. Weights in half precision follow float32 copies of theirs; those in float32
            stay so under `torch.autocast` around the call.
        data: training samples, named tensors.
        objective: the loss, see `Objective`.
        config: what decides the weights.
        out: folder of the run, for one process at a time; None keeps everything in memory.
        resume: continue the run in ``out`` from its last checkpoint, or begin it if there is none.
        log_every: steps between records of the metrics.
        save_every: steps between checkpoints; the last step always has one.
        keep: number of checkpoints that stay.
        evaluate: called with the model and the number of steps after every ``evaluate_every`` steps
            and after the last one, for instance `Validation`. The model then is in evaluation mode and
            holds the averaged weights. The numbers that it returns, by name, go to the metrics and to
            the progress bar; whatever it draws at random, the training goes on as without it.
        evaluate_every: steps between evaluations.
        about: JSON values that ``run.json`` keeps beside what decides the weights.
        progress: True: a progress bar on stderr; None: a bar in a terminal or a notebook, elsewhere a
            line every half a minute.

    Raises:
        ValueError: the folder cannot be written, is in use or holds another run; an option out of
            range; more classes in the data than in the model; weights that were trained to predict
            something else than the objective trains.
        FormatError: the folder holds something else, or broken checkpoints only: a broken last one is
            passed over with a warning.
        DivergenceError: loss or gradient not finite; the last good checkpoint stays. A run that fails
            before it has a checkpoint or a record leaves nothing.

    Example:
        >>> from torch import nn
        >>> from effformer.train import Classification, TrainConfig, load_data, train
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        >>> train(net, load_data("digits"), Classification(), TrainConfig(steps=20, warmup=0)).steps
        20
    """
    pace = _Pace(
        log_every=log_every, save_every=save_every, keep=keep, evaluate_every=evaluate_every
    )
    classes = getattr(getattr(bare(model), "config", None), "num_classes", None)
    if classes and data.classes and (most := int(data[data.target].max())) >= classes:
        raise ValueError(
            f"train: {data.name!r} has labels up to {most}, the model has "
            f"{classes} classes; build it with num_classes={len(data.classes)}"
        )
    made = trained_by(objective, model, data)
    record = recorded(model) if made is None else made.to_dict()
    trainer = _Trainer(model, data, objective, config)
    folder = None
    if out is not None:
        identity = _identity(model, data, objective, config) | {"trained": record}
        renew = partial(_renewed, model, record)
        facts = {"model": _named(model), **(about or {})}
        folder = RunFolder(Path(out), identity, resume=resume, renew=renew, about=facts)
    try:
        if folder is not None and (found := folder.restore()) is not None:
            trainer.restore(found[0], *found[1])
        if made is not None:
            bare(model).trained = record  # type: ignore[assignment]
        result = _finish(trainer, folder, pace, evaluate, progress)
    except BaseException:
        if folder is not None:
            folder.abandon()
        raise
    if folder is not None:
        folder.close()
    return result


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pace:
    """Steps between what a training does beside its steps, and how many checkpoints stay."""

    log_every: int
    save_every: int
    keep: int
    evaluate_every: int


def _finish(
    trainer: _Trainer,
    folder: RunFolder | None,
    pace: _Pace,
    evaluate: Evaluation | None,
    progress: bool | None,
) -> TrainResult:
    """Take the steps that are left."""
    model, config = trainer.model, trainer.config
    resumed, training = trainer.done, model.training
    model.train()
    try:
        with (
            isolated_randomness(trainer.device),
            progress_bar(config.steps, resumed, progress) as show,
            _interruption(folder is not None) as interrupted,
        ):
            while trainer.done < config.steps:
                trainer.step()
                last, stop = trainer.done == config.steps, interrupted()
                saving = folder is not None and (
                    last or stop or trainer.done % pace.save_every == 0
                )
                looking = evaluate is not None and not stop
                looking = looking and (last or trainer.done % pace.evaluate_every == 0)
                if last or saving or looking or trainer.done % pace.log_every == 0:
                    record = trainer.record(folder)
                    if looking and evaluate is not None:
                        record |= _look(trainer, folder, evaluate, pace.keep)
                    if folder is not None:
                        folder.log(record)
                show(trainer.done, trainer.numbers)
                if saving and folder is not None:
                    folder.save(trainer.done, trainer.tensors(), trainer.state(), keep=pace.keep)
                if stop:
                    raise KeyboardInterrupt
    finally:
        model.train(training)
    if trainer.ema is not None:
        trainer.ema.copy_to(model)
    history, newest = (None, None) if folder is None else (folder.metrics, folder.newest())
    return TrainResult(trainer.done, trainer.seconds(), trainer.loss, resumed, history, newest)


def _look(
    trainer: _Trainer, folder: RunFolder | None, evaluate: Evaluation, keep: int
) -> dict[str, float]:
    """Numbers of an evaluation; one that fails does not cost the steps before it."""
    try:
        return trainer.evaluated(evaluate)
    except BaseException:
        if folder is not None:
            folder.save(trainer.done, trainer.tensors(), trainer.state(), keep=keep)
        raise


def _numbers(found: Any, own: Collection[str]) -> dict[str, float]:
    """What an evaluation returned, as numbers by name; nothing is none.

    Raises:
        TypeError: something else.
        ValueError: a name of the training's own records.
    """
    wrong = (
        "train: evaluate must return numbers by name, such as {'accuracy': 0.9}, or None; got "
        f"{shown(found)}"
    )
    if not isinstance(found, Mapping | None):
        raise TypeError(wrong)
    try:
        numbers = {str(name): float(x) for name, x in (found or {}).items()}
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(wrong) from error
    if taken := sorted(set(numbers) & set(own)):
        raise ValueError(
            f"train: evaluate returned {taken[0]!r}, which the training records itself; another "
            f"name would do, val_{taken[0]}"
        )
    return numbers


@contextmanager
def _interruption(saves: bool) -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed, which waits to be asked for so that a step can be saved; the second
    does not wait. Programs that treat it in their own way go on doing so.
    """
    pressed: list[int] = []

    def note(number: int, frame: Any) -> None:
        if pressed:
            signal.default_int_handler(number, frame)
        pressed.append(number)

    main = threading.current_thread() is threading.main_thread()
    if not saves or not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield lambda: False
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if pressed:  # while the last step was saved
        raise KeyboardInterrupt


class _Trainer:
    """Everything that changes during training."""

    def __init__(
        self, model: nn.Module, data: Dataset, objective: Objective, config: TrainConfig
    ) -> None:
        self.model, self.data, self.objective, self.config = model, data, objective, config
        self.optimizer = adamw(model, weight_decay=config.weight_decay, betas=config.betas)
        self.trainable = [self.optimizer.stepped(p) for p in model.parameters() if p.requires_grad]
        self.device = self.trainable[0].device
        self.half = half_of(model)
        self.ema = None if config.ema is None else EMA(model, config.ema, warmup=True)
        self.generator = torch.Generator()
        self.order = Order(len(data), config.batch, config.seed)
        self.done = 0
        self.loss = math.nan
        self.numbers: dict[str, float] = {}
        self._losses: list[Tensor] = []
        self._norms: list[Tensor] = []
        self._spent, self._began = 0.0, time.perf_counter()

    def step(self) -> None:
        """One optimizer step; losses stay on the device until `record`: nothing waits for them."""
        config = self.config
        self._seed()
        loss = torch.zeros((), device=self.device)
        for rows in self.order.rows(self.done).chunk(config.accumulate):
            batch = placed(self.data.rows(rows), self.device, self.half)
            ledger = Ledger(step=self.done)
            value = self.objective(self.model, batch, self.generator, ledger)
            _check_loss(value)
            value = value + ledger.total_loss()
            value = value / config.accumulate
            value.backward()
            self.optimizer.collect()
            loss += value.detach()
        gradients = [p.grad for p in self.trainable if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if config.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(self.trainable, config.clip, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self._lr(self.done)
        self.optimizer.step()
        torch.clear_autocast_cache()  # around the run it would go on with the weights of its first step
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update(self.model)
        self._losses.append(loss)
        self._norms.append(norm)
        self.done += 1

    def record(self, folder: RunFolder | None) -> dict[str, float]:
        """Means since the last record.

        Raises:
            DivergenceError: one of them is not finite.
        """
        losses, norms = torch.stack(self._losses).tolist(), torch.stack(self._norms).tolist()
        first = self.done - len(losses)
        for i, (loss, norm) in enumerate(zip(losses, norms, strict=True)):
            if not math.isfinite(loss) or not math.isfinite(norm):
                newest = None if folder is None else folder.newest()
                raise DivergenceError(
                    f"train: loss {loss}, gradient norm {norm} at step {first + i + 1} of "
                    f"{self.config.steps} (last checkpoint: {newest or 'none'}); try a lower lr "
                    f"(now {self.config.lr:g}) or clip ({self.config.clip}), or a longer warmup "
                    f"({self.config.warmup})"
                )
        self._losses, self._norms = [], []
        self.loss = sum(losses) / len(losses)
        self.numbers = {**self.numbers, "loss": self.loss}
        return {
            "step": self.done,
            "loss": self.loss,
            "lr": self._lr(self.done - 1),
            "grad_norm": sum(norms) / len(norms),
            "seconds": round(self.seconds(), 3),
        }

    def evaluated(self, evaluate: Evaluation) -> dict[str, float]:
        """What is measured of the averaged weights; the next step has seeds of its own."""
        raw = self.ema and {name: x.clone() for name, x in _state(self.model).items()}
        if self.ema is not None:
            self.ema.copy_to(self.model)
        self.model.eval()
        try:
            with torch.no_grad():
                found = _numbers(evaluate(self.model, self.done), RECORDED)
        finally:
            self.model.train()
            if raw:
                for name, tensor in _state(self.model).items():
                    tensor.data.copy_(raw[name])
        self.numbers = {**self.numbers, **found}
        return found

    def tensors(self) -> dict[str, Tensor]:
        """Model, averaged weights and optimizer, named as `read_checkpoint` documents."""
        with unwrapped(self.model) as plain:
            out = {f"model.{key}": value for key, value in plain.state_dict().items()}
        if self.ema is not None:
            out |= {f"ema.{key}": value for key, value in self.ema.shadow.items()}
        return out | {
            f"optimizer.{k}": v for k, v in optimizer_tensors(self.optimizer, self.model).items()
        }

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds beside tensors."""
        moments = len(optimizer_tensors(self.optimizer, self.model))
        return {
            "step": self.done, "seconds": self.seconds(), "loss": self.loss, "optimizer": moments,
            "trained": recorded(self.model),
        }  # fmt: skip

    def restore(
        self, checkpoint: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]
    ) -> None:
        """Continue from a checkpoint of the same run.

        Raises:
            FormatError: the checkpoint lacks what an exact continuation needs.
            ValueError: it does not fit the model.
        """
        moments, step = parts(tensors, "optimizer"), state["step"]
        if step > self.config.steps:
            raise FormatError(
                f"train: {checkpoint} is at step {step}, beyond the {self.config.steps} of this run"
            )
        if len(moments) != state.get("optimizer", len(moments)) or (step and not moments):
            raise FormatError(
                f"train: {checkpoint} has {len(moments)} of {state.get('optimizer', 'all')} tensors of "
                "the optimizer, without which the run does not go on exactly; load its weights with "
                "load_checkpoint into a model, and train that in another folder"
            )
        with unwrapped(self.model) as plain:
            check_fit(parts(tensors, "model"), plain.state_dict(), f"train: {checkpoint}")
        if self.ema is not None:
            averaged = parts(tensors, "ema")
            check_fit(averaged, self.ema.shadow, f"train: the averaged weights of {checkpoint}")
        weights = parts(tensors, "model")
        with unwrapped(self.model) as plain:
            halves = [n for n, p in plain.named_parameters() if p in self.optimizer.masters]
            copies = {f"{name}.master": weights[name] for name in halves}  # of earlier versions
            restore_optimizer(self.optimizer, plain, copies | moments)
            plain.load_state_dict(weights)
        if self.ema is not None:
            self.ema.load_state_dict(
                self.ema.state_dict() | {"shadow": parts(tensors, "ema"), "updates": state["step"]}
            )
        self.done, self._spent, self.loss = state["step"], state["seconds"], state["loss"]

    def seconds(self) -> float:
        """Time spent, over all resumes."""
        return self._spent + time.perf_counter() - self._began

    def _lr(self, step: int) -> float:
        config = self.config
        return learning_rate(
            step,
            peak=config.lr,
            warmup=config.warmup,
            steps=config.steps,
            cosine=config.schedule == "cosine",
        )

    def _seed(self) -> None:
        self.generator.manual_seed(seed_for(self.config.seed, "objective", self.done))
        dropout = seed_for(self.config.seed, "dropout", self.done)
        torch.default_generator.manual_seed(dropout)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(dropout)


def _check_loss(value: Any) -> None:
    """Refuse what is no loss.

    Raises:
        TypeError: no tensor of one real number.
    """
    if not isinstance(value, Tensor) or value.dim() or not value.is_floating_point():
        found = f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else shown(value)
        raise TypeError(f"train: the objective must return one real number, got {found}")


def _state(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


@unwrapping
def _named(model: nn.Module) -> dict[str, Any] | None:
    """Which model it is, so that it can be built again; None if it is none of ours."""
    family = getattr(model, "FAMILY", None)
    return None if family is None else {"family": family, "name": getattr(model, "name", family)}


@unwrapping
def _identity(
    model: nn.Module, data: Dataset, objective: Objective, config: TrainConfig
) -> dict[str, Any]:
    """What a run is, as JSON values."""
    layout = [
        (name, list(p.shape), str(p.dtype), p.requires_grad) for name, p in model.named_parameters()
    ]
    own = getattr(model, "config", None)
    return {
        "config": config.to_dict(),
        "objective": _describe(objective),
        "model": {
            "class": type(model).__qualname__,
            "config": own.to_dict() if isinstance(own, Config) else None,
            "transforms": list(getattr(model, "transforms", ())),
            "parameters": hashlib.sha256(repr(layout).encode()).hexdigest(),
        },
        "data": {"samples": len(data), "sha256": data.fingerprint()},
        "autocast": _autocast(next(model.parameters()).device.type),
    }


def _autocast(device: str) -> str | None:
    """The type of `torch.autocast` around the call, None if there is none."""
    return str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else None


@unwrapping
def _renewed(model: nn.Module, trained: Any, found: dict[str, Any]) -> dict[str, Any]:
    """What an older version wrote about a run, with the options that came since at their defaults,
    and with what its objective trains.
    """
    trained = json.loads(json.dumps(trained))
    autocast = _autocast(next(model.parameters()).device.type)
    found = {"trained": trained, "autocast": autocast, **found}
    if isinstance(trained, dict) and isinstance(found["trained"], dict):
        found["trained"] = {**trained, **found["trained"]}
    own, there = getattr(model, "config", None), dict(found.get("model", {}))
    if not isinstance(own, Config) or not isinstance(there.get("config"), dict):
        return found
    try:
        there["config"] = json.loads(json.dumps(type(own).from_dict(there["config"]).to_dict()))
    except (TypeError, ValueError):  # another model, which the comparison names
        return found
    return {**found, "model": there}


def _describe(value: object) -> Any:
    if isinstance(value, Config):
        return value.to_dict()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        options = {f.name: _describe(getattr(value, f.name)) for f in dataclasses.fields(value)}
        if options.get("target") == "y":  # runs from before targets had names go on
            del options["target"]
        return {"class": type(value).__qualname__, **options}
    if isinstance(value, (str, int, float, bool)) or value is None:
        return value
    # without its module, which is another one when a script is imported
    name = getattr(value, "__qualname__", type(value).__qualname__)
    own = getattr(value, "config", None)
    return {"class": name, "config": own.to_dict()} if isinstance(own, Config) else name
