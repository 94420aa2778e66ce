"""Every published layout of every family, with every option changed alone: what the layout's own network
cannot be told is refused, and what is written is read back as the same function.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

import effformer
from effformer import registry
from effformer.checks import FormatError
from effformer.config import Config
from effformer.layout import TRAINING, Layout

TINY: dict[str, dict[str, Any]] = {
    "flowsep-tiny": {
        "dim": 32, "groups": 32, "multipliers": (1, 1), "head_dim": 16, "residuals": 1, "input_size": (4, 4),
    },
    "flux-tiny": {},
    "bert-tiny": {"dim": 24, "heads": 2, "vocab": 31, "context": 20},
    "dit-nano": {"input_size": 8, "num_classes": 10},
    "ditdh-nano": {"num_classes": 10},
    "dydit-nano": {"input_size": 8, "num_classes": 10},
    "sit-nano": {"input_size": 8, "num_classes": 10},
    "lightningdit-nano": {"num_classes": 10},
    "vit-nano": {},
    "flowformer-gpt-nano": {"vocab": 31, "context": 20, "depth": 2},
    "flowformer-vision": {
        "dims": (24, 48), "depths": (1, 1), "heads": 2, "input_size": 16, "num_classes": 3,
    },
    "gencompositor-tiny": {"depth": 1, "branch_depth": 1},
    "ifactformer-tiny": {"dim": 24, "heads": 2, "grid": (4, 6)},
    "lmuformer-tiny": {"dim": 24},
    "spiking-lmuformer-tiny": {"dim": 24, "attn": {"memory": 8}},
    "macaron-tiny": {"dim": 24},
    "macaron-bert-tiny": {"dim": 24},
    "mmdit-nano": {"input_size": 8},
    "predformer-tiny": {"dim": 24, "size": (16, 16)},
    "rectok-tiny": {},
    "sana-nano": {"dim": 32, "input_size": 4},
    "sana-sprint-nano": {"dim": 32, "input_size": 4},
    "starflow-tiny": {},
    "tarflow-tiny": {"flows": (2, 2), "input_size": 4},
    "triposg-two-nano": {"depth": 3},
    "triposg-vae-tiny": {},
    "wan-tiny": {"depth": 1},
}  # fmt: skip
"""Small models of all families that have published layouts."""

BASE: dict[tuple[str, str], dict[str, Any]] = {
    ("dit-nano", "diffusers"): {"time_freq_shift": 1},
    ("sit-nano", "diffusers"): {"time_freq_shift": 1},
    ("dydit-nano", "diffusers"): {"time_freq_shift": 1, "width": None, "tokens": None},
    ("predformer-tiny", "official-factorized"): {"axes": "ts", "depth": 2},
    ("vit-nano", "timm-srelpos"): {"attn": "relative"},
    ("vit-nano", "timm-eva"): {"positions": {"rope": {}}, "ffn": "swiglu"},
    ("vit-nano", "timm-eva02"): {"positions": {"rope": {}}},
    ("vit-nano", "timm-split"): {"attn": {"kv_heads": 1}},
}
"""What a layout's network needs to be told."""


def cases() -> list[tuple[str, str]]:
    return [
        (name, layout.name)
        for name in TINY
        for layout in registry.model.get(name).build.LAYOUTS  # type: ignore[attr-defined]
    ]


def build(name: str, layout: str) -> Any:
    return effformer.build_model(name, **TINY[name] | BASE.get((name, layout), {}))


def awake(model: Any) -> Any:
    """Weights that no rule explains; the running statistics and the fixed tables stay."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if p.requires_grad and "segment_embed" not in key:
                p.add_(torch.randn(p.shape, generator=generator), alpha=0.1)
    return model.eval()


def same(model: Any, other: Any) -> bool:
    given = model.example_inputs(2, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        outs = [m(**given) for m in (model, other)]
    outs = [out if isinstance(out, tuple) else (out,) for out in outs]
    return all(
        torch.allclose(a, b, rtol=1e-5, atol=1e-6 * float(a.abs().max()))
        for a, b in zip(*outs, strict=True)
        if isinstance(a, Tensor) and a.numel()
    )


def others(hint: Any, value: Any) -> Iterator[Any]:
    """Other values of an option, by its type."""
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, int):
        yield from (value + 1, value * 2)
    elif isinstance(value, float):
        yield value * 2 if value else 0.5
    for choice in get_args(hint):
        for one in get_args(choice) or (choice,):
            if isinstance(one, (str, int, float)) and one not in (value, "xformers"):
                yield one
    if value is not None and type(None) in get_args(hint):
        yield None
    if value is None:
        yield from (1, 2, 0.5, True)


def changes(config: Any, above: str = "") -> Iterator[tuple[str, Any]]:
    """(path, value): every option of a config, and of the parts in it, changed alone."""
    for field in dataclasses.fields(config):
        path, value = f"{above}{field.name}", getattr(config, field.name)
        kind = field.metadata.get("kind")
        if kind is not None:
            yield from ((path, {"name": e.name}) for e in registry.KINDS[kind])
            yield path, None
        elif field.name == "layers":
            yield from (
                (path, {"-1": {"attn": "flow"}}), (path, {"0": {"ffn": "swiglu"}}),
                (path, {"0": {"ffn": {"act": "silu"}}}), (path, {"0": {"attn": {"scale": 0.3}}}),
            )  # fmt: skip
        else:
            yield from (
                (path, other)
                for other in others(typing.get_type_hints(type(config))[field.name], value)
            )
        if isinstance(value, Config):
            yield from changes(value, f"{path}.")


def variants(model: Any) -> Iterator[tuple[str, Any]]:
    """(path, config) of all changes that make a config."""
    for path, value in changes(model.config):
        try:
            yield path, model.config.put(path, value)
        except (TypeError, ValueError):
            continue


def holds(layout: Layout, config: Any) -> bool:
    try:
        return not layout.strange(config)
    except (TypeError, ValueError):  # parts that no model can have
        return False


def check(name: str, layout_name: str, tmp_path: Path) -> tuple[int, int]:
    """Numbers of changed options that were refused, and written."""
    base = build(name, layout_name)
    layout = next(lay for lay in base.LAYOUTS if lay.name == layout_name)
    file, refused, written = tmp_path / "w.safetensors", 0, 0
    for path, config in variants(base):
        if not holds(layout, config):
            refused += 1
            continue
        try:
            model = awake(type(base)(config))
            effformer.save_weights(model, file, layout)
        except (FormatError, ValueError, TypeError):
            refused += 1
            continue
        written += 1
        again = type(base)(config).eval()
        report = effformer.load_weights(again, file)
        assert not report.missing + report.unexpected + report.differs, (path, report)
        assert same(model, again), path
        if any(fnmatchcase(path, pattern) for pattern in TRAINING) and path != "layer_scale":
            plain = type(base)(base.config).eval()
            effformer.load_weights(plain, file)
            assert same(model, plain), path
    return refused, written


def test_every_family_with_layouts_is_here() -> None:
    families = {e.facts["family"] for e in registry.model if e.build.LAYOUTS}  # type: ignore[attr-defined]
    assert families == {registry.model.get(name).facts["family"] for name in TINY}


@pytest.mark.parametrize(("name", "layout"), cases())
def test_a_model_comes_back_from_its_layout(name: str, layout: str, tmp_path: Path) -> None:
    model = awake(build(name, layout))
    if layout.startswith("timm-eva"):
        with torch.no_grad():
            for block in model.blocks:
                block.attn.part.qkv.bias.chunk(3)[1].zero_()
    if layout == "timm-srelpos":
        first = model.blocks[0].attn.part.core.state_dict()
        for block in model.blocks:
            block.attn.part.core.load_state_dict(first)
    file = effformer.save_weights(model, tmp_path / "w.safetensors", layout)
    again = build(name, layout).eval()
    assert not effformer.load_weights(again, file, layout).differs
    assert same(model, again)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "layout"), cases())
def test_what_a_layout_cannot_say_is_refused(name: str, layout: str, tmp_path: Path) -> None:
    refused, _ = check(name, layout, tmp_path)
    assert refused > 10


def test_an_option_that_nobody_declared_is_refused(tmp_path: Path) -> None:
    """Of each published layout: token mixers, networks and blocks that its network has not."""
    for name, layout in cases():
        model = build(name, layout)
        chosen = next(lay for lay in model.LAYOUTS if lay.name == layout)
        assert not chosen.strange(model.config), (name, layout)
        for path, value in (("attn", {"name": "nystrom"}), ("layers", {"0": {"attn": "linear"}})):
            assert chosen.strange(model.config.put(path, value)), (name, layout, path)


@pytest.mark.parametrize(
    "options",
    [
        {}, {"ffn": {"act": "gelu"}}, {"ffn": {"act": "silu"}}, {"ffn_norm_eps": 1e-3}, {"learn_sigma": False},
        {"ffn": {"name": "geglu", "ratio": 4.0}}, {"ffn": {"name": "swiglu", "ratio": 4.0}}, {"heads": 4},
        {"patch": 4}, {"channels": 3},
    ],
    ids=str,
)  # fmt: skip
@torch.no_grad()
def test_diffusers_computes_what_was_written(options: dict[str, Any], tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    model = awake(
        effformer.build_model("dit-nano", **TINY["dit-nano"], time_freq_shift=1, **options)
    )
    layout = next(lay for lay in model.LAYOUTS if lay.name == "diffusers")
    file = effformer.save_weights(model, tmp_path / "w.safetensors", layout)
    config = model.config
    said = {k: v for k, v in layout.options(config).items() if k != "_class_name"}
    theirs = diffusers.DiTTransformer2DModel(
        num_layers=config.depth, in_channels=config.channels, out_channels=model.out_channels,
        num_embeds_ada_norm=config.num_classes, dropout=0.0, **said,
    ).eval()  # fmt: skip
    lost = theirs.load_state_dict(effformer.io.read_weights(file), strict=False)  # type: ignore[attr-defined]
    assert not lost.unexpected_keys
    assert set(lost.missing_keys) <= {"pos_embed.pos_embed"}
    x = torch.randn(3, config.channels, 8, 8)
    t, y = torch.tensor([0, 417, 999]), torch.tensor([0, 9, 10])
    expected = theirs(x, timestep=t, class_labels=y).sample
    torch.testing.assert_close(model(x, t, y), expected, rtol=1e-4, atol=1e-5)
