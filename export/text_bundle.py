"""The bundle of a text encoder: its graph with pooling, its tokenizer as data, and a runner."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from effformer.arguments import checked
from effformer.calls import device_of, evaluating, outputs, takes
from effformer.checks import FormatError
from effformer.files import atomic_folder, read_json, workspace
from effformer.notebook import Shown
from effformer.values import Count
from effformer.version import VERSION
from effformer.wrapped import unwrapping

from . import choice, opened, pictures, texts, wordpiece
from . import facts as checks
from .bundle import FOLDER, session_options
from .onnx import export_onnx
from .packed import step_of
from .quantize import FORMS, QuantizeReport, named_form
from .record import ROUNDED, error_of, finish
from .verify import VerificationError, VerifyReport
from .within import quantize_form
from .work import multiply_adds

__all__ = ["Embedding", "TextBundleReport", "export_text_bundle"]

SENTENCES = (
    "A cat sits on the mat, and a dog lies beside it.",
    "Über 12,5 % der naïve CAFÉs - isn't it? [SEP]",
    "東京 is 35.68°N; supercalifragilisticexpialidocious!",
)
"""Texts whose embeddings are recorded."""
Pooling = Literal["mean", "cls"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TextBundleReport(Shown):
    """What `export_text_bundle` wrote.

    Attributes:
        folder: the bundle.
        bytes: size of all its files.
        parity: the comparison of the written graph, quantized or not, with torch; None if it was not
            wanted.
        quantized: what was quantized in the graph, None if nothing.
        pooling: how an embedding is made of the features of its tokens.
        normalise: embeddings have unit length.
        longest: most tokens of a text.
        error: difference of the runner's embeddings from torch's, relative to the largest value.
    """

    folder: Path
    bytes: int
    parity: VerifyReport | None
    quantized: QuantizeReport | None
    pooling: str
    normalise: bool
    longest: int
    error: float

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "folder": str(self.folder), "bytes": self.bytes,
            "parity": None if self.parity is None else self.parity.to_dict(),
            "quantized": None if self.quantized is None else self.quantized.to_dict(),
            "pooling": self.pooling, "normalise": self.normalise, "longest": self.longest,
            "error": self.error,
        }  # fmt: skip


class Embedding(nn.Module):
    """A text encoder with pooling: ``sum_t m_t h_t / sum_t m_t`` over real tokens, or the first token's
    features; at unit length if asked.

    Args:
        encoder: ``encoder(tokens, mask=mask)`` gives features (B, N, D), first of its outputs.
        pooling: "mean" or "cls".
        normalise: divide by the length.
    """

    def __init__(self, encoder: nn.Module, pooling: Pooling, normalise: bool) -> None:
        super().__init__()
        self.encoder, self.pooling, self.normalise = encoder, pooling, normalise

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Embeddings (B, D) of ids (B, N); ``mask`` is True where they are no padding."""
        hidden = outputs(self.encoder(tokens, mask=mask))[0].float()
        if self.pooling == "mean":
            real = mask.unsqueeze(-1).to(hidden)
            pooled = (hidden * real).sum(1) / real.sum(1).clamp(min=1)
        else:
            pooled = hidden[:, 0]
        if self.normalise:
            pooled = pooled / pooled.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        return pooled


@checked
@unwrapping
def export_text_bundle(
    model: nn.Module,
    folder: str | Path,
    tokenizer: str | Path,
    *,
    pooling: Pooling | None = None,
    normalise: bool | None = None,
    longest: Count | None = None,
    quantize: str | Mapping[str, Any] | None = None,
    session: Mapping[str, int | bool | None] | None = None,
    verify: bool = True,
    force: bool = False,
) -> TextBundleReport:
    """Write a text encoder as a folder that embeds texts by itself.

    The folder holds ``encoder.onnx`` with pooling inside, ``vocab.txt``, ``bundle.json`` and ``run.py``,
    which needs numpy and onnxruntime. Batch and number of tokens vary. The runner's embeddings of three
    sentences are compared with torch's, and recorded for ``run.py --self-test``.

    Args:
        model: ``model(tokens, mask=mask)``, such as `effformer.models.bert.Bert`.
        folder: new, empty, or an earlier bundle, which is replaced when the new one is complete.
        tokenizer: the folder of the published model, or its ``tokenizer.json`` or ``vocab.txt``
            (WordPiece). What stands beside these, ``tokenizer_config.json``,
            ``sentence_bert_config.json``, ``modules.json`` and ``1_Pooling/config.json``, decides where
            nothing else is said.
        pooling: "mean" of the tokens' features, or those of the first token ("cls"); None: as the folder
            says, or "mean".
        normalise: embeddings have unit length; None: as ``modules.json`` says, or True.
        longest: most tokens of a text, start and end included; None: as the folder says, or as many as
            the model has positions.
        quantize: of the graph, by ONNX Runtime: "dynamic-int8", "int8", "int4", ... (`quantize_onnx`); static
            ones take data, which texts are not. Models quantized by `effformer.compress` are exported as
            they are.
        session: as for `export_bundle`.
        verify: compare the graph with torch at three other shapes.
        force: replace a bundle that others wrote as well.

    Raises:
        ValueError: no text encoder, a tokenizer that does not fit it or is none of BERT's, or an unknown
            quantization or option of the session.
        ExportError: the model cannot be exported.
        VerificationError: the graph or the runner does not compute what the model computes.
        FormatError: the tokenizer cannot be read; the folder holds something else or cannot be written.
    """
    form, knobs = _form(quantize)
    name = str(getattr(model, "name", type(model).__name__))
    if not takes(model, "tokens") or not takes(model, "mask"):
        raise ValueError(
            f"export_text_bundle: {name} takes no tokens and mask, so that it is no text encoder; export_onnx "
            "writes the graph of any module, and export_bundle a model that draws pictures of classes"
        )
    rules, vocabulary, told = read_tokenizer(Path(tokenizer))
    config: Any = getattr(model, "config", None)
    rows, positions = getattr(config, "vocab", len(vocabulary)), getattr(config, "context", None)
    if len(vocabulary) > rows:
        raise ValueError(
            f"export_text_bundle: {tokenizer} has {len(vocabulary):,} tokens and {name} {rows:,}; give the "
            "tokenizer that the model was trained with"
        )
    most = longest or told.get("longest") or positions or 512
    if most < 3 or most > (positions or most):
        raise ValueError(
            f"export_text_bundle: longest must lie in 3..{positions or 2**16} for {name}, got {most}"
        )
    network = Embedding(
        model, pooling or told.get("pooling", "mean"),
        told.get("normalise", True) if normalise is None else normalise,
    )  # fmt: skip
    facts: dict[str, Any] = {
        "format": checks.FORMAT, "kind": "texts", "effformer": VERSION, "model": name,
        "graphs": {"encoder": "encoder.onnx"}, "longest": most, "vocabulary": rows,
        "pooling": network.pooling, "normalise": network.normalise,
        "tokenizer": {"file": "vocab.txt", **rules},
        "quantization": None if form == "float32" else form, "session": session_options(session),
    }  # fmt: skip
    with atomic_folder(folder, **FOLDER, force=force) as place, evaluating(network):
        (place / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
        parity, quantized = _graph(
            network, place / "encoder.onnx", form, knobs, rows, verify=verify
        )
        for source in (wordpiece, opened, pictures, checks, choice):
            shutil.copyfile(str(source.__file__), place / Path(str(source.__file__)).name)
        shutil.copyfile(str(texts.__file__), place / "run.py")
        facts |= _documented(network, rows)
        facts["macs"] = {"encoder": multiply_adds(network, _example(rows))}
        error = _record(place, facts, network, exact=form == "float32")
        total = sum(f.stat().st_size for f in place.iterdir())
    path = Path(folder) / "encoder.onnx"  # the reports name the file where it was checked
    return TextBundleReport(
        folder=Path(folder), bytes=total, error=error,
        parity=None if parity is None else replace(parity, path=path),
        quantized=None if quantized is None else replace(quantized, path=path),
        pooling=network.pooling, normalise=network.normalise, longest=most,
    )  # fmt: skip


def _form(quantize: str | Mapping[str, Any] | None) -> tuple[str, dict[str, Any]]:
    form, options = named_form(quantize or "float32", where="export_text_bundle: quantize")
    if form.startswith("static"):
        able = ", ".join(name for name in FORMS if "static" not in name)
        raise ValueError(f"export_text_bundle: quantize: {form!r} takes data; choices: {able}")
    form = "dynamic-int8" if form == "dynamic" else form
    return form, {"reduce_range": False, **options} if form == "dynamic-int8" else options


def _example(rows: int) -> dict[str, Tensor]:
    """Two texts, of which one is padded."""
    draws = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, rows, (2, 12), generator=draws)
    return {"tokens": tokens, "mask": torch.arange(12) < torch.tensor([[12], [7]])}


def _graph(
    network: Embedding, path: Path, form: str, knobs: dict[str, Any], rows: int, *, verify: bool
) -> tuple[VerifyReport | None, QuantizeReport | None]:
    """Write the graph, quantized if asked."""
    inputs = {n: x.to(device_of(network)) for n, x in _example(rows).items()}
    how: dict[str, Any] = {
        "dynamic": {n: {0: "batch", 1: "tokens"} for n in inputs}, "verify": verify,
        "output_names": ["embedding"],
    }  # fmt: skip
    if form == "float32":
        return export_onnx(network, path, inputs, **how).parity, None
    with workspace(path) as space:
        dense = space / "dense.onnx"
        parity = export_onnx(network, dense, inputs, **how).parity
        made = quantize_form(
            dense, path, form, compared=(network, inputs) if verify else None,
            more=knobs,
        )  # fmt: skip
    return made.parity if verify else parity, made


def _documented(network: Embedding, rows: int) -> dict[str, Any]:
    """What the graph takes and gives, for programs in other languages."""
    with torch.no_grad():
        inputs = {n: x.to(device_of(network)) for n, x in _example(rows).items()}
        width = network(**inputs).shape[1]
    size = ["batch", "tokens"]
    return {
        "width": width,
        "inputs": [
            {"name": "tokens", "type": "int64", "shape": size, "range": [0, rows - 1]},
            {"name": "mask", "type": "bool", "shape": size, "range": [False, True]},
        ],
        "outputs": [{"name": "embedding", "type": "float32", "shape": ["batch", width]}],
    }


def _record(place: Path, facts: dict[str, Any], network: Embedding, *, exact: bool) -> float:
    """Embeddings of torch, with which the runner's are compared here and elsewhere.

    Raises:
        VerificationError: they differ.
    """
    import numpy as np

    test: dict[str, Any] = {
        "file": "self_test.npy", "texts": list(SENTENCES), "tokens": [[0]] * len(SENTENCES), "tolerance": 1.0,
    }  # fmt: skip
    facts["self_test"] = test
    (place / test["file"]).touch()  # a bundle lists what it names; filled below
    finish(place, facts)
    bundle = texts.TextBundle(place)
    test["tokens"] = bundle.tokens(SENTENCES)
    made, device = [], device_of(network)
    with torch.no_grad():
        for ids in test["tokens"]:
            tokens = torch.tensor([ids], device=device)
            made.append(network(tokens, torch.ones_like(tokens).bool())[0].float().cpu().numpy())
    expected = np.stack(made)
    np.save(place / test["file"], expected, allow_pickle=False)
    error = error_of(bundle.embed(SENTENCES), expected)
    allowed = max(1e-3, step_of(network)) if exact else 1.0
    if not error < allowed:
        raise VerificationError(
            f"export_text_bundle: what the runner embeds differs by {error:.1e} from what torch embeds "
            f"(allowed {allowed:.0e})"
        )
    test["tolerance"] = allowed if exact else min(1.0, error + ROUNDED)
    finish(place, facts)
    return error


def read_tokenizer(place: Path) -> tuple[dict[str, Any], list[str], dict[str, Any]]:
    """Rules and vocabulary of a published tokenizer, and what stands beside it about embeddings.

    Raises:
        FormatError: no such file, or a damaged one.
        ValueError: a tokenizer of another kind.
    """
    home = place if place.is_dir() else place.parent
    names = ("tokenizer.json", "vocab.txt") if place.is_dir() else (place.name,)
    file = next((home / name for name in names if (home / name).is_file()), None)
    if file is None:
        raise FormatError(f"{place}: holds no tokenizer.json and no vocab.txt")
    if file.suffix == ".json":
        rules, vocabulary = _of_json(file)
    else:
        lower = _beside(home / "tokenizer_config.json").get("do_lower_case", True) is not False
        rules = wordpiece.RULES | {"lower": lower, "strip_accents": lower}
        vocabulary = _vocabulary(file)
    rules["whole"] = [token for token in rules["whole"] if token in vocabulary]
    try:
        wordpiece.WordPiece(vocabulary, rules)
    except pictures.BundleError as error:
        raise ValueError(f"{file}: {error}; give the WordPiece tokenizer of a BERT") from error
    return rules, vocabulary, _told(home)


def _vocabulary(file: Path) -> list[str]:
    try:
        return wordpiece.read_vocabulary(file)
    except pictures.BundleError as error:
        raise FormatError(str(error).replace("; copy the folder again", "")) from error


def _of_json(file: Path) -> tuple[dict[str, Any], list[str]]:
    """Of the file of the package tokenizers, read as data."""
    facts = read_json(file)
    model = facts.get("model") if isinstance(facts, dict) else None
    ids = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(model, dict) or not isinstance(ids, dict) or not ids:
        raise FormatError(f"{file}: is no tokenizer.json")
    kind = model.get("type", "WordPiece")
    normal, cut = facts.get("normalizer") or {}, facts.get("pre_tokenizer") or {}
    parts = (kind, normal.get("type"), cut.get("type"))
    if parts != ("WordPiece", "BertNormalizer", "BertPreTokenizer"):
        raise ValueError(
            f"{file}: is a tokenizer of {', '.join(map(str, parts))}; a bundle has WordPiece behind "
            "BertNormalizer and BertPreTokenizer"
        )
    vocabulary = sorted(ids, key=lambda token: ids[token])
    if [ids[token] for token in vocabulary] != [*range(len(ids))]:
        raise FormatError(f"{file}: its ids are not 0 to {len(ids) - 1}")
    lower = normal.get("lowercase", True) is not False
    accents = normal.get("strip_accents")
    rules = wordpiece.RULES | {
        "unknown": model.get("unk_token", "[UNK]"),
        "prefix": model.get("continuing_subword_prefix", "##"),
        "longest_word": model.get("max_input_chars_per_word", 100),
        "clean": normal.get("clean_text", True) is not False,
        "chinese": normal.get("handle_chinese_chars", True) is not False,
        "strip_accents": lower if accents is None else bool(accents), "lower": lower,
        "whole": [one["content"] for one in facts.get("added_tokens") or []],
    }  # fmt: skip
    return rules, vocabulary


def _told(home: Path) -> dict[str, Any]:
    """What a folder of sentence-transformers says of embeddings."""
    told: dict[str, Any] = {}
    pooling = _beside(home / "1_Pooling" / "config.json")
    if pooling.get("pooling_mode_mean_tokens"):
        told["pooling"] = "mean"
    elif pooling.get("pooling_mode_cls_token"):
        told["pooling"] = "cls"
    elif pooling:
        raise ValueError(
            f"{home / '1_Pooling/config.json'}: neither mean nor cls; give pooling='mean' or 'cls'"
        )
    modules = _beside(home / "modules.json", list)
    if modules:
        told["normalise"] = any("Normalize" in str(one.get("type")) for one in modules)
    longest = _beside(home / "sentence_bert_config.json").get("max_seq_length")
    if type(longest) is int and longest > 2:
        told["longest"] = longest
    return told


def _beside(file: Path, kind: type = dict) -> Any:
    """The content of a file of JSON, empty if there is none."""
    facts = read_json(file) if file.is_file() else kind()
    if not isinstance(facts, kind):
        raise FormatError(f"{file}: holds a {type(facts).__name__}, expected a {kind.__name__}")
    return facts
