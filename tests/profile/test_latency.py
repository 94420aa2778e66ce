from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
from torch import nn

from effformer.profile import interleave, latency, machine


def test_latency_states_its_conditions() -> None:
    net, before = nn.Linear(8, 8).train(), torch.get_num_threads()
    row = latency(net, torch.randn(2, 8), warmup=1, runs=5, threads=2)
    assert row.p10 <= row.median <= row.p90
    assert (row.runs, row.warmup, row.threads, len(row.samples)) == (5, 1, 2, 5)
    assert (row.dtype, row.device, row.form, row.name) == ("float32", "cpu", "eager", "Linear")
    assert torch.get_num_threads() == before
    assert net.training
    assert "2 threads" in str(row)


def test_threads_are_restored_after_an_error() -> None:
    before = torch.get_num_threads()

    def fail() -> None:
        raise KeyError

    with pytest.raises(KeyError):
        interleave({"a": fail}, threads=2)
    assert torch.get_num_threads() == before


def test_candidates_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, order = [0.0], list[str]()
    monkeypatch.setattr(sys.modules[latency.__module__], "perf_counter", lambda: clock[0])

    def taking(seconds: float, name: str) -> Callable[[], None]:
        def call() -> None:
            order.append(name)
            clock[0] += seconds

        return call

    side = interleave({"short": taking(2.0, "s"), "long": taking(8.0, "l")}, warmup=1, runs=3)
    assert "".join(order) == "sl" + "slslsl"
    assert side.ratios == {"short": 1.0, "long": 4.0}
    assert [row.median for row in side.rows.values()] == [2.0, 8.0]
    assert "4.000x  long" in str(side)


@pytest.mark.parametrize(
    "options", [{"runs": 0}, {"warmup": -1}, {"threads": 0}], ids=lambda o: next(iter(o))
)
def test_bad_numbers_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"latency: {next(iter(options))} must lie in"):
        latency(nn.Linear(8, 8), torch.randn(2, 8), **options)


def test_nothing_and_meta_are_refused() -> None:
    with pytest.raises(ValueError, match="no candidates"):
        interleave({})
    with pytest.raises(ValueError, match="meta device"):
        latency(nn.Linear(8, 8, device="meta"), torch.randn(2, 8))


def test_machine_facts() -> None:
    facts = machine()
    assert facts.cores >= 1
    assert facts.threads == torch.get_num_threads()
    assert facts.torch == torch.__version__
    assert facts.cpu in str(facts)
