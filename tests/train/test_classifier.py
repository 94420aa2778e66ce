from __future__ import annotations

import pytest
import torch
from torch import nn

from effformer.train import (
    Classifier,
    TrainConfig,
    accuracy,
    confusion,
    load_data,
    train_classifier,
)


@pytest.fixture(scope="module")
def judge() -> Classifier:
    torch.set_num_threads(1)
    return train_classifier()


def test_reads_held_out_digits(judge: Classifier) -> None:
    held_out = load_data("digits").split(0.1, seed=0)[1]
    assert judge.accuracy >= 0.98
    assert judge.accuracy == accuracy(judge.network, held_out)
    assert judge.recognised(held_out["x"], held_out["y"]) == judge.accuracy


def test_wrong_labels_and_noise_are_not_recognised(judge: Classifier) -> None:
    data = load_data("digits")
    assert judge.recognised(data["x"], (data["y"] + 1) % 10) < 0.02
    noise = torch.randn(1000, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert judge.recognised(noise, torch.arange(1000) % 10) < 0.2


def test_samples_are_clamped(judge: Classifier) -> None:
    images = load_data("digits")["x"][:50]
    beyond = torch.where(images == 1, 3.0, torch.where(images == -1, -3.0, images))
    assert torch.equal(judge.predict(beyond), judge.predict(images))


def test_is_deterministic_and_leaves_randomness_alone() -> None:
    before = torch.get_rng_state()
    short = TrainConfig(steps=10, batch=32, warmup=2)
    first, second, other = (train_classifier(seed=seed, config=short) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    flat = [
        torch.cat([p.flatten() for p in c.network.parameters()]) for c in (first, second, other)
    ]
    assert torch.equal(flat[0], flat[1])
    assert not torch.equal(flat[0], flat[2])


def test_labels_must_fit(judge: Classifier) -> None:
    with pytest.raises(ValueError, match="labels"):
        judge.recognised(torch.zeros(3, 1, 8, 8), torch.zeros(2).long())


def test_confusion_counts_what_classes_are_taken_for(judge: Classifier) -> None:
    data = load_data("digits")
    counts = confusion(judge.network, data, batch=200)
    assert torch.equal(counts.sum(1), torch.bincount(data["y"]))
    assert torch.equal(counts.sum(0), torch.bincount(judge.predict(data["x"]), minlength=10))
    assert counts.trace().item() / len(data) == pytest.approx(accuracy(judge.network, data))
    with pytest.raises(ValueError, match="tells 3 classes apart, 'digits' has 10"):
        confusion(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), data)


def test_features_are_what_the_last_layer_sees(judge: Classifier) -> None:
    images = load_data("digits")["x"][:20]
    last = judge.network[-1]  # type: ignore[index]
    with torch.inference_mode():
        assert torch.equal(last(judge.features(images)).argmax(1), judge.predict(images))
    assert judge.features(images).shape == (20, 128)
    with pytest.raises(ValueError, match="no linear layer"):
        Classifier(nn.Sequential(nn.Flatten()), 1.0).features(images)
