"""Cutting: what is left computes what the whole model computes without the lost units."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import assert_close
from effformer.compress import Plan, cut, plan, quantize, replay
from torch import Tensor, nn

import effformer
from effformer.calls import run
from effformer.checks import CapabilityError, FormatError
from effformer.profile import profile

MODELS: dict[str, dict[str, Any]] = {
    "pre-norm": {"name": "vit-nano"},
    "post-norm": {"name": "bert-tiny"},
    "sandwich": {"name": "vit-nano", "block": "respost"},
    "adaLN": {"name": "dit-nano"},
    "gated FFN": {"name": "vit-nano", "ffn": "swiglu", "layer_scale": 0.5},
    "convolution": {"name": "dit-nano", "ffn": "glumbconv"},
    "grouped query": {"name": "vit-nano", "attn": {"name": "softmax", "kv_heads": 2, "head_dim": 12}, "heads": 4},
    "rotary": {"name": "lightningdit-nano"},
    "flow": {"name": "vit-nano", "attn": "flow"},
    "relative": {"name": "vit-nano", "attn": "relative"},
    "gated heads": {"name": "vit-nano", "attn": {"name": "softmax", "gate": "element", "short_conv": 3}},
    "decays": {"name": "flowformer-gpt-nano", "attn": "retention", "vocab": 32},
    "parallel": {"name": "vit-nano", "block": "parallel"},
    "joint": {"name": "mmdit-tiny"},
    "fused": {"name": "flux-tiny"},
    "dynamic": {"name": "dydit-nano", "width": None, "tokens": None},
    "macaron": {"name": "macaron-tiny"},
    "control": {"name": "relactrl-nano"},
    "grid": {"name": "predformer-tiny"},
}  # fmt: skip


def made(case: str) -> Any:
    """A model in float64 whose weights are all of some size, so that no branch is silent."""
    options = dict(MODELS[case])
    torch.manual_seed(0)
    model = effformer.build_model(options.pop("name"), **options).double().eval()
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def inputs(model: Any) -> dict[str, Any]:
    given = model.example_inputs(2, generator=torch.Generator().manual_seed(1))
    return {k: x.double() if x.is_floating_point() else x for k, x in given.items()}


def some(planned: Plan) -> dict[str, Tensor]:
    """About half of the heads and channels of every part, not the first ones."""
    kept = {}
    generator = torch.Generator().manual_seed(3)
    for group in planned.groups:
        if group.kind in ("heads", "channels"):
            order = torch.randperm(group.units, generator=generator)
            kept[group.path] = order[: max(1, group.units // 2)].sort().values
    return kept


def silenced(model: nn.Module, planned: Plan, kept: dict[str, Tensor]) -> None:
    """Nobody reads the units that are not kept."""
    state = model.state_dict()
    for path, units in kept.items():
        group = planned[path]
        assert group.outgoing, path
        for member in group.outgoing:
            lost = (member.owner >= 0) & ~torch.isin(member.owner, units)
            state[member.path][:, lost] = 0


QUICK = ("pre-norm", "post-norm", "adaLN", "gated FFN", "grouped query", "fused")


@pytest.mark.parametrize(
    "case", [c if c in QUICK else pytest.param(c, marks=pytest.mark.slow) for c in MODELS]
)
def test_cut_equals_silenced(case: str, tmp_path: Path) -> None:
    model = made(case)
    planned, given = plan(model), inputs(model)
    kept = some(planned)
    assert {g.kind for g in planned.groups} >= {"heads", "channels"}
    small = cut(model, kept)
    work = profile(small, given, memory=False).total / profile(model, given, memory=False).total
    assert work < 0.99
    again = effformer.load_model(effformer.save_pretrained(small, tmp_path / "small"))
    silenced(model, planned, kept)
    expected = run(model, given, where="test")
    for some_model in (small, again):
        for actual, whole in zip(run(some_model, given, where="test"), expected, strict=True):
            assert_close(actual, whole, rtol=0, atol=1e-10, what=case)


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("pre-norm", True), ("post-norm", True), ("grouped query", True), ("adaLN", True),
        ("joint", True), ("control", False), ("decays", False),
    ],
)  # fmt: skip
def test_the_config_says_sizes_where_it_can(case: str, said: bool) -> None:
    model = made(case)
    small = cut(model, some(plan(model)))
    assert (small.transforms == ()) == said
    if said:
        rebuilt = type(small)(small.config)
        assert {k: v.shape for k, v in rebuilt.state_dict().items()} == {
            k: v.shape for k, v in small.state_dict().items()
        }


def test_streams_of_unlike_widths_are_recorded(tmp_path: Path) -> None:
    model = effformer.build_model("mmdit-nano").eval()
    small = cut(model, {"blocks.0.x.ffn.part": list(range(64))})
    assert [r["layers"] for r in small.transforms] == [["blocks.0.x.ffn.part"]]
    both = cut(model, {f"blocks.0.{s}.ffn.part": list(range(64)) for s in "xy"})
    assert both.transforms == ()
    assert both.config.at("blocks.0.ffn.hidden") == 64


def test_parts_alike_are_said_once() -> None:
    model = made("pre-norm")
    channels = {f"blocks.{i}.ffn.part": list(range(64)) for i in range(2)}
    small = cut(model, channels)
    assert small.config.ffn.hidden == 64
    assert small.config.layers == {}


def test_rotary_angles_of_heads_go_with_them() -> None:
    """Learned angles per head stand in the model, so that the record says which heads are left."""
    rope = {"kind": "mixed"}
    model = effformer.build_model("vit-nano", positions={"absolute": False, "rope": rope}, heads=4)
    model = model.double().eval()
    planned, given = plan(model), inputs(model)
    kept = {g.path: torch.tensor([1, 3]) for g in planned.groups if g.kind == "heads"}
    small = cut(model, kept)
    assert small.transforms[0]["kind"] == "prune"
    silenced(model, planned, kept)
    assert_close(small(**given), model(**given), rtol=0, atol=1e-10)


def test_blocks_go_and_others_move_up() -> None:
    layers = {"1": {"attn": "flow"}, "2": {"ffn": {"hidden": 40}}}
    model = effformer.build_model("vit-nano", depth=4, layers=layers).double().eval()
    given = inputs(model)
    small = cut(
        model, {"blocks": [0, 2, 3], "blocks.2.ffn.part": list(range(32)), "blocks.1.ffn.part": [0]}
    )
    assert small.config.depth == 3
    assert small.config.at("blocks.1.ffn.hidden") == 32
    short = cut(model, {"blocks": [0, 2, 3]})
    del model.blocks[1]
    assert_close(short(**given), model(**given), rtol=0, atol=1e-10)


@pytest.mark.parametrize("case", ["pre-norm", "post-norm", "fused"])
def test_width_is_a_config_and_permutes(case: str) -> None:
    """A permuted stream is the same model: every axis that is as wide as it was found."""
    from effformer.compress.rebuild import rebuilt, width_group

    model = made(case)
    given, dim = inputs(model), model.config.dim
    order = torch.randperm(dim, generator=torch.Generator().manual_seed(2))
    state = dict(model.state_dict())
    for module, name, axis, owner in width_group(model):
        key = f"{module}.{name}" if module else name
        rows = torch.cat([order + c * dim for c in range(len(owner) // dim)])
        state[key] = state[key].index_select(axis, rows)
    moved = rebuilt(model, model.config, state)
    for actual, expected in zip(
        run(moved, given, where="t"), run(model, given, where="t"), strict=True
    ):
        if actual.shape[-1] == dim:  # features, in their new order
            expected = expected[..., order]
        assert_close(actual, expected, rtol=0, atol=1e-10)
    small = cut(model, {"width": list(range(0, dim, 2))})
    assert small.config.dim == dim // 2
    assert small.transforms == ()
    assert run(small, given, where="t")[0].isfinite().all()


def test_twice_is_fine_and_quantizing_after(tmp_path: Path) -> None:
    model = made("decays").float()
    one = cut(model, {"blocks.0.attn.part": [0, 1]})
    two = cut(one, {"blocks.0.attn.part": [1], "blocks.1.ffn.part": list(range(32))})
    packed, _ = quantize(two, "int8", "blocks.*.ffn")
    again = effformer.load_model(effformer.save_pretrained(packed, tmp_path / "m"))
    assert [r["kind"] for r in again.transforms] == ["prune", "prune", "quantize"]
    given = model.example_inputs()
    assert torch.equal(run(again, given, where="t")[0], run(packed, given, where="t")[0])


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("dit-nano", "pos_embed is computed from the width"),
        ("predformer-tiny", "positions is computed"),
        ("macaron-bert-tiny", "a table of the model is computed"),
        ("macaron-tiny", "a table of the model is computed"),
    ],
)
def test_tables_of_the_width_are_found(name: str, why: str) -> None:
    torch.manual_seed(0)
    assert why in plan(effformer.build_model(name)).kept["width"]


def test_heads_that_a_table_numbers_are_recorded() -> None:
    """The first heads of fewer would have other decays."""
    model = effformer.build_model("flowformer-gpt-nano", attn="lightning", vocab=32).double().eval()
    planned, given = plan(model), inputs(model)
    kept = {g.path: torch.tensor([0, 1]) for g in planned.groups if g.kind == "heads"}
    small = cut(model, kept)
    assert [r["kind"] for r in small.transforms] == ["prune"]
    silenced(model, planned, kept)
    assert_close(
        run(small, given, where="t")[0], run(model, given, where="t")[0], rtol=0, atol=1e-10
    )


def test_refusals() -> None:
    model = made("pre-norm")
    with pytest.raises(ValueError, match=r"'blocks.9' cannot be cut; what can: blocks.0.attn.part"):
        cut(model, {"blocks.9": [0]})
    with pytest.raises(ValueError, match=r"some of 0..1, got \[7\]"):
        cut(model, {"blocks.0.attn.part": [7]})
    with pytest.raises(CapabilityError, match="must stay"):
        cut(made("joint"), {"blocks": [0]})
    with pytest.raises(ValueError, match="matches no module"):
        plan(model, "nowhere.*")
    packed, _ = quantize(model.float(), "int8")
    assert "prune first, then quantize" in plan(packed).kept["blocks.0.ffn.part"]
    with pytest.raises(FormatError, match="no part that can be cut"):
        replay(model, {"kind": "prune", "layers": ["head"], "kept": [[0]]})
    with pytest.raises(FormatError, match="has not all of the units"):
        replay(model, {"kind": "prune", "layers": ["blocks.0.ffn.part"], "kept": [[4000]]})
