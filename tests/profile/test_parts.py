"""Which part of a transformer an operator belongs to."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

import effformer
from effformer import registry
from effformer.attention import Mixer
from effformer.context import EMPTY, Context
from effformer.profile import profile
from effformer.profile.parts import PART_LABELS, Parts
from effformer.site import Site

MM = "aten::addmm"


class Inner(nn.Module):
    ROLES: ClassVar[Mapping[str, str]] = {"": "attn", "first": "qkv", "gate": "gates"}

    def __init__(self) -> None:
        super().__init__()
        self.first, self.gate, self.rest = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)
        self.several = nn.ModuleList([nn.ModuleDict({"gate": nn.Linear(2, 2)})])


class Outer(nn.Module):
    ROLES: ClassVar[Mapping[str, str]] = {"mod": "adaln_blocks"}

    def __init__(self) -> None:
        super().__init__()
        self.mixer, self.mod, self.mlp, self.odd = Inner(), Inner(), nn.Linear(2, 2), nn.Identity()


@pytest.mark.parametrize(
    ("path", "op", "part"),
    [
        ("mixer.first", MM, "qkv"),
        ("mixer.gate", MM, "gates"),
        ("mixer.several.0.gate", MM, "gates"),
        ("mixer", "aten::bmm", "attn"),
        ("mixer.rest", "aten::bmm", "attn"),
        ("mixer.rest", MM, "projections"),  # a weight without a role
        ("mod.first", MM, "qkv"),  # the nearest part answers
        ("mlp", MM, "mlp"),  # nobody answers: the usual names
        ("odd", MM, "other"),
        ("", MM, "other"),
    ],
)
def test_the_nearest_part_that_names_a_role_decides(path: str, op: str, part: str) -> None:
    assert Parts(Outer())(path, op) == part


@pytest.mark.parametrize(
    ("path", "part"),
    [
        ("blocks.3.attn.qkv", "qkv"),
        ("transformer_blocks.0.attn1.to_out.0", "proj"),
        ("encoder.layer.2.intermediate.dense", "mlp"),
        ("final_layer.adaLN_modulation.1", "adaln_final"),
        ("t_embedder.mlp.0", "t_mlp"),
        ("head", "head"),
    ],
)
def test_other_libraries_are_known_by_their_names(path: str, part: str) -> None:
    assert Parts(nn.Module())(path) == part


def declared() -> Iterator[type]:
    for package in ("attention", "blocks", "ffn", "nn", "models"):
        found = importlib.import_module(f"effformer.{package}")
        for module in pkgutil.iter_modules(found.__path__):
            loaded = importlib.import_module(f"effformer.{package}.{module.name}")
            for value in vars(loaded).values():
                if isinstance(value, type) and hasattr(value, "ROLES"):
                    yield value


def test_roles_are_parts_of_a_transformer() -> None:
    found = set(declared())
    assert len(found) > 30
    wrong = {c.__name__: r for c in found if (r := set(c.ROLES.values()) - PART_LABELS.keys())}
    assert not wrong


@pytest.mark.parametrize(
    "options",
    [
        {"ffn": "acm"},
        {"ffn": "moe"},
        {"attn": {"projections": {}}},
        {"attn": {"projections": {}}, "ffn": "acm"},
    ],
    ids=str,
)
def test_gates_are_booked_as_gates(options: dict[str, object]) -> None:
    """What gates cost is not hidden in the part that they serve."""
    model = effformer.build_model("vit-nano", **options).eval()
    seen = profile(model, memory=False)
    expected = 0
    n = 1 + model.config.grid[0] * model.config.grid[1]
    for path, module in model.named_modules():
        if path.endswith((".gate", ".router")):
            layers = [m for m in module.modules() if isinstance(m, nn.Linear)]
            expected += n * sum(m.in_features * m.out_features for m in layers)
    assert expected > 0
    assert seen.by_part["gates"] == expected
    assert sum(seen.by_part.values()) == seen.total


def test_a_gate_of_a_mixer_is_no_attention_core() -> None:
    class Gated(Mixer):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.site = Site(dim=4)
            self.qkv, self.gate = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor, ctx: Context = EMPTY) -> Tensor:
            return self.gate(x).sigmoid() * self.qkv(x)

        def macs(self, n: int, m: int | None = None, *, grid: object = None) -> int:
            return 2 * n * 16

    seen = profile(Gated(), (torch.zeros(1, 3, 4),), memory=False)
    assert seen.by_part == {"gates": 48, "qkv": 48}


def small_models() -> list[str]:
    """One small preset of every family."""
    found = {e.facts["family"]: e.name for e in registry.model if e.name.endswith("nano")}
    tiny = {e.facts["family"]: e.name for e in registry.model if e.name.endswith("tiny")}
    return sorted((tiny | found).values())


@pytest.mark.parametrize("name", small_models())
def test_every_layer_of_our_models_says_what_it_is(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No pattern over names decides for them."""
    monkeypatch.setattr("effformer.profile.parts._guessed", lambda path: "other")
    with torch.device("meta"):
        model = effformer.build_model(name)
    layers = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
    paths = [path for path, module in model.named_modules() if isinstance(module, layers)]
    parts = Parts(model)
    assert paths
    assert [path for path in paths if parts(path, MM) == "other"] == []


@pytest.mark.parametrize(
    ("name", "path", "part"),
    [
        ("dit-nano", "final.modulation.linear", "adaln_final"),
        ("dit-nano", "final.linear", "final_linear"),
        ("relactrl-nano", "backbone.final.modulation.linear", "adaln_final"),
        ("relactrl-nano", "modulation.linear", "adaln_blocks"),
        ("relactrl-nano", "control.blocks.0.before", "projections"),
        ("vit-nano", "head.linear", "head"),
        ("factformer-tiny", "mlp.0", "head"),
        ("lmuformer-tiny", "embed.convs.0.conv", "patch_embed"),
    ],
)
def test_ends_of_models(name: str, path: str, part: str) -> None:
    with torch.device("meta"):
        model = effformer.build_model(name)
    assert model.get_submodule(path)
    assert Parts(model)(path, MM) == part
