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
import math
import os
import re
import reprlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if not __package__:  # in a bundle, from wherever it is started
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
if TYPE_CHECKING or __package__:
    from . import facts as checks
    from .choice import Choice, choose, place_of
    from .opened import Opened, command_line, served
    from .pictures import Array, BundleError, check_place, write_image, write_samples
else:
    import facts as checks
    from choice import Choice, choose, place_of
    from opened import Opened, command_line, served
    from pictures import Array, BundleError, check_place, write_image, write_samples

__all__ = [
    "Bundle", "BundleError", "check_place", "main", "parse_labels",
    "write_image", "write_samples",
]  # fmt: skip


class Bundle(Opened):
    """An opened bundle.

    Args:
        folder: the folder, as written by ``effformer.export.export_bundle``.
        threads: threads of ONNX Runtime, None: as the bundle says.
        form: which of its forms runs; None: the one that is fastest on this machine, which is found out
            once and remembered in ``choice.json``.
        alone: nothing else runs in this process, so that numbers close to 0 may be flushed to it in
            whatever this thread computes, if the bundle says so.

    Attributes:
        facts: the content of ``bundle.json``.
        shape: (C, H, W) of a sample.
        graphs: what is computed by which file.
        form: name of the form that runs, None if the bundle has one only.
        choice: why it is that one; None if it was given, or there is one only.

    Raises:
        BundleError: no bundle, an incomplete or damaged one, or one of a newer format; a number of
            threads outside 1..1024; no such form.
    """

    KIND = "pictures"

    def __init__(
        self, folder: str | Path, threads: int | None = None, *, form: str | None = None, alone: bool = False
    ) -> None:  # fmt: skip
        super().__init__(folder, threads, alone=alone)
        self.shape: tuple[int, int, int] = tuple(self.facts["shape"])
        self._forms: dict[str, Any] = self.facts.get("forms") or {}
        if form is not None and form not in self._forms:
            known = (
                f"forms of the bundle: {', '.join(self._forms)}"
                if self._forms
                else "it has one form"
            )
            raise BundleError(f"{self.folder}: unknown form {reprlib.repr(form)}; {known}")
        self.choice: Choice | None = None
        if form is None and self._forms:
            place = place_of(self.folder, self._options.get("threads"))
            self.choice = choose(self.folder, [*self._forms], place, self._trial)
            form = self.choice.form
        self.form, own = form, self._forms.get(form or "", {})
        self.graphs: dict[str, str | None] = self.facts["graphs"] | {
            name: own[name] for name in ("velocity", "light") if name in own
        }
        velocity, light, decoder = (self.graphs.get(n) for n in ("velocity", "light", "decoder"))
        self._velocity = self._open(str(velocity), ["t", "x", "y"], own)
        self._light = self._open(light, ["change", "t", "x", "y"], own) if light else None
        self._decoder = self._open(decoder, ["x"]) if decoder else None

    def _trial(self, form: str) -> Callable[[], Array]:
        """A form in a session of its own, after it has agreed with the record."""
        own, test = self._forms[form], self.facts["self_test"]
        session = self._open(own["velocity"], ["t", "x", "y"], own)
        labels, expected = np.asarray(test["labels"], dtype=np.int64), self._recorded(test)
        times = np.full(len(labels), test["t"], dtype=np.float32)
        feed = {"x": self._start(len(labels), test["seed"], None), "t": times, "y": labels}

        def call() -> Array:
            return self._run(session, feed)[0]

        self._differs(call(), expected, own["tolerance"], f"velocity in {form}")
        return call

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
            sampler: one of `facts.SAMPLERS`.
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
        checks.check_sampler({"steps": count, "guidance": scale, "name": name})
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
        checks.check_cache(asked, "")
        return Carried(**{name: asked[name] for name in checks.CACHE if name in asked})

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
        own = self._forms.get(self.form or "", {})
        error = self._differs(actual, expected, own.get("tolerance", test["tolerance"]), "velocity")
        drawn = test.get("sample")
        if drawn is None:  # an earlier bundle, or one that was not verified
            return error
        expected = self._recorded(drawn)
        actual = self.sample(drawn["labels"], steps=drawn["steps"], seed=drawn["seed"])
        allowed = own.get("sample_tolerance", drawn["tolerance"])
        return max(error, self._differs(actual, expected, allowed, "sample"))

    def _recorded(self, test: dict[str, Any]) -> Array:
        return checks.read_array(self.folder / test["file"], (len(test["labels"]), *self.shape))

    def _check(self, at: str) -> None:
        checks.check_facts(self.facts, at)

    def example(self) -> Array:
        """A sample."""
        return self.sample([0])

    def which(self) -> str:
        """Which form runs, and why."""
        if self.choice is not None:
            return str(self.choice)
        return "the bundle has one form" if self.form is None else f"{self.form}, as was asked"

    @property
    def classes(self) -> list[str]:
        """Names of the classes, empty if nobody gave them any."""
        record = self.facts.get("trained")
        names = record.get("classes") if isinstance(record, dict) else None
        return [str(name) for name in names] if isinstance(names, list) else []

    def _labels(self, labels: Sequence[int]) -> Array:
        if not 1 <= len(labels) <= checks.MOST:
            say = f"at most {checks.MOST} pictures at once" if len(labels) else "no labels given"
            raise BundleError(f"{say}; use for instance --labels 0,1,2")
        if len(labels) * math.prod(self.shape) > checks.MOST_NUMBERS:
            what = f"{len(labels)} samples of shape {self.shape}"
            raise BundleError(f"{what} do not fit into the memory; draw fewer at once")
        classes = self.facts["num_classes"]
        for label in labels:
            if not 0 <= checks.number(label, -checks.SEEDS, checks.SEEDS, "a label") < classes:
                known = f"the classes 0..{classes - 1} of this bundle"
                raise BundleError(f"label {label} is not one of {known}")
        return np.asarray(labels, dtype=np.int64)

    def _start(self, count: int, seed: int, noise: Array | None) -> Array:
        shape = (count, *self.shape)
        checks.number(seed, 0, checks.SEEDS, "seed")
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


def _step(
    field: Callable[[Array, float], Array], x: Array, t: float, dt: float, name: str
) -> Array:
    rows, weights, times = checks.SAMPLERS[name]
    stages = [field(x, t)]
    for row, c in zip(rows, times, strict=True):
        stages.append(field(_combine(x, stages, row, dt), t + c * dt))
    return _combine(x, stages, weights, dt)


def _combine(x: Array, stages: list[Array], weights: list[float], dt: float) -> Array:
    for k, weight in zip(stages, weights, strict=True):
        if weight:
            x = x + np.float32(weight * dt) * k
    return x


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
        if len(labels) + last - first >= checks.MOST or max(map(len, found.groups(""))) > 18:
            raise BundleError(
                f"--labels {reprlib.repr(text)}: at most {checks.MOST} pictures at once"
            )
        labels += range(first, last + 1)
    if not labels:
        raise BundleError(f"--labels {reprlib.repr(text)}: the range is empty")
    return labels


def main(argv: Sequence[str] | None = None, *, alone: bool = False) -> int:
    """Command line; returns the exit code, 2 for a bundle or request that cannot be served.

    Args:
        argv: the words, None for those of the process.
        alone: see `Bundle`.
    """
    parser = command_line("Sample from an edge bundle", "velocity")
    add = parser.add_argument
    add("--labels", default="", help="class ids, 0,1,2 or 0-9, or names of classes")
    add("--out", type=Path, default=Path("samples.png"), help="samples.png or samples.npy")
    add("--steps", type=int, help="number of steps")
    add("--guidance", type=float, help="scale of classifier-free guidance; 1 is none")
    add("--sampler", help=", ".join(checks.SAMPLERS))
    add("--no-cache", action="store_true", help="compute all blocks at every step")
    add("--seed", type=int, default=0, help="of the noise")
    add("--form", help="which form of the bundle runs; default: the fastest here")
    add("--which", action="store_true", help="say which form runs here, and why, and stop")
    given = parser.parse_args(argv)
    return served(lambda: _serve(given, alone))


def _serve(given: argparse.Namespace, alone: bool) -> list[object]:
    """Do what the words ask for, and say what there is to say."""
    if not given.self_test and not given.which:
        if given.out.suffix not in (".npy", ".png"):
            raise BundleError(f"{given.out}: samples are written as .png or .npy")
        check_place(given.out, force=given.force)
    bundle = Bundle(given.folder, given.threads, form=given.form, alone=alone)
    if given.which:
        return [f"{given.folder}: {bundle.which()}"]
    if given.self_test:
        return [f"{given.folder}: agrees within {bundle.self_test():.1e}"]
    labels = parse_labels(given.labels, bundle.classes) if given.labels else []
    options = {key: getattr(given, key) for key in ("steps", "guidance", "sampler", "seed")}
    options["cache"] = False if given.no_cache else None
    _save(given.out, bundle, bundle.sample(labels, **options), force=given.force)
    return [given.out]


if __name__ == "__main__":
    sys.exit(main(alone=True))
