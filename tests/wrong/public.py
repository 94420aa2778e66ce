"""Right calls of every public function outside of `effformer.flow`: found in ``__all__``, with arguments
made by name.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import gc
import importlib
import inspect
import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import web_package
from effformer.compress.quant.control import Goal
from torch import nn

import effformer
from effformer import compress, export, profile, registry, train
from effformer import config as configs
from effformer.train import Dataset

from .corpus import Entry

__all__ = ["ENTRIES", "found"]

Make = Callable[[Path], Any]

TINY = {
    "depth": 1,
    "dim": 16,
    "heads": 2,
    "patch": 4,
    "input_size": 8,
    "channels": 1,
    "num_classes": 3,
}


@functools.cache
def _model(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return effformer.build_model(name, **{**TINY, **options})


def model(name: str, **options: Any) -> Make:
    return lambda folder: copy.deepcopy(_model(name, **options))


def dense(folder: Path) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 8), nn.GELU(), nn.Linear(8, 3))


def x(folder: Path) -> torch.Tensor:
    return torch.linspace(-1, 1, 128).reshape(2, 64)


def data(folder: Path) -> Dataset:
    images = torch.linspace(-1, 1, 6 * 64).reshape(6, 1, 8, 8)
    return Dataset("squares", {"x": images, "y": torch.arange(6) % 3}, ("a", "b", "c"))


def samples(folder: Path) -> list[dict[str, torch.Tensor]]:
    """Inputs of `dense`, as calibration takes them."""
    return [{"input": x(folder)}]


def adapted(folder: Path) -> nn.Module:
    return compress.adapt(dense(folder), {"rank": 2}, "*")[0]


def adapter(folder: Path) -> Path:
    return compress.save_adapter(adapted(folder), folder / "adapter")


def saved(folder: Path) -> Path:
    return effformer.save_pretrained(_model("sit-nano"), folder / "saved")


def finished(folder: Path) -> Path:
    effformer.save_pretrained(_model("sit-nano"), folder / "model")
    return folder


def weights(folder: Path) -> Path:
    return Path(effformer.save_weights(_model("sit-nano"), folder / "weights.safetensors"))


def packed(folder: Path) -> Path:
    small = compress.quantize(dense(folder), "int8")[0]
    return Path(effformer.save_weights(small, folder / "packed.safetensors"))


def looked_at(folder: Path) -> compress.Sensitivity:
    return compress.sensitivity(dense(folder), ["int8"], data=samples(folder), runs=1)


def looked_at_file(folder: Path) -> Path:
    looked_at(folder).save(folder / "looked at.json")
    return folder / "looked at.json"


RECIPE = {"steps": [{"prune": {"keep": 0.5}}, {"quantize": {"scheme": "int8"}}]}


def tried(folder: Path) -> compress.Exploration:
    row = compress.Tried(
        name="dense", steps=(), latency=1.0, seconds=1.0, size=1.0, macs=1.0, value=1.0, drop=0.0
    )
    goal = Goal(reference=1.0, max_drop=0.1, relative=False, best="high")
    return compress.Exploration(
        target="size", share=0.5, quality="error", goal=goal, rows=(row,), refused={}, how=""
    )


def recipe(folder: Path) -> Path:
    (folder / "recipe.yaml").write_text(json.dumps(RECIPE))
    return folder / "recipe.yaml"


def written(folder: Path) -> Path:
    (folder / "some.json").write_text('{"a": 1}')
    return folder / "some.json"


@functools.cache
def _graph() -> bytes:
    import tempfile

    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "graph.onnx"
        export.export_onnx(dense(path), path, x(path), verify=False)
        return path.read_bytes()


def graph(folder: Path) -> Path:
    (folder / "graph.onnx").write_bytes(_graph())
    return folder / "graph.onnx"


def of_graph(folder: Path) -> dict[str, torch.Tensor]:
    """What `graph` takes."""
    return {name: x(folder) for name in export.Session(graph(folder)).inputs}


def config(**options: Any) -> Make:
    return lambda folder: train.TrainConfig(
        **{"steps": 2, "batch": 2, "warmup": 0, "ema": 0.5, **options}
    )


@functools.cache
def _run() -> dict[str, bytes]:
    import tempfile

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        train.train(_flat(), data(folder), train.Classification(), config()(folder), out=folder)
        return {
            str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()
        }


def _flat() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), dense(Path()))


def run(folder: Path) -> Path:
    for name, content in _run().items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def new(name: str) -> Make:
    return lambda folder: folder / name


def given(value: Any) -> Make:
    return lambda folder: copy.copy(value)


def pictures(folder: Path) -> torch.Tensor:
    return data(folder)["x"]


def task(folder: Path) -> train.Objective:
    return train.Classification()


def things(folder: Path) -> registry.Registry:
    made = registry.Registry("thing", "effformer.attention")
    made.add(registry.Entry(name="a", kind="thing", build=dict))
    return made


def smallest(cls: type[Any]) -> Make:
    """The config of the smallest model of a family."""
    names = [e.name for e in registry.model if e.build is cls]
    name = min(names, key=lambda name: (not name.endswith(("nano", "tiny")), name))
    return given(registry.model.get(name).preset)


def nothing(*_: Any) -> None:
    pass


def objection(folder: Path) -> str:
    return ""


def candidate(**options: Any) -> Callable[[], Any]:
    """What is timed in a process of its own."""
    return lambda: x(Path()).sum()


RIGHT: dict[str, Make] = {
    "model": dense,
    "inputs": x,
    "data": data,
    "objective": task,
    "config": config(),
    "seed": given(1),
    "threads": given(1),
    "runs": given(1),
    "warmup": given(0),
    "rounds": given(1),
    "cases": given(1),
    "progress": given(nothing),
    "generator": lambda folder: torch.Generator().manual_seed(0),
    "path": new("new"),
    "folder": new("new"),
    "scheme": given("int8"),
    "call": given(lambda: x(Path()) + 1),
    "ledger": lambda folder: effformer.Ledger(),
}
"""Arguments by name; what is not here has its default."""

OWN: dict[str, dict[str, Make]] = {
    "build_model": {"name": given("sit-nano"), "depth": given(1), "attn": given("flow"), "ffn": given({"name": "swiglu"})},
    "list_attention": {"like": given("f*"), "causal": given(True), "mask": given("key")},
    "load_model": {"folder": saved},
    "load_weights": {"model": model("sit-nano"), "source": weights, "keep": given("final"), "config": given({"hidden_size": 16})},
    "convert_weights": {"model": model("sit-nano"), "source": weights, "path": new("new.safetensors")},
    "load_quantized": {
        "model": model("sit-nano"), "source": weights, "where": given("*"), "skip": given(("final",)), "scheme": given("int8"),
    },
    "save_pretrained": {"model": model("sit-nano")},
    "save_weights": {"path": new("new.safetensors")},
    "read_weights": {"source": weights},
    "replay": {"record": lambda folder: compress.quantize(dense(folder), "int8")[0].transforms[0]},
    "restore": {"path": packed},
    "read_json": {"path": written},
    "write_json": {"data": given({"a": [1, 2]})},
    "atomic_path": {"path": new("new.txt")},
    "atomic_folder": {"marker": given("some.json"), "own": given(("*.txt",)), "objection": given(objection)},
    "gate_tables": {"model": model("dydit-nano"), "times": lambda folder: torch.linspace(0, 900, 3)},
    "prepare_widths": {"model": model("dydit-nano"), "times": lambda folder: torch.linspace(0, 900, 3)},
    "sort_by_magnitude": {"model": model("sit-nano")},
    "optimize": {"rows": given(2)},
    "acmize": {
        "model": model("sit-nano"), "scheme": given({"seed": 0, "steps": [1, 1, 1], "batch": 2}), "data": given(None),
        "objective": given(train.Generation()), "progress": given(False),
    },
    "dynamize": {
        "model": model("sit-nano"), "scheme": given({"course": 0.5, "steps": 1, "batch": 2}), "data": given(None),
        "objective": given(train.Generation()), "progress": given(False),
    },
    "upcycle": {"model": model("sit-nano"), "scheme": given({"experts": 3}), "where": given("*")},
    "quantize": {"where": given("*"), "skip": given(("2",)), "data": samples},
    "quantize_": {"where": given(["0", "2"]), "data": samples},
    "MixedScheme": {"schemes": given({"0": "int4", "*": "int8"})},
    "sensitivity": {"schemes": given(["int8"]), "where": given("*"), "skip": given(("2",)), "data": samples},
    "Sensitivity.budget": {"bits": given(9.0)},
    "Sensitivity.expected": {"scheme": lambda folder: looked_at(folder).budget(bits=9.0)},
    "Sensitivity.read": {"path": looked_at_file},
    "Sensitivity.save": {"path": new("new.json")},
    "Recipe": {"steps": lambda folder: compress.Recipe.from_dict(RECIPE).steps},
    "Recipe.from_dict": {"given": given(RECIPE)},
    "Recipe.read": {"path": recipe},
    "explore": {
        "model": model("sit-nano"), "target": given("macs"), "share": given(0.9), "out": new("out"),
        "data": given(None), "max_drop": given(9.0),
    },
    "Exploration.cost": {"row": lambda folder: tried(folder).rows[0]},
    "Exploration.save": {"path": new("new.json")},
    "run_recipe": {"model": model("sit-nano"), "recipe": recipe, "out": new("out"), "data": given(None)},
    "choose_kernels": {"goal": given("size"), "forms": given(["int8-bitsandbytes"]), "cache": new("cache")},
    "quantize_within": {"metric": given(lambda model: 1.0), "where": given("*"), "data": samples},
    "quantize_onnx_within": {
        "path": graph, "out": new("out.onnx"), "metric": given(lambda session: 1.0), "scheme": given("int8"),
    },
    "plan": {"model": model("sit-nano"), "where": given("*")},
    "prune": {"model": model("sit-nano"), "scheme": given({"keep": 0.5}), "data": given(None), "objective": given(None)},
    "cut": {"model": model("sit-nano"), "kept": given({"blocks.0.attn.part": [1]})},
    "approximate": {
        "model": model("sit-nano"), "scheme": given({"batch": 4, "most": 2}), "where": given("*"), "data": data,
        "objective": given(train.Generation()),
    },
    "importance": {"model": model("sit-nano"), "where": given("*"), "data": given(None), "objective": given(None)},
    "sparsify": {"where": given("*"), "scheme": given({"kind": "magnitude"}), "data": samples},
    "linearize": {
        "model": model("sit-nano"),
        "scheme": given({"attn": "flow", "steps": 1, "whole": 1, "batch": 2}),
        "data": data,
        "objective": given(train.Generation()),
        "progress": given(False),
    },
    "adapt": {"scheme": given({"rank": 2}), "where": given("*")},
    "merge": {"model": adapted},
    "unadapt": {"model": adapted},
    "adapter_scale": {"model": adapted, "strength": given(0.5)},
    "save_adapter": {"model": adapted, "folder": new("adapter")},
    "load_adapter": {"folder": adapter},
    "recording": {"limit": given(4)},
    "Distillation": {"teacher": dense, "losses": given(("logits",)), "task": task, "weight": given(0.5)},
    "PruneScheme": {"keep": given(0.5)},
    "LinearizeScheme": {"attn": given("flow")},
    "Masks": {"masks": lambda folder: {"0": torch.ones(8, 8).bool()}},
    "Masks.apply_": {"model": dense},
    "check_part": {"name": given("mlp"), "kind": given("ffn")},
    "new_package": {"kind": given("ffn"), "name": given("squared")},
    "vit_config_from_timm": {"model": given("vit_tiny_patch16_224")},
    "benchmark": {"threads": given((1,)), "candidates": lambda folder: [profile.Candidate(name="a", load=candidate)]},
    "compare": {
        "models": lambda folder: [dense(folder), dense(folder)],
        "names": given(["a", "b"]),
        "time": given(False),
    },
    "breakdown": {"models": lambda folder: [dense(folder), dense(folder)], "names": given(["a", "b"])},
    "Breakdown.cells": {"path": given("0")},
    "Breakdown.save": {"path": new("new.json")},
    "interleave": {"candidates": lambda folder: {"a": dense(folder), "b": dense(folder)}},
    "dequantize": {"model": lambda folder: compress.quantize(dense(folder), "int8")[0]},
    "peak_rss": {"call": given(gc.collect)},
    "peak_memory": {"own": lambda folder: [x(folder)]},
    "accuracy": {"model": lambda folder: _flat()},
    "confusion": {"model": lambda folder: _flat()},
    "train": {"model": lambda folder: _flat(), "out": new("run"), "progress": given(False)},
    "train_classifier": {"config": config()},
    "load_checkpoint": {"source": run, "model": lambda folder: _flat()},
    "load_data": {"source": given("digits"), "size": given(4)},
    "read_checkpoint": {"source": run},
    "read_metrics": {"source": run},
    "read_graph": {"path": graph},
    "verify_onnx": {"path": graph},
    "graph_breakdown": {"path": graph},
    "quantize_onnx": {"path": graph, "out": new("out.onnx"), "scheme": given("matmul-nbits"), "keep": given(["0/node_linear_MatMul"]), "compared": lambda folder: (dense(folder), x(folder))},
    "calibrate_onnx": {"path": graph, "data": of_graph},
    "deviation": {"path": graph, "data": of_graph},
    "Calibration": {"ranges": given({"x": (0.0, 1.0)}), "rule": given("minmax"), "batches": given(1)},
    "export_onnx": {"path": new("new.onnx"), "output_names": given(["out"])},
    "export_web": {
        "bundle": given(Path(__file__).parents[1] / "saved/bundle"),
        "runtime": lambda folder: web_package.package(folder / "package"),
    },
    "export_bundle": {
        "model": model("sit-nano"), "steps": given(1), "guidance": given(1.0), "quantize": given(None),
        "verify": given(False), "shape": given((1, 8, 8)), "num_classes": given(3), "value_range": given((-1.0, 1.0)),
    },
    "export_text_bundle": {
        "model": model("bert-tiny", dim=16, heads=2, vocab=96, context=32), "quantize": given(None), "verify": given(False),
        "tokenizer": given(Path(__file__).parents[1] / "saved/texts"), "longest": given(8),
    },
    "export_stream_bundle": {"model": model("lmu-sequence-tiny")},
    "open_bundle": {"folder": given(Path(__file__).parents[1] / "saved/streams")},
    "Packing": {
        "indices": lambda folder: torch.arange(4), "offsets": lambda folder: torch.tensor([0, 2, 4]),
        "lengths": given((2, 2)), "padded": given(2),
    },
    "Rope": {"cos": lambda folder: torch.ones(3, 4), "sin": lambda folder: torch.ones(3, 4)},
    "Context": {
        "cond": lambda folder: torch.ones(2, 4), "mask": lambda folder: torch.ones(2, 3).bool(), "grid": given((1, 3)),
    },
    "Site": {"path": given("blocks.0"), "dim": given(8), "grid": given((2, 2))},
    "EMA": {"weights": dense, "warmup": given(True)},
    "EMA.update": {"weights": dense},
    "EMA.copy_to": {"weights": dense},
    "EMA.load_state_dict": {"state": lambda folder: train.EMA(dense(folder)).state_dict()},
    "Dataset": {
        "name": given("squares"), "tensors": lambda folder: dict(data(folder).tensors), "classes": given(("a", "b", "c")),
        "value_range": given((-1.0, 1.0)), "cut": given(0.25),
    },
    "Dataset.rows": {"index": lambda folder: torch.tensor([0, 2])},
    "Dataset.subset": {"index": lambda folder: torch.tensor([0, 2])},
    "Classifier.predict": {"samples": pictures},
    "Classifier.features": {"samples": pictures},
    "Classifier.recognised": {"samples": pictures, "labels": lambda folder: torch.arange(6) % 3},
    "Generation": {"loss": given("flow-matching"), "convention": given(None)},
    "Augmented": {"task": task},
    "read_run": {"source": run},
    "load_run": {"source": finished},
    "Budgeted": {"task": task, "target": given(0.5)},
    "Frugal": {"task": task, "target": given(0.5)},
    "LearnerDistillation": {"teacher": dense, "task": task},
    "GatePretraining": {"teacher": dense, "task": task},
    "GateTable.fraction": {"path": given("a")},
    "WorkTarget": {"share": given(0.5)},
    "QuantLinear": {"in_features": given(8), "out_features": given(4)},
    "QuantEmbedding": {"num_embeddings": given(8), "embedding_dim": given(4)},
    "Session": {"path": graph},
    "Session.run": {"feed": lambda folder: {"input": x(folder)}},
    "Target.problems": {"graph": lambda folder: export.read_graph(graph(folder))},
    "ComparisonRow.value": {"metric": given("macs")},
    "Comparison.pareto": {"x": given("params"), "y": given("macs")},
    "Comparison.save": {"path": new("new.json")},
    "Sweep.save": {"path": new("new.json")},
    "Sweep.times": {"name": given("Linear")},
    "Profile.save": {"path": new("new.json")},
    "Quality": {
        "model": given("a"), "data": given("b"), "classes": given(("c", "d")), "counts": given(((1, 0), (2, 3))),
        "judge": given(0.5), "distance": given(1.0), "floor": given(0.5), "how": given("so"),
    },
    "Quality.save": {"path": new("new.json")},
    "Registry": {"kind": given("thing"), "home": given("effformer.attention")},
    "Registry.add": {"entry": given(registry.Entry(name="b", kind="thing", build=dict))},
    "Registry.register": {"name": given("b"), "paper": given("2209.03003")},
    "Registry.get": {"name": given("a")},
    "Registry.describe": {"name": given("a")},
    "Registry.follow": {"function": given(nothing)},
    "Caps.satisfies": {"causal": given(True), "mask": given("key")},
    "Config.at": {"path": given("lr")},
    "Config.put": {"path": given("lr"), "value": given(0.5)},
    "Config.from_dict": {"data": given({"lr": 0.5})},
    "Config.changed": {"changes": given({"lr": 0.5})},
    "Config.replace": {"lr": given(0.5)},
}  # fmt: skip
"""Arguments of single functions and classes, beside those by name."""


LONG = {
    "train_classifier": ("config",),
    "benchmark": ("rounds", "runs", "warmup"),
    "explore": (
        "out",
        "data",
        "rounds",
        "steps",
        "samples",
        "threads",
        "quality",
        "max_drop",
        "told",
    ),
}
"""Arguments of which a wrong kind may be right and take minutes: {} are 1,000 steps, and so are many
rounds.
"""


INSTANCES: dict[str, Make] = {
    "Breakdown": lambda folder: profile.breakdown([dense(folder)], x(folder), runs=1),
    "Classifier": lambda folder: train.Classifier(_flat(), 1.0),
    "Caps": given(registry.Caps()),
    "Comparison": lambda folder: profile.compare([dense(folder)], x(folder), time=False),
    "ComparisonRow": lambda folder: profile.compare([dense(folder)], x(folder), time=False).rows[0],
    "Config": config(),
    "Dataset": data,
    "EMA": lambda folder: train.EMA(dense(folder)),
    "GateTable": lambda folder: compress.GateTable(torch.ones(2), {"a": torch.ones(2, 3).bool()}),
    "Exploration": tried,
    "Masks": lambda folder: compress.sparsify(dense(folder))[1],
    "Profile": lambda folder: profile.profile(dense(folder), x(folder)),
    "Quality": lambda folder: profile.Quality(
        model="a", data="b", classes=("c", "d"), counts=((1, 0), (2, 3))
    ),
    "Recipe": lambda folder: compress.Recipe.from_dict(RECIPE),
    "Registry": things,
    "Session": lambda folder: export.Session(graph(folder)),
    "Sensitivity": looked_at,
    "Sweep": lambda folder: profile.Sweep(
        "width", {1.0: profile.compare([dense(folder)], x(folder), names=["Linear"])}
    ),
    "Target": lambda folder: registry.target.get("onnx-cpu").preset,
}
"""Objects whose methods users call, by class."""

OURS = ("part", "resolve")
"""Functions that classes of parts are declared with."""

INSIDE = ("Context", "Ledger", "MatMulNBits", "Packing", "Rope", "Tap")
"""Classes whose methods parts and packed layers call; the contract gives parts wrong ones."""


def packages() -> Iterator[Any]:
    """Where public names stand; `effformer.flow` has calls of its own."""
    yield effformer
    yield from (
        getattr(effformer, name)
        for name in effformer.__all__
        if inspect.ismodule(getattr(effformer, name)) and name != "flow"
    )
    yield importlib.import_module("effformer.io")
    yield from (configs, registry)


def found() -> Iterator[Entry]:
    """Everything public that takes arguments."""
    names: dict[str, Any] = {}
    for package in packages():
        names |= {name: getattr(package, name) for name in package.__all__ if name not in OURS}
    for name, thing in names.items():
        called = inspect.isroutine(thing) or (inspect.isclass(thing) and made_by_users(thing))
        if not called or not arguments(name, thing):
            pass
        elif inspect.isroutine(thing):
            made = inspect.isgeneratorfunction(inspect.unwrap(thing))
            yield entry(name, entered(thing) if made else thing)
        else:
            yield entry(name, thing, functools.partial(constructed, thing))
        if inspect.isclass(thing):
            yield from methods(name, thing)


def made_by_users(cls: type[Any]) -> bool:
    """Whether a class is no result, no base class, no error, and looks at what it is made of."""
    if (
        cls is registry.Registry
        or inspect.isabstract(cls)
        or getattr(cls, "_is_protocol", False)
        or issubclass(cls, Exception)
    ):
        return False
    return hasattr(cls, "__post_init__") or not dataclasses.is_dataclass(cls)


def methods(name: str, cls: type[Any]) -> Iterator[Entry]:
    """Methods with arguments; parts and models are called by the contract tests."""
    own = [
        key
        for key in vars(cls)
        if not key.startswith("_")
        and inspect.isroutine(getattr(cls, key))
        and getattr(getattr(cls, key), "__module__", "").startswith("effformer")
        and len(inspect.signature(getattr(cls, key)).parameters) > 1
    ]
    if (
        not own
        or issubclass(cls, nn.Module)
        or inspect.isabstract(cls)
        or getattr(cls, "_is_protocol", False)
    ):
        return
    if name not in INSTANCES:
        known = name in INSIDE or issubclass(cls, configs.Config)
        assert known, f"{name}: say in INSTANCES how one is made"
        return
    for key in filter(lambda key: arguments(f"{name}.{key}", getattr(cls, key)), own):

        def call(folder: Path, key: str = key, **options: Any) -> Any:
            return getattr(INSTANCES[name](folder), key)(**options)

        yield entry(f"{name}.{key}", getattr(cls, key), call)


def constructed(cls: type[Any], folder: Path, **options: Any) -> Any:
    """What is made of right options may be large, and its weights do not matter."""
    models = issubclass(cls, effformer.models.Model)
    with torch.device("meta") if models else nullcontext():
        return cls(**options)


def entered(manager: Callable[..., Any]) -> Callable[..., Any]:
    """A context manager as a function."""

    @functools.wraps(manager)
    def call(*args: Any, **kwargs: Any) -> Any:
        with manager(*args, **kwargs) as inside:
            return inside

    return call


def arguments(name: str, call: Callable[..., Any]) -> dict[str, Make]:
    """What makes right arguments of a function."""
    own, makes = dict(OWN.get(name, {})), {}
    if inspect.isclass(call) and issubclass(call, effformer.models.Model):
        own["config"] = smallest(call)
    for parameter in inspect.signature(call).parameters.values():
        if parameter.name == "self" or parameter.kind in (
            parameter.VAR_KEYWORD,
            parameter.VAR_POSITIONAL,
        ):
            continue
        make = own.pop(parameter.name, RIGHT.get(parameter.name))
        if make is None:
            missing = parameter.default is parameter.empty
            assert not missing, f"{name}: say in OWN or RIGHT what {parameter.name} may be"
            make = given(parameter.default)
        makes[parameter.name] = make
    return makes | own


def entry(name: str, call: Callable[..., Any], bound: Callable[..., Any] | None = None) -> Entry:
    makes = arguments(name, call)
    return Entry(
        name, call, lambda folder: {key: make(folder) for key, make in makes.items()},
        skip=LONG.get(name, ()), method=bound,
    )  # fmt: skip


ENTRIES = list(found())
