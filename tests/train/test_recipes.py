from __future__ import annotations

import pytest
import torch

import effformer
from effformer.flow import Guidance, sample
from effformer.train import load_data, train, train_classifier
from effformer.train.recipes import DIGITS, DIGITS_QUICK, Recipe


def recognised(recipe: Recipe, attn: str) -> float:
    torch.manual_seed(0)
    model = effformer.build_model(recipe.model, **recipe.overrides, attn=attn)
    train(model, load_data(recipe.data), recipe.objective, recipe.config)
    model.eval()
    labels = torch.arange(500) % 10
    noise = torch.randn(500, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    guidance = Guidance(recipe.guidance, {"y": 10})
    x = sample(model, noise, steps=recipe.steps, guidance=guidance, y=labels).x
    return train_classifier().recognised(x, labels)


@pytest.mark.slow
@pytest.mark.parametrize("attn", ["softmax", "flow"])
@pytest.mark.parametrize(("recipe", "least"), [(DIGITS_QUICK, 0.95), (DIGITS, 0.97)])
def test_samples_are_recognised(recipe: Recipe, least: float, attn: str) -> None:
    assert recognised(recipe, attn) >= least


def test_recipes_fit_their_data() -> None:
    data = load_data(DIGITS.data)
    assert data["x"].shape[1:] == (DIGITS.overrides["channels"], 8, 8)
    assert len(data.classes) == DIGITS.overrides["num_classes"]
    assert DIGITS_QUICK.config.steps < DIGITS.config.steps
