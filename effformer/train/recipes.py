"""Recipes that are known to work, with what they were measured to reach."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from ..flow.losses import FlowMatching
from .loop import TrainConfig
from .objectives import Generation

__all__ = ["DIGITS", "DIGITS_QUICK", "MNIST", "RECIPES", "Recipe"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How a model is built, trained and sampled.

    Attributes:
        model: name for `effformer.build_model`.
        overrides: its options.
        data: name for `load_data`.
        objective: the loss.
        config: what decides the weights.
        guidance: scale of classifier-free guidance in sampling.
        steps: Euler steps in sampling.
        measured: what it was measured to reach, in words.
    """

    model: str
    overrides: Mapping[str, int | float | bool]
    data: str
    objective: Generation = field(default_factory=Generation)
    config: TrainConfig = field(default_factory=TrainConfig)
    guidance: float = 2.0
    steps: int = 10
    measured: str


# Small batches and a high learning rate: at equal time, 800 steps of 32 samples beat 400 of 64, and
# 4e-3 beats 2e-3 by far. Times from the middle of the path (logit-normal) beat uniform ones.
DIGITS = Recipe(
    model="sit-tiny",
    overrides=MappingProxyType(
        {"input_size": 8, "channels": 1, "num_classes": 10, "learn_sigma": False}
    ),
    data="digits",
    objective=Generation(loss=FlowMatching.Config(time="logit-normal")),
    config=TrainConfig(steps=1500, batch=32, lr=4e-3, warmup=50, ema=0.995),
    measured="of 1,000 samples 100 % are recognised for both softmax and flow, 98 % without guidance; "
    "about a minute of one CPU core",
)
"""Class-conditional digits for any ``attn=``."""

DIGITS_QUICK = Recipe(
    model=DIGITS.model,
    overrides=DIGITS.overrides,
    data=DIGITS.data,
    objective=DIGITS.objective,
    config=DIGITS.config.replace(steps=500, ema=0.99),
    measured="of 1,000 samples 98.4 % (softmax) and 98.7 % (flow) are recognised; a third of the time of digits",
)
"""`DIGITS` in a third of the time."""

MNIST = Recipe(
    model=DIGITS.model,
    overrides=MappingProxyType(
        {"input_size": 28, "channels": 1, "num_classes": 10, "learn_sigma": False, "patch": 4}
    ),
    data="mnist",
    objective=DIGITS.objective,
    config=TrainConfig(steps=3000, batch=64, lr=4e-3, warmup=100, ema=0.998),
    measured="of 500 samples 99.2 % are recognised after 2,000 of its steps; about ten minutes of one CPU core",
)
"""MNIST, 28 x 28, in 49 tokens."""

RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {"digits": DIGITS, "digits-quick": DIGITS_QUICK, "mnist": MNIST}
)
"""By the names that ``effformer train --recipe`` takes."""
