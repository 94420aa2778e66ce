"""The contract of every registered part: tested by being registered, with `effformer.testing`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from closeness import assert_close
from contract import BLOCKS, FFNS, MIXERS, context_for, make_mixer, mixers, tokens
from torch import nn
from torch._dynamo.utils import counters

from effformer.testing import pairs
from effformer.testing.check import CHECKS
from effformer.testing.report import Check
from effformer.testing.subjects import Subject, subjects

NAMED = (
    [("attention", n) for n in MIXERS] + [("ffn", n) for n in FFNS] + [("block", n) for n in BLOCKS]
)
SUBJECTS = [subject for kind, name in NAMED for subject in subjects(kind, name)]
ALONE = [check for check in CHECKS if check not in pairs.CHECKS]  # a test for each of those beside
EXPORTS = ("one-graph-serves-every-length", "its-graph-agrees")
EXPORTED = ("softmax", "mlp", "moe", "prenorm", "adaln-zero", "joint")
"""Parts whose graphs are made in the quick tier, too."""


def _case(check: Check, subject: Subject) -> Any:
    rare = check.name in EXPORTS and subject.name not in EXPORTED
    marks = [pytest.mark.slow] if rare else []
    return pytest.param(check, subject, id=f"{check.name}-{subject}", marks=marks)


CASES = [_case(check, s) for s in SUBJECTS for check in ALONE if check.applies(s)]


@pytest.mark.parametrize(("check", "subject"), CASES)
def test_contract(check: Check, subject: Subject) -> None:
    check(subject)


@pytest.mark.parametrize(("kind", "name"), NAMED)
def test_every_part_of_ours_has_its_paper(kind: str, name: str) -> None:
    entry = Subject(kind, name).entry
    assert entry.paper
    assert "Reference:" in (entry.build.__doc__ or "")


COMPILED = [(str(subject), subject.make()) for subject in SUBJECTS]
COMPILED += [(f"causal {n}", make_mixer(n, causal=True)) for n in mixers(causal=True)]
QUICK = ("attention lmu", "attention spiking-lmu", "ffn spiking-conv-channel", "causal linear")
"""Parts with a loop or a block whose length varies, and that are traced in a second."""
MOST_GRAPHS = 3
"""Graphs of `torch.compile(dynamic=True)` over all numbers of tokens above 1, which torch sets apart."""


def _graphs(part: nn.Module, lengths: Sequence[int], backend: str, *, learns: bool) -> int:
    """Compile a part without a break, run it, compare it with itself uncompiled, count graphs: those
    that are kept, for torch calls its backend again wherever it learns that an operator takes no
    number as an input.
    """
    torch.compiler.reset()
    counters.clear()
    compiled = torch.compile(part, fullgraph=True, dynamic=True, backend=backend)
    core: Any = getattr(part, "core", None)
    fixed = getattr(part, "order", None) is not None  # permutations are constants
    most = part.site.length or getattr(core, "tokens", None) or max(lengths)  # type: ignore[union-attr]
    for n in (11,) if fixed else (n for n in lengths if n <= most):
        x = tokens(n, 2 + n % 2).requires_grad_(learns)
        ctx = context_for(part, x)
        found, expected = compiled(x, ctx), part(x, ctx)
        assert_close(found, expected, rtol=1e-4, atol=1e-5)
        if learns:
            weights = torch.randn_like(expected)
            grads = (torch.autograd.grad((y * weights).sum(), x)[0] for y in (found, expected))
            assert_close(*grads, rtol=1e-4, atol=1e-5)
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("name", QUICK)
def test_few_compiled_graphs_serve_every_length(name: str) -> None:
    assert _graphs(dict(COMPILED)[name], (11, 70, 300), "eager", learns=False) <= MOST_GRAPHS


@pytest.mark.slow
@pytest.mark.parametrize("part", [p for _, p in COMPILED], ids=[name for name, _ in COMPILED])
def test_few_graphs_of_every_part_serve_every_length_and_learn(part: nn.Module) -> None:
    lengths = (3, 7, 16, 33, 64, 150, 300, 301)
    assert _graphs(part, lengths, "aot_eager", learns=True) <= MOST_GRAPHS
