"""What weights were trained to predict travels with them, through every kind of file and copy."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import assert_close
from effformer.compress import acmize, dequantize, optimize, quantize
from effformer.compress.dynamic import Budgeted, Frugal
from effformer.export import export_bundle
from effformer.export.run import Bundle
from torch import Tensor, nn

import effformer
from effformer.checks import FormatError
from effformer.cli.drawing import draw
from effformer.flow import (
    CONVENTIONS,
    Guidance,
    Trained,
    adapt,
    get_path,
    guided,
    sample,
    trained_of,
)
from effformer.flow.conventions import DIT, EFFFORMER
from effformer.train import EMA, Dataset, Generation, TrainConfig, load_checkpoint, load_data, train

FAMILIES = ("dit", "sit", "dydit", "lightningdit")
SMALL = {"input_size": 8, "channels": 1, "patch": 4, "num_classes": 10, "learn_sigma": False, "depth": 1, "dim": 16}  # fmt: skip
QUICK = TrainConfig(steps=2, batch=4, warmup=0, ema=0.9)
RECORD = Trained(
    convention=CONVENTIONS["sd3"].replace(path=get_path("gvp")),
    null=True, steps=4, value_range=(0.1, 0.7), latent_scale=0.3,
)  # fmt: skip


def digits(count: int = 8) -> Dataset:
    return load_data("digits").subset(torch.arange(count))


def build(name: str = "dit-nano", **changes: Any) -> Any:
    torch.manual_seed(0)
    return effformer.build_model(name, **{**SMALL, **changes})


@pytest.fixture(scope="module")
def marked() -> Any:
    model = build()
    with torch.no_grad():  # a DiT starts with output 0
        for p in filter(lambda p: p.requires_grad, model.parameters()):
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    model.trained = RECORD
    return model


def test_json_is_exact() -> None:
    assert Trained.from_dict(json.loads(json.dumps(RECORD.to_dict()))) == RECORD
    short = {"convention": {"name": "dit", "variance": False}}
    assert Trained.from_dict(short).convention == DIT.replace(variance=False)
    assert Trained.from_dict({"convention": "sit"}) == Trained(convention="sit")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 0}, {"steps": 2.5}, {"value_range": [1.0, 1.0]}, {"value_range": [0, float("inf")]},
        {"latent_scale": float("nan")}, {"latent_scale": 0}, {"convention": "ditt"}, {"null": 1},
        {"convention": {"data_at": 2}}, {"convention": {"data_at": 1, "label_scale": float("nan")}},
        {"convention": {"data_at": 1, "prediction": "speed"}}, {"time": 1}, {"convention": {}},
    ],
)  # fmt: skip
def test_damaged_records_are_refused(changes: dict[str, Any]) -> None:
    model = build()
    model.trained = RECORD.to_dict() | changes
    with pytest.raises((ValueError, TypeError), match="dit-nano: trained"):
        trained_of(model)


def test_a_record_is_values_or_a_config() -> None:
    with pytest.raises(TypeError, match=r"trained is an effformer.flow.Trained"):
        build().trained = "dit"


def test_models_without_a_record_are_taken_for_published_ones() -> None:
    found = {name: trained_of(build(f"{name}-nano")) for name in FAMILIES}
    counts = {name: record.convention for name, record in found.items() if record is not None}
    fixed = DIT.replace(variance=False)
    assert counts == {"dit": fixed, "dydit": fixed, "sit": EFFFORMER, "lightningdit": EFFFORMER}
    learned = trained_of(build(learn_sigma=True, label_dropout=0.0))
    assert learned == Trained(convention=DIT, null=False, latent_scale=0.18215)
    for name, convention in (("joint-dit-nano", EFFFORMER), ("relactrl-nano", DIT)):
        record = trained_of(effformer.build_model(name))
        assert record is not None
        assert record.convention == convention
    assert trained_of(effformer.build_model("vit-nano")) is None
    foreign = nn.Linear(2, 2)
    assert trained_of(foreign) is None
    foreign.trained = True  # type: ignore[assignment]
    assert trained_of(foreign) is None


def test_saved_folders_say_it(tmp_path: Path) -> None:
    """None where nobody said anything; a folder of an earlier version has no such line."""
    folder = effformer.save_pretrained(build(), tmp_path / "m")
    facts = json.loads((folder / "config.json").read_text())
    assert facts.pop("trained") is None
    (folder / "config.json").write_text(json.dumps(facts))
    assert effformer.load_model(folder).trained is None
    (folder / "config.json").write_text(json.dumps(facts | {"trained": "dit"}))
    with pytest.raises(FormatError, match="trained is 'dit', expected a dict or null"):
        effformer.load_model(folder)


def through_torch(model: Any, place: Path) -> Any:
    torch.save(model.state_dict(), place)
    fresh = build()
    effformer.load_weights(fresh, place)
    return fresh


def through_torch_alone(model: Any, place: Path) -> Any:
    memory = io.BytesIO()
    torch.save(model.state_dict(), memory)
    memory.seek(0)
    fresh = build()
    fresh.load_state_dict(torch.load(memory, weights_only=True))
    return fresh


def through_weights(layout: str) -> Any:
    def trip(model: Any, place: Path) -> Any:
        fresh, file = build(), place.with_suffix(".safetensors")
        effformer.load_weights(fresh, effformer.save_weights(model, file, layout=layout))
        return fresh

    return trip


def through_average(model: Any, place: Path) -> Any:
    ema, fresh = EMA(build(), 0.5), build()
    ema.update(model)
    again = EMA(build(), 0.5)
    again.load_state_dict(ema.state_dict())
    again.copy_to(fresh)
    return fresh


@pytest.mark.parametrize(
    "trip",
    [
        lambda model, place: effformer.load_model(effformer.save_pretrained(model, place)),
        through_torch, through_torch_alone, through_average, through_weights("effformer"),
        through_weights("official"),
        lambda model, place: copy.deepcopy(model),
        lambda model, place: torch.compile(model),
        lambda model, place: quantize(model, "int8", inputs=model.example_inputs())[0],
        lambda model, place: dequantize(quantize(model, "int8")[0]),
        lambda model, place: optimize(model),
        lambda model, place: acmize(model)[0],
        lambda model, place: effformer.load_model(
            effformer.save_pretrained(quantize(model, "nf4")[0], place)
        ),
    ],
)  # fmt: skip
def test_round_trips(trip: Any, marked: Any, tmp_path: Path) -> None:
    assert trained_of(trip(marked, tmp_path / "there")) == RECORD


def test_foreign_files_bring_what_was_published(tmp_path: Path) -> None:
    """A model that was trained otherwise is that no more."""
    state = dict(build().state_dict())
    official = next(lay for lay in build().LAYOUTS if lay.name == "official")
    model = build()
    model.trained = RECORD
    effformer.load_weights(model, official.from_ours(state, model.config))
    assert trained_of(model) == trained_of(build())
    assert model.trained is not None
    model.trained = RECORD
    effformer.load_weights(model, state)  # ours, and says nothing
    assert trained_of(model) == RECORD


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "loss",
    [
        "flow-matching", "pseudo-huber", {"name": "flow-matching", "prediction": "data"},
        {"name": "flow-matching", "prediction": "noise", "path": "vp"},
        {"name": "flow-matching", "time": {"name": "k-step", "k": 3}}, "distillation",
    ],
    ids=lambda loss: loss if isinstance(loss, str) else "-".join(map(str, loss.values()))[14:25],
)  # fmt: skip
def test_training_says_what_it_trains(family: str, loss: Any, tmp_path: Path) -> None:
    """Run, checkpoint and model carry it, and a sample is what the loss implies."""
    data, name = digits(), f"{family}-nano"
    if loss == "distillation":
        data = Dataset("pairs", {**data.tensors, "noise": torch.randn(8, 1, 8, 8)}, data.classes)
    model = build(name)
    train(model, data, Generation(loss=loss), QUICK, out=tmp_path)
    record = trained_of(model)
    config = Generation(loss=loss).loss
    path = "linear" if loss == "distillation" else config.path  # type: ignore[attr-defined]
    expected = EFFFORMER.replace(
        path=get_path(path), prediction=getattr(config, "prediction", "velocity")
    )
    assert record is not None
    assert record.convention == expected
    assert record.steps == (1 if loss == "distillation" else 3 if "k-step" in str(loss) else None)
    assert (record.null, record.value_range) == (True, data.value_range)
    assert json.loads((tmp_path / "run.json").read_text())["trained"] == model.trained
    fresh = build(name)
    load_checkpoint(tmp_path, fresh)
    assert trained_of(fresh) == record
    noise = torch.randn(2, 1, 8, 8)
    y = torch.tensor([1, 2])
    by_hand = sample(adapt(lambda x, t, **c: fresh(x, t, **c), expected), noise, y=y, steps=3).x
    assert torch.equal(sample(fresh, noise, y=y, steps=3).x, by_hand)
    rule = Guidance(2.0, {"y": 10})
    assert torch.equal(
        guided(fresh, 2.0, null={"y": 10})(noise, 0.5, y=y),
        sample_field(fresh, expected, rule, noise, y),
    )


def sample_field(model: Any, convention: Any, rule: Guidance, x: Tensor, y: Tensor) -> Tensor:
    field = adapt(lambda x, t, **c: model(x, t, **c), convention)
    null = torch.full_like(y, 10)
    both = field(torch.cat([x, x]), 0.5, y=torch.cat([y, null]))
    cond, without = both.chunk(2)
    return without + rule.scale * (cond - without)


def test_objectives_around_others_and_joint_models() -> None:
    dynamic = build(width="dynamic", tokens="dynamic", dim=32)
    train(dynamic, digits(), Frugal(task=Generation(label_drop=0.0), target=0.5), QUICK)
    digit = tuple("0123456789")
    assert trained_of(dynamic) == Trained(
        convention=EFFFORMER, value_range=(-1.0, 1.0), classes=digit
    )
    adaptive = acmize(build())[0]
    train(adaptive, digits(), Budgeted(task=Generation(), target=0.5), QUICK)
    assert trained_of(adaptive) == Trained(
        convention=EFFFORMER, null=True, value_range=(-1, 1), classes=digit
    )
    joint = effformer.build_model("joint-dit-nano", depth=1)
    drawn = {n: x for n, x in joint.example_inputs(8).items() if n != "t"}
    train(joint, Dataset("texts", drawn), Generation(loss="pseudo-huber"), QUICK)
    assert trained_of(joint) == Trained(convention=EFFFORMER)


def test_training_something_else_is_refused() -> None:
    model = build()
    model.trained = trained_of(model)
    with pytest.raises(ValueError, match=r"dit-nano were trained to predict the noise \(data_at=0"):
        train(model, digits(), Generation(), QUICK)
    model.trained = None
    train(model, digits(), Generation(), QUICK)
    train(model, digits(), Generation(loss="pseudo-huber"), QUICK)  # the same prediction
    control = effformer.build_model("relactrl-nano")
    control.backbone.trained = trained_of(control)
    assert control.trained == control.backbone.trained
    given = {n: x for n, x in control.example_inputs(8).items() if n != "t"}
    with pytest.raises(ValueError, match="relactrl-nano were trained to predict"):
        train(control, Dataset("controls", given), Generation(), QUICK)


def test_nothing_is_guessed() -> None:
    model, noise = build(), torch.randn(1, 1, 8, 8)
    for ask in (lambda: sample(model, noise, y=torch.tensor([1])), lambda: guided(model, 2.0, null={"y": 1})):  # fmt: skip
        with pytest.raises(ValueError, match="dit-nano does not say what its weights were trained"):
            ask()
    assert adapt(model).convention == DIT.replace(variance=False)
    with pytest.raises(TypeError, match="Linear does not say what it was trained to predict"):
        adapt(nn.Linear(2, 2))
    model.trained = Trained(convention=EFFFORMER)
    with pytest.raises(ValueError, match="its labels were never dropped in training"):
        draw(model, [1], guidance=2.0)
    assert draw(model, [1], steps=1).shape == (1, 1, 8, 8)  # no guidance by default


def test_a_bundle_follows_the_record(marked: Any, tmp_path: Path) -> None:
    """The numpy runner draws what torch draws, as the weights were trained, with their settings."""
    report = export_bundle(marked, tmp_path / "b")
    facts = json.loads((tmp_path / "b" / "bundle.json").read_text())
    assert facts["trained"] == marked.trained
    assert facts["network_convention"] == RECORD.convention.to_dict()
    assert (facts["sampler"]["steps"], facts["sampler"]["guidance"]) == (4, 2.0)
    assert facts["value_range"] == [0.1, 0.7]
    edge = Bundle(tmp_path / "b")
    assert edge.self_test() <= 1e-3
    noise = torch.randn(2, 1, 8, 8)
    expected = sample(
        adapt(lambda x, t, **c: marked(x, t, **c), RECORD.convention), noise, steps=4,
        guidance=Guidance(2.0, {"y": 10}), y=torch.tensor([3, 4]),
    ).x  # fmt: skip
    drawn = torch.from_numpy(edge.sample([3, 4], noise=noise.numpy()))
    assert_close(drawn, expected, rtol=1e-4, atol=1e-4)
    assert report.parity is not None
    edge.facts["self_test"]["sample"]["steps"] = 1
    with pytest.raises(ValueError, match="this machine's sample differs by"):
        edge.self_test()


def test_a_convention_that_contradicts_the_record_is_said(marked: Any, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="were trained to predict the velocity .*gvp"):
        export_bundle(marked, tmp_path / "b", convention="sit", verify=False)
    facts = json.loads((tmp_path / "b" / "bundle.json").read_text())
    assert facts["network_convention"] == EFFFORMER.to_dict()


@pytest.mark.slow
def test_the_error_of_a_quantized_bundle_is_its_own(marked: Any, tmp_path: Path) -> None:
    report = export_bundle(marked, tmp_path / "b", quantize="int4")
    assert report.parity is not None
    edge, given = Bundle(tmp_path / "b"), torch.randn(2, 1, 8, 8)
    y = torch.tensor([3, 4])
    field = adapt(lambda x, t, **c: marked(x, t, **c), RECORD.convention)
    with torch.no_grad():
        true = field(given, 0.5, y=y)
    found = torch.from_numpy(edge.velocity(given.numpy(), 0.5, y.numpy()))
    error = float((found - true).abs().max() / true.abs().max())
    assert 0.3 * error < report.parity.max_rel < 3 * error
    edge.self_test()
