"""Embed texts with a bundle. Needs numpy and onnxruntime, nothing else; in a bundle of texts this file is
``run.py``.

    python -m effformer.export.texts DIR --text "a cat" --text "a dog"
    python DIR/run.py --text "a cat" --text "a dog" --out embeddings.npy

The graph of such a bundle takes ids of tokens and tells them from padding by a mask; it gives one embedding for each
text.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if not __package__:  # in a bundle, from wherever it is started
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
if TYPE_CHECKING or __package__:
    from . import facts as checks
    from .opened import Opened, command_line, served
    from .pictures import Array, BundleError, check_place, write_samples
    from .wordpiece import WordPiece, check_rules, read_vocabulary
else:
    import facts as checks
    from opened import Opened, command_line, served
    from pictures import Array, BundleError, check_place, write_samples
    from wordpiece import WordPiece, check_rules, read_vocabulary

__all__ = ["TextBundle", "main"]

INPUTS = ["mask", "tokens"]
BATCH = 32  # texts that run together


class TextBundle(Opened):
    """An opened bundle that embeds texts.

    Args:
        folder: the folder, as written by ``effformer.export.export_text_bundle``.
        threads: threads of ONNX Runtime, None: as the bundle says.
        alone: see `run.Bundle`.

    Attributes:
        facts: the content of ``bundle.json``.
        width: numbers of an embedding.
        longest: tokens of a text, its start and its end among them; what is beyond is cut off.

    Raises:
        BundleError: no bundle of texts, an incomplete or damaged one, or one of a newer format.
    """

    KIND = "texts"

    def __init__(
        self, folder: str | Path, threads: int | None = None, *, alone: bool = False
    ) -> None:
        super().__init__(folder, threads, alone=alone)
        self.width, self.longest = self.facts["width"], self.facts["longest"]
        rules = self.facts["tokenizer"]
        tokens = read_vocabulary(self.folder / rules["file"])
        if len(tokens) > self.facts["vocabulary"]:
            say = f"{self.folder / rules['file']}: holds {len(tokens):,} tokens"
            raise BundleError(f"{say}, and the model has {self.facts['vocabulary']:,}")
        self._tokenizer = WordPiece(tokens, rules)
        self._encoder = self._open(self.facts["graphs"]["encoder"], INPUTS)

    def _check(self, at: str) -> None:
        facts = self.facts
        super()._check(at)
        checks.fields(facts, at, graphs=dict, tokenizer=dict, self_test=dict)
        checks.check_listed(facts["graphs"].get("encoder"), facts, at)
        checks.check_listed(facts["tokenizer"].get("file"), facts, at)
        check_rules(facts["tokenizer"], at)
        for name, low, high in (
            ("width", 1, 2**16),
            ("longest", 3, 2**16),
            ("vocabulary", 1, 2**31),
        ):
            checks.number(facts.get(name), low, high, f"{at}{name}")
        test = facts["self_test"]
        checks.check_listed(test.get("file"), facts, at)
        checks.number(test.get("tolerance"), 0, 1, f"{at}self_test.tolerance", real=True)
        checks.fields(test, f"{at}self_test.", texts=list, tokens=list)
        if not 1 <= len(test["texts"]) <= 100 or len(test["tokens"]) != len(test["texts"]):
            raise BundleError(f"{at}self_test has no texts, or too many; copy the folder again")

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of the tokens of every text.

        Raises:
            BundleError: none or too many texts, or one that is none or endless.
        """
        if isinstance(texts, str) or not 1 <= len(texts) <= checks.MOST:
            raise BundleError(f"expected a list of 1 to {checks.MOST} texts")
        return [self._tokenizer(text, self.longest) for text in texts]

    def embed(self, texts: Sequence[str]) -> Array:
        """Embeddings (B, width) float32 of texts, one for each.

        Raises:
            BundleError: as `tokens`; or onnxruntime cannot run the graph.
        """
        ids = self.tokens(texts)
        out = [self._some(ids[i : i + BATCH]) for i in range(0, len(ids), BATCH)]
        return np.concatenate(out)

    def _some(self, ids: Sequence[Sequence[int]]) -> Array:
        longest, pad = max(map(len, ids)), self._tokenizer.ids[self._tokenizer.rules["pad"]]
        tokens = np.full((len(ids), longest), pad, dtype=np.int64)
        mask = np.zeros(tokens.shape, dtype=bool)
        for i, one in enumerate(ids):
            tokens[i, : len(one)], mask[i, : len(one)] = one, True
        (out,) = self._run(self._encoder, {"tokens": tokens, "mask": mask})
        if out.shape != (len(ids), self.width) or not np.isfinite(out).all():
            raise BundleError(
                f"{self.folder}: the graph gives no embeddings of {self.width} numbers"
            )
        return out

    def similarity(self, texts: Sequence[str]) -> Array:
        """Cosines (B, B) of the embeddings of texts.

        Raises:
            BundleError: as `embed`.
        """
        x = self.embed(texts)
        unit = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
        return unit @ unit.T

    def example(self) -> Array:
        """An embedding."""
        return self.embed(self.facts["self_test"]["texts"][:1])

    def self_test(self) -> float:
        """Relative difference between this machine's embeddings and those of torch that are recorded.

        Raises:
            BundleError: it is above the recorded tolerance, texts become other tokens here, or the record
                is damaged.
        """
        test = self.facts["self_test"]
        expected = checks.read_array(self.folder / test["file"], (len(test["texts"]), self.width))
        if self.tokens(test["texts"]) != test["tokens"]:
            raise BundleError(
                f"{self.folder}: this machine cuts texts into other tokens than recorded"
            )
        actual = self.embed(test["texts"])
        return self._differs(actual, expected, test["tolerance"], "embedding")


def main(argv: Sequence[str] | None = None, *, alone: bool = False) -> int:
    """Command line; returns the exit code, 2 for a bundle or request that cannot be served.

    Args:
        argv: the words, None for those of the process.
        alone: see `run.Bundle`.
    """
    parser = command_line("Embed texts with a bundle", "embeddings")
    add = parser.add_argument
    add("--text", action="append", default=[], help="a text; may be repeated")
    add("--file", type=Path, help="a file of texts in UTF-8, one a line")
    add("--out", type=Path, help="embeddings.npy; default: cosines of all pairs are printed")
    given = parser.parse_args(argv)
    return served(lambda: _serve(given, alone))


def _serve(given: argparse.Namespace, alone: bool) -> list[Any]:
    """Do what the words ask for, and say what there is to say."""
    if given.out is not None and given.out.suffix != ".npy":
        raise BundleError(f"{given.out}: embeddings are written as .npy")
    if given.out is not None and not given.self_test:
        check_place(given.out, force=given.force)
    texts = given.text + ([] if given.file is None else _lines(given.file))
    bundle = TextBundle(given.folder, given.threads, alone=alone)
    if given.self_test:
        return [f"{given.folder}: agrees within {bundle.self_test():.1e}"]
    if not texts:
        raise BundleError('no texts given; use for instance --text "a cat" --text "a dog"')
    if given.out is not None:
        write_samples(given.out, bundle.embed(texts), force=given.force)
        return [given.out]
    cosines = bundle.similarity(texts)
    return [
        " ".join([*(f"{cosine:7.3f}" for cosine in row), f" {text[:60]}"])
        for row, text in zip(cosines, texts, strict=True)
    ]


def _lines(path: Path) -> list[str]:
    try:
        if not path.is_file() or path.stat().st_size > 2**28:
            raise BundleError(f"{path}: is no file of texts of at most 256 MiB")
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        if isinstance(error, BundleError):
            raise
        raise BundleError(f"{path}: is no readable text in UTF-8") from error


if __name__ == "__main__":
    sys.exit(main(alone=True))
