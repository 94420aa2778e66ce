from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import assert_close
from effformer.export import Session, export_onnx
from effformer.models import DyDiT
from effformer.models.dydit import PRESETS
from torch import Tensor

import effformer
from effformer import registry
from effformer.checks import CapabilityError, FormatError
from effformer.context import Ledger, Tap
from effformer.flow import CONVENTIONS
from effformer.profile import profile

SMALL: dict[str, Any] = {"input_size": 8, "num_classes": 10, "dim": 48, "heads": 4}


def awake(name: str = "dydit-nano", *, gates: float = 0.4, **options: Any) -> Any:
    """A model whose layers do something, with gates near their threshold."""
    torch.manual_seed(0)
    model = effformer.build_model(name, **{**SMALL, **options}).eval()
    with torch.no_grad():
        for key, p in model.named_parameters():
            if ".gates." in key:
                p.normal_(std=gates)
            elif p.requires_grad:
                p.add_(torch.randn_like(p) * 0.1)
    return model


def inputs(model: Any, batch: int = 3) -> dict[str, Tensor]:
    return model.example_inputs(batch, generator=torch.Generator().manual_seed(1))  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", [n for n in PRESETS if PRESETS[n].params is not None])
def test_parameter_counts(name: str) -> None:
    with torch.device("meta"):
        model = effformer.build_model(name)
    assert isinstance(model, DyDiT)
    assert sum(p.numel() for p in model.parameters()) == PRESETS[name].params


def test_the_released_model_has_678_million_parameters() -> None:
    assert PRESETS["dydit-xl-2"].params == 678_424_644


def test_it_is_the_dit_with_both_slots_filled() -> None:
    model = awake("dit-nano", width="dynamic", tokens="dynamic")
    other = awake()
    assert effformer.load_weights(other, model.state_dict()).missing == ()
    given = inputs(model)
    torch.testing.assert_close(model(**given), other(**given), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["dit-nano", "sit-nano"])
@pytest.mark.parametrize("layout", ["official", "diffusers", "effformer"])
def test_starts_as_the_dit_whose_weights_it_loads(name: str, layout: str, tmp_path: Path) -> None:
    shift = int(layout == "diffusers")
    dense = awake(name, time_freq_shift=shift)
    path = effformer.save_weights(dense, tmp_path / "dit.safetensors", layout)
    gates = {"width": "dynamic", "tokens": "dynamic"}
    model = effformer.build_model(name, **SMALL, **gates, time_freq_shift=shift).eval()
    report = effformer.load_weights(model, path)
    assert report.missing
    assert all(".gates." in key for key in report.missing)
    given, ledger = inputs(dense), Ledger()
    torch.testing.assert_close(model(**given, ledger=ledger), dense(**given), rtol=0, atol=0)
    assert all(bool((f == 1).all()) for f in ledger.executed.values())


def test_gates_that_are_missing_in_part_are_an_error(tmp_path: Path) -> None:
    model = awake()
    state = model.state_dict()
    del state["blocks.0.width.gates.attn.router.bias"]
    with pytest.raises(FormatError, match=r"missing: blocks\.0\.width\.gates\.attn\.router\.bias"):
        effformer.load_weights(effformer.build_model("dydit-nano", **SMALL), state)


def test_official_layout_round_trip(tmp_path: Path) -> None:
    model = awake()
    path = effformer.save_weights(model, tmp_path / "w.safetensors", "official")
    keys = effformer.io.read_weights(path).keys()  # type: ignore[attr-defined]
    assert "blocks.1.attn_rate.router.weight" in keys
    assert "blocks.1.mlp_rate.router.bias" in keys
    assert "blocks.1.token_selection.mlp_head.2.weight" in keys
    other = effformer.build_model("dydit-nano", **SMALL)
    assert effformer.load_weights(other, path).layout == "official"
    for key, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[key], value), key


@pytest.mark.parametrize("name", ["dydit-nano", "sit-nano"])
@torch.no_grad()
def test_skipping_equals_masking_at_mixed_times(name: str) -> None:
    model = awake(name, width="dynamic", tokens="dynamic")
    given, ledger = inputs(model, 6), Ledger()
    given["t"] = torch.tensor([0, 1, 1, 0, 2, 2]) * (0.4 if name == "sit-nano" else 400.0)
    masked = model(**given, tap=Tap())
    torch.testing.assert_close(model(**given, ledger=ledger), masked, rtol=1e-5, atol=1e-5)
    assert min(float(f.min()) for f in ledger.executed.values()) < 0.7
    # the width belongs to the time, and labels and neighbours change nothing
    for path, fraction in ledger.executed.items():
        if path.endswith("attn"):
            assert fraction[0] == fraction[3]
            assert fraction[1] == fraction[2]
            assert fraction[4] == fraction[5]
    given["y"] = given["y"].flip(0)
    again = Ledger()
    model(**given, ledger=again)
    for path, fraction in ledger.executed.items():
        if path.endswith("attn"):
            assert torch.equal(fraction, again.executed[path])


@torch.no_grad()
def test_no_token_may_remain() -> None:
    model = awake(gates=0.0)
    for block in model.blocks:
        block.tokens.gates["ffn"].fc2.bias.fill_(-1)
    ledger, tap = Ledger(), Tap(keep=("blocks.*.ffn",))
    out = model(**inputs(model), ledger=ledger)
    assert not any(f.any() for path, f in ledger.executed.items() if path.endswith("ffn"))
    torch.testing.assert_close(out, model(**inputs(model), tap=tap), rtol=1e-5, atol=1e-5)
    assert tap.seen["blocks.0.ffn"].any()  # it would have contributed


def test_training_samples_and_evaluation_does_not() -> None:
    model = awake(gates=0.01)
    given = inputs(model)
    first = model.train()(**given)
    assert not torch.equal(first, model(**given))
    assert torch.equal(model.eval()(**given), model(**given))
    complete = model.train()(**given, complete=True)
    torch.testing.assert_close(complete, model.eval()(**given, complete=True))


def test_layers_may_be_left_out() -> None:
    model = awake(layers={"0": {"tokens": None, "width": None}})
    assert model.blocks[0].width is None
    assert model.blocks[0].tokens is None
    assert model.blocks[1].width is not None
    rebuilt = type(model)(model.config)
    assert rebuilt.state_dict().keys() == model.state_dict().keys()


def test_save_and_load(tmp_path: Path) -> None:
    model = awake()
    effformer.save_pretrained(model, tmp_path / "m")
    loaded = effformer.load_model(tmp_path / "m")
    given = inputs(model)
    torch.testing.assert_close(loaded(**given), model(**given), rtol=0, atol=0)


def test_compiled_graphs_are_static() -> None:
    model = awake(depth=1)
    given = inputs(model)
    with torch.no_grad():
        expected = model(**given)
        torch.compiler.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(**given), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@torch.no_grad()
def test_graphs_skip_heads_channels_and_tokens(tmp_path: Path) -> None:
    """What nobody asks for is not even read: NaN in the weights of units that are off, at any time of
    the batch, reach no output of the graph; neither do those of a branch that no token takes.
    """
    model = awake()
    path = tmp_path / "m.onnx"
    report = export_onnx(model, path)
    assert report.parity is not None
    assert report.graph.operators["NonZero"] == 3 * len(model.blocks)
    given = inputs(model, 6)
    given["t"] = torch.tensor([0, 1, 1, 0, 2, 2]) * 400
    assert_close(_run(path, given), model(**given), rtol=1e-4, atol=1e-5)
    given["t"] = torch.full((6,), 400)
    ctx, block = model.context(**given), model.blocks[0]
    off = {name: (block.width(name, ctx)[0] == 0).nonzero().flatten() for name in ("attn", "ffn")}
    assert all(len(units) for units in off.values())
    expected = model(**given)
    channels = off["ffn"][:, None] * (block.ffn.part.units // 4) + torch.arange(
        block.ffn.part.units // 4
    )
    block.ffn.part.fc1.weight[channels.flatten()] = torch.nan
    rows = off["attn"][:, None] * 12 + torch.arange(12)
    block.attn.part.qkv.weight[rows.flatten()] = torch.nan
    for gate in model.blocks[1].tokens.gates.values():
        gate.fc2.weight.zero_()
        gate.fc2.bias.fill_(-1.0)
    expected = model(**given)
    assert expected.isfinite().all()
    for p in model.blocks[1].ffn.part.parameters():
        p.fill_(torch.nan)
    export_onnx(model, path, verify=False, force=True)
    assert_close(_run(path, given), expected, rtol=1e-4, atol=1e-5)


def _run(path: Path, given: dict[str, Tensor]) -> Tensor:
    (out,) = Session(path).run(given).values()
    return torch.from_numpy(out)


@pytest.mark.parametrize(
    "core", [pytest.param(n, marks=pytest.mark.slow) for n in ("differential", "nystrom", "gla")]
)
def test_graphs_multiply_where_heads_must_be_counted(core: str, tmp_path: Path) -> None:
    model = awake(attn=core, depth=1, tokens=None)
    report = export_onnx(model, tmp_path / "m.onnx")
    assert report.graph.operators["NonZero"] == 1  # that of the channels


def test_a_model_made_in_inference_mode_skips_as_well() -> None:
    with torch.inference_mode():
        model = awake()
        given = inputs(model)
        out = model(**given)
        torch.testing.assert_close(out, model(**given, tap=Tap()), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_quantized_model_multiplies() -> None:
    model = awake()
    small, _ = effformer.compress.quantize(model, "int8")
    given = inputs(model)
    torch.testing.assert_close(small(**given), small(**given, tap=Tap()), rtol=0, atol=0)
    assert type(small.blocks[0].width.gates["attn"].router) is type(
        model.blocks[0].width.gates["attn"].router
    )


def test_profile_reports_what_is_executed() -> None:
    model = awake()
    given, ledger = inputs(model), Ledger()
    with torch.no_grad():
        model(**given, ledger=ledger)
    counted = profile(model, given, memory=False)
    assert counted.executed is not None
    # mean over the batch of each part's dense work times its fraction
    saved = sum(float((1 - s.fraction).sum()) * s.cost for s in ledger.shares.values())
    assert counted.executed == pytest.approx(counted.total - saved, abs=len(ledger.shares))
    assert counted.executed < 0.9 * counted.total
    routers = sum(b.width.macs() * 3 + b.tokens.macs(16) * 3 for b in model.blocks)
    assert counted.by_part["gates"] == routers


def test_a_vit_takes_tokens_and_refuses_width() -> None:
    torch.manual_seed(0)
    vit = effformer.build_model("vit-nano", tokens="dynamic").eval()
    plain = effformer.build_model("vit-nano").eval()
    assert effformer.load_weights(vit, plain.state_dict()).missing
    given = vit.example_inputs(2)
    torch.testing.assert_close(vit(**given), plain(**given), rtol=0, atol=0)
    with pytest.raises(CapabilityError, match="'dynamic' reads the time embedding, which"):
        effformer.build_model("vit-nano", width="dynamic")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attn": "longformer"}, r"attn 'longformer' has none .*softmax.* would do"),
        (
            {"attn": {"kv_heads": 2}},
            r"lets heads share keys \(kv_heads=None and qk_heads=None would do\)",
        ),
        ({"attn": {"qk_norm": "across-heads"}}, r"share a norm .qk_norm=True or False would do"),
        ({"attn": {"projections": {}}}, r"share learners .projections=None would do"),
        ({"ffn": "acm"}, r"width: .*ffn 'acm' has none .*mlp.* would do"),
        ({"ffn": "acm", "width": None}, r"tokens: .*'acm' chooses its work .*mlp.* would do"),
        ({"ffn": "glumbconv", "width": None}, r"'glumbconv' mixes tokens .*mlp.* would do"),
        ({"block": "parallel", "width": None}, r"side by side .block: .*prenorm.* would do"),
        ({"width": {"groups": 5}}, r"192 hidden channels do not divide into 5 groups"),
        ({"width": {"groups": 1}}, "groups must be at least 2"),
        ({"width": {"tau": 0.0}}, "tau must be positive"),
        ({"tokens": {"reduction": 0}}, "reduction must be at least 1"),
        ({"tokens": {"threshold": 1.0}}, r"threshold must lie in \(0, 1\)"),
        ({"heads": 1}, r"blocks\.0\.width\.attn: a gate needs at least 2 units, got 1"),
        ({"width": "dynamik"}, r"unknown width 'dynamik'; did you mean 'dynamic'\?"),
    ],
)
def test_what_does_not_work_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        effformer.build_model("dydit-nano", **{**SMALL, **options})


def test_generators_say_how_they_count() -> None:
    families = {e.facts["family"]: e.build for e in registry.model}
    for family in ("dit", "sit", "dydit", "lightningdit"):
        assert families[family].CONVENTION in CONVENTIONS
    assert families["dydit"].CONVENTION == "dit"
    assert families["vit"].CONVENTION is None
