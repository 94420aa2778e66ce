from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from effformer.profile import Candidate, benchmark
from effformer.profile.benchmark import BUSY, _distance


def sleeper(seconds: float, value: float = 1.0) -> Callable[[], Any]:
    print("libraries print, too")
    return lambda: (time.sleep(seconds), torch.full((3,), value))[1]


def threads() -> Callable[[], Any]:
    return lambda: torch.tensor([float(torch.get_num_threads())])


def hungry(megabytes: int) -> Callable[[], Any]:
    return lambda: torch.ones(megabytes * 250_000)


def refusing() -> Callable[[], Any]:
    from effformer import build_model

    return build_model("dit-nanoo")


def broken() -> Callable[[], Any]:
    return lambda: {}["key"]


def case(load: Callable[..., Any], name: str = "", **options: Any) -> Candidate:
    return Candidate(name=name or load.__name__, load=load, options=options)


def test_candidates_run_alone_with_their_threads() -> None:
    stages: list[tuple[int, int]] = []
    found = benchmark(
        [case(sleeper, "short", seconds=0.002), case(sleeper, "long", seconds=0.02, value=1.5)],
        threads=(2,), rounds=1, runs=3, warmup=1, compared=True,
        progress=lambda done, total: stages.append((done, total)),
    )  # fmt: skip
    assert stages == [(1, 2), (2, 2)]
    assert list(found.sides) == [2]
    for count, side in found.sides.items():
        short, long = side.rows["short"], side.rows["long"]
        assert (short.median >= 0.002, long.median >= 0.02) == (True, True)  # as long as they sleep
        assert side.ratios == {"short": 1.0, "long": pytest.approx(long.median / short.median)}
        assert {row.threads for row in side.rows.values()} == {count}
        assert all(row.machine.threads == count for row in side.rows.values())
        assert [row.runs for row in side.rows.values()] == [3, 3]
    assert found.errors == {"short": 0.0, "long": 0.5}
    for words in ("2 threads", "1 round of processes", "3 runs after 1"):
        assert words in str(found)


@pytest.mark.slow
def test_memory_is_that_of_the_candidate() -> None:
    small, large = (
        benchmark([case(hungry, megabytes=n)], rounds=1, runs=1).sides[1].rows["hungry"].memory
        for n in (1, 200)
    )
    assert small is not None
    assert large is not None
    assert 150e6 < large - small < 300e6


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the system does not tell waits")
def test_a_busy_machine_is_said() -> None:
    """Two processes for one processor: each waits for half of the time."""
    import os

    here = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(here)})
    neighbour = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        found = benchmark([case(counting)], rounds=1, runs=3)
    finally:
        neighbour.kill()
        neighbour.wait()
        os.sched_setaffinity(0, here)
    assert found.busy > BUSY
    assert "the machine was busy" in str(found)


def counting() -> Callable[[], Any]:
    return lambda: sum(range(3_000_000))


@pytest.mark.parametrize(
    ("candidates", "options", "words"),
    [
        ([], {}, "different names"),
        ([case(threads), case(threads)], {}, "different names"),
        ([case(threads)], {"threads": ()}, "threads is empty"),
        ([case(threads)], {"threads": (1, 0)}, r"threads\[1\] must lie in \[1, 1024\], got 0"),
        ([case(threads)], {"rounds": 0}, r"rounds must lie in \[1, 1000000\], got 0"),
        ([case(threads)], {"runs": 0}, "runs must lie in"),
        ([case(threads)], {"warmup": -1}, "warmup must lie in"),
        ([Candidate(name="x", load=lambda: None)], {}, "another process cannot import"),
        ([case(refusing)], {}, "'refusing': unknown model 'dit-nanoo'; did you mean 'dit-nano'"),
    ],
)
def test_what_cannot_be_timed_is_refused(
    candidates: list[Candidate], options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        benchmark(candidates, **options)


def test_a_fault_keeps_its_traceback() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)process of 'broken' failed: .*KeyError: 'key'"):
        benchmark([case(broken)], rounds=1)


def test_outputs_of_other_shapes_are_no_forms_of_one_model() -> None:
    one, first = ({"0": torch.ones(n)} for n in (1, 3))
    with pytest.raises(ValueError, match=r"'b' returns .* cannot be compared"):
        _distance(one, first, "b")
