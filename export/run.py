"""Sample from an edge bundle. Needs numpy and onnxruntime, nothing else; this file also lies in
every bundle.

    python -m effformer.export.run DIR --labels 0,1,2 --out samples.png
    python DIR/run.py --labels 0,1,2 --out samples.png

The graph of a bundle computes the velocity ``dx/dt = v(x, t, y)`` with t = 0 noise and t = 1 data,
whatever its network was trained to predict, so that sampling is integration from 0 to 1 with
classifier-free guidance ``v_null + g (v_cond - v_null)``.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import math
import os
import re
import reprlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

if __package__:
    from .pictures import Array, BundleError, check_place, write_image, write_samples
else:  # in a bundle, from wherever it is started
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    from pictures import (  # type: ignore[import-not-found, no-redef]
        Array,
        BundleError,
        check_place,
        write_image,
        write_samples,
    )

__all__ = [
    "SAMPLERS", "Bundle", "BundleError", "check_place", "main", "parse_labels", "refusal",
    "write_image", "write_samples",
]  # fmt: skip

FORMAT = 1
MOST = 10_000  # pictures at once, and steps: a mistyped number must not fill the memory or the day
STRONGEST = 1000  # scale of the guidance
MOST_NUMBERS = 2**28  # of all samples together, 1 GiB
SEEDS = 2**63 - 1

CACHE = {
    "every": (1, MOST),
    "warm": (0, MOST),
    "order": (0, 9),
}  # knobs of a cache, and their range

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


class Bundle:
    """An opened bundle.

    Args:
        folder: the folder, as written by ``effformer.export.export_bundle``.
        threads: threads of ONNX Runtime, None leaves it the choice.

    Attributes:
        facts: the content of ``bundle.json``.
        shape: (C, H, W) of a sample.

    Raises:
        BundleError: no bundle, an incomplete or damaged one, or one of a newer format; a number of
            threads outside 1..1024.
    """

    def __init__(self, folder: str | Path, threads: int | None = None) -> None:
        self._threads = None if threads is None else _number(threads, 1, 1024, "threads")
        self.folder = Path(folder)
        self.facts = _read_facts(self.folder)
        _check_facts(self.facts, f"{self.folder / 'bundle.json'}: ")
        for name, record in self.facts["files"].items():
            _check_file(self.folder, name, record)
        self.shape: tuple[int, int, int] = tuple(self.facts["shape"])
        self._velocity = self._open(self.facts["graphs"]["velocity"], ["t", "x", "y"])
        light = self.facts["graphs"].get("light")
        self._light = self._open(light, ["change", "t", "x", "y"]) if light else None
        decoder = self.facts["graphs"].get("decoder")
        self._decoder = self._open(decoder, ["x"]) if decoder else None

    def velocity(self, x: Array, t: float, labels: Array, carried: Carried | None = None) -> Array:
        """The velocity (B, C, H, W) at x and t in [0, 1] for class ids (B,).

        Args:
            x: (B, C, H, W).
            t: time.
            labels: (B,) class ids.
            carried: what a run carries from one evaluation to the next, if blocks are skipped.

        Raises:
            BundleError: onnxruntime cannot run the graph, or it gives something else.
        """
        times = np.full(x.shape[0], t, dtype=np.float32)
        feed = {"x": x.astype(np.float32), "t": times, "y": labels.astype(np.int64)}
        if carried is None:
            (out,) = self._run(self._velocity, feed)
        elif (change := carried.next(t)) is not None:
            (out,) = self._run(self._light, feed | {"change": change})
        else:
            out, change = self._run(self._velocity, feed, 2)
            carried.learn(t, change)
        if out.shape != x.shape:
            raise BundleError(f"{self.folder}: the graph gives {out.shape} for {x.shape}")
        return out

    def guided(
        self, x: Array, t: float, labels: Array, scale: float, carried: Carried | None = None
    ) -> Array:
        """``v_null + scale (v_cond - v_null)``, both from one evaluation of 2B samples."""
        if scale == 1.0:
            return self.velocity(x, t, labels, carried)
        null = np.full_like(labels, self.facts["null_label"])
        twice = np.concatenate([x, x]), t, np.concatenate([labels, null])
        both = self.velocity(*twice, carried)
        cond, without = np.split(both, 2)
        channels = self.facts["sampler"].get("guidance_channels") or self.shape[0]
        mixed = without + np.float32(scale) * (cond - without)
        return np.concatenate([mixed[:, :channels], cond[:, channels:]], axis=1)

    def sample(
        self,
        labels: Sequence[int],
        *,
        steps: int | None = None,
        guidance: float | None = None,
        sampler: str | None = None,
        seed: int = 0,
        noise: Array | None = None,
        cache: dict[str, Any] | bool | None = None,
    ) -> Array:
        """Samples (B, C, H, W) float32, one for each label.

        Args:
            labels: class ids.
            steps: number of equal steps, 1..10000; like guidance and sampler, the bundle's own if
                None.
            guidance: scale of classifier-free guidance, -1000..1000; 1 is the plain conditional
                field.
            sampler: one of `SAMPLERS`.
            seed: of the noise, 0..2**63 - 1.
            noise: standard normal noise to start from instead.
            cache: at which evaluations blocks are skipped: ``{"every": n, "warm": w, "order": m}``,
                False for none; True or None is as the bundle was exported.

        Raises:
            BundleError: a label, sampler, number or shape that does not fit the bundle.
        """
        own = self.facts["sampler"]
        ids = self._labels(labels)
        count = own["steps"] if steps is None else steps
        scale = own["guidance"] if guidance is None else guidance
        name = own["name"] if sampler is None else sampler
        _check_sampler({"steps": count, "guidance": scale, "name": name})
        if scale != 1.0 and self.facts["null_label"] is None:
            raise BundleError(
                f"guidance {scale} needs a null class, which this model has not; use --guidance 1"
            )
        x = self._start(len(ids), seed, noise)
        carried = self._carried(cache)
        field = lambda x, t: self.guided(x, t, ids, scale, carried)  # noqa: E731
        with np.errstate(over="ignore", invalid="ignore"):  # said below
            for i in range(count):
                x = _step(field, x, i / count, 1 / count, name)
        if not np.isfinite(x).all():
            raise BundleError(
                f"samples are not finite ({name}, {count} steps, guidance {scale}); use more steps"
            )
        return x

    def _carried(self, cache: dict[str, Any] | bool | None) -> Carried | None:
        own: dict[str, Any] | None = self.facts["sampler"].get("cache")
        if cache is False or (cache is None and own is None):
            return None
        if self._light is None:
            raise BundleError(
                f"{self.folder}: was exported without a cache; export it with cache='newton'"
            )
        asked = cache if isinstance(cache, dict) else own or {}
        _check_cache(asked, "")
        return Carried(**{name: asked[name] for name in CACHE if name in asked})

    def images(self, samples: Array) -> Array:
        """Pixels (B, H, W, c) uint8 of samples, through the decoder if the bundle has one.

        Raises:
            BundleError: the samples are latents and there is no decoder.
        """
        x = samples if self._decoder is None else self._run(self._decoder, {"x": samples})[0]
        channels = x.shape[1] if x.ndim == 4 else "no"
        if channels not in (1, 3):
            say = f"samples have {channels} channels, a picture has 1 or 3"
            raise BundleError(f"{say}; write a .npy file")
        low, high = self.facts["value_range"]
        scaled = np.clip((x - low) / (high - low), 0.0, 1.0) * 255.0
        return scaled.round().astype(np.uint8).transpose(0, 2, 3, 1)

    def self_test(self) -> float:
        """Relative difference between this machine's velocity and the recorded one, or between what
        it draws and what torch drew where that is larger.

        Raises:
            BundleError: it is above the recorded tolerance, or the record is damaged.
        """
        test = self.facts["self_test"]
        labels, expected = np.asarray(test["labels"], dtype=np.int64), self._recorded(test)
        actual = self.velocity(self._start(len(labels), test["seed"], None), test["t"], labels)
        error = self._differs(actual, expected, test, "velocity")
        drawn = test.get("sample")
        if drawn is None:  # an earlier bundle, or one that was not verified
            return error
        expected = self._recorded(drawn)
        actual = self.sample(drawn["labels"], steps=drawn["steps"], seed=drawn["seed"])
        return max(error, self._differs(actual, expected, drawn, "sample"))

    def _recorded(self, test: dict[str, Any]) -> Array:
        return _read_array(self.folder / test["file"], (len(test["labels"]), *self.shape))

    def _differs(self, actual: Array, expected: Array, test: dict[str, Any], what: str) -> float:
        error = float(np.abs(actual - expected).max() / max(float(np.abs(expected).max()), 1e-12))
        if not error <= test["tolerance"]:
            raise BundleError(
                f"{self.folder}: this machine's {what} differs by {error:.1e} from the recorded "
                f"one (allowed {test['tolerance']:.0e})"
            )
        return error

    def _open(self, name: str, inputs: list[str]) -> Any:
        try:
            import onnxruntime as ort
        except ImportError as error:
            raise BundleError(
                f"onnxruntime cannot be imported ({error}); pip install onnxruntime"
            ) from error
        options = ort.SessionOptions()
        options.intra_op_num_threads = self._threads or 0
        options.log_severity_level = 4  # what it would print stands in its exceptions
        providers = ["CPUExecutionProvider"]
        try:
            session = ort.InferenceSession(str(self.folder / name), options, providers=providers)
        except Exception as error:  # its exceptions share no base class of their own
            why = f"onnxruntime {ort.__version__} cannot load it ({error})"
            raise BundleError(f"{self.folder / name}: {why}") from error
        if (found := sorted(i.name for i in session.get_inputs())) != inputs:
            raise BundleError(f"{self.folder / name}: takes {found}, expected {inputs}")
        return session

    def _run(self, session: Any, feed: dict[str, Array], count: int = 1) -> list[Array]:
        """The first outputs of a graph."""
        names = [output.name for output in session.get_outputs()][:count]
        try:
            out = session.run(names, feed)
        except Exception as error:
            why = refusal(error) or f"onnxruntime cannot run it ({error})"
            raise BundleError(f"{self.folder}: {why}") from error
        if len(out) < count or not all(
            isinstance(x, np.ndarray) and x.dtype.kind == "f" for x in out
        ):
            raise BundleError(f"{self.folder}: the graph gives no tensor of real numbers")
        return list(out)

    @property
    def classes(self) -> list[str]:
        """Names of the classes, empty if nobody gave them any."""
        record = self.facts.get("trained")
        names = record.get("classes") if isinstance(record, dict) else None
        return [str(name) for name in names] if isinstance(names, list) else []

    def _labels(self, labels: Sequence[int]) -> Array:
        if not 1 <= len(labels) <= MOST:
            say = f"at most {MOST} pictures at once" if len(labels) else "no labels given"
            raise BundleError(f"{say}; use for instance --labels 0,1,2")
        if len(labels) * math.prod(self.shape) > MOST_NUMBERS:
            what = f"{len(labels)} samples of shape {self.shape}"
            raise BundleError(f"{what} do not fit into the memory; draw fewer at once")
        classes = self.facts["num_classes"]
        for label in labels:
            if not 0 <= _number(label, -SEEDS, SEEDS, "a label") < classes:
                known = f"the classes 0..{classes - 1} of this bundle"
                raise BundleError(f"label {label} is not one of {known}")
        return np.asarray(labels, dtype=np.int64)

    def _start(self, count: int, seed: int, noise: Array | None) -> Array:
        shape = (count, *self.shape)
        _number(seed, 0, SEEDS, "seed")
        if noise is None:
            return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
        if noise.shape != shape or noise.dtype.kind != "f" or not np.isfinite(noise).all():
            got = f"{noise.dtype} {noise.shape}"
            raise BundleError(f"noise must have shape {shape} and finite numbers, got {got}")
        return noise.astype(np.float32)


class Carried:
    """What the blocks of a network add, carried on from the evaluations that computed it by the
    polynomial through the last of them, in time; see `effformer.cache.NewtonForecast`.

    Args:
        every: every n-th evaluation is computed.
        warm: evaluations that are computed at the start.
        order: degree of the polynomial.
    """

    def __init__(self, every: int = 3, warm: int = 3, order: int = 2) -> None:
        self.every, self.warm, self.order = every, warm, order
        self.evaluations = self.skipped = 0
        self._points: list[tuple[float, Array]] = []

    def next(self, t: float) -> Array | None:
        """The change at the time of the next evaluation; None if it is computed."""
        k, self.evaluations = self.evaluations, self.evaluations + 1
        if k < self.warm or (k - self.warm) % self.every == 0 or not self._points:
            return None
        self.skipped += 1
        total = np.zeros_like(self._points[0][1])
        for j, (here, value) in enumerate(self._points):
            weight = 1.0
            for i, (there, _) in enumerate(self._points):
                weight *= 1.0 if i == j else (t - there) / (here - there)
            total = total + np.float32(weight) * value
        return total

    def learn(self, t: float, change: Array) -> None:
        """Take what an evaluation computed."""
        kept = [(time, value) for time, value in self._points if time != t]
        self._points = [*kept, (t, change)][-self.order - 1 :]


def refusal(error: Exception) -> str:
    """What a graph itself says when it refuses (`effformer.export.guards`), or nothing."""
    found = re.search(r"Name:'refused: ([^']+?)( #[0-9]+)?(_quant)?'", str(error))
    return found[1] if found else ""


def _step(
    field: Callable[[Array, float], Array], x: Array, t: float, dt: float, name: str
) -> Array:
    rows, weights, times = SAMPLERS[name]
    stages = [field(x, t)]
    for row, c in zip(rows, times, strict=True):
        stages.append(field(_combine(x, stages, row, dt), t + c * dt))
    return _combine(x, stages, weights, dt)


def _combine(x: Array, stages: list[Array], weights: list[float], dt: float) -> Array:
    for k, weight in zip(stages, weights, strict=True):
        if weight:
            x = x + np.float32(weight * dt) * k
    return x


def _read_facts(folder: Path) -> dict[str, Any]:
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


def _check_facts(facts: dict[str, Any], at: str) -> None:
    """Every field that is used, before anything is opened or allocated."""
    _fields(facts, at, files=dict, graphs=dict, sampler=dict, self_test=dict)
    _fields(facts, at, shape=list, value_range=list, num_classes=int, null_label=int | None)
    for name, record in facts["files"].items():
        if not name.strip(".") or re.search(r"[/\\:\0]", name):
            raise BundleError(f"{at}files: {name!r} is not the name of a file inside the bundle")
        _fields(facts["files"], f"{at}files.", **{name: dict})
        _fields(record, f"{at}files.{name}.", bytes=int, sha256=str)
    graphs, test, own = facts["graphs"], facts["self_test"], facts["sampler"]
    decoder = [] if graphs.get("decoder") is None else [graphs["decoder"]]
    drawn = [] if test.get("sample") is None else [test["sample"]]
    if drawn:
        _fields(test, f"{at}self_test.", sample=dict)
    files = [record.get("file") for record in (test, *drawn)]
    light = [] if graphs.get("light") is None else [graphs["light"]]
    for path in (graphs.get("velocity"), *light, *decoder, *files):
        if not isinstance(path, str) or path not in facts["files"]:
            raise BundleError(f"{at}{reprlib.repr(path)} is not one of the files of the bundle")
    if len(facts["shape"]) != 3 or len(facts["value_range"]) != 2:
        raise BundleError(f"{at}shape has three numbers and value_range two; copy the folder again")
    for size in facts["shape"]:
        _number(size, 1, 2**16, f"{at}each length of shape")
    low, high = (_number(v, -1e6, 1e6, f"{at}value_range", real=True) for v in facts["value_range"])
    if low >= high:
        raise BundleError(f"{at}value_range is empty, {low}..{high}; copy the folder again")
    classes, null = _number(facts["num_classes"], 1, 2**31, f"{at}num_classes"), facts["null_label"]
    _number(0 if null is None else null, 0, 2**31, f"{at}null_label")
    _check_sampler(own, at)
    if own.get("cache") is not None:
        _fields(own, f"{at}sampler.", cache=dict)
        _check_cache(own["cache"], f"{at}sampler.")
    guided = own.get("guidance_channels")
    _number(1 if guided is None else guided, 1, facts["shape"][0], f"{at}guidance_channels")
    _number(test.get("t"), 0, 1, f"{at}self_test.t", real=True)
    for record in drawn:
        _number(record.get("steps"), 1, MOST, f"{at}self_test.sample.steps")
    for record in (test, *drawn):
        _check_test(record, at, max(classes - 1, null or 0), math.prod(facts["shape"]))


def _check_test(record: dict[str, Any], at: str, last: int, numbers: int) -> None:
    _number(record.get("seed"), 0, SEEDS, f"{at}self_test.seed")
    _number(record.get("tolerance"), 0, 1, f"{at}self_test.tolerance", real=True)
    _fields(record, f"{at}self_test.", labels=list)
    for label in record["labels"]:
        _number(label, 0, last, f"{at}each of self_test.labels")
    if not 1 <= len(record["labels"]) <= MOST_NUMBERS // numbers:
        raise BundleError(f"{at}shape and self_test.labels do not fit into the memory")


def _fields(facts: dict[str, Any], at: str, **kinds: Any) -> None:
    for name, kind in kinds.items():
        value = facts.get(name)
        if name not in facts or isinstance(value, bool) or not isinstance(value, kind):
            found = reprlib.repr(value) if name in facts else "missing"
            raise BundleError(f"{at}{name} is {found}; copy the folder again")


def _check_sampler(options: dict[str, Any], at: str = "") -> None:
    _number(options.get("steps"), 1, MOST, f"{at}steps")
    _number(options.get("guidance"), -STRONGEST, STRONGEST, f"{at}guidance", real=True)
    name, known = options.get("name"), ", ".join(SAMPLERS)
    if not isinstance(name, str) or name not in SAMPLERS:
        raise BundleError(f"{at}unknown sampler {reprlib.repr(name)}; choices: {known}")


def _check_cache(cache: dict[str, Any], at: str) -> None:
    if unknown := [name for name in cache if name not in (*CACHE, "name", "over")]:
        say = f"{at}cache has no {reprlib.repr(unknown[0])}"
        raise BundleError(f"{say}; choices: {', '.join(CACHE)}")
    if cache.get("over", "stack") != "stack":
        raise BundleError(f"{at}cache: over must be 'stack', for a bundle skips all blocks at once")
    for name, (low, high) in CACHE.items():
        _number(cache.get(name, low), low, high, f"{at}cache: {name}")


def _number(value: Any, low: float, high: float, what: str, *, real: bool = False) -> Any:
    """``value``, if it is a whole (or real) number in low..high; NaN lies in no range."""
    kinds = (int, float, np.integer, np.floating) if real else (int, np.integer)
    if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
        kind = "number" if real else "whole number"
        raise BundleError(f"{what} must be a {kind} in {low}..{high}, got {reprlib.repr(value)}")
    return value


def _check_file(folder: Path, name: str, record: dict[str, Any]) -> None:
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


def _read_array(path: Path, shape: tuple[int, ...]) -> Array:
    """The numbers of an .npy file, which are looked at before memory is taken for them."""
    try:
        found = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # of five classes for the kinds of damage
        raise BundleError(f"{path}: is no complete .npy file of numbers") from error
    fits = isinstance(found, np.ndarray) and found.shape == shape and found.dtype.kind == "f"
    if not fits or not np.isfinite(found).all():
        raise BundleError(f"{path}: does not hold finite numbers of shape {shape}")
    return np.array(found)


def _save(path: Path, bundle: Bundle, samples: Array, *, force: bool = False) -> None:
    if path.suffix == ".npy":
        write_samples(path, samples, force=force)
    else:
        write_image(path, bundle.images(samples), force=force)


def parse_labels(text: str, classes: Sequence[str] = ()) -> list[int]:
    """Class ids from ``0,1,2``, ``0-9``, names of classes or a mixture; a name comes first.

    Raises:
        BundleError: something else.
    """
    labels: list[int] = []
    for part in text.split(","):
        if part.strip() in classes:
            labels.append(classes.index(part.strip()))
            continue
        found = re.fullmatch(r" *([0-9]+)(?:-([0-9]+))? *", part)
        if found is None:
            shown = reprlib.repr(text)
            named = f", or names: {reprlib.repr(list(classes))}" if classes else ""
            raise BundleError(f"--labels {shown}: expected class ids such as 0,1,2 or 0-9{named}")
        first, last = (int(digits[-18:]) for digits in (found[1], found[2] or found[1]))
        if len(labels) + last - first >= MOST or max(map(len, found.groups(""))) > 18:
            raise BundleError(f"--labels {reprlib.repr(text)}: at most {MOST} pictures at once")
        labels += range(first, last + 1)
    if not labels:
        raise BundleError(f"--labels {reprlib.repr(text)}: the range is empty")
    return labels


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code, 2 for a bundle or request that cannot be served."""
    here = Path(__file__).resolve().parent
    inside = (here / "bundle.json").is_file()
    parser = argparse.ArgumentParser(
        description="Sample from an edge bundle (numpy and onnxruntime only)."
    )
    add = parser.add_argument
    add("folder", nargs="?" if inside else None, default=here, type=Path, help="the bundle")
    add("--labels", default="", help="class ids, 0,1,2 or 0-9, or names of classes")
    add("--out", type=Path, default=Path("samples.png"), help="samples.png or samples.npy")
    add("--steps", type=int, help="number of steps")
    add("--guidance", type=float, help="scale of classifier-free guidance; 1 is none")
    add("--sampler", help=", ".join(SAMPLERS))
    add("--no-cache", action="store_true", help="compute all blocks at every step")
    add("--seed", type=int, default=0, help="of the noise")
    add("--threads", type=int, help="threads of onnxruntime")
    add("--self-test", action="store_true", help="compare with the recorded velocity and stop")
    add("--force", action="store_true", help="replace whatever file is at --out")
    given = parser.parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal may lack characters of a path
            stream.reconfigure(errors="backslashreplace")
    try:
        if not given.self_test:
            if given.out.suffix not in (".npy", ".png"):
                raise BundleError(f"{given.out}: samples are written as .png or .npy")
            check_place(given.out, force=given.force)
        bundle = Bundle(given.folder, given.threads)
        if given.self_test:
            print(f"{given.folder}: agrees within {bundle.self_test():.1e}")
            return 0
        labels = parse_labels(given.labels, bundle.classes) if given.labels else []
        options = {key: getattr(given, key) for key in ("steps", "guidance", "sampler", "seed")}
        options["cache"] = False if given.no_cache else None
        _save(given.out, bundle, bundle.sample(labels, **options), force=given.force)
    except BundleError as error:
        said = " ".join(str(error).split())
        said = said if len(said) < 1200 else f"{said[:500]} ... {said[-500:]}"
        print(f"error: {said}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted; nothing was written", file=sys.stderr)
        return 130
    print(given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
