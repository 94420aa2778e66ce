from __future__ import annotations

from typing import Any

import pytest
import torch
from cached_models import FAMILIES, awake, given
from closeness import assert_close
from torch import Tensor, nn

import effformer
from effformer.cache import Cached, cached, calibrate
from effformer.checks import CapabilityError
from effformer.context import Ledger
from effformer.flow import Guidance, Weak, adapt, sample

QUICK = ("sit-nano", "mmdit-nano", "flux-tiny")
MODELS = [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in FAMILIES]
OFF: list[Any] = [
    {"name": "reuse", "every": 1},
    {"name": "newton", "every": 1},
    {"name": "newton", "every": 1, "over": "attention"},
    {"name": "forecast", "every": 1},
    {"name": "pyramid", "every": 1},
    {"name": "mask"},
    {"name": "residual", "tau": -1.0},
    {"name": "teacache", "tau": 0.0},
    {"name": "easycache", "tau": 0.0},
    {"name": "magcache", "ratios": (1.1, 1.2), "most": 0},
]
ON: list[Any] = [
    "reuse",
    {"name": "reuse", "over": "attention"},
    "newton",
    {"name": "newton", "over": "attention", "order": 1},
    "forecast",
    {"name": "pyramid", "interval": (-1e4, 1e4)},
    {"name": "mask", "skip": (2, 5, 6)},
    {"name": "residual", "tau": 0.5},
    {"name": "teacache", "tau": 0.5},
    {"name": "magcache", "ratios": (1.0, 1.01)},
]
STEPS = 10


def title(policy: Any) -> str:
    return policy if isinstance(policy, str) else "-".join(map(str, policy.values()))


def draw(velocity: Any, x: Tensor, cond: dict[str, Tensor], **options: Any) -> Tensor:
    return sample(velocity, x, **({"steps": STEPS} | options), **cond).x


@pytest.mark.parametrize("name", MODELS)
def test_off_is_off_bit_by_bit(name: str) -> None:
    model = awake(name)
    x, cond = given(model)
    plain = draw(adapt(model), x, cond)
    variance = name == "dit-nano"
    for policy in OFF:
        if variance and policy["name"] == "easycache":
            continue
        field = cached(adapt(model), policy)
        assert torch.equal(draw(field, x, cond), plain), policy
        assert field.computed == (1.0,) * STEPS


@pytest.mark.parametrize("name", MODELS)
def test_every_policy_skips_and_comes_near(name: str) -> None:
    model = awake(name)
    x, cond = given(model)
    plain = draw(adapt(model), x, cond)
    for policy in ON:
        field = cached(adapt(model), policy)
        first = draw(field, x, cond)
        assert sum(field.computed) < STEPS, policy
        assert 0 < (first - plain).norm() < 0.2 * plain.norm(), policy
        assert torch.equal(draw(field, x, cond), first), (
            f"{policy}: a second run remembers the first"
        )
    assert torch.equal(draw(adapt(model), x, cond), plain)


def test_easycache_skips_whole_networks() -> None:
    model = awake()
    x, cond = given(model)
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    field = cached(adapt(model), {"name": "easycache", "tau": 0.5, "warm": 3})
    draw(field, x, cond)
    called, computed = len(calls), field.computed
    assert computed[:3] == (1, 1, 1)
    assert computed[-1] == 1
    assert called == sum(computed) < STEPS
    dit = awake("dit-nano")
    x, cond = given(dit)
    with pytest.raises(CapabilityError, match="output minus input, but the network makes"):
        draw(cached(adapt(dit), "easycache"), x, cond)


@pytest.mark.parametrize("policy", [p for p in ON if p != "forecast"], ids=title)
def test_branches_of_guidance_do_not_mix(policy: Any) -> None:
    """Two calls for each evaluation are two runs that know nothing of each other."""
    model = awake(dtype=torch.float64)
    x, cond = given(model)
    null = {"y": torch.full_like(cond["y"], model.config.num_classes)}
    field = cached(adapt(model), policy)
    rule = Guidance(2.0, null=null, batched=False)
    drawn = draw(field, x, cond, guidance=rule)
    alone = [cached(adapt(model), policy) for _ in range(2)]
    for one in alone:
        one.restart(STEPS)

    def combined(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        v, v_null = alone[0](x, t, y=y), alone[1](x, t, **null)
        return v_null + 2.0 * (v - v_null)

    assert torch.equal(drawn, draw(combined, x, cond))
    assert field.summary().executed == sum(one.summary().executed for one in alone)


@pytest.mark.parametrize("policy", ["reuse", "newton", "forecast"])
def test_schedules_draw_the_same_in_one_call_for_both_branches(policy: str) -> None:
    model = awake(dtype=torch.float64)
    x, cond = given(model)
    drawn, work = [], []
    for batched in (True, False):
        field = cached(adapt(model), policy)
        drawn.append(
            draw(field, x, cond, guidance=Guidance(2.0, null={"y": 1000}, batched=batched))
        )
        work.append(field.summary())
    assert_close(drawn[1], drawn[0], rtol=1e-9, atol=1e-11)
    assert work[0] == work[1]
    assert work[0].executed < work[0].dense


@pytest.mark.parametrize("name", ["sit-nano", pytest.param("flux-tiny", marks=pytest.mark.slow)])
@pytest.mark.parametrize("policy", ["residual", "teacache"])
def test_samples_that_decide_for_themselves_do_not_see_their_batch(name: str, policy: str) -> None:
    model = awake(name, dtype=torch.float64)
    x, cond = given(model, 4)
    x = x * torch.tensor([0.3, 1.0, 3.0, 10.0], dtype=x.dtype).view(-1, 1, 1, 1)
    changed: set[float] = set()
    for tau in (0.03, 0.1, 0.3):
        spec = {"name": policy, "tau": tau, "per_sample": True}
        field = cached(adapt(model), spec)
        drawn = draw(field, x, cond)
        changed |= set(field.computed)
        for i in range(4):
            own = {n: v[i : i + 1] for n, v in cond.items()}
            assert_close(draw(field, x[i : i + 1], own), drawn[i : i + 1], rtol=1e-9, atol=1e-11)
    assert changed - {0.0, 1.0}, "no evaluation computed a part of the batch"


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpm++2m"])
def test_counted_work_is_what_hooks_see(sampler: str) -> None:
    model = awake(depth=3)
    x, cond = given(model)
    calls = dict.fromkeys(range(3), 0)
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, i=i: calls.update({i: calls[i] + 1}))
    field = cached(adapt(model), "newton", blocks=slice(1, 3))
    result = sample(field, x, steps=STEPS, sampler=sampler, **cond)
    seen, counted = dict(calls), field.summary()
    assert seen[0] == result.nfe == counted.evaluations
    assert seen[1] == seen[2] == sum(counted.computed) < seen[0]
    costs = effformer.profile.profile(model, {"x": x, "t": torch.zeros(2), **cond}).by_module
    around = costs[""] - sum(costs[f"blocks.{i}"] for i in range(3))
    executed = result.nfe * around + sum(seen[i] * costs[f"blocks.{i}"] for i in range(3))
    assert counted.executed == executed // 2
    assert counted.dense == result.nfe * costs[""] // 2


def test_the_ledger_says_which_blocks_were_left_out() -> None:
    model = awake(width="dynamic")
    x, cond = given(model)
    field = cached(adapt(model), "reuse")
    field.restart(20)
    for t in (0.0, 0.1, 0.2, 0.3):
        ledger = Ledger()
        field(x, t, ledger=ledger, **cond)
    skipped = ledger.executed
    assert field.computed == (1.0, 0.0, 1.0, 0.0)
    assert {p for p, share in skipped.items() if not share.any()} == {"blocks.0", "blocks.1"}


def test_changing_the_weights_needs_no_new_cache() -> None:
    model = awake()
    x, cond = given(model)
    field = cached(adapt(model), "reuse")
    before = draw(field, x, cond)
    model.blocks[0] = awake().blocks[1]
    assert not torch.equal(draw(field, x, cond), before)


def test_skipped_layers_are_computed_beside_the_cache() -> None:
    model = awake("mmdit-nano")
    x, cond = given(model)
    null = {"text": torch.zeros_like(cond["text"])}
    rule = Guidance(2.0, null=null, batched=False, weak=Weak(1.0, {"skip_layers": (0,)}))
    off = draw(cached(adapt(model), {"name": "reuse", "every": 1}), x, cond, guidance=rule)
    assert torch.equal(off, draw(adapt(model), x, cond, guidance=rule))
    drawn = draw(cached(adapt(model), "reuse"), x, cond, guidance=rule)
    assert 0 < (drawn - off).norm() < 0.2 * off.norm()


def test_compiled_blocks_and_loops_give_the_same() -> None:
    model = awake()
    x, cond = given(model)
    expected = draw(cached(adapt(model), "newton"), x, cond)
    with pytest.raises(CapabilityError, match=r"block\.compile"):
        cached(adapt(torch.compile(model, backend="eager")))
    field = cached(adapt(model), "newton")
    field.restart(STEPS)

    @torch.compile(backend="eager")
    def step(x: Tensor, t: float) -> Tensor:
        return x + field(x, t, **cond) / STEPS

    drawn = x
    with torch.no_grad():
        for k in range(STEPS):
            drawn = step(drawn, k / STEPS)
    assert_close(drawn, expected, rtol=1e-5, atol=1e-6)
    for block in model.blocks:
        block.compile(backend="eager")
    assert_close(draw(cached(adapt(model), "newton"), x, cond), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["magcache", "teacache"])
def test_calibrated_numbers(name: str) -> None:
    model = awake()
    x, cond = given(model)
    rule = Guidance(2.0, null={"y": 1000}, batched=False)
    policy: Any = calibrate(adapt(model), name, x, steps=STEPS, guidance=rule, **cond)
    if name == "magcache":
        assert len(policy.ratios) == STEPS
        assert policy.ratios[0] == 1
    else:
        assert len(policy.poly) == 5
    field = cached(adapt(model), policy.replace(tau=0.3))
    draw(field, x, cond, guidance=rule)
    assert sum(field.computed) < STEPS
    with pytest.raises(ValueError, match="magcache, teacache"):
        calibrate(adapt(model), "reuse", x, **cond)


def test_refusals() -> None:
    model = awake()
    x, cond = given(model)
    velocity = adapt(model)
    with pytest.raises(ValueError, match="a run of 8 evaluations has none to spare"):
        draw(cached(velocity), x, cond, steps=8)
    assert draw(cached(velocity, "reuse", forced=True), x, cond, steps=8).isfinite().all()
    with pytest.raises(ValueError, match="reuse computes all 10 evaluations"):
        draw(cached(velocity, {"name": "reuse", "warm": 10}), x, cond)
    with pytest.raises(ValueError, match="skips evaluation 12, but the run has 10"):
        draw(cached(velocity, {"name": "mask", "skip": (12,)}), x, cond)
    with pytest.raises(ValueError, match="no ratios"):
        draw(cached(velocity, "magcache"), x, cond)
    with pytest.raises(ValueError, match="must know the number of evaluations"):
        draw(cached(velocity, {"name": "magcache", "ratios": (1.0,)}), x, cond, sampler="dopri5")
    with pytest.raises(ValueError, match="no blocks are left"):
        cached(velocity, blocks=slice(2, 2))
    with pytest.raises(ValueError, match="no blocks are left"):
        cached(velocity, {"name": "residual", "front": 2})
    with pytest.raises(TypeError, match="expected a model"):
        cached(lambda x, t: -x)
    with pytest.raises(ValueError, match="cached already"):
        cached(cached(velocity))
    with pytest.raises(CapabilityError, match="no list of blocks"):
        cached(adapt(nn.Linear(2, 2), "effformer"))
    with pytest.raises(ValueError, match="nothing was evaluated"):
        cached(velocity).summary()
    field = cached(velocity)
    field.restart()
    for i in range(8):
        field(x, 0.1 * i, y=torch.full((2,), i))
    with pytest.raises(ValueError, match="9 different conditions"):
        field(x, 0.8, y=torch.full((2,), 8))
    model.train()
    with pytest.raises(CapabilityError, match="training mode"):
        draw(cached(velocity), x, cond)


def test_packed_rows_are_refused() -> None:
    model = awake("mmdit-nano")
    x, cond = given(model)
    mask = torch.ones(cond["text"].shape[:2], dtype=torch.bool)
    field: Cached = cached(adapt(model))
    with pytest.raises(CapabilityError, match="packed row"):
        sample(field, x, steps=STEPS, text_mask=mask, packed=True, **cond)
