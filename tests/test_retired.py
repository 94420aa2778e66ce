"""What earlier versions spelled otherwise is read, computes the same, and says what it became."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

import effformer
from effformer import registry, retired
from effformer.cli import main
from effformer.config import resolve
from effformer.retired import RetiredWarning
from effformer.train import load_checkpoint

SAVED = Path(__file__).parent / "saved" / "models"
SMALL: dict[str, Any] = {"input_size": 8, "num_classes": 10, "dim": 32, "heads": 4}
FFN_HALF = {"name": "dynamic", "over": "ffn"}


def build(name: str = "dit-nano", **options: Any) -> Any:
    return effformer.build_model(name, **{**SMALL, **options})


def old(**options: Any) -> Any:
    with pytest.warns(RetiredWarning):
        return build(**options)


@pytest.mark.parametrize(
    ("folder", "words"),
    [
        ("dit-block-dydit", "block 'dydit' is written block='adaln-zero' with width='dynamic' and"),
        ("dit-ffn-dynamic-mlp", "ffn 'dynamic-mlp' is written ffn='mlp' with width={'name': 'dyn"),
    ],
)
def test_saved_folders(folder: str, words: str, tmp_path: Path) -> None:
    with pytest.warns(RetiredWarning) as said:
        model = effformer.load_model(SAVED / folder)
    assert len(said) == 1
    assert words in str(said[0].message)
    stored = load_file(SAVED / folder / "example.safetensors")
    given: dict[str, Any] = {
        k.removeprefix("in."): v for k, v in stored.items() if k.startswith("in.")
    }
    expected = stored["out.0"]
    assert any(b.width is not None for b in model.blocks)
    largest = float(expected.abs().max())
    with torch.no_grad():
        torch.testing.assert_close(model(**given), expected, rtol=1e-4, atol=1e-5 * largest)
        again = effformer.load_model(effformer.save_pretrained(model, tmp_path / "again"))
        torch.testing.assert_close(again(**given), model(**given), rtol=0, atol=0)
    assert again.config == model.config


def test_records_and_checkpoints_are_renamed(tmp_path: Path) -> None:
    """A quantized copy names its layers, a training run its weights."""
    model = build(ffn="mlp", width=FFN_HALF).eval()
    small, _ = effformer.compress.quantize(model, "int8")
    effformer.save_pretrained(small, tmp_path / "new")
    shutil.copytree(tmp_path / "new", tmp_path / "old")
    facts = json.loads((tmp_path / "old" / "config.json").read_text())
    facts["config"] |= {"ffn": {"name": "dynamic-mlp", "act": "gelu-tanh"}, "width": None}
    record = facts["transforms"][0]
    record["layers"] = [path.replace(".ffn.part.", ".ffn.part.mlp.") for path in record["layers"]]
    (tmp_path / "old" / "config.json").write_text(json.dumps(facts))
    effformer.save_weights(small, tmp_path / "plain.safetensors")
    state = {_before(k): v for k, v in load_file(tmp_path / "plain.safetensors").items()}
    assert len(state.keys() - small.state_dict().keys()) >= 6
    from safetensors.torch import save_file

    save_file(state, tmp_path / "old" / "model.safetensors")
    with pytest.warns(RetiredWarning):
        loaded = effformer.load_model(tmp_path / "old")
    given = small.example_inputs(2)
    torch.testing.assert_close(loaded(**given), small(**given), rtol=0, atol=0)
    assert loaded.transforms == small.transforms

    trained = {f"model.{_before(k)}": v for k, v in model.state_dict().items()}
    facts = {"format": 1, "step": 7, "seconds": 0.0}
    save_file(trained, tmp_path / "step.safetensors", {"effformer": json.dumps(facts)})
    other = build(width=FFN_HALF).eval()
    assert load_checkpoint(tmp_path / "step.safetensors", other, "raw") == 7
    for key, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[key], value), key


def _before(key: str) -> str:
    """The key that an earlier version wrote."""
    key = key.replace(".ffn.part.", ".ffn.part.mlp.")
    return key.replace(".width.gates.ffn.", ".ffn.part.gate.")


@pytest.mark.parametrize(
    ("given", "same"),
    [
        ({"block": "dydit"}, {"width": "dynamic", "tokens": "dynamic"}),
        ({"block": "DyDiT"}, {"width": "dynamic", "tokens": "dynamic"}),
        (
            {"block": {"name": "dydit", "width": {"tau": 2.0}, "tokens": {"reduction": 8}}},
            {"width": {"name": "dynamic", "tau": 2.0}, "tokens": {"name": "dynamic", "reduction": 8}},
        ),
        (
            {"block": "dydit", "width": {"name": "dynamic", "groups": 2}},
            {"width": {"name": "dynamic", "groups": 2}, "tokens": "dynamic"},
        ),
        (
            {"block": {"name": "iterate", "times": 2, "body": "dydit"}},
            {"block": {"name": "iterate", "times": 2}, "width": "dynamic", "tokens": "dynamic"},
        ),
        ({"ffn": "dynamic-mlp"}, {"width": FFN_HALF}),
        (
            {"ffn": {"name": "dynamic-mlp", "ratio": 2.0, "groups": 2, "start": 3.0, "tau": 2.0}},
            {"ffn": {"ratio": 2.0}, "width": {**FFN_HALF, "groups": 2, "bias": 3.0, "tau": 2.0}},
        ),
        (
            {"layers": {"-1": {"block": "dydit"}}},
            {"layers": {"-1": {"width": "dynamic", "tokens": "dynamic"}}},
        ),
        ({"layers": {"0": {"ffn": "dynamic-mlp"}}}, {"layers": {"0": {"width": FFN_HALF}}}),
        (  # another part in its place takes along what it filled
            {"block": "dydit", "layers": {"0": {"block": "macaron"}}},
            {
                "width": "dynamic", "tokens": "dynamic",
                "layers": {"0": {"block": "macaron", "width": None, "tokens": None}},
            },
        ),
        (
            {"ffn": "dynamic-mlp", "layers": {"0": {"ffn": {"name": "mlp", "ratio": 2.0}}}},
            {"width": FFN_HALF, "layers": {"0": {"ffn": {"ratio": 2.0}, "width": None}}},
        ),
        (  # options without a name change what the part became
            {"block": "dydit", "layers": {"0": {"block": {"tokens": {"reduction": 8}}}}},
            {"width": "dynamic", "tokens": "dynamic", "layers": {"0": {"tokens": {"reduction": 8}}}},
        ),
        (
            {"ffn": "dynamic-mlp", "layers": {"0": {"ffn": {"ratio": 2.0, "start": 3.0}}}},
            {"width": FFN_HALF, "layers": {"0": {"ffn": {"ratio": 2.0}, "width": {"bias": 3.0}}}},
        ),
    ],
)  # fmt: skip
def test_spellings(given: dict[str, Any], same: dict[str, Any]) -> None:
    model, expected = old(**given), build(**same)
    assert _parts(model) == _parts(expected)
    assert model.state_dict().keys() == expected.state_dict().keys()
    with warnings.catch_warnings():  # what is kept is the present spelling
        warnings.simplefilter("error", RetiredWarning)
        assert type(model)(type(model.config).from_dict(model.config.to_dict()))


def _parts(model: Any) -> list[tuple[Any, ...]]:
    """What the blocks are made of."""
    blocks = [getattr(b, "body", b) for b in model.blocks]
    return [
        (
            type(b), [type(x.part) for x in b.branches], b.branches[-1].part.config,
            b.width and b.width.config, b.tokens and b.tokens.config,
        )
        for b in blocks
    ]  # fmt: skip


def test_what_it_became_must_have_a_place() -> None:
    with pytest.raises(ValueError, match=r"ffn: is written .* now, but width= is given as well"):
        build(ffn="dynamic-mlp", width="dynamic")
    with pytest.raises(ValueError, match=r"ffn: is written .* now, but width= is given as well"):
        build("dydit-nano", ffn="dynamic-mlp")
    with pytest.raises(ValueError, match=r"ffn: is written .* now, but width= is given as well"):
        build(block="dydit", ffn="dynamic-mlp")
    with pytest.raises(ValueError, match=r"here: block 'dydit' is written block='adaln-zero' with"):
        resolve("block", "dydit", where="here")
    with pytest.raises(ValueError, match=r"head\.ffn: ffn 'dynamic-mlp' is written ffn='mlp' with"):
        effformer.build_model("vit-nano", head={"ffn": "dynamic-mlp"})


def test_nothing_is_retired_and_registered() -> None:
    for kind, name in retired.PARTS:
        assert name not in registry.KINDS[kind]
    assert retired.became("block", "adaln-zero") == ""


def test_keys_are_renamed_where_the_model_has_them() -> None:
    keys = ["blocks.0.ffn1.part.gate.router.bias", "ffn.part.mlp.fc1.weight", "x.ffn.part.mlp.b"]
    own = {"blocks.0.width.gates.ffn1.router.bias", "ffn.part.fc1.weight", "x.ffn.part.mlp.b"}
    assert retired.rename(keys, own) == {keys[0]: sorted(own)[0], keys[1]: "ffn.part.fc1.weight"}
    assert retired.rename(keys, ()) == {}


def test_the_command_line_says_it_once() -> None:
    words = "build dit-nano --set depth=1 --block dydit --json"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = CliRunner().invoke(main.app, words.split())
    assert result.exit_code == 0, result.output
    assert result.stderr.count("effformer: dit-nano: block 'dydit' is written block='adaln") == 1
    assert json.loads(result.stdout)


@pytest.mark.parametrize("attn", ["softmax", "longformer", "factorized-parallel"])
def test_half_of_a_width_leaves_mixers_whole(attn: str) -> None:
    """Groups of hidden channels follow the time, whatever the token mixer is."""
    torch.manual_seed(0)
    model = build(attn=attn, width=FFN_HALF).eval()
    with torch.no_grad():
        for key, p in model.named_parameters():
            p.normal_(std=0.4) if ".gates." in key else p.add_(torch.randn_like(p) * 0.1)
    assert [*model.blocks[0].width.gates] == ["ffn"]
    given: dict[str, Tensor] = model.example_inputs(4)
    ledger = effformer.Ledger()
    with torch.no_grad():
        cut = model(**given, ledger=ledger)
        masked = model(**given, tap=effformer.context.Tap())  # type: ignore[attr-defined]
    largest = float(masked.abs().max())
    torch.testing.assert_close(cut, masked, rtol=1e-4, atol=1e-5 * largest)
    assert {path.rpartition(".")[2] for path in ledger.executed} == {"ffn"}
    assert min(float(f.min()) for f in ledger.executed.values()) < 0.9


def test_half_of_a_width_needs_an_ffn_that_can_be_cut() -> None:
    with pytest.raises(effformer.CapabilityError, match=r"over='ffn' .* the block has no FFN"):
        build(ffn=None, width=FFN_HALF)
    with pytest.raises(effformer.CapabilityError, match=r"ffn 'moe' has none that can be taken"):
        build(ffn="moe", width=FFN_HALF)
    with pytest.raises(effformer.CapabilityError, match=r"longformer' has none .*or over='ffn';"):
        build(attn="longformer", width="dynamic")
