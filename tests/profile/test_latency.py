from __future__ import annotations

import time

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


def test_candidates_take_turns() -> None:
    order: list[str] = []
    side = interleave(
        {
            "short": lambda: (order.append("s"), time.sleep(0.002)),
            "long": lambda: (order.append("l"), time.sleep(0.008)),
        },
        warmup=1,
        runs=3,
    )
    assert "".join(order) == "sl" + "slslsl"
    assert side.ratios["short"] == 1.0
    assert side.ratios["long"] > 1.5
    assert "x  long" in str(side)


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
