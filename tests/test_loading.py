"""Loading says what it loaded, refuses look-alikes, and changes everything or nothing."""

from __future__ import annotations

import argparse
import json
import math
import pathlib
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import effformer
from effformer.checks import FormatError
from effformer.io import read_weights
from effformer.pickled import read_pickled

BERT: dict[str, Any] = {"dim": 24, "depth": 2, "heads": 3, "vocab": 31, "context": 20}
DIT: dict[str, Any] = {"input_size": 8, "num_classes": 10}


def bert(**options: Any) -> Any:
    return effformer.build_model("bert-tiny", **BERT | options).eval()


def dit(name: str = "dit-nano", **options: Any) -> Any:
    return effformer.build_model(name, **DIT | options).eval()


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(model: nn.Module, state: dict[str, Tensor]) -> bool:
    return all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def theirs(model: Any, layout: str) -> dict[str, Tensor]:
    found = next(lay for lay in model.LAYOUTS if lay.name == layout)
    return found.from_ours(dict(model.state_dict()), model.config)  # type: ignore[no-any-return]


# -- which weights -----------------------------------------------------------------------------------

A, B = torch.tensor([1.0]), torch.tensor([2.0])


@pytest.mark.parametrize(
    "content",
    [
        {"state_dict": {"w": A}, "state_dict_ema": {"w": B}},
        {"model": {"w": A}, "model_ema": {"w": B}},
        {"model": {"w": A}, "ema": {"decay": 0.9, "shadow": {"w": B}}},
        {"params": {"w": A}, "params_ema": {"w": B}},
        {"model_state_dict": {"w": A}, "ema_state_dict": {"module.w": B}},
        {"student": {"w": A}, "teacher": {"w": B}},
        {"model": {"w": A}, "swa_model": {"n_averaged": torch.tensor(3), "module.w": B}},
        {"state_dict": {"model.w": A, "ema_model.w": B}},
        {"state_dict": {"model.in.w": A, "model_ema.inw": B, "model_ema.decay": A}},
        {"model.w": A, "ema.w": B, "optimizer.w.exp_avg": A},
        {"checkpoint": {"state_dict": {"w": A}, "ema": {"w": B}}},
    ],
)
def test_averaged_weights_come_first_and_raw_ones_when_asked(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "w.pt")
    for weights, value in (("auto", B), ("ema", B), ("raw", A)):
        (found,) = read_weights(tmp_path / "w.pt", weights).values()
        assert torch.equal(found, value)


def test_which_average_must_be_clear() -> None:
    several = {"model": {"w": A}, "ema_1": {"w": B}, "ema_2": {"w": A}}
    with pytest.raises(FormatError, match=r"holds several averages \(ema_1, ema_2\); choose one"):
        read_weights(several)
    assert torch.equal(read_weights(several, "ema_1")["w"], B)
    with pytest.raises(FormatError, match="has no entry 'ema_3'; choices of weights: auto, ema"):
        read_weights(several, "ema_3")
    with pytest.raises(FormatError, match=r"its averaged weights \('ema'\) have no names"):
        read_weights({"model": {"w": A}, "ema": [B]})
    for content in ({"w": A}, {"model": {"w": A}}):
        with pytest.raises(FormatError, match="has no averaged weights; weights='raw' takes"):
            read_weights(content, "ema")


def test_names_of_wrappers_are_removed_wherever_they_stand() -> None:
    state = {"module.blocks.0._orig_mod.attn._checkpoint_wrapped_module.w": A, "module.b": B}
    assert set(read_weights(state)) == {"blocks.0.attn.w", "b"}


def test_the_report_says_what_was_read() -> None:
    source, model = dit(), dit()
    content = {"model": state_of(dit()), "ema": state_of(source)}
    report = effformer.load_weights(model, content)
    assert (report.weights, report.averaged, report.layout) == ("ema", True, "effformer")
    assert same(model, state_of(source))
    assert not effformer.load_weights(model, content, weights="raw").averaged


def test_a_training_checkpoint_holds_data_beside_its_weights(tmp_path: Path) -> None:
    space = argparse.Namespace(
        lr=np.float64(0.5), seed=np.int64(3), half=np.float16(1.5), on=np.bool_(True)
    )
    space.out, space.inner = pathlib.Path("a/b"), types.SimpleNamespace(x=1)
    content = {"state_dict": state_of(dit()), "args": space, "rng": np.arange(3)}
    torch.save(content, tmp_path / "w.pt")
    args = read_pickled(tmp_path / "w.pt")["args"]
    expected = {"lr": 0.5, "seed": 3, "half": 1.5, "on": True, "out": "a/b", "inner": {"x": 1}}
    assert args == expected
    effformer.load_weights(dit(), tmp_path / "w.pt")


# -- look-alikes -------------------------------------------------------------------------------------


def test_the_config_of_a_checkpoint_decides(tmp_path: Path) -> None:
    state = theirs(bert(), "huggingface")
    facts = {
        "model_type": "bert", "num_attention_heads": 3, "hidden_act": "gelu", "layer_norm_eps": 1e-12,
        "position_embedding_type": "absolute",
    }  # fmt: skip
    report = effformer.load_weights(bert(), state, config=facts)
    assert set(report.confirmed) == set(facts)
    model = bert(heads=6)
    before = state_of(model)
    for change, message in (
        ({}, "num_attention_heads is 3 there and 6 here"),
        ({"num_attention_heads": 6, "hidden_act": "gelu_new"}, "hidden_act is 'gelu_new' there"),
        ({"num_attention_heads": 6, "layer_norm_eps": 1e-5}, "layer_norm_eps is 1e-05 there"),
        ({"num_attention_heads": 6, "model_type": "ernie"}, "model_type is 'ernie' there"),
    ):
        with pytest.raises(FormatError, match=f"its network differs: {message}"):
            effformer.load_weights(model, state, config=facts | change)
    assert same(model, before)
    assert effformer.load_weights(model, state, config=facts, strict=False).differs
    file = effformer.save_weights(bert(), tmp_path / "model.safetensors", "huggingface")
    (tmp_path / "config.json").write_text(json.dumps(facts))
    with pytest.raises(FormatError, match="num_attention_heads is 3 there and 6 here"):
        effformer.load_weights(bert(heads=6), file)
    (tmp_path / "config.json").write_text('{"heads": 5}')  # says nothing about a model
    effformer.load_weights(bert(heads=6), file)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block": "prenorm"}, r"block='prenorm' \('postnorm' there\)"),
        ({"attn": "flow"}, r"attn\.core='flow' \('softmax' there\)"),
        ({"attn": {"scale": 0.5}}, r"attn\.core\.scale=0\.5"),
        ({"layers": {"0": {"attn": {"scale": 0.5}}}}, "block 0 differs from others"),
    ],
)
def test_keys_that_fit_another_network(options: Any, message: str, tmp_path: Path) -> None:
    model, state = bert(**options), theirs(bert(), "huggingface")
    before = state_of(model)
    with pytest.raises(FormatError, match=message):
        effformer.load_weights(model, state)
    assert same(model, before)
    with pytest.raises(FormatError, match=message):
        effformer.save_weights(model, tmp_path / "w.safetensors", "huggingface")
    assert list(tmp_path.iterdir()) == []
    assert not effformer.load_weights(model, state, strict=False).missing


def test_roberta_counts_positions_from_behind_the_padding() -> None:
    source = bert(segments=1, norm_eps=1e-5)
    state = {f"roberta.{k}": v for k, v in theirs(source, "roberta").items()}
    table = state["roberta.embeddings.position_embeddings.weight"]
    assert len(table) == BERT["context"] + 2
    facts = {"model_type": "roberta", "layer_norm_eps": 1e-5, "pad_token_id": 1}
    model, tokens = bert(segments=1, norm_eps=1e-5), torch.randint(2, 31, (2, 6))
    assert effformer.load_weights(model, state, config=facts).layout == "roberta"
    places = torch.arange(6) + 1 + 1  # as transformers counts them: padding_idx + 1, ...
    assert torch.equal(model.positions.weight[:6], table[places])
    assert torch.equal(model(tokens).hidden, source(tokens).hidden)
    plain = {key.removeprefix("roberta."): value for key, value in state.items()}
    assert effformer.load_weights(model, plain).layout == "roberta"
    wide = bert(segments=1, context=BERT["context"] + 2)
    with pytest.raises(FormatError, match="layout 'roberta' reads it into a model of context=20"):
        effformer.load_weights(wide, plain, "huggingface")
    with pytest.raises(FormatError, match="wrong shapes"):
        effformer.load_weights(wide, plain)
    with pytest.raises(FormatError, match="pad_token_id is 0 there and 1 here"):
        effformer.load_weights(model, plain, config={"pad_token_id": 0})


def test_heads_of_pre_training_are_left_out_and_named() -> None:
    source, model = bert(), bert()
    state = {f"bert.{k}": v for k, v in theirs(source, "huggingface").items()}
    state |= {
        "cls.predictions.bias": torch.ones(31),
        "cls.seq_relationship.weight": torch.ones(2, 24),
    }
    report = effformer.load_weights(model, state)
    assert report.ignored == ("cls.predictions.bias", "cls.seq_relationship.weight")
    assert same(model, state_of(source))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation_fn": "geglu"}, "activation_fn is 'geglu' there and 'gelu-approximate' here"),
        ({"norm_type": "ada_norm_single"}, "norm_type is 'ada_norm_single' there"),
        ({"num_attention_heads": 4}, "num_attention_heads is 4 there and 2 here"),
        ({"patch_size": 4}, "patch_size is 4 there"),
        ({"norm_eps": 1e-5}, "norm_eps is 1e-05 there and 1e-06 here"),
    ],
)
def test_configs_of_diffusers(change: dict[str, Any], message: str) -> None:
    model = dit(time_freq_shift=1)
    facts = {
        "_class_name": "DiTTransformer2DModel",
        "activation_fn": "gelu-approximate",
        "dropout": 0.0,
    }
    state = theirs(model, "diffusers")
    assert effformer.load_weights(model, state, config=facts).confirmed
    with pytest.raises(FormatError, match=message):
        effformer.load_weights(model, state, config=facts | change)


def test_a_named_size_and_training_options_are_compared() -> None:
    state = theirs(dit(), "official")
    with pytest.raises(FormatError, match="DiT-XL/2 has dim=1152, this model 48"):
        effformer.load_weights(dit(), {"model": state, "args": {"model": "DiT-XL/2"}})
    with pytest.raises(FormatError, match="path_type is 'GVP' there and 'Linear' here"):
        effformer.load_weights(dit("sit-nano"), {"ema": state, "args": {"path_type": "GVP"}})


def test_a_saved_model_of_ours_says_what_it_is(tmp_path: Path) -> None:
    folder = effformer.save_pretrained(bert(dropout=0.0), tmp_path / "m")
    effformer.load_weights(bert(), folder / "model.safetensors")
    with pytest.raises(FormatError, match="heads is 3 there and 6 here"):
        effformer.load_weights(bert(heads=6), folder / "model.safetensors")
    effformer.save_pretrained(dit(), tmp_path / "d")
    with pytest.raises(FormatError, match="family 'dit', which counts otherwise"):
        effformer.load_weights(dit("sit-nano"), tmp_path / "d" / "model.safetensors")
    gated = dit("dydit-nano")
    assert effformer.load_weights(gated, tmp_path / "d" / "model.safetensors").missing


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["dit-nano", "sit-nano", "lightningdit-nano"])
def test_half_precision_files_hold_the_fixed_tables(name: str, dtype: torch.dtype) -> None:
    source = dit(name)
    for back in (dtype, torch.float32):  # some files were half once
        state = {k: v.to(dtype).to(back) for k, v in theirs(source, "official").items()}
        assert effformer.load_weights(dit(name), state).layout == "official"
    wrong = {**state, "pos_embed": state["pos_embed"] + 0.05}
    with pytest.raises(FormatError, match="is not the fixed sin-cos table"):
        effformer.load_weights(dit(name), wrong)


# -- all or nothing ----------------------------------------------------------------------------------


def test_what_a_user_keeps_stays(tmp_path: Path) -> None:
    source = effformer.build_model("vit-nano")
    state = theirs(source, "timm")
    model = effformer.build_model("vit-nano", num_classes=3)
    head = model.head.linear.weight.clone()
    with pytest.raises(FormatError, match=r"keep= \(--keep\) names modules that keep their own"):
        effformer.load_weights(model, state)
    report = effformer.load_weights(model, state, keep="head.linear", config={"num_classes": 10})
    assert report.kept == ("head.linear.bias", "head.linear.weight")
    assert torch.equal(model.head.linear.weight, head)
    assert torch.equal(model.blocks[1].attn.part.qkv.weight, source.blocks[1].attn.part.qkv.weight)
    with pytest.raises(ValueError, match="keep: unknown module 'haed'; did you mean 'head'"):
        effformer.load_weights(model, state, keep="haed")


class Moody(nn.Module):
    """Its second layer refuses to be written after its first was."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)

        def refuse(*_: Any) -> None:
            if not torch.equal(self.a.weight, self.first):
                raise RuntimeError("not today")

        self.first = self.a.weight.detach().clone()
        self.b.register_load_state_dict_pre_hook(refuse)


def test_a_refused_load_changes_nothing() -> None:
    model, other = Moody(), Moody()
    before = state_of(model)
    with pytest.raises(FormatError, match="cannot be written into Moody"):
        effformer.load_weights(model, other.state_dict())
    assert same(model, before)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.ones(48, dtype=torch.int64), "norm.weight is int64, the model has float32"),
        (torch.ones(48, device="meta"), "norm.weight is without values"),
        (torch.ones(48, dtype=torch.complex64), "norm.weight is complex64"),
        (torch.ones(48).to_sparse(), "norm.weight is sparse_coo, the model has dense tensors"),
        (torch.ones(48).bool(), "norm.weight is bool, the model has float32"),
        (torch.ones(48).to(torch.float8_e4m3fn), "norm.weight is float8_e4m3fn, the model has"),
        (torch.ones(48).to(torch.float8_e8m0fnu), "norm.weight is float8_e8m0fnu, the model has"),
    ],
)
def test_tensors_of_another_kind(value: Tensor, message: str) -> None:
    model = effformer.build_model("vit-nano")
    before = state_of(model)
    with pytest.raises(FormatError, match=message):
        effformer.load_weights(model, before | {"norm.weight": value})
    assert same(model, before)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_eight_bits_fit_eight_bits(dtype: torch.dtype) -> None:
    source, model = nn.Linear(4, 4).to(dtype), nn.Linear(4, 4).to(dtype)
    effformer.load_weights(model, source.state_dict())
    assert torch.equal(model.weight.float(), source.weight.float())


@pytest.mark.parametrize("stem", ["model.safetensors", "pytorch_model.bin"])
def test_folders_and_shards_of_transformers(stem: str, tmp_path: Path) -> None:
    source, write = bert(), save_file if stem.endswith("safetensors") else torch.save
    state = {k: v.clone() for k, v in theirs(source, "huggingface").items()}
    names = [f"one-{stem}", f"two-{stem}"]
    places = {key: names[i % 2] for i, key in enumerate(state)}
    for name in names:
        write({k: v for k, v in state.items() if places[k] == name}, tmp_path / name)  # type: ignore[operator]
    index = tmp_path / f"{stem}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (tmp_path / "config.json").write_text('{"model_type": "bert", "num_attention_heads": 3}')
    for given in (tmp_path, index):
        model = bert()
        assert "num_attention_heads" in effformer.load_weights(model, given).confirmed
        assert same(model, state_of(source))
    with pytest.raises(FormatError, match="num_attention_heads is 3 there and 6 here"):
        effformer.load_weights(bert(heads=6), tmp_path)
    for wrong, message in (
        (places | {"x": names[0]}, "x and 0 more are not in their files"),
        (places | {"x": "../w.safetensors"}, "which is no file of weights in its folder"),
        (places | {"x": index.name}, "which is no file of weights in its folder"),
        ([], "is not an index of shards"),
    ):
        index.write_text(json.dumps({"weight_map": wrong}))
        with pytest.raises(FormatError, match=message):
            effformer.load_weights(bert(), tmp_path)
    index.unlink()
    with pytest.raises(FormatError, match=r"a folder without weights \(model\.safetensors, "):
        effformer.load_weights(bert(), tmp_path)


def test_configs_may_be_objects() -> None:
    class Config:
        def to_dict(self) -> dict[str, Any]:
            return {"model_type": "bert", "num_attention_heads": 3}

    state = theirs(bert(), "huggingface")
    assert effformer.load_weights(bert(), state, config=Config()).confirmed
    with pytest.raises(FormatError, match="num_attention_heads is 3 there and 6 here"):
        effformer.load_weights(bert(heads=6), state, config=Config())
    with pytest.raises(TypeError, match="config is a mapping of options, got int"):
        effformer.load_weights(bert(), state, config=3)


def test_numbers_that_a_buffer_cannot_hold() -> None:
    packed, _ = effformer.compress.quantize(nn.Sequential(nn.Linear(32, 4)), "int8")
    before = packed.state_dict()
    wide = before | {"0.codes": before["0.codes"].long()}
    effformer.load_weights(packed, wide)
    with pytest.raises(FormatError, match=r"0\.codes is int64 with values that uint8, .* not hold"):
        effformer.load_weights(packed, wide | {"0.codes": wide["0.codes"] + 256})


@pytest.mark.parametrize(
    ("dtype", "value", "message"),
    [
        (torch.float32, math.nan, r"NaN or infinite values in norm\.weight, and so"),
        (torch.float32, -math.inf, r"NaN or infinite values in norm\.weight, and so"),
        (torch.float16, 1e5, r"values in norm\.weight \(beyond float16\), and so"),
    ],
)
def test_values_that_are_not_finite_are_told(
    dtype: torch.dtype, value: float, message: str
) -> None:
    model = effformer.build_model("vit-nano").to(dtype)
    state = {key: x.double() if x.is_floating_point() else x for key, x in state_of(model).items()}
    effformer.load_weights(model, state)
    state["norm.weight"][3] = value
    with pytest.warns(UserWarning, match=message):
        effformer.load_weights(model, state)
    assert not model.norm.weight[3].isfinite()


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embed(x))  # type: ignore[no-any-return]


def test_tied_weights_save_load_and_stay_tied(tmp_path: Path) -> None:
    source = Tied()
    file = effformer.save_weights(source, tmp_path / "w.safetensors")
    with torch.device("meta"):
        empty = Tied()
    for model in (Tied(), empty):
        effformer.load_weights(model, file)
        assert model.head.weight is model.embed.weight
        assert same(model, state_of(source))
    effformer.load_weights(Tied(), {"embed.weight": source.embed.weight})  # one name is enough
    with pytest.raises(FormatError, match=r"differ, but are one tensor in this model"):
        effformer.load_weights(Tied(), state_of(source) | {"head.weight": torch.ones(5, 4)})


REBUILT: dict[str, dict[str, Any]] = {
    "predformer-tiny": {}, "lmuformer-tiny": {}, "dit-nano": DIT, "bert-tiny": {"attn": "retention"},
    "sit-nano": {**DIT, "attn": "tdsm"}, "macaron-tiny": {}, "vit-nano": {"attn": "performer"},
}  # fmt: skip


@pytest.mark.parametrize("name", REBUILT)
@torch.no_grad()
def test_models_without_storage_are_filled_whole(name: str, tmp_path: Path) -> None:
    options = REBUILT[name] if name != "bert-tiny" else {}
    source = effformer.build_model(name, **options).eval()
    given = source.example_inputs(2)
    out = source(**given)
    out = out[0] if isinstance(out, tuple) else out
    with torch.device("meta"):
        empty = effformer.build_model(name, **options).eval()
    lost = effformer.build_model(name, **options).eval().to_empty(device="cpu")
    for buffer in lost.buffers():
        buffer.fill_(7)
    for model in (empty, lost):
        effformer.load_weights(model, source.state_dict())
        again = model(**given)
        assert torch.equal(again[0] if isinstance(again, tuple) else again, out)


def test_nothing_stays_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = effformer.build_model("vit-nano")
    state = state_of(effformer.build_model("vit-nano"))
    del state["norm.bias"]
    with pytest.raises(FormatError, match=r"norm\.bias would hold nothing, since vit-nano is on"):
        effformer.load_weights(model, state, strict=False)
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_saved_models_keep_their_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    for name in ("vit-nano", "predformer-tiny"):
        model = effformer.build_model(name).eval().to(dtype)
        again = effformer.load_model(effformer.save_pretrained(model, tmp_path / name))
        assert {p.dtype for p in again.parameters()} == {dtype}
        assert {b.dtype for b in again.buffers()} == {b.dtype for b in model.buffers()}
        assert same(again, state_of(model))
    model = effformer.build_model("vit-nano")
    model.norm.to(dtype)
    again = effformer.load_model(effformer.save_pretrained(model, tmp_path / "mixed"))
    kinds = {k: v.dtype for k, v in model.state_dict().items()}
    assert {k: v.dtype for k, v in again.state_dict().items()} == kinds


# -- saving ------------------------------------------------------------------------------------------


def test_changed_models_are_no_published_ones(tmp_path: Path) -> None:
    packed, _ = effformer.compress.quantize(dit(), "int8")
    with pytest.raises(
        FormatError, match=r"this one was changed since \(quantize\); save_pretrained"
    ):
        effformer.save_weights(packed, tmp_path / "w.safetensors", "official")
    odd = dit(time_freq_shift=1)
    with torch.no_grad():
        odd.pos_embed += 0.1
    with pytest.raises(FormatError, match="layout 'diffusers' cannot hold pos_embed"):
        effformer.save_weights(odd, tmp_path / "w.safetensors", "diffusers")
    learned = dit(time_freq_shift=1, positions="learned")
    with pytest.raises(FormatError, match=r"has no positions='learned' \('sincos' there\)"):
        effformer.save_weights(learned, tmp_path / "w.safetensors", "diffusers")
    assert list(tmp_path.iterdir()) == []


def test_compiled_models_are_written_as_what_they_compile(tmp_path: Path) -> None:
    model = dit()
    expected = theirs(model, "official")
    model.blocks[0] = torch.compile(model.blocks[0])
    file = effformer.save_weights(model, tmp_path / "w.safetensors", "official")
    assert set(read_weights(file)) == set(expected)
    assert effformer.load_weights(model, file).layout == "official"
