"""What `effformer demo` does, step by step, and what it remembers of it."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import load
from .drawing import draw, pixels
from .forms import candidate, keep_inputs

if TYPE_CHECKING:
    import numpy as np

    from effformer.export import VerifyReport
    from effformer.models.base import Model
    from effformer.profile import Comparison, Sweep
    from effformer.train import Classifier, Dataset
    from effformer.train.recipes import Recipe

__all__ = ["ATTENTIONS", "GATE", "SCHEMES", "Demo", "Form", "Grid", "run_demo"]

GATE = 0.90
"""Share of the samples that the classifier must recognise."""
ATTENTIONS, SCHEMES = ("softmax", "flow"), ("int8", "nf4")
EDGE = "flow int8"
"""The form that becomes the bundle."""
TORCH, RUNTIME = "torch", "onnxruntime"
LONGER, SIDES = "dit-tiny", (64, 128)
"""A model without training, and the sides of its images: patches of 2 make 1,024 and 4,096 tokens."""
BATCH = 20
"""Samples of a timed forward: one of each class, with and without its label."""


@dataclass(slots=True, kw_only=True)
class Form:
    """One form of one model.

    Attributes:
        name: attention and number format, for instance "flow int8".
        runtime: "torch" or "onnxruntime".
        bytes: size of the file that has to be shipped.
        recognised: share of its samples that the classifier takes for what they should be, None if
            it was not sampled.
        parameters: parameters of the dense model.
        macs: multiply-adds of one forward of one sample.
        milliseconds: number of threads -> median time of one forward of `BATCH` samples.
    """

    name: str
    runtime: str
    bytes: int
    recognised: float | None = None
    parameters: int = 0
    macs: int = 0
    milliseconds: dict[int, float] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Name and, where it is not torch, the runtime."""
        return self.name if self.runtime == TORCH else f"{self.name}, {self.runtime}"


@dataclass(frozen=True, slots=True)
class Grid:
    """A picture of ten images of each class, one class per row."""

    title: str
    note: str
    file: Path


@dataclass(slots=True, kw_only=True)
class Demo:
    """A run of the demo.

    Attributes:
        out: its folder.
        recipe: how both models are built, trained and sampled.
        seed: of everything random.
        per_class: samples of each class that are judged.
        judge: the classifier, trained on real digits only.
        forms: what was measured, in the order of the report.
        grids: pictures.
        losses: attention -> records of the training.
        parity: form -> comparison of its export with torch.
        mixing: share of the multiply-adds of the softmax model in which its tokens meet.
        scaling: (tokens, MACs with softmax, MACs with flow) of a larger model.
        longer: tokens -> `LONGER` with each of `ATTENTIONS`, measured.
        measured: how and on what the times were measured.
        seconds: step -> time.
        say: called with one line when a step is done.
    """

    out: Path
    recipe: Recipe
    seed: int
    say: Callable[[str], None]
    per_class: int = 50
    judge: Classifier
    data: Dataset
    forms: list[Form] = field(default_factory=list)
    grids: list[Grid] = field(default_factory=list)
    losses: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    parity: dict[str, VerifyReport] = field(default_factory=dict)
    mixing: float = 0.0
    scaling: list[tuple[int, int, int]] = field(default_factory=list)
    longer: Sweep | None = None
    measured: str = ""
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def labels(self) -> list[int]:
        """Labels of the judged samples: all classes in turn, so that any beginning is balanced."""
        return [c for _ in range(self.per_class) for c in range(len(self.data.classes))]

    def form(self, name: str, runtime: str = TORCH) -> Form:
        """A form by name."""
        return next(f for f in self.forms if (f.name, f.runtime) == (name, runtime))

    @property
    def gated(self) -> list[Form]:
        """The forms that must pass: both trained models, and the bundle."""
        return [*(self.form(a) for a in ATTENTIONS), self.form(EDGE, RUNTIME)]

    @property
    def passed(self) -> bool:
        """Every gated form is recognised well enough."""
        return all((f.recognised or 0.0) >= GATE for f in self.gated)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Time a step."""
        began = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began

    def picture(self, key: str, title: str, note: str, samples: np.ndarray[Any, Any]) -> None:
        """Keep ten samples of each class as a picture."""
        from ..export.run import write_image

        classes = len(self.data.classes)
        order = [row * classes + c for c in range(classes) for row in range(10)]
        file = self.out / "images" / f"{key}.png"
        file.parent.mkdir(exist_ok=True)
        write_image(file, pixels(samples[order]), zoom=4, force=True)
        self.grids.append(Grid(title, note, file))

    def judged(self, samples: np.ndarray[Any, Any]) -> float:
        """Share of the samples that are recognised."""
        import torch

        return self.judge.recognised(torch.from_numpy(samples), torch.tensor(self.labels))


def run_demo(
    out: Path,
    recipe: Recipe,
    *,
    seed: int = 0,
    per_class: int = 50,
    say: Callable[[str], None] = lambda line: None,
) -> Demo:
    """Train, sample, profile, quantize, export, verify and run; everything lands in ``out``.

    Args:
        out: folder of the demo; an interrupted run in it is continued.
        recipe: how both models are built, trained and sampled.
        seed: of everything random.
        per_class: samples of each class that are judged, at least ten.
        say: called with one line when a step is done.
    """
    from ..train import load_data, train_classifier

    began = time.perf_counter()
    data = load_data(recipe.data)
    judge = train_classifier(data, seed=seed)
    demo = Demo(
        out=out, recipe=recipe, seed=seed, say=say, per_class=per_class, judge=judge, data=data
    )
    demo.seconds["train the judge"] = time.perf_counter() - began
    say(f"judge: recognises {judge.accuracy:.1%} of real digits that it has not seen")
    _show_real(demo)
    models = {attn: _train(demo, attn) for attn in ATTENTIONS}
    models |= _quantize(demo, models)
    for name, model in models.items():
        _sample(demo, name, model)
    files = {attn: _export(demo, attn, models[attn]) for attn in ATTENTIONS}
    files[EDGE] = _bundle(demo, models[EDGE])
    _time(demo, models, files)
    _count(demo)
    _measure_longer(demo)
    return demo


def _show_real(demo: Demo) -> None:
    import torch

    rows = [torch.nonzero(demo.data["y"] == c)[:10, 0] for c in range(len(demo.data.classes))]
    images = demo.data["x"][torch.stack(rows, dim=1).flatten()]
    demo.picture("real", "Real digits", "UCI handwritten digits, 8 x 8", images.numpy())


def _train(demo: Demo, attn: str) -> Model:
    """Train one model, or finish the training that an earlier run began."""
    from ..io import save_pretrained
    from ..train import read_metrics, train

    recipe = demo.recipe
    config = recipe.config.replace(seed=demo.seed)
    with demo.step(f"train attn={attn}"):
        folder = demo.out / "runs" / f"{attn}-{config.steps}-{demo.seed}"
        model = _build(demo, attn)
        result = train(model, demo.data, recipe.objective, config, out=folder, resume=True)
        save_pretrained(model.eval(), demo.out / "models" / attn, force=True)
        demo.losses[attn] = read_metrics(folder)
    demo.say(f"attn={attn}: {result.steps} steps, loss {result.loss:.4f}")
    return model


def _build(demo: Demo, attn: str) -> Model:
    changes: dict[str, Any] = {**demo.recipe.overrides, "attn": attn}
    return load(demo.recipe.model, changes, seed=demo.seed)


def _quantize(demo: Demo, models: dict[str, Model]) -> dict[str, Model]:
    from ..compress import quantize
    from ..io import load_model, save_pretrained

    made = {}
    with demo.step("quantize"):
        for attn, model in models.items():
            for scheme in SCHEMES:
                small, report = quantize(model, scheme)
                folder = demo.out / "models" / f"{attn}-{scheme}"
                save_pretrained(small, folder, force=True)
                made[f"{attn} {scheme}"] = load_model(folder)
                demo.say(f"{attn} {scheme}: {report.ratio:.2f}x the bytes")
    return made


def _sample(demo: Demo, name: str, model: Model) -> None:
    """Sample a torch model and judge it."""
    recipe = demo.recipe
    with demo.step("sample"):
        samples = draw(
            model, demo.labels, steps=recipe.steps, guidance=recipe.guidance, seed=demo.seed
        )
        share = demo.judged(samples)
    key = name.replace(" ", "-")
    file = demo.out / "models" / key / "model.safetensors"
    demo.forms.append(Form(name=name, runtime=TORCH, bytes=file.stat().st_size, recognised=share))
    demo.picture(key, name, f"torch, {share:.1%} recognised", samples)
    demo.say(f"{name}: {share:.1%} of {len(samples)} samples recognised")


def _export(demo: Demo, name: str, model: Model) -> Path:
    """Write a dense model as an ONNX file."""
    from ..export import export_onnx

    file = demo.out / "onnx" / f"{name}.onnx"
    inputs = model.example_inputs(2)
    with demo.step("export and verify"):
        axes = {key: {0: "batch"} for key in inputs}
        report = export_onnx(model, file, inputs, dynamic=axes, force=True)
    assert report.parity is not None  # verification is on by default
    demo.parity[name] = report.parity
    demo.forms.append(Form(name=name, runtime=RUNTIME, bytes=report.graph.bytes))
    demo.say(f"{name}: exported, differs from torch by {report.parity.max_rel:.1e}")
    return file


def _bundle(demo: Demo, model: Model) -> Path:
    """Write the bundle, then let it sample in a process of its own that has no torch."""
    import numpy as np

    from ..export import export_bundle

    folder, target = demo.out / "bundle", demo.out / "images" / "bundle.npy"
    recipe = demo.recipe
    with demo.step("export and verify"):
        report = export_bundle(
            model, folder, steps=recipe.steps, guidance=recipe.guidance, force=True
        )
    assert report.parity is not None  # verification is on by default
    demo.parity[EDGE] = report.parity
    with demo.step("run the bundle"):
        labels = ",".join(map(str, demo.labels))
        words = ["--labels", labels, "--seed", str(demo.seed), "--out", str(target), "--force"]
        command = [sys.executable, str(folder / "run.py"), *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ValueError(f"demo: the bundle does not run: {done.stderr.strip()}")
        samples = np.load(target, allow_pickle=False)
        target.unlink()
    share, graph = demo.judged(samples), folder / "velocity.onnx"
    size = graph.stat().st_size
    demo.forms.append(Form(name=EDGE, runtime=RUNTIME, bytes=size, recognised=share))
    note = f"numpy and onnxruntime alone, {share:.1%} recognised"
    demo.picture("bundle", f"{EDGE} bundle", note, samples)
    demo.say(f"edge bundle: {share:.1%} of {len(samples)} samples recognised")
    return graph


def _time(demo: Demo, models: dict[str, Model], files: dict[str, Path]) -> None:
    """Time all forms, one per process, on one thread and on all."""
    from ..profile import benchmark

    with demo.step("measure latency"), tempfile.TemporaryDirectory(prefix="effformer.") as folder:
        place = Path(folder) / "inputs.safetensors"
        keep_inputs(models[ATTENTIONS[0]].example_inputs(BATCH), place)
        folders = {name: demo.out / "models" / name.replace(" ", "-") for name in models}
        found = benchmark(
            [
                *(candidate(name, "eager", path, place) for name, path in folders.items()),
                *(candidate(f"{n}, {RUNTIME}", "onnx", file, place) for n, file in files.items()),
            ],
            threads=_threads(), rounds=1, runs=21, warmup=3,
        )  # fmt: skip
    for form in demo.forms:
        form.milliseconds = {
            n: 1e3 * side.rows[form.label].median for n, side in found.sides.items()
        }
    demo.measured = found.how()


def _threads() -> tuple[int, ...]:
    """One, and all that torch may use."""
    import torch

    return tuple(sorted({1, torch.get_num_threads()}))


def _measure_longer(demo: Demo) -> None:
    """The same exchange where there is something to gain."""
    from ..profile import Sweep
    from .bench import Plan, at_value, measure

    plan = Plan(batch=1, forms=("eager",), threads=_threads(), rounds=1, runs=5, warmup=1)
    specs = {attn: f"{LONGER}:attn={attn}" for attn in ATTENTIONS}
    with demo.step("measure longer inputs"):
        found: dict[float, Comparison] = {
            (side // 2) ** 2: measure(at_value(specs, "input_size", side), plan)[0]
            for side in SIDES
        }
    demo.longer = Sweep("tokens", found)
    demo.say("; ".join(demo.longer.verdicts()))


def _count(demo: Demo) -> None:
    """Multiply-adds: of the two models, and of a published size on longer inputs."""
    import torch

    from ..build import build_model
    from ..profile import profile

    with demo.step("profile"):
        for attn in ATTENTIONS:
            model = _build(demo, attn)
            cost = profile(model, model.example_inputs(1), memory=False)
            if attn == "softmax":
                demo.mixing = cost.by_part["attn"] / cost.total
            for form in demo.forms:
                if form.name.split()[0] == attn:
                    form.parameters, form.macs = cost.params, cost.total
        with torch.device("meta"):
            for size in (32, 64, 128):
                soft, flow = (
                    profile(build_model("dit-b", attn=attn, input_size=size), memory=False).total
                    for attn in ATTENTIONS
                )
                demo.scaling.append(((size // 2) ** 2, soft, flow))
