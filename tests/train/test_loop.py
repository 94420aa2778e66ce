from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import effformer
from effformer.context import Ledger
from effformer.train import (
    Batch,
    Classification,
    Dataset,
    DivergenceError,
    Generation,
    Objective,
    TrainConfig,
    load_checkpoint,
    load_data,
    read_metrics,
    train,
)

CONFIG = TrainConfig(steps=20, batch=8, warmup=2, lr=1e-2, ema=0.9)


def toy(samples: int = 30) -> Dataset:
    data = load_data("digits")
    return data.subset(torch.arange(samples))


def net(seed: int = 0, dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 10)
    )


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_learns_the_digits() -> None:
    learned, held_out = load_data("digits").split(0.2, seed=0)
    model = net()
    config = TrainConfig(steps=300, batch=64, lr=1e-2, warmup=10, ema=0.99)
    result = train(model, learned, Classification(), config)
    assert result.steps == 300
    assert result.loss < 0.15
    assert (model(held_out["x"]).argmax(1) == held_out["y"]).double().mean() > 0.93


def test_same_seed_same_bits_other_seed_other_weights() -> None:
    models = [net(dropout=0.3) for _ in range(3)]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        train(model, toy(), Classification(), CONFIG.replace(seed=seed))
    assert torch.equal(weights(models[0]), weights(models[1]))
    assert not torch.equal(weights(models[0]), weights(models[2]))


def test_callers_randomness_and_mode_are_left_alone() -> None:
    model = net(dropout=0.3).eval()
    before = torch.get_rng_state()
    train(model, toy(), Classification(), CONFIG)
    assert torch.equal(torch.get_rng_state(), before)
    assert not model.training


def test_equals_a_loop_written_out() -> None:
    """AdamW, warm-up + cosine, clipping and averaging against torch used by hand."""
    data = toy(8)
    config = TrainConfig(
        steps=6, batch=8, warmup=2, lr=1e-2, weight_decay=0.1, clip=0.5, ema=0.5, betas=(0.8, 0.95)
    )
    ours, theirs = net().double(), net().double()
    data_x, average = data["x"].double(), [p.detach().clone() for p in theirs.parameters()]

    def objective(
        model: nn.Module, batch: Batch, generator: torch.Generator, ledger: Ledger
    ) -> Tensor:
        return nn.functional.cross_entropy(model(batch["x"].double()), batch["y"])

    train(ours, data, objective, config)
    matrices = [p for p in theirs.parameters() if p.dim() == 2]
    biases = [p for p in theirs.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": biases, "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=1.0, betas=(0.8, 0.95))
    for step in range(6):
        rate = [0.005, 0.01, *(0.005 * (1 + math.cos(math.pi * p / 4)) for p in range(4))][step]
        for group in reference.param_groups:
            group["lr"] = rate
        reference.zero_grad()
        nn.functional.cross_entropy(theirs(data_x), data["y"]).backward()
        nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        reference.step()
        decay = min(0.5, (2 + step) / (11 + step))
        for mean, p in zip(average, theirs.parameters(), strict=True):
            mean.mul_(decay).add_(p.detach(), alpha=1 - decay)
    for ours_p, mean in zip(ours.parameters(), average, strict=True):
        torch.testing.assert_close(ours_p.detach(), mean)


def test_accumulation_changes_nothing_but_memory() -> None:
    sizes: list[int] = []

    def objective(
        model: nn.Module, batch: Batch, generator: torch.Generator, ledger: Ledger
    ) -> Tensor:
        sizes.append(len(batch["y"]))
        return nn.functional.cross_entropy(model(batch["x"].double()), batch["y"])

    whole, parts = net().double(), net().double()
    train(whole, toy(), objective, CONFIG)
    assert set(sizes) == {8}
    train(parts, toy(), objective, CONFIG.replace(accumulate=4))
    assert sizes[-1] == 2
    torch.testing.assert_close(weights(whole), weights(parts))


def test_losses_of_the_ledger_count() -> None:
    def objective(
        model: nn.Module, batch: Batch, generator: torch.Generator, ledger: Ledger
    ) -> Tensor:
        ledger.loss("budget", torch.tensor(2.0))
        ledger.loss("budget", torch.tensor(1.0))
        return nn.functional.cross_entropy(model(batch["x"]), batch["y"]) * 0

    assert train(net(), toy(), objective, CONFIG).loss == 3.0


def test_frozen_parameters_stay() -> None:
    model = net()
    first = model[1]
    assert isinstance(first, nn.Linear)
    first.requires_grad_(False)
    before = first.weight.clone()
    train(model, toy(), Classification(), CONFIG)
    assert torch.equal(first.weight, before)
    with pytest.raises(ValueError, match="no trainable parameters"):
        train(model.requires_grad_(False), toy(), Classification(), CONFIG)


def test_result_files_and_metrics(tmp_path: Path) -> None:
    model = net()
    result = train(
        model,
        toy(),
        Classification(),
        CONFIG,
        out=tmp_path / "new" / "run",
        log_every=6,
        save_every=8,
    )
    run = tmp_path / "new" / "run"
    assert result.history == run / "metrics.jsonl"
    assert result.checkpoint == run / "checkpoints" / "step-00000020.safetensors"
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == [
        "step-00000016.safetensors", "step-00000020.safetensors",
    ]  # fmt: skip
    records = read_metrics(run)
    assert [r["step"] for r in records] == [6, 8, 12, 16, 18, 20]
    assert set(records[0]) == {"step", "loss", "lr", "grad_norm", "seconds"}
    assert records[-1]["loss"] == result.loss
    assert records[0]["loss"] > records[-1]["loss"]
    assert json.loads((run / "run.json").read_text())["config"] == CONFIG.to_dict() | {
        "betas": [0.9, 0.999]
    }
    # the model carries the averaged weights, the checkpoint both
    loaded = net(seed=1)
    assert load_checkpoint(run, loaded) == 20
    assert torch.equal(weights(loaded), weights(model))
    load_checkpoint(run, loaded, weights="raw")
    assert not torch.equal(weights(loaded), weights(model))


def test_without_average(tmp_path: Path) -> None:
    model = net()
    train(model, toy(), Classification(), CONFIG.replace(ema=None), out=tmp_path)
    loaded = net(seed=1)
    with pytest.raises(ValueError, match="no averaged weights"):
        load_checkpoint(tmp_path, loaded)
    load_checkpoint(tmp_path, loaded, weights="raw")
    assert torch.equal(weights(loaded), weights(model))


class Tied(nn.Module):
    """Two names of one matrix, and a buffer that is no part of the state dict."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)
        self.b.weight = self.a.weight
        self.register_buffer("scale", torch.tensor(0.5), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x.flatten(1)).relu() * self.scale)[:, :10]


def test_tied_weights(tmp_path: Path) -> None:
    model, loaded = Tied(), Tied()
    train(model, toy(), Classification(), CONFIG, out=tmp_path)
    load_checkpoint(tmp_path, loaded)
    assert loaded.a.weight is loaded.b.weight
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
    again = train(Tied(), toy(), Classification(), CONFIG, out=tmp_path, resume=True)
    assert again.resumed == 20


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_divergence_names_the_step_and_keeps_the_checkpoint(tmp_path: Path, where: str) -> None:
    calls = 0

    def objective(
        model: nn.Module, batch: Batch, generator: torch.Generator, ledger: Ledger
    ) -> Tensor:
        nonlocal calls
        calls += 1
        loss = nn.functional.cross_entropy(model(batch["x"]), batch["y"])
        if calls != 13:
            return loss
        # the square root has an infinite slope at 0
        return loss * math.nan if where == "loss" else loss + (weights_sum(model) * 0).sqrt()

    message = r"at step 13 of 20 \(last checkpoint: .*step-00000010"
    with pytest.raises(DivergenceError, match=message):
        train(net(), toy(), objective, CONFIG, out=tmp_path, save_every=5)
    assert read_metrics(tmp_path)[-1]["step"] == 10
    assert load_checkpoint(tmp_path, net()) == 10


def test_a_run_that_comes_to_nothing_leaves_nothing(tmp_path: Path) -> None:
    def objective(
        model: nn.Module, batch: Batch, generator: torch.Generator, ledger: Ledger
    ) -> Tensor:
        return weights_sum(model) * math.nan

    folder = tmp_path / "runs" / "a"
    with pytest.raises(DivergenceError, match="last checkpoint: none"):
        train(net(), toy(), objective, CONFIG, out=folder)
    assert not (tmp_path / "runs").exists()
    folder.mkdir(parents=True)
    with pytest.raises(DivergenceError):
        train(net(), toy(), objective, CONFIG, out=folder)
    assert not any(folder.iterdir())
    with pytest.raises(DivergenceError):
        train(net(), toy(), late(objective, 11), CONFIG, out=folder, log_every=5, save_every=50)
    assert read_metrics(folder)[-1]["step"] == 10


def late(wrong: Objective, step: int) -> Objective:
    """A classification that turns into something else at a step."""
    calls = iter(range(1, 100))

    def objective(
        model: nn.Module, batch: Batch, generator: torch.Generator, ledger: Ledger
    ) -> Tensor:
        right = next(calls) < step
        return (Classification() if right else wrong)(model, batch, generator, ledger)

    return objective


def weights_sum(model: nn.Module) -> Tensor:
    return torch.stack([p.sum() for p in model.parameters()]).sum()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"batch": 10, "accumulate": 3}, "not divisible"),
        ({"warmup": 21}, r"warmup must lie in 0\.\.20"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"lr": math.inf}, "lr must be positive, got inf"),
        ({"clip": 0.0}, "clip must be positive"),
        ({"weight_decay": -1.0}, "weight_decay must be at least 0"),
        ({"ema": 1.0}, r"lie in \[0, 1\)"),
        ({"schedule": "linear"}, "unknown value 'linear'"),
        ({"learning_rate": 1.0}, "unknown option 'learning_rate'"),
    ],
)
def test_config_is_checked(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CONFIG.replace(**change)


@pytest.mark.parametrize("option", ["log_every", "save_every", "keep"])
def test_options_are_checked(option: str) -> None:
    with pytest.raises(ValueError, match=f"{option} must be at least 1"):
        train(net(), toy(), Classification(), CONFIG, **{option: 0})  # type: ignore[arg-type]


def test_labels_must_fit_the_model() -> None:
    model = effformer.build_model("sit-nano", input_size=8, channels=1, num_classes=3)
    with pytest.raises(ValueError, match=r"labels up to 9, the model has 3 .*num_classes=10"):
        train(model, toy(), Generation(), CONFIG)


def test_config_survives_json() -> None:
    config = CONFIG.replace(clip=None, betas=(0.8, 0.9))
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(("answer", "words"), [(None, "None"), (torch.ones(3), "a tensor")])
def test_an_objective_that_returns_no_loss_is_refused(answer: Any, words: str) -> None:
    with pytest.raises(TypeError, match=f"objective must return one real number, got {words}"):
        train(net(), toy(), lambda *_: answer, CONFIG)
