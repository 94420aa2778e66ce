from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import effformer
from effformer.context import Ledger
from effformer.train import (
    Augmented,
    Batch,
    Classification,
    Generation,
    TrainConfig,
    load_data,
    train,
)


class Network(nn.Module):
    """Answers zero velocities and remembers what it was asked."""

    def forward(
        self, x: Tensor, t: Tensor, y: Tensor, *, drop: Tensor | None, ledger: Ledger
    ) -> Tensor:
        self.seen = x, t, y, drop, ledger
        return torch.zeros_like(x)


def batch(size: int = 4000) -> Batch:
    return Batch(x=torch.full((size, 1, 2, 2), 0.5), y=torch.arange(size) % 10)


def test_generation_asks_for_velocities_at_random_times() -> None:
    network, ledger = Network(), Ledger()
    loss = Generation(label_drop=0.25)(network, batch(), torch.Generator().manual_seed(0), ledger)
    x, t, y, drop, given = network.seen
    assert given is ledger
    assert drop is not None
    assert drop.double().mean() == pytest.approx(0.25, abs=0.03)
    assert torch.equal(y, batch()["y"])
    assert (t.min() >= 0, t.max() <= 1) == (True, True)
    # mean of (data - noise)^2 = 0.25 + 1 for zero predictions
    assert loss.item() == pytest.approx(1.25, abs=0.05)
    noise = (x - 0.5 * t.view(-1, 1, 1, 1)) / (1 - t.view(-1, 1, 1, 1)).clamp_min(1e-3)
    assert noise[t < 0.9].std() == pytest.approx(1.0, abs=0.05)


def test_generation_is_a_function_of_the_generator() -> None:
    network = Network()
    losses = [
        Generation()(network, batch(8), torch.Generator().manual_seed(seed), Ledger()).item()
        for seed in (0, 0, 1)
    ]
    assert losses[0] == losses[1] != losses[2]


def test_labels_are_kept_without_dropping() -> None:
    network = Network()
    Generation(label_drop=0.0)(network, batch(8), torch.Generator(), Ledger())
    assert network.seen[3] is None


def test_other_losses_by_name() -> None:
    objective = Generation(loss="pseudo-huber")  # type: ignore[arg-type]
    assert objective.to_dict()["loss"]["name"] == "pseudo-huber"
    assert Generation.from_dict(objective.to_dict()) == objective
    assert (
        Generation.from_dict({"loss": {"name": "flow-matching", "time": "logit-normal"}})
        != objective
    )
    assert objective(Network(), batch(8), torch.Generator(), Ledger()).isfinite()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "flow-macthing"}, "did you mean 'flow-matching'"),
        ({"label_drop": 1.0}, r"\[0, 1\)"),
    ],
)
def test_generation_refuses(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Generation(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "options", "objective"),
    [
        ("sit-nano", {"input_size": 8, "num_classes": 10}, Generation()),
        ("vit-nano", {}, Classification()),
    ],
)
def test_our_models_train_with_it(
    name: str, options: dict[str, object], objective: Generation | Classification
) -> None:
    model = effformer.build_model(name, channels=1, **options)
    sample = Batch(x=torch.zeros(2, 1, 8, 8), y=torch.tensor([3, 4]))
    objective(model, sample, torch.Generator(), Ledger()).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_classification_is_cross_entropy() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 10))
    sample = batch(8)
    for smoothing in (0.0, 0.1):
        loss = Classification(smoothing=smoothing)(model, sample, torch.Generator(), Ledger())
        logp = model(sample["x"]).log_softmax(1)
        true = -logp[torch.arange(8), sample["y"]]
        expected = (1 - smoothing) * true - smoothing * logp.mean(1)
        torch.testing.assert_close(loss, expected.mean())


@pytest.mark.parametrize(
    ("model", "sample", "message"),
    [
        (nn.Identity(), batch(8), r"Classification: the model's output: expected .*, got shape"),
        (nn.Flatten(0), batch(8), r"Classification: the model's output: expected .*, got shape"),
        (nn.Flatten(), batch(8), r"Classification: target must lie in 0..3, got 7"),
        (nn.Flatten(), batch(8) | {"y": torch.ones(3).long()}, r"for targets \(3,\)"),
        (nn.Flatten(), batch(8) | {"y": torch.ones(8)}, "target must be int64 ids"),
    ],
)
def test_what_no_classifier_returns_is_refused(
    model: nn.Module, sample: Batch, message: str
) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        Classification()(model, sample, torch.Generator(), Ledger())


class _Seen(nn.Module):
    """Keeps the images that an objective hands to it."""

    def __call__(self, model: nn.Module, batch: Batch, generator: object, ledger: Ledger) -> Tensor:
        self.x = batch["x"]
        return batch["x"].sum()


def test_images_are_mirrored_with_the_probability_that_was_asked_for() -> None:
    x, seen = torch.rand(400, 1, 3, 5), _Seen()
    for flip, share in ((0.0, 0.0), (0.5, 0.5), (1.0, 1.0)):
        generator = torch.Generator().manual_seed(0)
        Augmented(task=seen, flip=flip)(nn.Identity(), {"x": x}, generator, Ledger())
        mirrored = (seen.x == x.flip(-1)).flatten(1).all(1)
        kept = (seen.x == x).flatten(1).all(1)
        assert (mirrored ^ kept).all()
        assert mirrored.double().mean() == pytest.approx(share, abs=0.08)


def test_images_move_and_repeat_their_edge() -> None:
    x, seen = torch.rand(60, 2, 6, 7), _Seen()
    Augmented(task=seen, shift=2)(
        nn.Identity(), {"x": x}, torch.Generator().manual_seed(0), Ledger()
    )
    wide = nn.functional.pad(x, (2, 2, 2, 2), mode="replicate")
    places = set()
    for moved, padded in zip(seen.x, wide, strict=True):
        found = [
            (i, j)
            for i in range(5)
            for j in range(5)
            if torch.equal(moved, padded[:, i : i + 6, j : j + 7])
        ]
        assert len(found) == 1
        places.add(found[0])
    assert len(places) > 15


def test_augmented_training_knows_what_it_trains() -> None:
    model = effformer.build_model(
        "sit-nano", input_size=8, channels=1, num_classes=10, learn_sigma=False, patch=4
    )
    task = Augmented(task=Generation(), flip=0.5, shift=1)
    train(model, load_data("digits"), task, TrainConfig(steps=1, batch=4, warmup=0))
    assert model.trained is not None
    with pytest.raises(ValueError, match="changes images x"):
        task(model, {"x": torch.ones(3, 4)}, torch.Generator(), Ledger())
    with pytest.raises(ValueError, match="shift must be below the side of the images, 8, got 8"):
        Augmented(task=Generation(), shift=8)(
            model, {"x": load_data("digits")["x"][:2]}, torch.Generator(), Ledger()
        )
    with pytest.raises(TypeError, match="likelihood: SiT is asked for times"):
        train(
            model,
            load_data("digits"),
            Generation(loss="likelihood"),
            TrainConfig(steps=1, warmup=0),
        )
    with pytest.raises(ValueError, match="flip must lie in"):
        Augmented(task=Generation(), flip=2.0)
