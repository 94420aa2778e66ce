"""Parts that break their promises are found, each by the check that says it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from effformer import registry
from effformer.attention import Softmax
from effformer.context import EMPTY, Context
from effformer.ffn import MLP
from effformer.registry import Caps, Registry
from effformer.testing import check_part
from effformer.testing.check import CHECKS
from effformer.testing.report import PartReport, found
from effformer.testing.subjects import Subject, subjects

SOFTMAX = registry.core.get("softmax").caps


@pytest.fixture
def registered() -> Iterator[Callable[..., None]]:
    """Register parts for one test."""
    added: list[tuple[Registry, str]] = []

    def register(kind: Registry, name: str, part: Any, caps: Caps) -> None:
        kind.register(name, caps=caps, paper="none")(part)
        added.append((kind, name))

    yield register
    for kind, name in added:
        for each in (kind, registry.attention):
            each._entries.pop(name, None)
            each._aliases.pop(name, None)


def core_of(forward: Callable[..., Tensor]) -> type[Softmax]:
    class Wrong(Softmax):
        """A core that breaks a promise."""

        @dataclass(frozen=True, slots=True, kw_only=True)
        class Config(Softmax.Config):
            """Knobs."""

        def forward(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context = EMPTY) -> Tensor:
            return forward(self, q, k, v, ctx)

    return Wrong


def sees_later_ones_in_long_rows(
    self: Any, q: Tensor, k: Tensor, v: Tensor, ctx: Context
) -> Tensor:
    """Causal among few tokens only."""
    if self.config.causal and q.shape[2] > 7:
        return Softmax.forward(self, q, k, v, ctx) + 1e-3 * v.mean(dim=2, keepdim=True)
    return Softmax.forward(self, q, k, v, ctx)


def looks_ahead(self: Any, q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> Tensor:
    return (q @ k.mT).softmax(-1) @ v


def sees_the_batch(self: Any, q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> Tensor:
    return v + v.mean(0, keepdim=True)


def ignores_masks(self: Any, q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> Tensor:
    return Softmax.forward(self, q, k, v, Context(rope=ctx.rope))


def cannot_be_derived(self: Any, q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> Tensor:
    return Softmax.forward(self, q, k, v, ctx) + v.detach()


def crashes(self: Any, q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> Tensor:
    return q.nothing


@pytest.mark.parametrize(
    ("forward", "check", "words"),
    [
        (looks_ahead, "causal-ignores-the-future", r"outputs 0\.\.5 change by .* with tokens 6"),
        (sees_the_batch, "samples-do-not-see-each-other", "sample 0 alone: "),
        (ignores_masks, "padding-changes-nothing", "causal=False: without padding: "),
        (ignores_masks, "full-masks-hold", r"tokens 3\.\. are hidden"),
        (cannot_be_derived, "gradients-are-exact", "Jacobian mismatch"),
        (looks_ahead, "streaming-equals-the-whole", "pieces of .* tokens: "),
        (sees_later_ones_in_long_rows, "both-capabilities-hold-together", r"^causal and (rope|mask): "),
        (crashes, "packed-equals-looped", r"AttributeError: .*nothing.* \(.*test_check.py:\d+\)"),
    ],
)  # fmt: skip
def test_broken_promises_are_found(
    forward: Any, check: str, words: str, registered: Callable[..., None]
) -> None:
    registered(registry.core, "wrong-core", core_of(forward), SOFTMAX)
    (one,) = (c for c in CHECKS if c.name == check)
    finding = found(one, Subject("attention", "wrong-core"))
    assert finding.outcome == "fails"
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(finding.words)


def test_promises_that_a_part_does_not_make_must_be_refused(
    registered: Callable[..., None],
) -> None:
    class Silent(nn.Module):
        """A mixer that looks at no context."""

        @dataclass(frozen=True, slots=True, kw_only=True)
        class Config(MLP.Config):
            """Knobs."""

        def __init__(self, config: Any, site: Any) -> None:
            super().__init__()
            self.config, self.site, self.caps = config, site, config.caps()
            self.proj = nn.Linear(site.dim, site.dim)

        def forward(self, x: Tensor, ctx: Context = EMPTY) -> Tensor:
            return self.proj(x)

    registered(registry.attention, "silent", Silent, Caps())
    (check,) = (c for c in CHECKS if c.name == "undeclared-capabilities-are-refused-with-choices")
    finding = found(check, Subject("attention", "silent"))
    assert "a mask of pairs are taken, although nothing of that kind is declared" in finding.words


def test_a_report_names_what_fails(registered: Callable[..., None]) -> None:
    class Wrong(MLP):
        """Counts its work wrongly, and has a weight that does nothing."""

        @dataclass(frozen=True, slots=True, kw_only=True)
        class Config(MLP.Config):
            """Knobs."""

        def __init__(self, config: Any, site: Any) -> None:
            super().__init__(config, site)
            self.idle = nn.Parameter(torch.zeros(3))

        def macs(self, n: int) -> int:
            return super().macs(n) + 1

    registered(registry.ffn, "wrong-ffn", Wrong, Caps(packed=True, width=True))
    skip = ["compiles-without-graph-breaks", "its-graph-agrees"]
    with pytest.raises(AssertionError, match="2 checks fail") as caught:
        check_part("wrong-ffn", skip=skip)
    said = str(caught.value)
    assert (
        "FAILS  ffn wrong-ffn: macs-are-those-of-the-operators: macs of 7 tokens is 32,257" in said
    )
    assert "no gradient reaches idle" in said
    assert "left out  ffn wrong-ffn: its-graph-agrees: as asked" in said


def test_right_parts_pass_with_their_options() -> None:
    slow = ["compiles-without-graph-breaks", "one-graph-serves-every-length"]
    report = check_part("topk", options={"keep": 5}, skip=slow)
    assert isinstance(report, PartReport)
    assert not report.failed
    assert str(report).startswith("topk: ")
    # with a convolution before its keys, a mixer promises less
    less = Subject("attention", "softmax", options={"short_conv": 3})
    assert less.caps.mask == "key"
    assert Subject("attention", "softmax").caps.mask == "full"


def test_blocks_are_checked_with_and_without_a_condition() -> None:
    assert [s.cond for s in subjects("block", "parallel")] == [False, True]
    assert [s.cond for s in subjects("block", "adaln-zero")] == [True]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("flwo",), "unknown part 'flwo'; did you mean 'flow'"),
        (("flow", "layer"), "unknown kind 'layer'"),
        (("mlp", "attention"), "unknown attention 'mlp'"),
    ],
)
def test_wrong_names_are_refused(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_part(*words)
    with pytest.raises(ValueError, match=r"skip: unknown check 'gradients'.*gradients-are-exact"):
        check_part("mlp", skip=["gradients"])
    with pytest.raises(ValueError, match="unknown option 'kep'"):
        check_part("topk", options={"kep": 5})
