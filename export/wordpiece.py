"""Texts to ids as BERT's tokenizers make them, in plain Python; this file also lies in every bundle of texts.

A text is cut at the special tokens that stand in it; what is between them is cleaned, put into lower case without
accents if the vocabulary is, and cut at spaces and punctuation; each word is cut into the longest pieces that the
vocabulary has, from left to right.
"""

from __future__ import annotations

import re
import reprlib
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING or __package__:
    from . import facts as checks
    from .pictures import BundleError
else:  # in a bundle, whose runner has made its folder known
    import facts as checks
    from pictures import BundleError

__all__ = ["RULES", "SPECIAL", "WordPiece", "check_rules", "read_vocabulary"]

SPECIAL = {
    "unknown": "[UNK]",
    "start": "[CLS]",
    "end": "[SEP]",
    "pad": "[PAD]",
}
"""Tokens with a meaning of their own, as BERT's vocabularies call them."""
RULES: dict[str, Any] = {
    **SPECIAL, "whole": ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"], "prefix": "##", "longest_word": 100,
    "clean": True, "chinese": True, "strip_accents": True, "lower": True,
}  # fmt: skip
"""How texts are cut, as of BERT's vocabularies in lower case."""
MOST_TOKENS, MOST_CHARACTERS, MOST_BYTES = 2**20, 2**20, 2**27
_SPACE = "\t\n\r"
_OTHER = ("Cc", "Cf", "Co", "Cs")  # code points without a character stay
_CJK = (
    (0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F), (0x2B740, 0x2B81F),
    (0x2B920, 0x2CEAF), (0xF900, 0xFAFF), (0x2F800, 0x2FA1F),
)  # fmt: skip


def read_vocabulary(path: Path) -> list[str]:
    """The tokens of a file with one in each line.

    Raises:
        BundleError: another file, or a token that is there twice.
    """
    try:
        if path.stat().st_size > MOST_BYTES:
            raise OSError("it is too large")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(f"{path}: is no vocabulary in UTF-8, a token a line") from error
    tokens = text.removesuffix("\n").split("\n")
    if len(tokens) > MOST_TOKENS or len({*tokens}) < len(tokens):
        raise BundleError(
            f"{path}: holds a token twice, or more than {MOST_TOKENS:,}; copy the folder again"
        )
    return tokens


def check_rules(rules: dict[str, Any], at: str) -> None:
    """Refuse rules that cannot be used.

    Raises:
        BundleError: see there.
    """
    if unknown := [name for name in rules if name not in (*RULES, "file")]:
        say = f"{at}tokenizer has no {reprlib.repr(unknown[0])}"
        raise BundleError(f"{say}; choices: {', '.join(RULES)}")
    for name, value in RULES.items():
        given = rules.get(name)
        if isinstance(value, bool) and not isinstance(given, bool):
            raise BundleError(f"{at}tokenizer.{name} is no truth value; copy the folder again")
        words = [given] if isinstance(value, str) else given if name == "whole" else []
        if (
            not isinstance(words, list)
            or len(words) > 1000
            or not all(isinstance(w, str) and 1 <= len(w) <= 100 for w in words)
        ):
            raise BundleError(f"{at}tokenizer.{name} holds no tokens; copy the folder again")
    checks.number(rules["longest_word"], 1, 10_000, f"{at}tokenizer.longest_word")


class WordPiece:
    """A tokenizer.

    Args:
        tokens: the vocabulary, by id.
        rules: see `RULES`.

    Raises:
        BundleError: the vocabulary lacks a token that the rules name.
    """

    def __init__(self, tokens: Sequence[str], rules: Mapping[str, Any]) -> None:
        self.ids = {token: i for i, token in enumerate(tokens)}
        self.rules = dict(rules)
        whole = [token for token in rules["whole"] if token in self.ids]
        for name in SPECIAL:
            if rules[name] not in self.ids:
                raise BundleError(
                    f"the vocabulary has no {reprlib.repr(rules[name])}, which is its {name}"
                )
        longest_first = sorted(whole, key=len, reverse=True)
        self._whole = re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")
        self._longest = max(map(len, self.ids))

    def __call__(self, text: str, longest: int) -> list[int]:
        """Ids of a text between its start and its end, at most ``longest`` of them.

        Raises:
            BundleError: it is no text, or endless.
        """
        if not isinstance(text, str) or len(text) > MOST_CHARACTERS:
            raise BundleError(
                f"expected texts of at most {MOST_CHARACTERS:,} characters, got {reprlib.repr(text)}"
            )
        start, end = (self.ids[self.rules[name]] for name in ("start", "end"))
        found: list[int] = []
        for i in self._pieces(text):
            if len(found) == longest - 2:
                break
            found.append(i)
        return [start, *found, end]

    def _pieces(self, text: str) -> Iterator[int]:
        for part in self._whole.split(text):
            if part in self.ids and self._whole.fullmatch(part):
                yield self.ids[part]
                continue
            for word in _words(self._normal(part)):
                yield from self._cut(word)

    def _normal(self, text: str) -> str:
        rules = self.rules
        if rules["clean"]:
            text = "".join(" " if _is_space(c) else c for c in text if not _is_control(c))
        if rules["chinese"]:
            text = "".join(f" {c} " if _is_cjk(c) else c for c in text)
        if rules["strip_accents"]:
            apart = unicodedata.normalize("NFD", text)
            text = "".join(c for c in apart if unicodedata.category(c) != "Mn")
        # by character: a word's last sigma stays what it is
        return "".join(c.lower() for c in text) if rules["lower"] else text

    def _cut(self, word: str) -> list[int]:
        unknown = [self.ids[self.rules["unknown"]]]
        if len(word) > self.rules["longest_word"]:
            return unknown
        found, start = [], 0
        while start < len(word):
            prefix = self.rules["prefix"] if start else ""
            for end in range(min(len(word), start + self._longest), start, -1):
                if (one := self.ids.get(prefix + word[start:end])) is not None:
                    break
            else:
                return unknown
            found.append(one)
            start = end
        return found


def _words(text: str) -> Iterator[str]:
    """Words and single marks of punctuation."""
    for word in text.split():
        start = 0
        for i, c in enumerate(word):
            if _is_mark(c):
                if start < i:
                    yield word[start:i]
                yield c
                start = i + 1
        if start < len(word):
            yield word[start:]


def _is_control(c: str) -> bool:
    return c in "\0\ufffd" or (c not in _SPACE and unicodedata.category(c) in _OTHER)


def _is_space(c: str) -> bool:
    return c.isspace()


def _is_cjk(c: str) -> bool:
    return any(low <= ord(c) <= high for low, high in _CJK)


def _is_mark(c: str) -> bool:
    ascii_mark = c.isascii() and c.isprintable() and not c.isalnum() and c != " "
    return ascii_mark or unicodedata.category(c)[0] == "P"
