"""`effformer train`: a flow that draws labelled images, or a classifier that tells their labels."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import (
    FFN,
    Attn,
    Block,
    Device,
    Dtype,
    Json,
    Out,
    Seed,
    Set,
    Size,
    Threads,
    emit,
    is_run,
    load,
    moved,
    note,
    overrides,
    placed,
    save_to,
    set_threads,
    sides,
)
from .request import as_begun, by_recipe, call_of
from .task import task_of

if TYPE_CHECKING:
    from torch import nn

    from effformer.train import Dataset, Objective, TrainConfig, TrainResult

    from .task import Task
    from .training import Watch

LONG = 100
"""Steps from which on it is worth to measure before how long they will take."""


def train(
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(
            help="Name of a model that draws images of classes, for instance sit-tiny, or tells them, for "
            "instance vit-tiny; with --resume also the folder of a run, with --recipe not needed."
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="Model, data and options that are known to work: digits, digits-quick, mnist (with --data "
            "mnist:DIR). What is given beside it wins."
        ),
    ] = None,
    data: Annotated[
        str,
        typer.Option(help="digits, mnist:DIR, cifar10:DIR, ..., or a folder of images by class."),
    ] = "digits",
    size: Size = None,
    validation: Annotated[
        float | None,
        typer.Option(
            help="Share of the data that is held out to measure loss and accuracy on; default: 0.1 for "
            "classifiers, else 0."
        ),
    ] = None,
    flip: Annotated[
        float, typer.Option(help="Probability of mirroring an image; not for digits or letters.")
    ] = 0.0,
    shift: Annotated[
        int, typer.Option(help="Most pixels by which images move at random.", max=10**4)
    ] = 0,
    steps: Annotated[int, typer.Option(help="Optimizer steps.", max=10**9)] = 1000,
    minutes: Annotated[
        float | None,
        typer.Option(help="As many steps as take this time here, instead of --steps.", max=10**6),
    ] = None,
    batch: Annotated[int, typer.Option(help="Samples per step.", max=10**6)] = 128,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 1e-3,
    warmup: Annotated[int, typer.Option(help="Steps of linear warm-up.", max=10**9)] = 100,
    train_pairs: Annotated[
        list[str] | None,
        typer.Option(
            "--train",
            help="Any other option of TrainConfig: ema=0.99, clip=null, schedule=constant, "
            "weight_decay=0.01, accumulate=4. May be repeated.",
            metavar="KEY=VALUE",
        ),
    ] = None,
    loss: Annotated[
        str | None,
        typer.Option(
            help="effformer list losses; with options flow-matching:time=logit-normal,cosine=1. Default: "
            "flow-matching; of classifiers cross-entropy, with cross-entropy:smoothing=0.1.",
            metavar="NAME[:KEY=VALUE,...]",
        ),
    ] = None,
    objective: Annotated[str | None, typer.Option(hidden=True)] = None,
    label_drop: Annotated[
        float | None, typer.Option(help="Share of labels dropped for guidance; default: 0.1.")
    ] = None,
    attn: Attn = None,
    ffn: FFN = None,
    block: Block = None,
    pairs: Set = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on from the last checkpoint in --out; --resume RUN alone goes on as RUN was begun.",
        ),
    ] = False,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.", max=10**9)] = 500,
    evaluate_every: Annotated[
        int,
        typer.Option(help="Steps between grids of samples and held-out losses.", max=10**9),
    ] = 500,
    device: Device = "cpu",
    dtype: Dtype = None,
    amp: Annotated[
        bool, typer.Option("--amp", help="Compute in bfloat16, on float32 weights.")
    ] = False,
    compiled: Annotated[bool, typer.Option("--compile", help="Compile the model.")] = False,
    seed: Seed = 0,
    threads: Threads = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Train a model; --out gets checkpoints, metrics.jsonl, samples, report.html and, at the end, the
    model.

    Image size, channels and number of classes follow the data. A killed run continues with --resume
    and ends with the same weights. Weights in --dtype bfloat16 follow copies in float32.

    Examples: `effformer train --recipe digits --attn flow -o runs/digits`, `effformer train --resume
    runs/digits`, `effformer train vit-nano --data digits -o runs/vit`, `effformer train sit-tiny --data photos --size 32 --loss
    flow-matching:time=logit-normal -o runs/photos`
    """
    import torch

    from ..files import check_folder
    from ..io import model_folder, save_pretrained
    from ..train import Augmented, TrainConfig, Validation
    from ..train import train as run
    from ..train.recipes import RECIPES
    from .training import Watch, header

    if validation is not None and not 0 <= validation < 1:
        raise ValueError(f"--validation must lie in [0, 1), got {validation:g}")
    if recipe is not None:
        return train(context, **by_recipe(recipe, context))
    if model is None:
        raise ValueError(f"train: which model? Name one, or add --recipe {next(iter(RECIPES))}")
    if resume and (is_run(Path(model)) or out is None):
        return train(context, **as_begun(Path(model), context))
    if objective is not None:
        note("train: --objective is now called --loss")
        loss = objective
    folder = save_to(out, "train")
    check_folder(folder / "model", **model_folder("trained", by="train"))
    if Path(model).is_dir():
        raise ValueError(f"train: {model} is a saved model; training starts from a model's name")
    _check_dtype(dtype)
    set_threads(threads)
    task = task_of(model, loss, label_drop)
    share = task.validation if validation is None else validation
    context.params["validation"] = share  # what the run keeps
    images, held_out = _split(data, sides(size), share, seed)
    changes = task.fitted(images) | overrides(attn, ffn, block, pairs)
    config = TrainConfig.from_dict(
        {"steps": steps, "batch": batch, "lr": lr, "warmup": min(warmup, steps), "seed": seed}
        | overrides(pairs=train_pairs, flag="--train"),
        where="train",
    )
    goal = task.objective
    changed = Augmented(task=goal, flip=flip, shift=shift) if flip or shift else goal
    network = moved(load(model, changes, seed=seed), device, dtype)
    trained: nn.Module = torch.compile(network) if compiled else network  # type: ignore[assignment]
    with torch.autocast(placed(device).type, torch.bfloat16, enabled=amp):
        config, pace = _timed(network, images, changed, config, minutes, folder if resume else None)
        note(title := header(network, images, config, pace))
        watch = Watch(
            folder, title, None if held_out is None else Validation(data=held_out, objective=goal),
            task.draws and images.value_range is not None and images["x"].shape[1] in (1, 3),
        )  # fmt: skip
        result = run(
            trained, images, changed, config, out=folder, resume=resume, save_every=save_every,
            evaluate=watch, evaluate_every=evaluate_every, about={"call": call_of(context, config.steps)},
        )  # fmt: skip
    saved = save_pretrained(network, folder / "model", by="train")
    emit(*_told(result, saved, watch, task), as_json)


def _told(result: TrainResult, saved: Path, watch: Watch, task: Task) -> tuple[dict[str, Any], str]:
    """What came of a training, for programs and for people."""
    report, measured = watch.report(), watch.measured()
    facts = {
        "model": str(saved), "steps": result.steps, "seconds": result.seconds, "loss": result.loss,
        "resumed": result.resumed, "checkpoint": str(result.checkpoint), "report": str(report),
    }  # fmt: skip
    right = f", {measured['val_accuracy']:.1%} of held-out images right" if measured else ""
    text = (
        f"{result.steps} steps in {result.seconds:.0f} s, loss {result.loss:.4f}{right}; model in {saved}, "
        f"curves in {report}; next: effformer "
        + (f"sample {watch.run} -o samples.png" if task.draws else f"evaluate {watch.run}")
    )
    return facts | measured, text


def _check_dtype(dtype: str | None) -> None:
    """Refuse numbers in which gradients vanish.

    Raises:
        ValueError: float16.
    """
    if dtype == "float16":
        raise ValueError(
            "train: --dtype float16: small gradients become zero in it, and this loop scales no losses; "
            "--dtype bfloat16 has the range of float32, --amp keeps weights in float32"
        )


def left(
    out: Path | None = None, model: str | None = None, resume: bool = False, **_: object
) -> str:
    """What an interrupted training leaves behind."""
    run = Path(model) if resume and model and is_run(Path(model)) else out
    if run is not None and any((run / "checkpoints").glob("step-*.safetensors")):
        return f"the last checkpoint is intact, effformer train --resume {run} goes on from it"
    return "there is no checkpoint yet, the training begins anew"


def _split(
    source: str, size: int | tuple[int, int] | None, share: float, seed: int
) -> tuple[Dataset, Dataset | None]:
    """What is learned, and what is held out."""
    from ..train import load_data

    data = load_data(source, size=size)
    return data.split(share, seed=seed) if share else (data, None)


def _timed(
    model: nn.Module,
    data: Dataset,
    objective: Objective,
    config: TrainConfig,
    minutes: float | None,
    resumed: Path | None,
) -> tuple[TrainConfig, float]:
    """The config with as many steps as are asked for, and the seconds of each, 0 for short runs.

    Raises:
        ValueError: no time at all.
    """
    from ..train import read_run
    from .training import seconds_per_step

    if minutes is not None and minutes <= 0:
        raise ValueError(f"--minutes must be positive, got {minutes:g}")
    if minutes is None and config.steps < LONG:
        return config, 0.0
    pace = seconds_per_step(model, data, objective, config)
    if minutes is None:
        return config, pace
    steps = max(int(minutes * 60 / pace), 1)
    if resumed is not None and is_run(resumed):  # its schedule ends where it was to end
        steps = read_run(resumed)["config"]["steps"]
    return config.replace(steps=steps, warmup=min(config.warmup, steps)), pace
