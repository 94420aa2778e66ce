"""A diffusion transformer with half of its work, and with linear attention: what is still recognised.

Trains the model of `effformer demo`, compresses it, lets it follow itself, and asks the demo's judge.

Usage: python benchmarks/compress_digits.py [--small]
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from cpu_time import take_turns
from effformer.compress import Distillation, linearize, prune
from markdown import Row, write

import effformer
from effformer.cli.drawing import draw
from effformer.flow import FlowMatching
from effformer.profile import profile
from effformer.train import Dataset, Generation, TrainConfig, load_data, train, train_classifier
from effformer.train.classifier import RECIPE as JUDGE
from effformer.train.recipes import DIGITS

TASK = Generation(loss=FlowMatching.Config(time="logit-normal"))
BATCH = 20
"""Samples of a timed forward: one of each class, with and without its label."""
LOST = 2.0
"""Points of recognised samples that may be lost."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is measured; the small form only shows that the script runs."""

    judge: int = 300
    train: int = 1500
    recover: int = 1500
    steps: int = 600
    whole: int = 1500
    judged: int = 100
    runs: int = 31
    depth: int = 6


SMALL = Sizes(judge=20, train=2, recover=2, steps=2, whole=2, judged=1, runs=1, depth=1)


@dataclass(frozen=True, kw_only=True)
class Form:
    """One form of the model.

    Attributes:
        name: in words.
        model: the model.
        guided: share of the samples with guidance 2 that is recognised, in percent.
        plain: and without guidance, where mistakes show.
    """

    name: str
    model: Any
    guided: float
    plain: float


def judged(name: str, model: Any, judge: Any, count: int) -> Form:
    labels = list(range(10)) * count
    shares = []
    for guidance in (2.0, 1.0):
        samples = torch.from_numpy(draw(model.eval(), labels, steps=10, guidance=guidance, seed=1))
        shares.append(100 * judge.recognised(samples, torch.tensor(labels)))
    print(f"{name}: {shares}", flush=True)
    return Form(name=name, model=model, guided=shares[0], plain=shares[1])


def forms(data: Dataset, sizes: Sizes) -> list[Form]:
    judge = train_classifier(data, config=JUDGE.replace(steps=sizes.judge))
    torch.manual_seed(0)
    teacher: Any = effformer.build_model(DIGITS.model, **DIGITS.overrides, depth=sizes.depth)
    config = DIGITS.config.replace(steps=sizes.train, warmup=min(50, sizes.train))
    train(teacher, data, TASK, config, progress=False)
    made = [judged("softmax", teacher, judge, sizes.judged)]

    options = {"macs": 0.5, "importance": "taylor", "recover": "least-squares"}
    calibration = {name: x[:512] for name, x in data.tensors.items()}
    half, _ = prune(teacher, options, data=calibration, objective=TASK)
    made.append(judged("pruned to half of the MACs", half, judge, sizes.judged))
    follow = Distillation(teacher=teacher, losses="output", task=TASK, weight=0.0)
    config = TrainConfig(
        steps=sizes.recover, batch=32, lr=2e-3, warmup=min(50, sizes.recover), ema=0.99
    )
    train(half, data, follow, config, progress=False)
    made.append(judged("pruned, distilled", half, judge, sizes.judged))

    for attn in ("flow", "sana"):
        scheme = {"attn": attn, "steps": sizes.steps, "whole": sizes.whole, "batch": 32}
        rates = {"lr": 2e-3, "whole_lr": 1e-3}
        linear, report = linearize(
            teacher, scheme | rates, data=data, objective=TASK, progress=False
        )
        print(report, flush=True)
        made.append(judged(f"linearized to {attn}", linear, judge, sizes.judged))
    return made


def main() -> None:
    sizes = SMALL if "--small" in sys.argv else Sizes()
    torch.set_num_threads(1)
    made = forms(load_data("digits"), sizes)
    dense = made[0]
    config = dense.model.config
    macs = {form.name: profile(form.model, memory=False).total for form in made}
    inputs = dense.model.example_inputs(BATCH)
    calls = {form.name: partial(form.model, **inputs) for form in made}
    times = take_turns(calls, runs=sizes.runs)
    rows = []
    for form in made:
        name = form.name
        rows.append(Row(what=f"{name}: recognised, guidance 2", value=f"{form.guided:.1f} %"))
        lost = dense.plain - form.plain
        aim = f", {lost:+.1f} points lost" if form is not dense else ""
        rows.append(Row(what=f"{name}: recognised, no guidance", value=f"{form.plain:.1f} %{aim}"))
        ratio = macs[name] / macs[dense.name]
        half = name.startswith("pruned")
        rows.append(
            Row(what=f"{name}: multiply-adds", value=f"{macs[name]:,}", ratio=ratio,
                target=0.5 if half else None)
        )  # fmt: skip
        rows.append(
            Row(what=f"{name}: CPU time", value=times.median(name), spread=times.spread(name),
                ratio=times.ratio(name), target=0.58 if half else None)
        )  # fmt: skip
    short = [
        f.name for f in made[2:] if dense.plain - f.plain > LOST or dense.guided - f.guided > LOST
    ]
    within = "no" if short else "every"
    notes = [
        f"{10 * sizes.judged:,} samples of 10 Euler steps in each row; the judge is trained on real digits "
        "only. The aim is at most 2 points less than the model that it was made from, after recovery: "
        + (f"missed by {', '.join(short)}" if short else f"met by {within} form"),
        "recovery follows the velocities of the dense model and sees no target of its own",
        f"{sizes.train} steps of training; {sizes.recover} of recovery after pruning; {sizes.steps} and "
        f"{sizes.whole} of linearizing",
        f"{(config.input_size // config.patch) ** 2} tokens of width {config.dim}: linear attention has more MACs "
        "than softmax here, and its many small operators cost time; what it saves grows with the number of "
        "tokens (linear_cost.md)",
        "CPU time of one thread, 20 samples of few tokens: what every operator costs beside its multiply-adds is "
        "why half of these take more than 0.58x of the time",
    ]
    write(
        "compress_digits", "A digits diffusion transformer, pruned and linearized", rows, times.machine,
        notes, keep=sizes is not SMALL,
    )  # fmt: skip


if __name__ == "__main__":
    main()
