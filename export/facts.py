"""What a bundle says of itself: `bundle.json` and the files that it names, checked before anything is opened or
allocated. Needs numpy alone; this file also lies in every bundle, beside `effformer.export.run`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import reprlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

if __package__:
    from .pictures import Array, BundleError
else:  # in a bundle, whose runner has made its folder known
    from pictures import Array, BundleError  # type: ignore[import-not-found, no-redef]

__all__ = [
    "CACHE", "FORMAT", "MOST", "MOST_NUMBERS", "SAMPLERS", "SEEDS", "STRONGEST", "check_cache", "check_facts",
    "check_file", "check_files", "check_listed", "check_sampler", "check_session", "fields", "number",
    "read_array", "read_facts",
]  # fmt: skip

FORMAT = 2  # 1: of pictures alone
MOST = 10_000  # pictures at once, and steps: a mistyped number must not fill the memory or the day
STRONGEST = 1000  # scale of the guidance
MOST_NUMBERS = 2**28  # of all samples together, 1 GiB
SEEDS = 2**63 - 1

CACHE = {
    "every": (1, MOST),
    "warm": (0, MOST),
    "order": (0, 9),
}  # knobs of a cache, and their range
SESSION = ("threads", "spinning", "denormals_to_zero", "arena")  # a number, and truth values
FORM = ("velocity", "light", "narrow", "tolerance", "sample_tolerance")
FORMS = 32

# Butcher tableaus: rows of the stages after the first, weights of the result, times of the stages.
SAMPLERS: dict[str, tuple[list[list[float]], list[float], list[float]]] = {
    "euler": ([], [1.0], []),
    "midpoint": ([[1 / 2]], [0.0, 1.0], [1 / 2]),
    "heun": ([[1.0]], [1 / 2, 1 / 2], [1.0]),
    "rk4": (
        [[1 / 2], [0.0, 1 / 2], [0.0, 0.0, 1.0]],
        [1 / 6, 1 / 3, 1 / 3, 1 / 6],
        [1 / 2, 1 / 2, 1.0],
    ),
}


def read_facts(folder: Path) -> dict[str, Any]:
    """The content of ``bundle.json``.

    Raises:
        BundleError: there is none, or it is that of a newer version.
    """
    path = folder / "bundle.json"
    if not os.path.isdir(folder):  # unlike pathlib's, False also for a name that cannot be
        raise BundleError(f"{folder}: no such folder")
    if not os.path.isfile(path):
        why = "so it is not a bundle or was not written to the end"
        raise BundleError(f"{folder}: holds no bundle.json, {why}")
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        known = isinstance(error, (json.JSONDecodeError, OSError))
        why = str(error) if known else "no UTF-8 text, a number without end, or nested too deeply"
        raise BundleError(f"{path}: is not readable JSON ({why})") from error
    if not isinstance(facts, dict) or type(facts.get("format")) is not int or facts["format"] < 1:
        raise BundleError(f"{path}: is not the description of a bundle")
    if facts["format"] > FORMAT:
        raise BundleError(
            f"{path}: has format {facts['format']}, this runner reads up to {FORMAT}; "
            "use the run.py inside the bundle or a newer effformer"
        )
    return facts


def check_facts(facts: dict[str, Any], at: str) -> None:
    """Every field of a bundle of pictures that is used, before anything is opened or allocated."""
    check_files(facts, at)
    fields(facts, at, graphs=dict, sampler=dict, self_test=dict)
    fields(facts, at, shape=list, value_range=list, num_classes=int, null_label=int | None)
    graphs, test, own = facts["graphs"], facts["self_test"], facts["sampler"]
    decoder = [] if graphs.get("decoder") is None else [graphs["decoder"]]
    drawn = [] if test.get("sample") is None else [test["sample"]]
    if drawn:
        fields(test, f"{at}self_test.", sample=dict)
    files = [record.get("file") for record in (test, *drawn)]
    light = [] if graphs.get("light") is None else [graphs["light"]]
    for path in (graphs.get("velocity"), *light, *decoder, *files):
        check_listed(path, facts, at)
    check_session(facts, at)
    _check_forms(facts, at)
    if "macs" in facts:
        fields(facts, at, macs=dict)
        for name, count in facts["macs"].items():
            number(count, 0, 2**62, f"{at}macs.{name}")
    if len(facts["shape"]) != 3 or len(facts["value_range"]) != 2:
        raise BundleError(f"{at}shape has three numbers and value_range two; copy the folder again")
    for size in facts["shape"]:
        number(size, 1, 2**16, f"{at}each length of shape")
    low, high = (number(v, -1e6, 1e6, f"{at}value_range", real=True) for v in facts["value_range"])
    if low >= high:
        raise BundleError(f"{at}value_range is empty, {low}..{high}; copy the folder again")
    classes, null = number(facts["num_classes"], 1, 2**31, f"{at}num_classes"), facts["null_label"]
    number(0 if null is None else null, 0, 2**31, f"{at}null_label")
    check_sampler(own, at)
    if own.get("cache") is not None:
        fields(own, f"{at}sampler.", cache=dict)
        check_cache(own["cache"], f"{at}sampler.")
    guided = own.get("guidance_channels")
    number(1 if guided is None else guided, 1, facts["shape"][0], f"{at}guidance_channels")
    number(test.get("t"), 0, 1, f"{at}self_test.t", real=True)
    for record in drawn:
        number(record.get("steps"), 1, MOST, f"{at}self_test.sample.steps")
    for record in (test, *drawn):
        _check_test(record, at, max(classes - 1, null or 0), math.prod(facts["shape"]))


def _check_test(record: dict[str, Any], at: str, last: int, numbers: int) -> None:
    number(record.get("seed"), 0, SEEDS, f"{at}self_test.seed")
    number(record.get("tolerance"), 0, 1, f"{at}self_test.tolerance", real=True)
    fields(record, f"{at}self_test.", labels=list)
    for label in record["labels"]:
        number(label, 0, last, f"{at}each of self_test.labels")
    if not 1 <= len(record["labels"]) <= MOST_NUMBERS // numbers:
        raise BundleError(f"{at}shape and self_test.labels do not fit into the memory")


def check_files(facts: dict[str, Any], at: str) -> None:
    """What is recorded of the files of any bundle."""
    fields(facts, at, files=dict)
    for name, record in facts["files"].items():
        if not name.strip(".") or re.search(r"[/\\:\0]", name):
            raise BundleError(f"{at}files: {name!r} is not the name of a file inside the bundle")
        fields(facts["files"], f"{at}files.", **{name: dict})
        fields(record, f"{at}files.{name}.", bytes=int, sha256=str)


def check_session(facts: dict[str, Any], at: str) -> None:
    """Options of the runtime."""
    if "session" in facts:
        fields(facts, at, session=dict)
        _check_names(facts["session"], SESSION, f"{at}session.")
        for option in SESSION[1:]:
            if not isinstance(facts["session"].get(option), bool):
                raise BundleError(f"{at}session.{option} is no truth value; copy the folder again")
        fields(facts["session"], f"{at}session.", threads=int | None)
        threads = facts["session"]["threads"]
        number(1 if threads is None else threads, 1, 1024, f"{at}session.threads")


def _check_forms(facts: dict[str, Any], at: str) -> None:
    """The forms in which the graphs are there."""
    if "forms" not in facts:  # of an earlier bundle, or there is one only
        return
    fields(facts, at, forms=dict)
    number(len(facts["forms"]), 2, FORMS, f"{at}the number of forms")
    light = facts["graphs"].get("light") is not None
    for name, own in facts["forms"].items():
        if not re.fullmatch(r"[a-z0-9-]{1,40}", name):
            raise BundleError(f"{at}forms: {reprlib.repr(name)} is no name of a form")
        fields(facts["forms"], f"{at}forms.", **{name: dict})
        here = f"{at}forms.{name}."
        _check_names(own, FORM, here)
        for kind in ("tolerance", "sample_tolerance"):
            number(own.get(kind), 0, 1, f"{here}{kind}", real=True)
        if not isinstance(own.get("narrow"), bool):
            raise BundleError(f"{here}narrow is no truth value; copy the folder again")
        for graph in ["velocity", "light"][: 1 + light]:
            check_listed(own.get(graph), facts, here)


def _check_names(given: dict[str, Any], known: Collection[str], at: str) -> None:
    if strange := [name for name in given if name not in known]:
        raise BundleError(f"{at}{reprlib.repr(strange[0])} is unknown; choices: {', '.join(known)}")


def check_listed(path: Any, facts: dict[str, Any], at: str) -> None:
    """Refuse what is not the name of a file of the bundle."""
    if not isinstance(path, str) or path not in facts["files"]:
        raise BundleError(f"{at}{reprlib.repr(path)} is not one of the files of the bundle")


def fields(facts: dict[str, Any], at: str, **kinds: Any) -> None:
    """Refuse fields that are missing or of another kind."""
    for name, kind in kinds.items():
        value = facts.get(name)
        if name not in facts or isinstance(value, bool) or not isinstance(value, kind):
            found = reprlib.repr(value) if name in facts else "missing"
            raise BundleError(f"{at}{name} is {found}; copy the folder again")


def check_sampler(options: dict[str, Any], at: str = "") -> None:
    """Refuse steps, a guidance or a sampler that cannot be used.

    Raises:
        BundleError: see there.
    """
    number(options.get("steps"), 1, MOST, f"{at}steps")
    number(options.get("guidance"), -STRONGEST, STRONGEST, f"{at}guidance", real=True)
    name, known = options.get("name"), ", ".join(SAMPLERS)
    if not isinstance(name, str) or name not in SAMPLERS:
        raise BundleError(f"{at}unknown sampler {reprlib.repr(name)}; choices: {known}")


def check_cache(cache: dict[str, Any], at: str) -> None:
    """Refuse a schedule of a cache that cannot be used.

    Raises:
        BundleError: see there.
    """
    if unknown := [name for name in cache if name not in (*CACHE, "name", "over")]:
        say = f"{at}cache has no {reprlib.repr(unknown[0])}"
        raise BundleError(f"{say}; choices: {', '.join(CACHE)}")
    if cache.get("over", "stack") != "stack":
        raise BundleError(f"{at}cache: over must be 'stack', for a bundle skips all blocks at once")
    for name, (low, high) in CACHE.items():
        number(cache.get(name, low), low, high, f"{at}cache: {name}")


def number(value: Any, low: float, high: float, what: str, *, real: bool = False) -> Any:
    """``value``, if it is a whole (or real) number in low..high; NaN lies in no range."""
    kinds = (int, float, np.integer, np.floating) if real else (int, np.integer)
    if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
        kind = "number" if real else "whole number"
        raise BundleError(f"{what} must be a {kind} in {low}..{high}, got {reprlib.repr(value)}")
    return value


def check_file(folder: Path, name: str, record: dict[str, Any]) -> None:
    """Refuse a file that is not the one that a bundle describes.

    Raises:
        BundleError: it is missing, elsewhere or damaged.
    """
    path = folder / name
    if not path.is_file():
        raise BundleError(f"{path}: is missing from the bundle; copy the folder again")
    if path.resolve().parent != folder.resolve():
        raise BundleError(f"{path}: is a link that leads out of the bundle; copy the file itself")
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    except OSError as error:
        raise BundleError(f"{path}: cannot be read ({error.strerror})") from error
    if path.stat().st_size != record["bytes"] or digest.hexdigest() != record["sha256"]:
        raise BundleError(f"{path}: is damaged (its checksum differs); copy the folder again")


def read_array(path: Path, shape: tuple[int, ...]) -> Array:
    """The numbers of an .npy file, which are looked at before memory is taken for them."""
    try:
        found = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # of five classes for the kinds of damage
        raise BundleError(f"{path}: is no complete .npy file of numbers") from error
    fits = isinstance(found, np.ndarray) and found.shape == shape and found.dtype.kind == "f"
    if not fits or not np.isfinite(found).all():
        raise BundleError(f"{path}: does not hold finite numbers of shape {shape}")
    return np.array(found)
