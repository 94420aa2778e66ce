"""Weight-shared depth: one block, several steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import effformer
from effformer.blocks import Block, Iterate, PreNorm
from effformer.checks import CapabilityError
from effformer.config import resolve
from effformer.context import Context, Ledger, Tap
from effformer.ledger import Choice
from effformer.profile import Counter
from effformer.site import Site

DIM = 12
BODIES = ["prenorm", "postnorm", "respost", "macaron", "parallel"]


def build(times: int, body: str = "prenorm", **site: Any) -> Iterate:
    torch.manual_seed(3)
    config = Iterate.Config(times=times, body=resolve("block", body))
    parts = {"attn": resolve("attention", "softmax"), "ffn": resolve("ffn", "mlp")}
    block = Iterate(config, Site(dim=DIM, heads=3, path="here", **site), **parts).double()
    with torch.no_grad():
        for p in block.parameters():
            p.normal_(std=0.4)
    return block.eval()


def tokens() -> Tensor:
    return torch.randn(2, 5, DIM, dtype=torch.float64)


@pytest.mark.parametrize("body", BODIES)
def test_one_step_is_the_block(body: str) -> None:
    block, x = build(1, body), tokens()
    assert torch.equal(block(x), block.body(x))


@pytest.mark.parametrize("body", BODIES)
def test_steps_add_a_share_of_what_the_block_adds(body: str) -> None:
    block, x = build(3, body), tokens().requires_grad_()
    y = x
    for _ in range(3):
        y = y + (block.body(y) - y) / 3
    torch.testing.assert_close(block(x), y)
    weight = torch.randn_like(y)
    ours = torch.autograd.grad((block(x) * weight).sum(), [x, *block.parameters()])
    slow = torch.autograd.grad((y * weight).sum(), [x, *block.parameters()])
    torch.testing.assert_close(ours, slow)


def test_many_steps_follow_the_flow() -> None:
    """Halving the steps of Euler's method halves the distance to the flow."""
    x = tokens()
    ends = {n: build(n)(x) for n in (32, 64, 128)}
    ratio = (ends[32] - ends[64]).norm() / (ends[64] - ends[128]).norm()
    assert 1.6 < ratio < 2.4


def test_parameters_stay_and_work_grows() -> None:
    x = tokens().float()
    one, four = build(1).float(), build(4).float()
    assert [p.shape for p in one.parameters()] == [p.shape for p in four.parameters()]
    counts = []
    for block in (one, four):
        with Counter(block) as counter:
            block(x)
        counts.append(sum(tally.macs for tally in counter.rows.values()))
        assert counts[-1] == 2 * block.macs(5)
    assert counts[1] == 4 * counts[0]


def test_conditioned_bodies_and_taps() -> None:
    block, x = build(2, "adaln-zero", cond_dim=4), tokens()
    cond = torch.randn(2, 4, dtype=torch.float64)
    seen: list[str] = []

    def note(place: str, value: Tensor) -> Tensor:
        seen.append(place)
        return value

    block(x, Context(cond=cond, tap=Tap(edit=note, at=("*attn",))))
    assert seen == ["here.body.attn"] * 2
    assert block.order == ("attn", "ffn")
    assert block.branches == block.body.branches


@pytest.mark.parametrize("name", ["dit-nano", "sit-nano"])
def test_repeats_the_block_that_a_model_has(name: str) -> None:
    plain = effformer.build_model(name, input_size=8, num_classes=3)
    model = effformer.build_model(
        name, input_size=8, num_classes=3, block={"name": "iterate", "times": 2}
    )
    assert model.config.block.body == plain.config.block
    assert type(model)(model.config).config == model.config
    assert type(model.config).from_dict(model.config.to_dict()) == model.config
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in plain.parameters())
    more = effformer.build_model(name, block=model.config.block).config.replace(block={"times": 5})
    assert (more.block.times, more.block.body) == (5, plain.config.block)
    other = effformer.build_model(name, block={"name": "iterate", "body": "macaron"})
    assert other.config.block.body == resolve("block", "macaron")


def test_trains_as_deep_as_it_runs() -> None:
    """The steps are used: a random iterated block is not one step of its body."""
    block, x = build(4), tokens()
    assert (block(x) - block.body(x)).norm() > 0.05 * block.body(x).norm()


def test_ledgers_hold_means_over_the_steps() -> None:
    torch.manual_seed(0)
    parts = {"attn": resolve("attention", "softmax"), "ffn": resolve("ffn", "acm")}
    block = Iterate(Iterate.Config(times=3), Site(dim=DIM, heads=3), **parts).eval()
    with torch.no_grad():
        for p in block.parameters():
            p.normal_(std=0.5)
    x, ledger, y, fractions = torch.randn(2, 7, DIM), Ledger(), None, []
    block(x, Context(ledger=ledger))
    for _ in range(3):
        alone = Ledger()
        y = x if y is None else y
        y = torch.lerp(y, block.body(y, Context(ledger=alone)), 1 / 3)
        fractions.append(*alone.executed.values())
    (mean,) = ledger.executed.values()
    torch.testing.assert_close(mean, torch.stack(fractions).mean(0))
    (choice,) = ledger.choices.values()
    assert choice.gate.shape == (2, 21, 5)


def test_average_of_ledgers() -> None:
    passes = [Ledger(), Ledger()]
    for i, ledger in enumerate(passes):
        ledger.loss("a", torch.tensor(1.0 + i))
        ledger.work("b", torch.tensor([0.25 + 0.5 * i]), 3.0)
        ledger.choose("c", torch.full((1, 2, 3), float(i)), 7.0)
    total = Ledger()
    total.loss("a", torch.tensor(10.0))
    total.average(passes)
    torch.testing.assert_close(total.losses["a"], torch.tensor(11.5))
    torch.testing.assert_close(total.executed["b"], torch.tensor([0.5]))
    assert total.shares["b"].cost == 6.0
    assert isinstance(total.choices["c"], Choice)
    assert total.choices["c"].gate[0, :, 0].tolist() == [0, 0, 1, 1]


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"times must be at least 1, got 0"):
        Iterate.Config(times=0)
    with pytest.raises(
        CapabilityError, match=r"block.body: 'prenorm' cannot use .*choices: .*macaron"
    ):
        effformer.build_model("dit-nano", block={"name": "iterate", "body": "prenorm"})
    with pytest.raises(
        CapabilityError, match=r"block.body: 'adaln-zero' needs a conditioning vector"
    ):
        effformer.build_model("vit-nano", block={"name": "iterate", "body": "adaln-zero"})
    model = effformer.build_model(
        "flowformer-gpt-nano", vocab=9, context=8, block={"name": "iterate", "times": 2}
    )
    state = model.init_state(1)
    with pytest.raises(CapabilityError, match=r"'iterate' cannot stream 2 steps .*block='prenorm'"):
        model.step(torch.zeros(1, 1, dtype=torch.int64), state)


@pytest.mark.parametrize("body", ["prenorm", "postnorm", "respost"])
def test_models_without_ffns(body: str) -> None:
    model = effformer.build_model("dit-nano", input_size=8, num_classes=3, ffn=None)
    assert [block.order for block in model.blocks] == [("attn",)] * 2  # type: ignore[union-attr]
    assert type(model.config).from_dict(model.config.to_dict()) == model.config
    assert model(**model.example_inputs(2)).shape == (2, 8, 8, 8)
    block: Block = effformer.registry.block.get(body).build(
        resolve("block", body),
        Site(dim=DIM, heads=3),
        attn=resolve("attention", "softmax"),
        ffn=None,
    )
    assert block.order == ("attn",)
    assert isinstance(PreNorm.caps.mixer_only, bool)  # type: ignore[attr-defined]


def test_blocks_that_need_an_ffn_and_models_that_need_one() -> None:
    with pytest.raises(
        CapabilityError,
        match=r"'macaron' cannot do without an FFN; choices: adaln-single, adaln-zero, iterate",
    ):
        effformer.build_model("dit-nano", ffn=None, block="macaron")
    with pytest.raises(
        CapabilityError, match=r"tokens: 'dynamic' lets tokens pass .*block has none"
    ):
        effformer.build_model("dit-nano", ffn=None, tokens="dynamic")
    narrow = effformer.build_model(
        "dit-nano", input_size=8, num_classes=3, ffn=None, width="dynamic"
    )
    assert narrow(**narrow.example_inputs(2)).isfinite().all()
    mixed = effformer.build_model("dit-nano", layers={"0": {"ffn": None}})
    assert [block.order for block in mixed.blocks] == [("attn",), ("attn", "ffn")]  # type: ignore[union-attr]
    with pytest.raises(TypeError, match=r"vit-nano.ffn: a model cannot be without it"):
        effformer.build_model("vit-nano", ffn=None)
    with pytest.raises(TypeError, match=r"dit-nano.attn: a model cannot be without it"):
        effformer.build_model("dit-nano", attn=None)
