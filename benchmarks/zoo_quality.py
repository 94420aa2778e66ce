"""What every attention of the zoo reaches under one small recipe, and the nodes of its ONNX graph.

Adds to the forms of ``benchmarks/results/zoo.csv``, hybrids included; times stay as they were
measured. A run that was ended goes on; names measure those forms anew:

    python benchmarks/zoo_quality.py [flow "flow 1:1 softmax" ...]
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from effformer.export import export_onnx
from markdown import Row, write
from torch import Tensor, nn
from zoo import QUALITY, TABLE, Form, build, inputs, load, needed, save

from effformer import build_model
from effformer.cli.drawing import draw
from effformer.context import Context
from effformer.flow import FlowMatching, frechet_distance
from effformer.profile import machine
from effformer.train import (
    Classification,
    Classifier,
    Dataset,
    Generation,
    TrainConfig,
    accuracy,
    load_data,
    train,
    train_classifier,
)

SEEDS = (0, 1, 2)
REPEATED = ("softmax",)
"""Forms that are trained from every seed, the others from the first."""
STEPS, SMALL_STEPS = 300, 2
BATCH, LR, WARMUP, EMA = 32, 6e-3, 20, 0.98
DEPTH, DIM, HEADS = 2, 48, 2
PAIRS, KEYS, VALUES, SIDE = 18, 36, 16, 6
"""Of the recall: tokens that hold a key and its value, the words of both, and the side of the grid of all
tokens.
"""
TOKENS = 256
"""Of the graphs."""
FORMATS = {
    "vit_accuracy": "{:.1%}",
    "dit_distance": "{:.2f}",
    "recall": "{:.1%}",
    "onnx_nodes": "{:.0f}",
}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How everything is trained.

    Attributes:
        steps: optimizer steps.
        seed: of the initial weights, the data and the order.
    """

    steps: int
    seed: int

    def config(self) -> TrainConfig:
        return TrainConfig(
            steps=self.steps, batch=BATCH, lr=LR, warmup=min(WARMUP, self.steps), ema=EMA, seed=self.seed
        )  # fmt: skip

    def model(self, name: str, form: Form, **options: object) -> nn.Module:
        torch.manual_seed(self.seed)
        layers = {"layers": form.layers} if form.layers else {}
        return build_model(name, attn=form.attn, depth=DEPTH, **layers, **options)


def vit(form: Form, recipe: Recipe) -> float:
    """Share of held-out digits that a ViT of 16 patches recognises."""
    learned, held_out = load_data("digits").split(0.2, seed=0)
    model = recipe.model("vit-nano", form)
    train(model, learned, Classification(smoothing=0.05), recipe.config(), progress=False)
    return accuracy(model.eval(), held_out)


@cache
def judge() -> Classifier:
    return train_classifier(load_data("digits"))


def dit(form: Form, recipe: Recipe) -> float:
    """Frechet distance of 300 digits, drawn by a DiT of 16 patches, from all real ones."""
    data = load_data("digits")
    model = recipe.model(
        "dit-nano", form, input_size=8, channels=1, num_classes=10, learn_sigma=False
    )
    objective = Generation(loss=FlowMatching.Config(time="logit-normal"))
    train(model, data, objective, recipe.config(), progress=False)
    samples = torch.from_numpy(
        draw(model.eval(), [i % 10 for i in range(300)], steps=10, guidance=2.0)
    )
    return frechet_distance(judge().features(samples), judge().features(data["x"]))


class Reader(nn.Module):
    """Tokens that hold a key and its value, then as many that ask for them: (B, 2 PAIRS, 2) words to
    the logits of the values that are asked for, (B * PAIRS, VALUES).
    """

    def __init__(self, form: Form) -> None:
        super().__init__()
        self.keys, self.values = nn.Embedding(KEYS, DIM), nn.Embedding(VALUES + 1, DIM)
        names = [form.attn, "softmax" if form.layers else form.attn]
        self.mixers = nn.ModuleList(
            build(name, form.causal, 2 * PAIRS, dim=DIM, heads=HEADS) for name in names
        )
        self.norms = nn.ModuleList(nn.LayerNorm(DIM) for _ in range(2 * len(names)))
        self.ffns = nn.ModuleList(
            nn.Sequential(nn.Linear(DIM, 4 * DIM), nn.GELU(), nn.Linear(4 * DIM, DIM))
            for _ in names
        )
        self.head = nn.Sequential(nn.LayerNorm(DIM), nn.Linear(DIM, VALUES))

    def forward(self, x: Tensor) -> Tensor:
        y = self.keys(x[..., 0]) + self.values(x[..., 1])
        ctx = Context(grid=(SIDE, SIDE), time=torch.zeros(len(x), DIM))
        for i, (mixer, ffn) in enumerate(zip(self.mixers, self.ffns, strict=True)):
            y = y + mixer(self.norms[2 * i](y), ctx)
            y = y + ffn(self.norms[2 * i + 1](y))
        logits: Tensor = self.head(y[:, PAIRS:]).flatten(0, 1)
        return logits


def pairs(samples: int, seed: int) -> Dataset:
    """Keys are drawn without repetition, and asked for in another order; the last word of the values
    stands where one is asked for.
    """
    generator = torch.Generator().manual_seed(seed)
    keys = torch.rand(samples, KEYS, generator=generator).argsort(1)[:, :PAIRS]
    values = torch.randint(VALUES, (samples, PAIRS), generator=generator)
    order = torch.rand(samples, PAIRS, generator=generator).argsort(1)
    told = torch.stack([keys, values], -1)
    asked = torch.stack([keys.gather(1, order), torch.full_like(values, VALUES)], -1)
    return Dataset("pairs", {"x": torch.cat([told, asked], 1), "y": values.gather(1, order)})


def answered(
    model: nn.Module, batch: dict[str, Tensor], generator: object, ledger: object
) -> Tensor:
    return nn.functional.cross_entropy(model(batch["x"]), batch["y"].flatten())


def recall(form: Form, recipe: Recipe) -> float:
    """Share of the questions that are answered rightly; by chance 1 of 16."""
    torch.manual_seed(recipe.seed)
    model = Reader(form)
    train(model, pairs(20_000, recipe.seed), answered, recipe.config(), progress=False)
    test = pairs(500, 99)
    with torch.inference_mode():
        said = model.eval()(test["x"]).argmax(-1)
    return (said == test["y"].flatten()).double().mean().item()


class Layer(nn.Module):
    """A layer of the zoo with its context; of a hybrid both."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        names = [form.attn, "softmax"] if form.layers else [form.attn]
        self.mixers = nn.ModuleList(build(name, form.causal, TOKENS) for name in names)
        self.ctx = inputs(TOKENS)[1]

    def forward(self, x: Tensor) -> Tensor:
        for mixer in self.mixers:
            x = mixer(x, self.ctx)
        return x


def nodes(form: Form) -> float:
    """Nodes of the graph of a layer; of a hybrid on average."""
    layer = Layer(form).eval()
    with tempfile.TemporaryDirectory(prefix="effformer.") as folder:
        given = {"x": inputs(TOKENS)[0]}
        report = export_onnx(layer, Path(folder) / "layer.onnx", given, dynamic=None, verify=False)
    return sum(report.graph.operators.values()) / len(layer.mixers)


MEASURED: dict[str, Callable[[Form, Recipe], float]] = {
    "vit_accuracy": vit, "dit_distance": dit, "recall": recall,
}  # fmt: skip


def measure(form: Form, steps: int, seed: int = 0) -> dict[str, str]:
    """Cells of a form by column, empty where it cannot do what the task asks for."""
    cells = dict.fromkeys(QUALITY, "")
    for task, run in MEASURED.items():
        if form.causal and run is not recall:  # images are not read in an order
            continue
        try:
            cells[task] = f"{run(form, Recipe(steps=steps, seed=seed)):.4g}"
        except ValueError as error:
            print(f"{form}, {task}: {error}", file=sys.stderr)
    return cells


def counted(form: Form) -> str:
    try:
        return f"{nodes(form):.0f}"
    except ValueError as error:
        print(f"{form}, ONNX: {error}", file=sys.stderr)
        return ""


def rows(found: dict[Form, dict[str, str]]) -> list[Row]:
    """One line a form, those that recall most first."""
    return [
        Row(what=str(form), value="; ".join(_words(cells)))
        for form, cells in sorted(found.items(), key=lambda item: -float(item[1]["recall"] or 0))
        if cells["recall"]
    ]


def _words(cells: Mapping[str, str]) -> list[str]:
    named = {task.replace("_", " "): (task, form) for task, form in FORMATS.items()}
    return [
        f"{name} {form.format(float(cells[task]))}"
        for name, (task, form) in named.items()
        if cells[task]
    ]


def spread(steps: int) -> str:
    """The range of some forms over the seeds, in words."""
    said = []
    for name in REPEATED:
        cells = [measure(Form(attn=name), steps, seed) for seed in SEEDS]
        ranges = (
            f"{task.replace('_', ' ')} {form.format(min(v))} to {form.format(max(v))}"
            for task, form in FORMATS.items()
            if (v := [float(one[task]) for one in cells if one[task]])
        )
        said.append(f"{name} {', '.join(ranges)}")
    return f"over {len(SEEDS)} seeds: {'; '.join(said)}"


def main(*, small: bool = False, only: tuple[str, ...] = ()) -> None:
    torch.set_num_threads(1)
    steps = SMALL_STEPS if small else STEPS
    chosen = only or (("flow",) if small else ())
    made = {}
    for form, cells in needed(load(TABLE)).items():
        if not {form.attn, str(form)} & set(chosen) if chosen else cells["recall"]:
            continue
        began = time.process_time()
        made[form] = measure(form, steps) | {"onnx_nodes": counted(form)}
        words = ", ".join(_words(made[form]))
        print(f"{form}: {words}; {time.process_time() - began:.0f} s", file=sys.stderr)
        if not small:  # read anew: others may have added theirs
            table = load(TABLE)
            save(TABLE, table, {**needed(table), form: made[form]})
    found = {**needed(load(TABLE)), **made}
    notes = NOTES if only or small else [*NOTES, spread(steps)]
    if missing := [str(form) for form, cells in found.items() if not cells["recall"]]:
        notes = [*notes, f"not measured yet: {'; '.join(missing)}"]
    write(
        "zoo_quality",
        "What one small recipe reaches",
        rows(found),
        machine(),
        notes,
        keep=not small,
    )


NOTES = [
    f"seed {SEEDS[0]}; all tasks: {STEPS} steps of {BATCH} "
    f"samples, AdamW with learning rate {LR:g} after {WARMUP} steps of warm-up, cosine to 0, averaged "
    f"weights with decay {EMA:g}, {DEPTH} layers of width {DIM} with {HEADS} heads, nothing tuned for any form",
    "vit accuracy: `vit-nano` on the digits, 16 tokens, share of 360 held-out ones; of forms that attend "
    "both ways",
    "dit distance: `dit-nano` on the digits, 16 tokens, 300 samples of 10 Euler steps at guidance 2, Frechet "
    "distance from the real ones in the features of a small classifier (smaller is better, not comparable with "
    "published FIDs); of forms that attend both ways",
    f"recall: {PAIRS} tokens that hold one of {KEYS} keys and one of {VALUES} values each, then as many that "
    f"ask for a key; share of right values, by chance 6 %; {2 * PAIRS} tokens without positions",
    f"onnx nodes: of the graph of one layer of width 384 at {TOKENS} tokens; of a hybrid on average over its layers",
    "layers=1:1 is one layer of the named attention, then one of softmax",
    "300 steps tell how easily a form learns, not what it can reach in the end",
]


if __name__ == "__main__":
    names = tuple(word for word in sys.argv[1:] if not word.startswith("--"))
    main(small="--small" in sys.argv[1:], only=names)
