from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import assert_close
from effformer.export import Session, export_onnx
from effformer.models import DiT
from effformer.models.dit import PRESETS
from torch import Tensor

import effformer
from effformer import registry
from effformer.checks import CapabilityError, FormatError
from effformer.context import Tap
from effformer.nn.embeddings import sincos_2d

SMALL: dict[str, Any] = {"input_size": 8, "num_classes": 10}


def awake(name: str = "dit-nano", **options: Any) -> Any:
    """A model whose gates and last layer are not zero."""
    model = effformer.build_model(name, **{**SMALL, **options}).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.05)
    return model


def inputs(model: Any, batch: int = 2) -> dict[str, Tensor]:
    return model.example_inputs(batch, generator=torch.Generator().manual_seed(1))  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", PRESETS)
def test_parameter_counts(name: str) -> None:
    with torch.device("meta"):
        model = effformer.build_model(name)
    learned = [p for k, p in model.named_parameters() if k != "pos_embed"]
    fixed = [p for k, p in model.named_parameters() if k == "pos_embed"]
    assert all(not p.requires_grad for p in fixed)
    if PRESETS[name].params is not None:
        assert sum(p.numel() for p in [*learned, *fixed]) == PRESETS[name].params


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("DiT-B/2", "dit-b-2"),
        ("dit-b", "dit-b-2"),
        ("dit-xl/8", "dit-xl-8"),
        ("DIT-S-4", "dit-s-4"),
    ],
)
def test_official_spellings(alias: str, name: str) -> None:
    with torch.device("meta"):
        assert effformer.build_model(alias, depth=1).name == name
    assert registry.model.get("dit-b").name == "dit-b-2"


def test_starts_as_the_identity_with_zero_output() -> None:
    model = effformer.build_model("dit-nano", **SMALL).eval()
    given = inputs(model)
    tap = Tap(keep=("blocks.*",))
    assert not model(**given, tap=tap).any()
    from effformer.context import Context

    tokens = torch.randn(2, 16, 48)
    ctx = Context(cond=torch.randn(2, 48), grid=(4, 4))
    for block in model.blocks:
        torch.testing.assert_close(block(tokens, ctx), tokens, rtol=0, atol=0)


def test_every_parameter_learns() -> None:
    model = awake().train()
    model(**inputs(model)).square().sum().backward()
    silent = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not silent


def test_permuting_patches_permutes_the_output_without_positions() -> None:
    model = awake()
    with torch.no_grad():
        model.pos_embed.zero_()
    given = inputs(model)
    order = torch.randperm(4)

    def shuffled(x: Tensor) -> Tensor:
        return x.unflatten(2, (4, 2))[:, :, order].flatten(2, 3)

    out = model(**given)
    turned = model(**{**given, "x": shuffled(given["x"])})
    torch.testing.assert_close(turned, shuffled(out), rtol=1e-4, atol=1e-5)


def test_other_resolutions_recompute_positions() -> None:
    model = awake()
    larger = effformer.build_model("dit-nano", **{**SMALL, "input_size": 12}).eval()
    state = {k: v for k, v in model.state_dict().items() if k != "pos_embed"}
    effformer.load_weights(larger, state, strict=False)
    given = inputs(larger)
    torch.testing.assert_close(model(**given), larger(**given))
    wide = torch.randn(1, 4, 4, 10)
    assert model(wide, torch.zeros(1), torch.zeros(1, dtype=torch.int64)).shape == (1, 8, 4, 10)
    assert model.dynamic_axes()["x"] == {0: "batch", 2: "height", 3: "width"}


def test_dropped_labels_are_the_null_class() -> None:
    model = awake()
    given = inputs(model)
    null = {**given, "y": torch.full((2,), 10)}
    dropped = model(**given, drop=torch.tensor([True, True]))
    torch.testing.assert_close(dropped, model(**null), rtol=0, atol=0)
    one = model(**given, drop=torch.tensor([False, True]))
    torch.testing.assert_close(one[0], model(**given)[0])
    without = awake(label_dropout=0.0)
    assert without.label_embed.table.num_embeddings == 10
    with pytest.raises(ValueError, match="no null class; build it with label_dropout > 0"):
        without(**given, drop=torch.tensor([True, False]))


def test_layer_patterns() -> None:
    layers = {
        "0:4": {"attn": "flow"},
        "1::2": {"attn": "linear", "ffn": "swiglu"},
        "-1": {"block": "macaron"},
    }
    model = awake(depth=4, layers=layers)
    cores = [type(b.attn.part.core).__name__ for b in model.blocks]
    assert cores == ["Flow", "Linear", "Flow", "Linear"]
    assert [type(b).__name__ for b in model.blocks] == ["AdaLNZero"] * 3 + ["Macaron"]
    assert type(model.blocks[1].ffn.part).__name__ == "SwiGLU"
    assert DiT(model.config).config == model.config
    assert model(**inputs(model)).shape == (2, 8, 8, 8)


@pytest.mark.parametrize("block", ["macaron", "parallel"])
@pytest.mark.parametrize("attn", ["softmax", "flow", "linear", "relative", "differential"])
def test_swaps(block: str, attn: str, tmp_path: Path) -> None:
    model = awake(block=block, attn=attn)
    out = model(**inputs(model))
    assert out.std() > 0
    effformer.save_pretrained(model, tmp_path / "m")
    torch.testing.assert_close(
        effformer.load_model(tmp_path / "m")(**inputs(model)), out, rtol=0, atol=0
    )


@pytest.mark.parametrize("layout", ["official", "diffusers"])
def test_layouts_lose_nothing(layout: str, tmp_path: Path) -> None:
    options = {**SMALL, "time_freq_shift": int(layout == "diffusers")}
    model = awake(**options)
    path = effformer.save_weights(model, tmp_path / "w.safetensors", layout)
    again = effformer.build_model("dit-nano", **options).eval()
    report = effformer.load_weights(again, path)
    assert report.layout == layout
    assert (report.missing, report.unexpected, report.reshaped) == ((), (), ())
    for key, value in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[key], value, rtol=0, atol=0)


def test_official_keys_are_those_of_the_released_files(tmp_path: Path) -> None:
    model = awake(depth=1)
    state = model.LAYOUTS[0].from_ours(model.state_dict(), model.config)
    linear = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1")
    names = [f"blocks.0.{x}" for x in linear] + ["t_embedder.mlp.0", "t_embedder.mlp.2"]
    names += ["x_embedder.proj", "final_layer.linear", "final_layer.adaLN_modulation.1"]
    keys = {f"{n}.{kind}" for n in names for kind in ("weight", "bias")}
    assert set(state) == keys | {"pos_embed", "y_embedder.embedding_table.weight"}


def diffusers_twin(freq_shift: int, norm_eps: float, patch: int = 2) -> Any:
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=8, num_layers=2,
        sample_size=8, patch_size=patch, num_embeds_ada_norm=10, norm_eps=norm_eps, dropout=0.0,
    ).eval()  # fmt: skip
    shared: dict[str, Tensor] = {}
    with torch.no_grad():
        for key, p in theirs.named_parameters():
            p.copy_(torch.randn_like(p) * (p[0].numel() ** -0.5 if p.dim() > 1 else 0.2))
            if ".emb." in key:  # every block holds a copy of the embedders
                p.copy_(shared.setdefault(key.partition(".emb.")[2], p.clone()))
    for block in theirs.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = freq_shift
    return theirs


@pytest.mark.parametrize(
    ("shift", "eps", "patch"),
    [(1, 1e-5, 2), (0, 1e-6, 2), (1, 1e-6, 4)],
    ids=["diffusers", "official", "mixed"],
)
def test_agrees_with_diffusers(shift: int, eps: float, patch: int) -> None:
    theirs = diffusers_twin(shift, eps, patch)
    ours = effformer.build_model(
        "dit-nano", **SMALL, patch=patch, time_freq_shift=shift, ffn_norm_eps=eps
    ).eval()
    state = theirs.state_dict()
    # diffusers itself has shift 1; the twin with 0 is patched
    report = effformer.load_weights(ours, state, strict=shift == 1)
    assert (report.layout, report.missing, report.unexpected) == ("diffusers", (), ())
    assert report.differs == (() if shift else ("time_freq_shift=0 (1 there)",))
    x, t, y = torch.randn(3, 4, 8, 8), torch.tensor([0, 417, 999]), torch.tensor([0, 9, 10])
    expected = theirs(x, timestep=t, class_labels=y).sample
    torch.testing.assert_close(ours(x, t, y), expected, rtol=1e-4, atol=1e-5)
    back = ours.LAYOUTS[1].from_ours(ours.state_dict(), ours.config)
    assert set(back) == set(state) - {"pos_embed.pos_embed"}
    assert all(torch.equal(back[key], state[key]) for key in back)


def test_diffusers_copies_must_agree() -> None:
    theirs = diffusers_twin(0, 1e-6)
    state = theirs.state_dict()
    key = "transformer_blocks.1.norm1.emb.timestep_embedder.linear_1.weight"
    state[key] = state[key] + 1
    model = effformer.build_model("dit-nano", **SMALL, time_freq_shift=1)
    with pytest.raises(FormatError, match="differs from block 0's copy"):
        effformer.load_weights(model, state)


def test_changed_position_tables_need_learned_positions() -> None:
    model = awake()
    state = model.LAYOUTS[0].from_ours(model.state_dict(), model.config)
    state["pos_embed"] = state["pos_embed"] + 0.1
    with pytest.raises(FormatError, match="build the model with positions='learned'"):
        effformer.load_weights(effformer.build_model("dit-nano", **SMALL), state)
    learned = effformer.build_model("dit-nano", **SMALL, positions="learned")
    effformer.load_weights(learned, state)
    torch.testing.assert_close(learned.pos_embed, state["pos_embed"])
    with pytest.raises(ValueError, match=r"x: expected shape \(B, 4, 8, 8\), got \(1, 4, 12, 12\)"):
        learned(torch.zeros(1, 4, 12, 12), torch.zeros(1), torch.zeros(1, dtype=torch.int64))


def test_the_table_of_a_half_file_is_exact_again() -> None:
    state = awake().state_dict()
    rounded = state | {"pos_embed": state["pos_embed"].bfloat16()}
    model = effformer.build_model("dit-nano", **SMALL)
    effformer.load_weights(model, model.LAYOUTS[0].from_ours(rounded, model.config))
    torch.testing.assert_close(model.pos_embed, awake().pos_embed, rtol=0, atol=0)
    once = awake().half().float()
    effformer.load_weights(model, once.LAYOUTS[0].from_ours(once.state_dict(), once.config))
    torch.testing.assert_close(model.pos_embed, once.pos_embed, rtol=0, atol=0)


def test_a_changed_table_is_exported_and_not_the_formula(tmp_path: Path) -> None:
    model = awake(depth=1)
    every = model.dynamic_axes()
    with torch.no_grad():
        model.pos_embed.mul_(1.1)
    assert model.dynamic_axes()["x"] == {0: "batch"}
    path, given = tmp_path / "m.onnx", inputs(model, 3)
    export_onnx(model, path, verify=False)
    found = torch.from_numpy(Session(path).run(given)["output"])
    torch.testing.assert_close(found, model(**given), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"axis 2 of 'x' is fixed in this model"):
        export_onnx(model, path, dynamic=every, verify=False)


def test_position_table_is_the_published_one() -> None:
    table = sincos_2d(2, 3, 8)[0].double()
    w = torch.tensor([1.0, 0.01], dtype=torch.float64)
    for row in range(2):
        for column in range(3):
            code = torch.cat([f(p * w) for p in (column, row) for f in (torch.sin, torch.cos)])
            torch.testing.assert_close(table[3 * row + column], code, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"input_size": 9}, ValueError, "not divisible by patch 2; patches that fit: 1, 3, 9"),
        ({"patch": 0}, ValueError, "dit-nano.patch must be at least 1, got 0"),
        ({"channels": 0}, ValueError, "dit-nano.channels must be at least 1, got 0"),
        ({"input_size": 0}, ValueError, "input_size must be at least 1, got 0"),
        ({"num_classes": -1}, ValueError, "num_classes must be at least 1, got -1"),
        ({"dim": 50}, ValueError, "dim must be divisible by 4"),
        ({"heads": 5}, ValueError, "width 48 is not divisible by 5 heads"),
        ({"label_dropout": 1.0}, ValueError, r"label_dropout must lie in \[0, 1\)"),
        ({"depth": 0}, ValueError, r"depth must lie in \[1, 4096\]"),
        ({"drop_path": -0.1}, ValueError, r"drop_path must lie in \[0, 1\)"),
        ({"positions": "rope"}, ValueError, "unknown value 'rope'"),
        ({"attn": "flwo"}, ValueError, "unknown attention 'flwo'; did you mean 'flow'"),
        ({"atn": "flow"}, ValueError, "unknown option 'atn'; did you mean 'attn'"),
        ({"attn": {"name": "flow", "epz": 1.0}}, ValueError, "unknown option 'epz'"),
        ({"block": "prenorm"}, CapabilityError, "cannot use this model's conditioning vector"),
        ({"attn": {"name": "flow", "causal": True}}, CapabilityError, "attends both ways"),
        ({"layers": {"7": {"attn": "flow"}}}, ValueError, "selects none of the 2 blocks"),
        ({"layers": {"a": {"attn": "flow"}}}, ValueError, "expected an index or a slice"),
        ({"layers": {"0": "flow"}}, TypeError, "expected a dict"),
        ({"layers": {"0": {"mixer": "flow"}}}, ValueError, "unknown part 'mixer'"),
        ({"dim": "48"}, TypeError, "dim: expected int, got '48'"),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        effformer.build_model("dit-nano", **options)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 3, 8, 8)}, ValueError, r"dit-nano: x: expected shape \(B, 4, H, W\)"),
        ({"x": torch.zeros(2, 4, 9, 8)}, ValueError, r"\(9, 8\) is not divisible by patch 2"),
        ({"x": torch.zeros(2, 4, 8, 8).int()}, TypeError, "x must be floating point"),
        ({"t": torch.zeros(3)}, ValueError, r"t: expected shape \(B,\), got \(3,\)"),
        ({"t": 0.5}, TypeError, "t: expected a tensor"),
        ({"y": torch.zeros(2, 1)}, ValueError, r"y: expected shape \(B,\)"),
        ({"y": torch.zeros(2)}, TypeError, "y must hold integer class ids, got torch.float32"),
    ],
)
def test_bad_inputs(change: dict[str, Any], error: type[Exception], message: str) -> None:
    model = effformer.build_model("dit-nano", **SMALL)
    with pytest.raises(error, match=message):
        model(**{**inputs(model), **change})


@pytest.mark.parametrize("name", ["dit-nano", "sit-nano", "lightningdit-nano", "dydit-nano"])
def test_rectangles_are_what_square_models_compute_for_them(name: str) -> None:
    """The stored table is what the formula gives for a grid that none is stored for."""
    square, wide = awake(name), awake(name, input_size=(8, 12))
    assert (wide.config.size, wide.config.grid) == (
        (8, 12),
        (8 // wide.config.patch, 12 // wide.config.patch),
    )
    weights = {k: v for k, v in square.state_dict().items() if k != "pos_embed"}
    wide.load_state_dict(weights, strict=False)
    given = inputs(wide)
    assert given["x"].shape[2:] == (8, 12)
    assert_close(wide(**given), square(**given), rtol=1e-4, atol=1e-5)
    again = effformer.build_model(name, **wide.config.to_dict())
    assert again.config == wide.config


def test_learned_positions_hold_for_one_rectangle() -> None:
    model = awake(input_size=[8, 12], positions="learned")
    given = inputs(model)
    assert model(**given).shape[2:] == (8, 12)
    given["x"] = given["x"].transpose(2, 3)
    with pytest.raises(ValueError, match=r"expected shape \(B, 4, 8, 12\), got \(2, 4, 12, 8\)"):
        model(**given)
    with pytest.raises(ValueError, match=r"input_size \(8, 13\) is not divisible by patch 2"):
        effformer.build_model("dit-nano", input_size=(8, 13))
