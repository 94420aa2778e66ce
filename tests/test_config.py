from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import pytest
from effformer.models import DiT, ViT
from effformer.models.vit import Prefix

from effformer import registry
from effformer.attention import Attention, Flow, HeadsConfig, Linear, Softmax
from effformer.blocks import AdaLNZero
from effformer.config import Config, part, resolve
from effformer.ffn import MLP, SwiGLU


@dataclass(frozen=True, slots=True, kw_only=True)
class Inner(Config):
    a: int = 1
    b: float = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Outer(Config):
    size: int
    rate: float = 0.5
    mode: Literal["x", "y"] = "x"
    pair: tuple[int, int] = (1, 2)
    many: tuple[float, ...] = ()
    either: int | tuple[int, int] = 3
    maybe: Inner | None = None
    inner: Inner = Inner()
    table: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    ffn: Config = part("ffn", MLP.Config())


def test_json_round_trip() -> None:
    config = Outer.from_dict(
        {
            "size": 3, "rate": 1, "pair": [4, 5], "many": [1, 2.5], "either": [7, 8],
            "maybe": {"a": 9},
            "table": {"k": [1, {"z": Inner()}]}, "ffn": "swiglu",
        }
    )  # fmt: skip
    assert (config.rate, config.pair, config.many, config.either) == (
        1.0,
        (4, 5),
        (1.0, 2.5),
        (7, 8),
    )
    assert config.maybe == Inner(a=9)
    assert config.ffn == SwiGLU.Config()
    plain = json.loads(json.dumps(config.to_dict()))
    assert plain["ffn"]["name"] == "swiglu"
    assert Outer.from_dict(plain) == config


@pytest.mark.parametrize("name", [e.name for e in registry.model])
def test_model_configs_survive_json(name: str) -> None:
    entry = registry.model.get(name)
    data = json.loads(json.dumps(entry.preset.to_dict()))
    assert type(entry.preset).from_dict(data) == entry.preset


def test_replace_starts_from_what_is_there() -> None:
    config = Outer(size=1, inner=Inner(a=5), ffn=SwiGLU.Config(bias=False))
    assert config.replace(inner={"b": 1}).inner == Inner(a=5, b=1.0)
    assert config.replace(ffn={"hidden": 7}).ffn == SwiGLU.Config(bias=False, hidden=7)
    assert config.replace(ffn="swiglu").ffn == SwiGLU.Config(bias=False)
    assert config.replace(ffn="mlp").ffn == MLP.Config()
    assert config.replace(maybe={"a": 2}).replace(maybe={"b": 3}).maybe == Inner(a=2, b=3.0)
    assert config.size == 1
    vit = ViT.Config(dim=8, depth=1, heads=1, prefix=Prefix(registers=4))
    assert vit.replace(prefix={"positions": False}).prefix == Prefix(registers=4, positions=False)


def test_configs_are_frozen_and_comparable() -> None:
    assert Inner(a=1) == Inner()
    assert hash(Inner()) == hash(Inner(b=2.0))
    with pytest.raises(dataclasses.FrozenInstanceError):
        Inner().a = 2  # type: ignore[misc]


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ({"size": 1, "siz": 2}, ValueError, "Outer: unknown option 'siz'; did you mean 'size'"),
        ({}, ValueError, "Outer: missing options size"),
        ({"size": "1"}, TypeError, r"Outer.size: expected int, got '1'"),
        ({"size": True}, TypeError, r"Outer.size: expected int, got True"),
        ({"size": 1.0}, TypeError, r"Outer.size: expected int, got 1.0"),
        ({"size": 1, "rate": "x"}, TypeError, "Outer.rate: expected float"),
        ({"size": 1, "mode": "z"}, ValueError, "Outer.mode: unknown value 'z'"),
        ({"size": 1, "pair": [1]}, ValueError, "Outer.pair: expected 2 values, got 1"),
        ({"size": 1, "pair": "12"}, TypeError, "Outer.pair: expected a list"),
        ({"size": 1, "many": [1, None]}, TypeError, r"Outer.many\[1\]: expected float"),
        ({"size": 1, "inner": {"c": 1}}, ValueError, "Outer.inner: unknown option 'c'"),
        ({"size": 1, "inner": 4}, TypeError, "Outer.inner: expected Inner"),
        ({"size": 1, "table": [1]}, TypeError, "Outer.table: expected a dict"),
        ({"size": 1, "ffn": "mpl"}, ValueError, "unknown ffn 'mpl'; did you mean 'mlp'"),
        (
            {"size": 1, "ffn": 3},
            TypeError,
            "Outer.ffn: expected a name, a dict or a Config",
        ),
        ({"size": 1, "ffn": None}, TypeError, "Outer.ffn: a model cannot be without it"),
        ({"size": 1, "ffn": Softmax.Config()}, TypeError, "not the config of a registered ffn"),
        ({"size": 1, "ffn": {"ratio": -1.0}}, ValueError, "Outer.ffn.ratio must be positive"),
    ],
)
def test_bad_values(data: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Outer.from_dict(data)


def test_a_core_stands_for_attention_around_it() -> None:
    base = Attention.Config(qk_norm=True, core=Softmax.Config(scale=0.1))
    lifted = Attention.Config(qk_norm=True, core=Flow.Config(eps=1e-3))
    assert resolve("attention", {"name": "flow", "eps": 1e-3}, base) == lifted
    assert resolve("attention", Flow.Config(eps=1e-3), base) == lifted
    assert resolve("attention", "flow") == Attention.Config(core=Flow.Config())
    assert resolve("attention", "softmax", base) == base


def test_options_go_to_attention_or_to_its_core() -> None:
    base = Attention.Config(core=Linear.Config())
    both = resolve("attention", {"qkv_bias": False, "eps": 1e-2}, base)
    assert both == Attention.Config(qkv_bias=False, core=Linear.Config(eps=1e-2))
    with pytest.raises(ValueError, match="unknown option 'epz'"):
        resolve("attention", {"epz": 1}, base)
    with pytest.raises(ValueError, match=r"unknown attention 'sotfmax'; did you mean 'softmax'"):
        resolve("attention", "sotfmax")
    with pytest.raises(ValueError, match="both 'flow' and 'linear' are named; leave one out"):
        resolve("attention", {"name": "flow", "core": "linear"}, base, where="attn")
    assert resolve("attention", {"name": "flow", "core": {"eps": 1e-2}}) == Attention.Config(
        core=Flow.Config(eps=1e-2)
    )


def test_nested_parts_are_listed_from_the_outermost() -> None:
    attn = resolve("attention", {"name": "axes", "over": "h", "mixer": "flow"})
    found = attn.nested("attention", "core")
    assert [one.entry.name for one in found] == ["axes", "multihead", "flow"]
    assert attn.nested("core") == [attn]


def test_dicts_need_a_name_or_a_base() -> None:
    with pytest.raises(ValueError, match="the dict has no 'name'"):
        resolve("ffn", {"ratio": 2.0})
    assert resolve("ffn", {"ratio": 2.0}, MLP.Config(act="relu")) == MLP.Config(
        act="relu", ratio=2.0
    )
    assert resolve("block", AdaLNZero.Config()) == AdaLNZero.Config()


def test_messages_name_the_place() -> None:
    config = DiT.Config(dim=8, depth=1, heads=1)
    with pytest.raises(ValueError, match=r"my-model.attn: unknown option 'epsilon'"):
        config.replace(where="my-model", attn={"name": "flow", "epsilon": 1})


def test_no_core_has_an_option_of_the_heads_around_it() -> None:
    """``attn={"name": "core", "option": 1}`` means one of the two."""
    heads = {f.name for f in dataclasses.fields(HeadsConfig)}
    for entry in registry.core:
        assert entry.config is not None
        own = {f.name for f in dataclasses.fields(entry.config)}
        assert own.isdisjoint(heads), entry.name
