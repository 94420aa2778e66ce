"""`effformer train`: a class-conditional flow on labelled images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..checks import unknown
from .common import (
    FFN,
    Attn,
    Block,
    Json,
    Out,
    Seed,
    Set,
    Threads,
    emit,
    load,
    note,
    overrides,
    save_to,
    set_threads,
)


def train(
    model: Annotated[
        str, typer.Argument(help="A model name of a flow family, for instance sit-tiny.")
    ],
    data: Annotated[
        str,
        typer.Option(help="digits, mnist:DIR, cifar10:DIR, ..., or a folder of images by class."),
    ] = "digits",
    size: Annotated[
        int | None, typer.Option(help="Resize images to this side.", min=1, max=2**14)
    ] = None,
    steps: Annotated[int, typer.Option(help="Optimizer steps.", max=10**9)] = 1000,
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
    loss: Annotated[str, typer.Option(help="effformer list losses.")] = "flow-matching",
    objective: Annotated[str | None, typer.Option(hidden=True)] = None,
    label_drop: Annotated[float, typer.Option(help="Share of labels dropped for guidance.")] = 0.1,
    attn: Attn = None,
    ffn: FFN = None,
    block: Block = None,
    pairs: Set = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint in --out.")
    ] = False,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.", max=10**9)] = 500,
    seed: Seed = 0,
    threads: Threads = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Train a model; --out gets checkpoints, metrics.jsonl and, at the end, the model.

    Image size, channels and number of classes follow the data. A killed run continues with --resume
    and ends with the same weights.

    Examples: `effformer train sit-tiny --set patch=1 --attn flow -o runs/digits`
    """
    from ..files import check_folder
    from ..io import model_folder, save_pretrained
    from ..train import Generation, TrainConfig, load_data
    from ..train import train as run

    if objective is not None:
        note("train: --objective is now called --loss")
        loss = objective
    folder = save_to(out, "train")
    check_folder(folder / "model", **model_folder("trained", by="train"))
    if Path(model).is_dir():
        raise ValueError(f"train: {model} is a saved model; training starts from a model's name")
    set_threads(threads)
    images = load_data(data, size=size)
    changes = _fit(model, images) | overrides(attn, ffn, block, pairs)
    config = TrainConfig.from_dict(
        {"steps": steps, "batch": batch, "lr": lr, "warmup": min(warmup, steps), "seed": seed}
        | overrides(pairs=train_pairs),
        where="train",
    )
    goal = Generation.from_dict({"loss": loss, "label_drop": label_drop}, where="train")
    network = load(model, changes, seed=seed)
    result = run(network, images, goal, config, out=folder, resume=resume, save_every=save_every)
    saved = save_pretrained(network, folder / "model", by="train")
    data_out = {
        "model": str(saved), "steps": result.steps, "seconds": result.seconds, "loss": result.loss,
        "resumed": result.resumed, "checkpoint": str(result.checkpoint),
    }  # fmt: skip
    text = (
        f"{result.steps} steps in {result.seconds:.0f} s, loss {result.loss:.4f}; model in {saved}"
    )
    emit(data_out, text, as_json)


def left(out: Path | None = None, **_: object) -> str:
    """What an interrupted training leaves behind."""
    if out is not None and any((out / "checkpoints").glob("step-*.safetensors")):
        return "the last checkpoint is intact, --resume goes on from it"
    return "there is no checkpoint yet, the training begins anew"


def _fit(model: str, images: Any) -> dict[str, Any]:
    """Config fields that the data decide.

    Raises:
        ValueError: the model is no class-conditional image model.
    """
    from ..registry import model as registry

    fitted = {
        "input_size": images["x"].shape[-1],
        "channels": images["x"].shape[1],
        "num_classes": len(images.classes),
        "learn_sigma": False,
    }
    fields = registry.get(model).preset.to_dict()
    if not set(fitted) <= set(fields):
        names = [e.name for e in registry if set(fitted) <= set(e.preset.to_dict())]
        raise unknown("class-conditional image model", model, names, where="train")
    return fitted
