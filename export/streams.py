"""Read a sequence step by step with a bundle. Needs numpy and onnxruntime, nothing else; in a bundle of a streaming model
this file is ``run.py``.

    python -m effformer.export.streams DIR --tokens 5,7,9 --more 20
    python DIR/run.py --input sequence.npy --out outputs.npy

The graph of such a bundle takes one step of a sequence, the number of steps before it and a state, and gives an output
and the next state, whose size does not depend on the number of steps.
"""

from __future__ import annotations

import argparse
import os
import re
import reprlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if not __package__:  # in a bundle, from wherever it is started
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
if TYPE_CHECKING or __package__:
    from . import facts as checks
    from .opened import Opened, command_line, served
    from .pictures import Array, BundleError, check_place, write_samples
else:
    import facts as checks
    from opened import Opened, command_line, served
    from pictures import Array, BundleError, check_place, write_samples

__all__ = ["State", "StreamBundle", "main"]

MOST_STEPS = 2**31 - 1


class State(NamedTuple):
    """What was read.

    Attributes:
        position: number of steps.
        values: (B, S) float32, what the model keeps of them.
    """

    position: int
    values: Array


class StreamBundle(Opened):
    """An opened bundle that reads sequences.

    Args:
        folder: the folder, as written by ``effformer.export.export_stream_bundle``.
        threads: threads of ONNX Runtime, None: as the bundle says.
        alone: see `run.Bundle`.

    Attributes:
        facts: the content of ``bundle.json``.
        channels: numbers of a step; None: a step is the id of a token.
        outputs: numbers that a step gives.
        longest: most steps of a sequence, None: any.

    Raises:
        BundleError: no bundle of a streaming model, an incomplete or damaged one, or one of a newer format.
    """

    KIND = "streams"

    def __init__(
        self, folder: str | Path, threads: int | None = None, *, alone: bool = False
    ) -> None:
        super().__init__(folder, threads, alone=alone)
        self.channels, self.longest = self.facts["channels"], self.facts["longest"]
        self.outputs = self.facts["outputs"][0]["shape"][1]
        name = self.facts["inputs"][0]["name"]
        self._name = name
        self._step = self._open(self.facts["graphs"]["step"], [name, "position", "state"])
        shape = next(i.shape for i in self._step.get_inputs() if i.name == "state")
        if len(shape) != 2 or shape[1] != sum(count for count, _ in self.facts["start"]):
            raise BundleError(f"{self.folder}: start does not fit the state of its graph, {shape}")
        self._start = np.concatenate(
            [np.full(count, value, dtype=np.float32) for count, value in self.facts["start"]]
        )

    def _check(self, at: str) -> None:
        facts, test = self.facts, self.facts.get("self_test")
        super()._check(at)
        checks.fields(facts, at, graphs=dict, inputs=list, outputs=list, start=list, self_test=dict)
        assert isinstance(test, dict)
        checks.fields(facts, at, channels=int | None, longest=int | None, vocabulary=int | None)
        for path in (facts["graphs"].get("step"), test.get("file"), test.get("input")):
            checks.check_listed(path, facts, at)
        for name in ("channels", "longest", "vocabulary"):
            number = 1 if facts[name] is None else facts[name]
            checks.number(number, 1, MOST_STEPS, f"{at}{name}")
        if (facts["channels"] is None) == (facts["vocabulary"] is None):
            raise BundleError(f"{at}has either channels or a vocabulary; copy the folder again")
        _check_values(facts, at)
        total = 0
        for piece in facts["start"]:
            if not isinstance(piece, list) or len(piece) != 2:
                raise BundleError(f"{at}start is no list of pairs; copy the folder again")
            total += checks.number(piece[0], 1, checks.MOST_NUMBERS, f"{at}start")
            checks.number(piece[1], -3.5e38, 3.5e38, f"{at}start", real=True)
        checks.number(total, 1, checks.MOST_NUMBERS, f"{at}numbers of start")
        checks.number(test.get("steps"), 1, 1000, f"{at}self_test.steps")
        checks.number(test.get("tolerance"), 0, 1, f"{at}self_test.tolerance", real=True)

    def start(self, batch: int = 1) -> State:
        """The state before the first step of so many sequences.

        Raises:
            BundleError: a number of sequences that is none, or too large for the memory.
        """
        most = max(1, checks.MOST_NUMBERS // len(self._start))
        checks.number(batch, 1, most, "number of sequences")
        return State(0, np.tile(self._start, (batch, 1)))

    def step(self, x: Array, state: State) -> tuple[Array, State]:
        """Read the next step of every sequence.

        Args:
            x: (B,) ids of tokens, or (B, channels).
            state: from `start` or the step before; it is not changed.

        Returns:
            (B, outputs) float32, and the next state.

        Raises:
            BundleError: numbers or a state that do not fit, or a sequence that is too long.
        """
        x, (position, values) = self._given(x, 1)[:, None], state
        if values.shape != (len(x), len(self._start)):
            raise BundleError(f"expected a state of {len(x)} sequences, got {values.shape}")
        if self.longest is not None and position >= self.longest:
            raise BundleError(f"sequences of this bundle have at most {self.longest} steps")
        feed = {self._name: x, "position": np.asarray(position, dtype=np.int64), "state": values}
        out, after = self._run(self._step, feed, 2)
        if out.shape != (len(x), self.outputs) or after.shape != values.shape:
            raise BundleError(f"{self.folder}: the graph gives {out.shape} and {after.shape}")
        return out, State(position + 1, after)

    def read(self, sequence: Array, state: State | None = None) -> tuple[Array, State]:
        """Read a sequence, and give what every step of it gives.

        Args:
            sequence: (B, N) ids of tokens, or (B, N, channels).
            state: what was read before; None: nothing.

        Returns:
            (B, N, outputs) float32, and the state behind it.

        Raises:
            BundleError: as `step`.
        """
        x = self._given(sequence, 2)
        state, made = state or self.start(len(x)), []
        for n in range(x.shape[1]):
            out, state = self.step(x[:, n], state)
            made.append(out)
        return np.stack(made, axis=1), state

    def _given(self, x: Any, dims: int) -> Array:
        x, tokens = np.asarray(x), self.channels is None
        right = (
            x.ndim == dims + (not tokens) and x.size and x.dtype.kind in ("iu" if tokens else "f")
        )
        if not right or not (tokens or x.shape[-1] == self.channels):
            want = "ids of tokens" if tokens else f"real numbers, {self.channels} a step"
            raise BundleError(f"expected {want} in {dims} axes, got {x.dtype} {x.shape}")
        if tokens and not (x.min() >= 0 and x.max() < self.facts["vocabulary"]):
            raise BundleError(f"ids of tokens lie in 0..{self.facts['vocabulary'] - 1}")
        if not np.isfinite(x).all():
            raise BundleError("a sequence has numbers that are not finite")
        return x.astype(np.int64 if tokens else np.float32)

    def example(self) -> Array:
        """What a step gives."""
        tokens = self.channels is None
        x = np.zeros((1,), np.int64) if tokens else np.zeros((1, self.channels), np.float32)
        return self.step(x, self.start())[0]

    def self_test(self) -> float:
        """Relative difference between this machine's outputs and those of torch, which has read the whole
        sequence at once.

        Raises:
            BundleError: it is above the recorded tolerance, or the record is damaged.
        """
        test = self.facts["self_test"]
        more = () if self.channels is None else (self.channels,)
        x = checks.read_array(self.folder / test["input"], (2, test["steps"], *more))
        shape = (2, test["steps"], self.outputs)
        expected = checks.read_array(self.folder / test["file"], shape)
        made, _ = self.read(x.astype(np.int64) if self.channels is None else x)
        return self._differs(made, expected, test["tolerance"], "output")


def _check_values(facts: dict[str, Any], at: str) -> None:
    """What the graph is said to take and give, as far as the runner uses it."""
    for name in ("inputs", "outputs"):
        first: Any = facts[name][0] if facts[name] else None
        checks.fields({name: first}, at, **{name: dict})
        checks.fields(first, f"{at}{name}.", name=str, shape=list)
    if not re.fullmatch(r"\w{1,40}", facts["inputs"][0]["name"]):
        raise BundleError(f"{at}inputs: the first has no name; copy the folder again")
    shape = facts["outputs"][0]["shape"]
    checks.number(shape[1] if len(shape) == 2 else None, 1, 2**24, f"{at}outputs.shape[1]")


def main(argv: Sequence[str] | None = None, *, alone: bool = False) -> int:
    """Command line; returns the exit code, 2 for a bundle or request that cannot be served.

    Args:
        argv: the words, None for those of the process.
        alone: see `run.Bundle`.
    """
    parser = command_line("Read a sequence step by step with a bundle", "outputs")
    add = parser.add_argument
    add("--tokens", help="ids of tokens, for instance 5,7,9")
    add("--input", type=Path, help="sequence.npy: (N,) ids, or (N, channels)")
    add("--more", type=int, default=0, help="go on with the likeliest token, so many times")
    add("--out", type=Path, help="outputs.npy; default: the likeliest outputs are printed")
    given = parser.parse_args(argv)
    return served(lambda: _serve(given, alone))


def _serve(given: argparse.Namespace, alone: bool) -> list[Any]:
    """Do what the words ask for, and say what there is to say."""
    if given.out is not None and given.out.suffix != ".npy":
        raise BundleError(f"{given.out}: outputs are written as .npy")
    if given.out is not None and not given.self_test:
        check_place(given.out, force=given.force)
    bundle = StreamBundle(given.folder, given.threads, alone=alone)
    if given.self_test:
        return [f"{given.folder}: agrees within {bundle.self_test():.1e}"]
    if (given.tokens is None) == (given.input is None):
        raise BundleError("give either --tokens, for instance --tokens 5,7,9, or --input")
    checks.number(given.more, 0, checks.MOST, "--more")
    if given.more and bundle.channels is not None:
        raise BundleError("--more goes on with tokens, and this bundle reads numbers")
    x = _ids(given.tokens) if given.input is None else _array(given.input)
    made, state = bundle.read(x[None])
    rows, likeliest = [*made[0]], [int(made[0, -1].argmax())]
    for _ in range(given.more):
        out, state = bundle.step(np.array(likeliest[-1:]), state)
        rows.append(out[0])
        likeliest.append(int(out[0].argmax()))
    if given.out is not None:
        write_samples(given.out, np.stack(rows), force=given.force)
        return [given.out]
    return [",".join(map(str, likeliest))]


def _ids(text: str) -> Array:
    if not re.fullmatch(r"\s*[0-9]{1,9}(\s*,\s*[0-9]{1,9})*\s*", text, re.ASCII):
        say = f"--tokens {reprlib.repr(text)}: expected ids such as 5,7,9"
        raise BundleError(say)
    return np.array([int(part) for part in text.split(",")], dtype=np.int64)


def _array(path: Path) -> Array:
    try:
        if not os.path.isfile(path):
            raise FileNotFoundError(path)
        found = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # of five classes for the kinds of damage
        raise BundleError(f"{path}: is no complete .npy file of numbers") from error
    if found.size > checks.MOST_NUMBERS or found.dtype.kind not in "iuf":
        raise BundleError(f"{path}: holds no numbers, or too many")
    return np.array(found)


if __name__ == "__main__":
    sys.exit(main(alone=True))
