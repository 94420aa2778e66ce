"""Every option of every config, with values that make no sense, however the config is made."""

from __future__ import annotations

import dataclasses
import gc
import importlib
import math
import pkgutil
import typing
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import contract
import numpy as np
import pytest
import torch

import effformer
from effformer import registry
from effformer.checks import shown
from effformer.config import Config
from effformer.context import Context
from effformer.ffn import MLP
from effformer.flow.guidance import Guidance
from effformer.values import Chance, Count, Even, Range, checker

REQUIRED = {
    "dim": 48, "depth": 1, "heads": 2, "share": 0.5, "data_at": 1, "block": 32, "attn": "softmax",
    "convention": "sit",
}  # fmt: skip
"""Values of options without a default."""

ONE_OF: dict[str, dict[str, Any]] = {
    "PruneScheme": {"keep": 0.5},
    "MixedScheme": {"schemes": {"*": "int8"}},
}
"""Options of which one must be given."""

HOSTILE: tuple[Any, ...] = (
    math.nan, math.inf, -math.inf, -1, -0.5, 0, 0.0, 2.5, 1e400, 10**400, True, "1", [], {}, object(),
)  # fmt: skip


def classes(base: type[Config] = Config) -> Iterator[type[Config]]:
    """Every config that has fields and can be made; slots leave a twin of each behind."""
    for cls in base.__subclasses__():
        yield from classes(cls)
        if cls.__module__.startswith("effformer") and "__slots__" in cls.__dict__:
            yield cls


for package in (effformer, effformer.models, effformer.compress, effformer.export):
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        if not module.name.startswith("effformer.cli"):
            importlib.import_module(module.name)
CLASSES = {f"{cls.__module__}.{cls.__qualname__}": cls for cls in classes()}


def made(cls: type[Config]) -> Config:
    presets = [e.preset for e in registry.model if type(e.preset) is cls]
    if presets:
        return presets[0]
    names = {f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING}
    chosen = {name: value for name, value in REQUIRED.items() if name in names}
    return cls(**chosen, **ONE_OF.get(cls.__qualname__, {}))


def ranges(hint: Any) -> Iterator[tuple[type, Range | None]]:
    """The numbers in a type, with the range that it declares for them."""
    if typing.get_origin(hint) is typing.Annotated:
        kind, *rules = typing.get_args(hint)
        yield kind, next(r for r in rules if isinstance(r, Range))
        return
    if hint in (int, float):
        yield hint, None
    if typing.get_origin(hint) is not typing.Literal:
        for inner in typing.get_args(hint):
            yield from ranges(inner)


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_every_number_declares_its_range_and_keeps_it(name: str) -> None:
    cls = CLASSES[name]
    config = made(cls)
    hints = typing.get_type_hints(cls, include_extras=True)
    for field in dataclasses.fields(cls):
        numbers = list(ranges(hints[field.name]))
        if typing.get_origin(hints[field.name]) in (dict, typing.get_origin(typing.Mapping)):
            continue
        for kind, rule in numbers:
            assert rule is not None, f"{name}.{field.name}: a plain {kind.__name__} has no range"
        for value in HOSTILE if numbers else ():
            sound = [type(value) in (kind, int) and value in rule for kind, rule in numbers if rule]
            if any(sound) or value == []:
                continue
            with pytest.raises((TypeError, ValueError), match=rf"{field.name}\b") as caught:
                dataclasses.replace(config, **{field.name: value})
            assert "\n" not in str(caught.value)
            assert str(caught.value).startswith(cls.__qualname__)


@pytest.mark.parametrize("kind", ["attention", "ffn"])
def test_numbers_that_are_accepted_mean_something(kind: str) -> None:
    """At the ends of its range an option gives numbers, or a refusal in words."""
    x = torch.randn(2, 12, contract.DIM, generator=torch.Generator().manual_seed(0))
    names = contract.MIXERS if kind == "attention" else contract.FFNS
    refused, tried = [], 0
    for name in names:
        config = effformer.config.resolve(kind, {"name": name, **contract.OPTIONS.get(name, {})})
        inner = next(iter(config.parts("core").values()), config)
        hints = typing.get_type_hints(type(inner), include_extras=True)
        for field, hint in hints.items():
            for number, rule in ranges(hint) if field != "ENTRY" else ():
                assert rule is not None
                for end in {v for v in (-1, 0, rule.low) if v in rule and abs(v) < 2**31}:
                    options = {"name": name, **contract.OPTIONS.get(name, {}), field: number(end)}
                    try:
                        changed = effformer.config.resolve(kind, options)
                        part = changed.build(_site(kind, name))
                    except (TypeError, ValueError) as error:
                        refused.append(str(error))
                        continue
                    tried += 1
                    try:
                        with torch.no_grad():
                            out = part.eval()(x, Context(grid=(3, 4), time=x[:, 0]))
                    except ValueError as error:  # so few tokens, so small a table
                        refused.append(str(error))
                        continue
                    assert out.isfinite().all(), f"{name}: {field}={end}"
    assert tried > 10
    assert not [text for text in refused if "\n" in text]


def _site(kind: str, name: str) -> Any:
    from effformer.site import Site

    time = contract.DIM if registry.KINDS[kind].get(name).caps.time else None
    return Site(dim=contract.DIM, heads=contract.HEADS, grid=(3, 4), length=12, time_dim=time)


@pytest.mark.parametrize(
    ("hint", "given", "kept"),
    [
        (Count, 3, 3),
        (Chance, 0, 0.0),
        (Even | None, None, None),
        (tuple[Count, ...], [1, 2], (1, 2)),
        (tuple[Chance, Chance], (0, 0.5), (0.0, 0.5)),
        (typing.Literal[0, 1], 1, 1),
        (Count | tuple[Count, Count], [2, 3], (2, 3)),
        (Count, np.int64(3), 3),
        (Chance, np.float32(0.5), 0.5),
        (Chance, np.int8(0), 0.0),
        (bool, np.True_, True),
        (typing.Literal[4, 8], np.uint8(8), 8),
        (Sequence[Count], [np.int64(3)], [3]),
        (Mapping[str, Count], {"a": np.int64(3)}, {"a": 3}),
    ],
)
def test_values_are_kept_as_their_type_says(hint: Any, given: Any, kept: Any) -> None:
    value = checker(hint)(given, "here")
    assert value == kept
    assert type(value) is type(kept)


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (Range(), "be finite"),
        (Range(2), "be at least 2"),
        (Range(1, above=True), "be above 1"),
        (Range(high=0, below=True), "be below 0"),
        (Range(high=3), "be at most 3"),
        (Range(0, 1, below=True), r"lie in [0, 1)"),
        (Range(1, step=2), "be one of 1, 3, 5, ..."),
    ],
)
def test_a_range_says_what_it_is(rule: Range, words: str) -> None:
    assert str(rule) == words
    assert math.nan not in rule
    assert math.inf not in rule


def test_true_is_no_number() -> None:
    for hint in (Count, Chance, typing.Literal[0, 1]):
        with pytest.raises(TypeError, match="here: expected"):
            checker(hint)(True, "here")


def test_what_was_tried_in_vain_keeps_nothing_alive() -> None:
    class Owner:
        pass

    def call() -> weakref.ref[Owner]:
        owner = Owner()
        assert checker(Count | str)("words", "here") == "words"
        with pytest.raises(TypeError):
            checker(Count | str)(2.5, "here")
        return weakref.ref(owner)

    gc.collect()
    gc.disable()
    try:
        assert call()() is None
    finally:
        gc.enable()


def test_of_a_long_dict_only_the_beginning_is_written_down() -> None:
    """A state dict is no path; finding that out takes no text of a thousand tensors."""
    written = 0

    class Slow:
        def __repr__(self) -> str:
            nonlocal written
            written += 1
            return "slow"

    many = {str(i): Slow() for i in range(1000)}
    assert checker(str | int | dict[str, Any])(many, "x") is many
    assert written <= 100
    assert shown(dict.fromkeys(range(50))) == f"{str(dict.fromkeys(range(50)))[:77]}..."
    assert shown([None] * 50) == f"{str([None] * 50)[:77]}..."


def test_parts_that_are_named_in_python_are_resolved() -> None:
    from effformer.models import ViT

    config = ViT.Config(dim=8, depth=1, heads=1, ffn="swiglu", attn={"name": "flow", "eps": 1e-3})
    assert config == ViT.Config.from_dict(
        {"dim": 8, "depth": 1, "heads": 1, "ffn": "swiglu", "attn": {"name": "flow", "eps": 1e-3}}
    )
    with pytest.raises(TypeError, match=r"ViT.Config.attn: MLP.Config is not the config of a"):
        ViT.Config(dim=8, depth=1, heads=1, attn=MLP.Config())


def test_no_config_replaces_the_check_of_all() -> None:
    with pytest.raises(TypeError, match="name what this one adds `check`"):
        type("Own", (Config,), {"__post_init__": lambda self: None})


@pytest.mark.parametrize(
    "options", [{"scale": math.nan}, {"scale": "2"}, {"channels": 0}, {"interval": (0.5, math.nan)}]
)
def test_guidance_is_checked_as_configs_are(options: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError), match=next(iter(options))):
        Guidance(**({"scale": 2.0, "null": {"y": 3}} | options))
