"""Stacks: per-layer patterns, depth-dependent facts, capabilities checked before weights exist."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest

from effformer.attention import Attention
from effformer.blocks import BackboneConfig, Joint, Needs, StackConfig, build_stack
from effformer.checks import CapabilityError
from effformer.site import Layer, Site

BASE: dict[str, Any] = {"dim": 12, "depth": 4, "heads": 3}
SITE = Site(dim=12, heads=3)


GRID = replace(SITE, grid=(None, None))


def cores(needs: Needs | None = None, site: Site = SITE, **config: Any) -> list[str]:
    chosen = BackboneConfig.from_dict(BASE | config)
    blocks = build_stack(chosen, site, needs or Needs(), name="toy")
    return [block.attn.part.config.core.to_dict()["name"] for block in blocks]


@pytest.mark.parametrize(
    ("key", "chosen"),
    [("0", [0]), ("-1", [3]), ("1:3", [1, 2]), (":2", [0, 1]), ("1::2", [1, 3]), ("-2:", [2, 3])],
)
def test_slices(key: str, chosen: list[int]) -> None:
    names = cores(layers={key: {"attn": "flow"}})
    assert [i for i, name in enumerate(names) if name == "flow"] == chosen


def test_later_entries_win() -> None:
    layers = {":": {"attn": "flow"}, "2:": {"attn": "linear"}, "3": {"attn": "softmax"}}
    assert cores(layers=layers) == ["flow", "flow", "linear", "softmax"]


@pytest.mark.parametrize(("pattern", "names"), [
    ("3:1", ["linear"] * 3 + ["softmax"] + ["linear"] * 3 + ["softmax"]),
    ("1:1", ["linear", "softmax"] * 4),
    ("2:2", ["linear", "linear", "softmax", "softmax"] * 2),
    ("3:1 flow", ["linear"] * 3 + ["flow"] + ["linear"] * 3 + ["flow"]),
    ("4:1", ["linear"] * 4 + ["softmax"] + ["linear"] * 3),
])  # fmt: skip
def test_hybrids_are_named_by_their_ratio(pattern: str, names: list[str]) -> None:
    assert cores(attn="linear", depth=8, layers=pattern) == names


def test_a_ratio_is_a_short_word_for_slices() -> None:
    config = BackboneConfig.from_dict(BASE | {"attn": "gated-delta", "layers": "3:1"})
    assert config.to_dict()["layers"] == {"3::4": {"attn": "softmax"}}
    assert BackboneConfig.from_dict(config.to_dict()) == config
    assert BackboneConfig(**BASE, attn=config.attn, layers="3:1") == config  # type: ignore[arg-type]
    assert config.replace(layers="1:1").layers == {"1::2": {"attn": "softmax"}}


def test_the_other_blocks_of_a_hybrid_lose_what_the_core_brought_along() -> None:
    config = BackboneConfig.from_dict(BASE | {"attn": "gated-delta", "layers": "3:1"})
    blocks = build_stack(config, SITE, Needs(causal=True), name="toy")
    configs = [block.attn.part.config for block in blocks]
    assert [c.short_conv for c in configs] == [4, 4, 4, 0]
    assert [c.gate is None for c in configs] == [False, False, False, True]
    assert all(c.core.causal for c in configs)


@pytest.mark.parametrize(("pattern", "message"), [
    ("3-1", r"layers: unknown pattern '3-1'; a ratio such as '3:1' .*'3:1 flow'.*works"),
    ("0:1", "unknown pattern '0:1'"), ("3:1 flow linear", "unknown pattern"),
    ("3:1 flwo", r"layers\['3::4'\].*'flwo'; did you mean 'flow'"),
    ("7:1", r"toy layers\['7::8'\]: selects none of the 4 blocks"),
])  # fmt: skip
def test_bad_ratios(pattern: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cores(layers=pattern)


def test_paths_layers_and_drop_path() -> None:
    config = BackboneConfig.from_dict(BASE | {"drop_path": 0.3, "dropout": 0.1})
    blocks = build_stack(config, Site(dim=12, heads=3, path="encoder"), Needs(), name="toy")
    assert [b.site.path for b in blocks] == [f"encoder.blocks.{i}" for i in range(4)]
    assert [b.site.layer for b in blocks] == [0, 1, 2, 3]
    assert [b.site.drop_path for b in blocks] == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert {b.site.dropout for b in blocks} == {0.1}


def test_one_site_per_block() -> None:
    sites = [Site(dim=12, heads=3), Site(dim=24, heads=3)]
    blocks = build_stack(StackConfig(), sites, Needs(), name="toy")
    assert [b.attn.part.qkv.in_features for b in blocks] == [12, 24]


@dataclass(frozen=True, slots=True, kw_only=True)
class TwoKinds(BackboneConfig):
    """The first block has two streams, the others one."""

    def plain_layer(self, index: int) -> Layer:
        layer = BackboneConfig.plain_layer(self, index)
        return replace(layer, block=Joint.Config(ends=False)) if index == 0 else layer


def two_kinds(**options: Any) -> Any:
    needs = [Needs(joint=i == 0) for i in range(4)]
    return build_stack(TwoKinds.from_dict(BASE | options), SITE, needs, name="toy")


def test_blocks_of_two_kinds_share_their_parts() -> None:
    blocks = two_kinds(attn="flow", layers={"1": {"ffn": "swiglu"}, "-1": {"attn": "longformer"}})
    assert [type(block).__name__ for block in blocks] == ["Joint", *["PreNorm"] * 3]
    assert blocks[0].core.config.entry.name == "flow"
    assert [b.attn.part.config.title for b in blocks[1:]] == ["flow", "flow", "longformer"]
    config = TwoKinds.from_dict(BASE)
    assert config.at("blocks.0.block").entry.name == "joint"
    assert config.put("blocks.2.attn", "flow").at("blocks.2.attn").title == "flow"


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"attn": "longformer"}, r"blocks\[0:1\]\.attn: 'longformer' .*; choices: .*flow"),
        (
            {"layers": {"0": {"block": "prenorm"}}},
            r"blocks\[0:1\]\.block: .*; choices: expert-adaln, joint$",
        ),
        ({"block": "joint"}, r"blocks\[1:4\]\.block: .*; choices: .*macaron.*prenorm"),
        ({"axes": "hw"}, "axes"),
    ],
)
def test_refusals_in_blocks_of_two_kinds_offer_what_serves_there(options: Any, match: str) -> None:
    with pytest.raises(CapabilityError, match=match):
        two_kinds(**options)


def test_causal_models_make_their_mixers_causal() -> None:
    blocks = build_stack(BackboneConfig(**BASE), SITE, Needs(causal=True), name="toy")
    assert all(b.attn.part.core.config.causal for b in blocks)


@pytest.mark.parametrize(
    ("layers", "error", "message"),
    [
        ({"x": {}}, ValueError, r"toy layers\['x'\]: expected an index or a slice"),
        ({"9": {"attn": "flow"}}, ValueError, "selects none of the 4 blocks"),
        ({"0": "flow"}, TypeError, "expected a dict such as"),
        ({"0": {"atn": "flow"}}, ValueError, "unknown part 'atn'; did you mean 'attn'"),
        ({"0": {"cross": "flow"}}, ValueError, "unknown part 'cross'"),
        ({"0": {"attn": "flwo"}}, ValueError, "'flwo'; did you mean 'flow'"),
    ],
)
def test_bad_layers(layers: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        cores(layers=layers)


@pytest.mark.parametrize(
    ("needs", "site", "config", "message"),
    [
        (
            Needs(rope=4),
            SITE,
            {"attn": {"name": "flow", "head_dim": 6}},
            r"heads of width 6, but .* made for 4",
        ),
        (
            Needs(rope=4, causal=True),
            SITE,
            {"attn": "lmu"},
            r"blocks\[0:4\]\.attn: 'lmu' cannot apply rotary .*choices: .*flow",
        ),
        (Needs(mask="full"), SITE, {"attn": "linear"}, "'linear' cannot honour a full mask"),
        (Needs(), SITE, {"attn": {"name": "flow", "causal": True}}, "attends both ways"),
        (
            Needs(),
            SITE,
            {"ffn": "glumbconv"},
            r"\.ffn: 'glumbconv' needs a token grid.*choices: .*mlp",
        ),
        (Needs(causal=True), GRID, {"ffn": "glumbconv"}, "must not see later tokens"),
        (Needs(mask="key"), GRID, {"ffn": "glumbconv"}, "cannot honour a key mask"),
        (Needs(), SITE, {"block": "adaln-zero"}, "'adaln-zero' needs a conditioning vector"),
        (
            Needs(),
            replace(SITE, cond_dim=8),
            {"block": "prenorm"},
            "'prenorm' cannot use this model's conditioning",
        ),
    ],
)
def test_impossible_combinations_name_choices(
    needs: Needs, site: Site, config: Any, message: str
) -> None:
    with pytest.raises(CapabilityError, match=message):
        cores(needs, site, **config)


def test_decoders_need_a_block_with_a_place_for_the_memory() -> None:
    site = Site(dim=12, heads=3, memory_dim=8)
    for block in ("parallel", "respost"):
        config = BackboneConfig.from_dict(BASE | {"block": block})
        with pytest.raises(
            CapabilityError, match=r"choices: gated, iterate, macaron, postnorm, prenorm"
        ):
            build_stack(config, site, Needs(), name="toy", cross=Attention.Config())


@pytest.mark.parametrize(
    ("field", "words"),
    [("dim", "be at least 1"), ("depth", r"lie in \[1, 4096\]"), ("heads", "be at least 1")],
)
def test_sizes_are_positive(field: str, words: str) -> None:
    with pytest.raises(ValueError, match=f"{field} must {words}, got 0"):
        BackboneConfig(**{**BASE, field: 0})


@pytest.mark.parametrize("field", ["dropout", "drop_path"])
def test_probabilities(field: str) -> None:
    with pytest.raises(ValueError, match=rf"{field} must lie in \[0, 1\), got 1.0"):
        BackboneConfig(**BASE, **{field: 1.0})


def test_configs_are_read_and_changed_by_path() -> None:
    config = BackboneConfig.from_dict(BASE | {"layers": {"1": {"ffn": "swiglu"}}})
    assert config.at("blocks.1.ffn").title == "swiglu"
    assert config.at("blocks.0.attn.core.backend") == "sdpa"
    assert config.at("attn.core").title == "softmax"
    other = config.put("blocks.1.ffn.ratio", 2.0).put("blocks.2:4.attn", "flow")
    assert other.at("blocks.1.ffn") == config.at("blocks.1.ffn").replace(ratio=2.0)
    assert [other.at(f"blocks.{i}.attn").title for i in range(4)] == ["softmax"] * 2 + ["flow"] * 2
    assert other.put("attn.qkv_bias", False).at("blocks.0.attn.qkv_bias") is False
    assert BackboneConfig.from_dict(other.to_dict()) == other
    assert config.layers == {"1": {"ffn": "swiglu"}}
    for path, error in (
        ("blocks.9.ffn", "names no part of one of the 4 blocks"),
        ("blocks.0.fnn", "names no part"),
        ("atn", "unknown option 'atn'; did you mean 'attn'"),
        ("depth.x", "has no options of its own"),
    ):
        with pytest.raises(ValueError, match=error):
            config.at(path)
    with pytest.raises(ValueError, match="unknown ffn 'sviglu'; did you mean 'swiglu'"):
        config.put("blocks.0.ffn", "sviglu")


def test_a_changed_block_keeps_its_other_parts() -> None:
    layers = {"1": {"attn": "linear"}, "0:2": {"attn": "flow"}}
    config = BackboneConfig.from_dict(BASE | {"layers": layers})
    other = config.put("blocks.1.ffn", "swiglu")
    assert [other.at(f"blocks.1.{slot}").title for slot in ("attn", "ffn")] == ["flow", "swiglu"]
    for path in ("blocks.9.ffn", "blocks.7:9.ffn", "blocks.0.nonsense"):
        with pytest.raises(ValueError, match="names no part of one of the 4 blocks"):
            config.put(path, "swiglu")
    with pytest.raises(ValueError, match="'gate' is None, which has no options of its own"):
        config.put("blocks.0.attn.gate.act", "silu")
    with pytest.raises(TypeError, match=r"BackboneConfig\.depth: expected int, got 'x'"):
        config.put("depth", "x")
