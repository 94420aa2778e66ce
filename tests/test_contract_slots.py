"""Every part for the slots "width" and "tokens", in every block that takes it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from contract import (
    BLOCKS,
    FFNS,
    HEADS,
    MIXERS,
    OPTIONS,
    caps_of,
    context_for,
    is_dynamic,
    make_block,
    make_ffn,
    make_mixer,
    tokens,
    unrolled,
)
from effformer.export import export_onnx
from torch import Tensor, nn

from effformer import registry
from effformer.blocks import BackboneConfig, Needs, build_stack
from effformer.checks import CapabilityError
from effformer.config import resolve
from effformer.context import Ledger, Tap
from effformer.profile import Counter
from effformer.site import Site

CONDS = {"never": [False], "optional": [False, True], "always": [True]}
SLOTS = [("width", n) for n in registry.width.names()]
SLOTS += [("tokens", n) for n in registry.tokens.names()]


def _forms() -> list[tuple[str, str, str, bool]]:
    """(slot, part, block, conditioned) for everything that fits together."""
    forms = []
    for slot, name in SLOTS:
        for block in BLOCKS:
            caps = registry.block.get(block).caps
            if slot == "tokens" and not caps.sequential:
                continue
            if not registry.KINDS[slot].get(name).build.admits(resolve(slot, name), "block", caps):
                continue
            for cond in CONDS[caps.cond]:
                if cond or not (registry.KINDS[slot].get(name).caps.time or caps.time):
                    forms.append((slot, name, block, cond))
    return forms


FORMS = _forms()
# capturing takes seconds: one block of each kind of forward, the others in the slow tier
CAPTURED = [
    form if form[1:3] == ("dynamic", "adaln-zero") else pytest.param(*form, marks=pytest.mark.slow)
    for form in FORMS
]
# half of the tokens at most can merge, and all graphs have a fixed number of merges
ONE_LENGTH = ("tome",)
WIDE_MIXERS = [n for n in MIXERS if caps_of(n).width]
WIDE_FFNS = registry.ffn.names(width=True)


def _make(slot: str, name: str, block: str, cond: bool, seed: int = 5) -> nn.Module:
    part = make_block(block, cond=cond, **{slot: name})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, p in part.named_parameters():
            if ".gates." in key:  # some open, some closed
                p.normal_(std=0.5, generator=generator)
    torch.manual_seed(seed)
    return part


def _static(part: nn.Module, x: Tensor) -> Tensor:
    """The masked execution: a tap wants to see values that skipping never computes."""
    return part(x, context_for(part, x, tap=Tap()))


@pytest.mark.parametrize(("slot", "name"), SLOTS)
def test_name_dict_and_config_mean_the_same(slot: str, name: str) -> None:
    config = resolve(slot, name)
    assert resolve(slot, {"name": name}) == config
    assert resolve(slot, config.to_dict()) == config
    with pytest.raises(ValueError, match="unknown option 'no_such_option'"):
        resolve(slot, {"name": name, "no_such_option": 1})


@pytest.mark.parametrize(("slot", "name"), SLOTS)
def test_every_entry_says_what_it_is(slot: str, name: str) -> None:
    entry = registry.KINDS[slot].get(name)
    assert entry.summary
    assert entry.paper
    assert "Reference:" in (entry.build.__doc__ or "")


@pytest.mark.parametrize(("slot", "name", "block", "cond"), FORMS)
@torch.no_grad()
def test_skipping_equals_masking(slot: str, name: str, block: str, cond: bool) -> None:
    part, x = _make(slot, name, block, cond), tokens(9, 3)
    time = torch.randn(3, part.site.dim) if cond else None
    ctx = context_for(part, x, time=time)
    expected = part(x, replace(ctx, tap=Tap()))
    torch.testing.assert_close(part(x, ctx), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("slot", "name", "block", "cond"), FORMS)
def test_gradients_of_both_executions_agree(slot: str, name: str, block: str, cond: bool) -> None:
    part = _make(slot, name, block, cond).double()
    grads = []
    for static in (True, False):
        x = torch.randn(2, 7, part.site.dim, dtype=torch.float64, generator=torch.manual_seed(1))
        x.requires_grad_()
        part.zero_grad()
        out = _static(part, x) if static else part(x, context_for(part, x))
        out.square().sum().backward()
        own = {n: p.grad for n, p in part.named_parameters() if p.grad is not None}
        grads.append((x.grad, {n: g for n, g in own.items() if g.any()}))
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize(("slot", "name", "block", "cond"), FORMS)
def test_every_parameter_learns(slot: str, name: str, block: str, cond: bool) -> None:
    part, x = _make(slot, name, block, cond), tokens(9, 3)
    out = part.train(is_dynamic(part))(x, context_for(part, x))
    (out * torch.randn_like(out)).sum().backward()
    assert not [n for n, p in part.named_parameters() if p.grad is None or not p.grad.any()]


@pytest.mark.parametrize(("slot", "name", "block", "cond"), FORMS)
@torch.no_grad()
def test_samples_do_not_see_each_other(slot: str, name: str, block: str, cond: bool) -> None:
    part, x = _make(slot, name, block, cond), tokens(9, 3)
    ctx = context_for(part, x)
    whole = part(x, ctx)
    for i in range(3):
        alone = part(x[i : i + 1], ctx.rows(torch.tensor([i])))
        torch.testing.assert_close(alone, whole[i : i + 1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("slot", "name", "block", "cond"), FORMS)
@torch.no_grad()
def test_complete_runs_everything(slot: str, name: str, block: str, cond: bool) -> None:
    part, x, ledger = _make(slot, name, block, cond), tokens(), Ledger()
    out = part(x, context_for(part, x, ledger=ledger, complete=True))
    assert not ledger.executed
    unrolled(part).width = unrolled(part).tokens = None
    torch.testing.assert_close(out, part(x, context_for(part, x)), rtol=0, atol=0)


@pytest.mark.parametrize(("slot", "name", "block", "cond"), FORMS)
@torch.no_grad()
def test_it_executes_what_it_reports(slot: str, name: str, block: str, cond: bool) -> None:
    saved = 0.0
    for seed in range(8):  # random gates may be all open, or all closed
        part, x, ledger = _make(slot, name, block, cond, seed), tokens(9, 3), Ledger()
        ctx = context_for(part, x, ledger=ledger)
        with Counter(part) as counter:
            part(x, ctx)
        executed = sum(tally.macs for tally in counter.rows.values())
        skipped = sum(float((1 - s.fraction).sum()) * s.cost for s in ledger.shares.values())
        assert executed == round(3 * part.macs(9) - skipped)
        saved += skipped
    assert saved > 0


@pytest.mark.parametrize(("slot", "name", "block", "cond"), CAPTURED)
@torch.no_grad()
def test_a_captured_graph_is_static(
    slot: str, name: str, block: str, cond: bool, tmp_path: Path
) -> None:
    class Alone(nn.Module):
        def __init__(self, part: nn.Module) -> None:
            super().__init__()
            self.part = part

        def forward(self, x: Tensor) -> Tensor:
            return self.part(x, context_for(self.part, x))

    part, x = _make(slot, name, block, cond), tokens()
    ctx = context_for(part, x)
    torch.compiler.reset()
    compiled = torch.compile(part, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, ctx), part(x, ctx), rtol=1e-4, atol=1e-5)
    axes = {"x": {0: "batch"} if name in ONE_LENGTH else {0: "batch", 1: "tokens"}}
    report = export_onnx(Alone(part), tmp_path / "block.onnx", (x,), dynamic=axes)
    assert report.parity is not None
    assert report.parity.passed


@pytest.mark.parametrize("name", WIDE_MIXERS)
@torch.no_grad()
def test_mixers_cut_to_some_heads(name: str) -> None:
    part, x = make_mixer(name), tokens(9, 4)
    width = torch.tensor([[1.0, 0, 1], [1, 1, 1], [1, 0, 1], [0, 0, 1]])
    ctx = context_for(part, x, width=width)
    branch = _branch(part)
    torch.testing.assert_close(branch.forms.run(part, x, ctx), part(x, ctx), rtol=1e-4, atol=1e-5)
    # one head alone, and its multiply-adds
    small, ones = part.select(torch.tensor([1])), torch.zeros(4, HEADS)
    ones[:, 1] = 1
    plain, masked = replace(ctx, width=None), replace(ctx, width=ones)
    torch.testing.assert_close(small(x, plain), part(x, masked), rtol=1e-4, atol=1e-5)
    shared = 9 * sum(  # bottlenecks of gates, which all heads read
        m[0].weight.numel() for m in part.modules() if isinstance(m, nn.Sequential)
    )
    assert (small.macs(9) - shared) * HEADS == part.macs(9) - shared


@pytest.mark.parametrize("name", WIDE_FFNS)
@torch.no_grad()
def test_ffns_cut_to_some_channels(name: str) -> None:
    part, x = make_ffn(name), tokens(9, 3)
    width = torch.tensor([[1.0, 0, 1, 0], [1, 1, 1, 1], [0, 0, 0, 1]])
    ctx = context_for(part, x, width=width)
    branch = _branch(part)
    torch.testing.assert_close(branch.forms.run(part, x, ctx), part(x, ctx), rtol=1e-4, atol=1e-5)
    small = part.select(torch.arange(part.units // 4))
    assert small.macs(9) * 4 == part.macs(9)


def _branch(part: nn.Module) -> nn.Module:
    from effformer.blocks import Branch

    return Branch(part, part.site)


@pytest.mark.parametrize("name", [n for n in MIXERS if not caps_of(n).width])
def test_mixers_without_heads_refuse(name: str) -> None:
    part, x = make_mixer(name), tokens()
    with pytest.raises(CapabilityError, match=r"width=True; choices that can: .*softmax"):
        part(x, context_for(part, x, width=torch.ones(2, HEADS)))
    with pytest.raises(CapabilityError, match=r"attn: .*softmax.* would do"):
        _stack(
            causal=caps_of(name).causal == "always",
            attn={"name": name, **OPTIONS.get(name, {})},
            width="dynamic",
        )


@pytest.mark.parametrize("name", [n for n in FFNS if n not in WIDE_FFNS])
def test_ffns_without_channels_refuse(name: str) -> None:
    part, x = make_ffn(name), tokens()
    with pytest.raises(CapabilityError, match=r"width=True; choices that can: .*mlp"):
        part(x, context_for(part, x, width=torch.ones(2, 3)))
    with pytest.raises(CapabilityError, match=r"ffn: .*mlp.* would do"):
        _stack(
            causal=registry.ffn.get(name).caps.causal == "always",
            ffn={"name": name, **OPTIONS.get(name, {})},
            width="dynamic",
        )


@pytest.mark.parametrize("block", [b for b in BLOCKS if not registry.block.get(b).caps.sequential])
@pytest.mark.parametrize("name", registry.tokens.names())
def test_blocks_whose_branches_run_side_by_side_refuse_tokens(block: str, name: str) -> None:
    caps = registry.block.get(block).caps
    causal = caps.causal == "always"
    why = "carry a state from token to token" if causal else "run side by side"
    with pytest.raises(CapabilityError, match=rf"{why} .block: .*prenorm.* would do"):
        _stack(cond=caps.cond != "never", causal=causal, block=block, tokens=name)


@pytest.mark.parametrize("name", registry.width.names(time=True))
def test_models_without_time_refuse(name: str) -> None:
    with pytest.raises(CapabilityError, match=r"width: '.*' reads the time embedding"):
        _stack(time=False, width=name)


def _stack(
    *, time: bool = True, cond: bool = True, causal: bool = False, **parts: object
) -> nn.ModuleList:
    parts.setdefault("block", "adaln-zero" if cond else "prenorm")
    options = {"dim": 24, "depth": 2, "heads": 3, **parts}
    config = BackboneConfig.from_dict(options)
    site = Site(
        dim=24, heads=3, cond_dim=24 if cond else None, time_dim=24 if time else None, length=130,
        grid=(None, None),
    )  # fmt: skip
    return build_stack(config, site, Needs(causal=causal), name="toy")


@pytest.mark.parametrize("name", registry.block.names(sequential=True, joint=False))
def test_a_branch_is_what_enters_runs_and_leaves(name: str) -> None:
    """Parts in the slot "tokens" may act between these three."""
    for cond in CONDS[registry.block.get(name).caps.cond]:
        block, x = make_block(name, cond=cond), tokens()
        ctx = context_for(block, x)
        mods = torch.randn(3, 2, 1, x.shape[-1]).unbind() if cond else None
        for branch in block.branches:
            apart = branch.leave(x, branch.run(branch.enter(x, mods), ctx), mods)
            torch.testing.assert_close(apart, branch(x, ctx, mods), rtol=0, atol=0)
