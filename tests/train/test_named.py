"""Data of any kind train through the same verb: only the names of their tensors differ."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import effformer
from effformer.checks import CapabilityError
from effformer.context import Ledger
from effformer.train import (
    Batch,
    Classification,
    Dataset,
    Generation,
    TrainConfig,
    accuracy,
    train,
)

CONFIG = TrainConfig(steps=60, batch=16, lr=3e-3, warmup=5, ema=None)


def texts(samples: int = 200) -> Dataset:
    """Ragged texts in which token 7 occurs (class "seven") or does not; padding holds sevens."""
    rng = torch.Generator().manual_seed(0)
    tokens = torch.randint(8, 40, (samples, 12), generator=rng)
    labels = torch.randint(0, 2, (samples,), generator=rng)
    place = torch.randint(0, 4, (samples,), generator=rng)
    tokens[torch.arange(samples), place] = torch.where(labels == 1, 7, tokens[:, 0])
    mask = torch.arange(12) < torch.randint(4, 13, (samples, 1), generator=rng)
    tokens = tokens.where(mask, 7)
    named = {"tokens": tokens, "mask": mask, "labels": labels}
    return Dataset("sevens", named, ("none", "seven"), target="labels")


class TextClassifier(nn.Module):
    """A text encoder with logits; what it calls its inputs is all that training knows of it."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = effformer.build_model("bert-tiny", vocab=40, context=12, dropout=0.0)
        self.head = nn.Linear(48, 2)

    def forward(
        self, tokens: Tensor, mask: Tensor | None = None, *, ledger: Ledger | None = None
    ) -> Tensor:
        return self.head(self.encoder(tokens, mask=mask, ledger=ledger).pooled)


def test_texts_are_classified() -> None:
    torch.manual_seed(0)
    learned, held_out = texts().split(0.25)
    model = TextClassifier()
    assert accuracy(model, held_out) < 0.75
    train(model, learned, Classification(target="labels"), CONFIG, progress=False)
    assert accuracy(model, held_out) > 0.9
    blind = Dataset("blind", {k: v for k, v in held_out.tensors.items() if k != "mask"},
                    held_out.classes, target="labels")  # fmt: skip
    assert accuracy(model, blind) < accuracy(model, held_out)


def series(model: Any) -> Dataset:
    """Two classes of series that begin at zero, rising and falling, as a model takes them."""
    x, *_ = model.example_inputs(40, generator=torch.Generator().manual_seed(0)).values()
    y = torch.arange(40) % 2
    slope = torch.linspace(0, 1, x.shape[1]).view(-1, 1) * (2 * y - 1).view(-1, 1, 1)
    named = {"x": x * 0.1 + slope, "mask": torch.ones(x.shape[:2]).bool(), "y": y}
    return Dataset("slopes", named, ("falling", "rising"))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("flowformer-series",
         {"dim": 16, "heads": 2, "depth": 1, "length": 12, "ffn": {"hidden": 16}, "dropout": 0.0}),
        ("lmu-sequence-tiny", {"num_classes": 2}),
        ("lmuformer-tiny", {"num_classes": 2}),
    ],
)  # fmt: skip
def test_series_are_classified_by_models_that_differ_in_what_they_take(
    name: str, options: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    model = effformer.build_model(name, **options)
    data = series(model)
    result = train(model, data, Classification(), CONFIG.replace(steps=50, lr=2e-2), progress=False)
    assert result.loss < 0.5
    assert accuracy(model.eval(), data) == 1.0


def test_conditions_are_what_the_model_takes() -> None:
    seen: dict[str, Any] = {}

    class Conditioned(nn.Module):
        def forward(
            self, x: Tensor, t: Tensor, *, text: Tensor, text_mask: Tensor | None = None
        ) -> Tensor:
            seen.update(text=text, text_mask=text_mask)
            return torch.zeros_like(x)

    batch = Batch(
        x=torch.zeros(3, 2), y=torch.arange(3), text=torch.ones(3, 4), text_mask=torch.ones(3, 4)
    )
    loss = Generation()(Conditioned(), batch, torch.Generator().manual_seed(0), Ledger())
    assert loss.isfinite()
    assert seen["text"] is batch["text"]
    assert seen["text_mask"] is batch["text_mask"]


def test_a_controlled_model_gets_its_condition() -> None:
    torch.manual_seed(0)
    model: Any = effformer.build_model(
        "relactrl-nano", changes={"depth": 3, "input_size": 8, "num_classes": 10,
                                  "learn_sigma": False},
    )  # fmt: skip
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.05)  # what starts at zero learns later
    given = model.example_inputs(6)
    data = Dataset("pairs", {name: given[name] for name in ("x", "y", "condition")})
    before = [p.detach().clone() for p in model.control.parameters()]
    train(model, data, Generation(), CONFIG.replace(steps=2, batch=3, warmup=0), progress=False)
    after = list(model.control.parameters())
    assert not all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_noise_that_data_were_made_from_makes_pairs() -> None:
    class Straight(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return torch.full_like(x, 2.0)

    noise = torch.randn(5, 3)
    batch = Batch(x=noise + 2.0, noise=noise)
    rng = torch.Generator().manual_seed(0)
    assert Generation()(Straight(), batch, rng, Ledger()) < 1e-10
    assert Generation(loss="distillation")(Straight(), batch, rng, Ledger()) < 1e-10  # type: ignore[arg-type]


def test_labels_that_cannot_be_dropped_are_refused() -> None:
    class Labelled(nn.Module):
        def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            return torch.zeros_like(x)

    batch = Batch(x=torch.zeros(2, 2), y=torch.arange(2))
    rng = torch.Generator().manual_seed(0)
    assert Generation(label_drop=0.0)(Labelled(), batch, rng, Ledger()).isfinite()
    with pytest.raises(CapabilityError, match=r"Labelled.forward has no argument 'drop'.*=0"):
        Generation(label_drop=0.1)(Labelled(), batch, rng, Ledger())


def test_missing_names_are_told() -> None:
    data = texts(8)
    with pytest.raises(ValueError, match=r"Classification: target: unknown tensor 'y'.*labels"):
        train(TextClassifier(), data, Classification(), CONFIG, progress=False)
    with pytest.raises(ValueError, match=r"Generation: data: unknown tensor 'x'.*tokens"):
        train(TextClassifier(), data, Generation(), CONFIG, progress=False)
    images = Dataset("images", {"mask": torch.ones(4, 12).bool(), "labels": torch.zeros(4).long()})
    with pytest.raises(TypeError, match=r"Classification: inputs do not fit .*'tokens'"):
        train(TextClassifier(), images, Classification(target="labels"), CONFIG, progress=False)


def test_runs_on_named_tensors_resume_exactly(tmp_path: Path) -> None:
    def start(out: Path, steps: int) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model, calls = TextClassifier(), 0

        class Interrupted(Classification):
            def __call__(self, *args: Any) -> Tensor:
                nonlocal calls
                calls += 1
                if calls > steps:
                    raise KeyboardInterrupt
                return Classification.__call__(self, *args)

        config = CONFIG.replace(steps=8)
        train(
            model, texts(20), Interrupted(target="labels"), config,
            out=out, resume=True, save_every=2, progress=False,
        )  # fmt: skip
        return model.state_dict()

    whole = start(tmp_path / "whole", 8)
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path / "cut", 5)
    torch.testing.assert_close(start(tmp_path / "cut", 8), whole, rtol=0, atol=0)


def test_runs_say_which_target_they_have_unless_it_is_the_usual_one(tmp_path: Path) -> None:
    """Runs that began before targets had names must still resume."""
    config = CONFIG.replace(steps=1, warmup=0)
    train(TextClassifier(), texts(8), Classification(target="labels"), config, out=tmp_path / "a")
    described = json.loads((tmp_path / "a" / "run.json").read_text())["objective"]
    assert described == {"class": "Classification", "smoothing": 0.0, "target": "labels"}
    images = Dataset("", {"x": torch.zeros(4, 1, 2, 2), "y": torch.arange(4)}, tuple("abcd"))
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 4))
    train(net, images, Classification(), config, out=tmp_path / "b")
    described = json.loads((tmp_path / "b" / "run.json").read_text())["objective"]
    assert described == {"class": "Classification", "smoothing": 0.0}
