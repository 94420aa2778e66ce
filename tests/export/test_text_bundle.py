"""Bundles that embed texts: their tokenizer, their runner, and what is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import minilm
import numpy as np
import pytest
import torch
from closeness import assert_close
from effformer.export import export_text_bundle, open_bundle
from effformer.export.pictures import BundleError
from effformer.export.run import Bundle
from effformer.export.text_bundle import Embedding, read_tokenizer
from effformer.export.texts import TextBundle
from effformer.export.wordpiece import RULES, WordPiece
from harness import GOLDEN, Golden
from torch import nn

from effformer import build_model
from effformer.checks import FormatError

SAVED = Path(__file__).parents[1] / "saved/texts"
VOCABULARY = (SAVED / "vocab.txt").read_text(encoding="utf-8").split("\n")[:-1]


def cut(text: str, longest: int = 64, **rules: Any) -> list[str]:
    """Tokens of a text between its start and its end."""
    ids = WordPiece(VOCABULARY, RULES | rules)(text, longest)
    tokens = [VOCABULARY[i] for i in ids]
    assert (tokens[0], tokens[-1]) == ("[CLS]", "[SEP]")
    return tokens[1:-1]


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("The CAT sits, on a mat.", "the cat sits , on a mat ."),
        ("cats", "cat ##s"),
        ("thé\u0301", "the"),  # accents go, composed or not
        ("dog's\tmat\u00a0!", "dog ' s mat !"),
        ("東京a", "東 京 a"),
        ("12%-3", "1 % - 3".replace("1 ", "[UNK] ")),
        ("ca\u200bt\0 \u00ad", "cat"),  # controls vanish
        ("[SEP]cat[MASK]", "[SEP] cat [MASK]"),
        ("[sep]", "[UNK] s ##e ##p [UNK]"),
        ("a" * 101 + " cat", "[UNK] cat"),
        ("ΣΑΣ", "[UNK]"),
        ("", ""),
    ],
)
def test_words_become_pieces(text: str, tokens: str) -> None:
    assert cut(text) == tokens.split()


def test_rules_of_other_vocabularies() -> None:
    assert cut("The cat", lower=False) == ["[UNK]", "cat"]
    assert cut("thé", lower=False, strip_accents=False) == ["[UNK]"]
    assert cut("cat dog mat", 4) == ["cat", "dog"]
    assert cut("aaaa", longest_word=3) == ["[UNK]"]


@pytest.fixture(scope="module")
def encoder() -> nn.Module:
    torch.manual_seed(0)
    model = build_model("bert-tiny", dim=16, depth=1, heads=2, vocab=96, context=32).eval()
    for p in model.parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=0.3)
    return model


@pytest.fixture(scope="module")
def bundle(encoder: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    home = folder / "published"
    (home / "1_Pooling").mkdir(parents=True)
    shutil.copyfile(SAVED / "vocab.txt", home / "vocab.txt")
    (home / "1_Pooling/config.json").write_text('{"pooling_mode_cls_token": true}')
    (home / "modules.json").write_text('[{"type": "sentence_transformers.models.Pooling"}]')
    (home / "sentence_bert_config.json").write_text('{"max_seq_length": 8}')
    report = export_text_bundle(encoder, folder / "bundle", home, verify=False)
    assert (report.pooling, report.normalise, report.longest) == ("cls", False, 8)
    assert report.error < 1e-5
    return folder / "bundle"


def test_the_runner_embeds_as_torch_does(bundle: Path, encoder: nn.Module) -> None:
    opened = open_bundle(bundle, 1)
    assert isinstance(opened, TextBundle)
    texts = ["the cat", "a dog sits on the mat, and the cat sits on the dog!", ""]
    made = opened.embed(texts)
    assert made.shape == (3, 16)
    for text, row, ids in zip(texts, made, opened.tokens(texts), strict=True):
        assert len(ids) <= 8
        with torch.no_grad():
            hidden = encoder(torch.tensor([ids])).hidden
        assert_close(torch.from_numpy(row), hidden[0, 0], rtol=1e-4, atol=1e-5)
        assert_close(
            torch.from_numpy(opened.embed([text])[0]), torch.from_numpy(row), rtol=1e-4, atol=1e-5
        )
    many = opened.embed(["the cat"] * 40)  # more than run together
    assert_close(
        torch.from_numpy(many), torch.from_numpy(made[:1]).expand(40, -1), rtol=1e-4, atol=1e-5
    )
    cosines = opened.similarity(texts)
    assert np.allclose(np.diag(cosines), 1, atol=1e-5)
    assert opened.self_test() < 1e-4


def test_pooling_is_over_real_tokens(encoder: nn.Module) -> None:
    tokens, mask = torch.randint(0, 96, (2, 6)), torch.arange(6) < torch.tensor([[6], [3]])
    with torch.no_grad():
        mean, unit = (Embedding(encoder, "mean", n)(tokens, mask) for n in (False, True))
        alone = encoder(tokens[1:, :3]).hidden.mean(1)
    assert_close(mean[1:], alone, rtol=1e-4, atol=1e-5)
    assert_close(unit, mean / mean.norm(dim=1, keepdim=True), rtol=1e-4, atol=1e-5)


def test_documented_inputs_and_outputs_are_those_of_the_graph(bundle: Path) -> None:
    import onnxruntime

    facts = json.loads((bundle / "bundle.json").read_text())
    session = onnxruntime.InferenceSession(str(bundle / "encoder.onnx"))
    for told, found in (
        (facts["inputs"], session.get_inputs()), (facts["outputs"], session.get_outputs())
    ):  # fmt: skip
        named = {v["name"]: (f"tensor({v['type'].removesuffix('32')})", v["shape"]) for v in told}
        assert named == {v.name: (v.type, v.shape) for v in found}
    assert facts["inputs"][0]["range"] == [0, 95]


def test_the_runner_needs_numpy_and_onnxruntime_alone(bundle: Path, tmp_path: Path) -> None:
    code = (
        "import sys, runpy\n"
        "for name in ('torch', 'transformers', 'tokenizers', 'effformer'): sys.modules[name] = None\n"
        f"sys.argv = ['run.py', '--text', 'the cat', '--text', 'the dog', '--out', {str(tmp_path / 'e.npy')!r}]\n"
        f"runpy.run_path({str(bundle / 'run.py')!r}, run_name='__main__')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    made = np.lib.format.open_memmap(tmp_path / "e.npy", mode="r")
    assert np.allclose(made, TextBundle(bundle).embed(["the cat", "the dog"]), atol=1e-6)


def published(**changes: Any) -> dict[str, Any]:
    """A tokenizer.json."""
    return {
        "added_tokens": [{"content": t} for t in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")],
        "normalizer": {"type": "BertNormalizer", "lowercase": False, "strip_accents": None},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "model": {
            "type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 50, "vocab": {t: i for i, t in enumerate(VOCABULARY)},
        },
    } | changes  # fmt: skip


def test_a_published_tokenizer_is_read_as_data(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(published()))
    rules, vocabulary, told = read_tokenizer(tmp_path)
    assert (rules["lower"], rules["strip_accents"], rules["longest_word"]) == (False, False, 50)
    assert vocabulary == VOCABULARY
    assert told == {}
    (tmp_path / "vocab.txt").write_text("\n".join(VOCABULARY))
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    assert read_tokenizer(tmp_path / "vocab.txt")[0]["lower"] is False


def wrong_tokenizers() -> Iterator[tuple[str, Any, type[Exception], str]]:
    model = published()["model"]
    yield "BPE", published(model=model | {"type": "BPE"}), ValueError, "is a tokenizer of BPE"
    yield "a list", [1], FormatError, "is no tokenizer.json"
    holes = {**model["vocab"], "new": 999}
    yield "holes", published(model=model | {"vocab": holes}), FormatError, "its ids are not 0 to"
    bare = {"a": 0, "[UNK]": 1}
    yield "bare", published(model=model | {"vocab": bare}), ValueError, "has no '.CLS.', which is"
    large = {f"t{i}": i for i in range(200)} | dict.fromkeys(())
    full = {t: i for i, t in enumerate([*VOCABULARY, *large])}
    yield "large", published(model=model | {"vocab": full}), ValueError, "has 279 tokens and"


@pytest.mark.parametrize(
    ("content", "error", "said"), [w[1:] for w in wrong_tokenizers()], ids=[w[0] for w in wrong_tokenizers()]
)  # fmt: skip
def test_tokenizers_that_do_not_fit(
    content: Any, error: type[Exception], said: str, encoder: nn.Module, tmp_path: Path
) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(error, match=said):
        export_text_bundle(encoder, tmp_path / "out", tmp_path / "tokenizer.json")
    assert not (tmp_path / "out").exists()


def test_models_and_options_that_do_not_fit(encoder: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="vit-nano takes no tokens and mask"):
        export_text_bundle(build_model("vit-nano"), tmp_path / "out", SAVED)
    with pytest.raises(ValueError, match="'static-int8' takes data; choices: float32"):
        export_text_bundle(encoder, tmp_path / "out", SAVED, quantize="static-int8")
    with pytest.raises(ValueError, match=r"longest must lie in 3\.\.32"):
        export_text_bundle(encoder, tmp_path / "out", SAVED, longest=33)
    with pytest.raises(FormatError, match=r"holds no tokenizer\.json and no vocab\.txt"):
        export_text_bundle(encoder, tmp_path / "out", tmp_path)


def test_requests_that_cannot_be_served(bundle: Path) -> None:
    opened = TextBundle(bundle)
    for wrong in ([], "cat", ["a" * 2**21], [3]):
        with pytest.raises(BundleError, match="expected"):
            opened.embed(wrong)
    with pytest.raises(BundleError, match="is a bundle of texts, not of pictures"):
        Bundle(bundle)


@pytest.mark.slow
def test_a_published_encoder_gives_its_published_embeddings(tmp_path: Path) -> None:
    """All of MiniLM: tokenizer, pooling, unit length."""
    golden = Golden.read(GOLDEN / "minilm_embeddings.json")
    texts, expected = golden.config["sentences"], golden.tensor("out.embedding")
    report = export_text_bundle(minilm.encoder(), tmp_path / "b", minilm.folder(), verify=False)
    assert (report.pooling, report.normalise, report.longest) == ("mean", True, 256)
    made = torch.from_numpy(TextBundle(tmp_path / "b").embed(texts))
    assert_close(made, expected, rtol=1e-5, atol=1e-5)
