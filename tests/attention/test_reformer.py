"""Reformer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import assert_close
from definitions import HEADS, SITE, WIDTH
from effformer.export import ExportError
from torch._dynamo.utils import counters

import effformer
from effformer.attention import Reformer
from effformer.attention.reference_efficient import reformer_reference
from effformer.checks import CapabilityError
from effformer.context import Context, Packing, Tap
from effformer.site import Site
from effformer.testing.work import exports, serves_every_length


def _part(**options: object) -> Reformer:
    config = Reformer.Config(**{"chunk": 4, "rounds": 2, "buckets": 4, **options})
    return Reformer(config, SITE).double()


def _qv(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    q, v = torch.randn(2, 2, HEADS, n, WIDTH, dtype=torch.float64).unbind(0)
    return q.requires_grad_(), v.requires_grad_()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("n", [1, 4, 5, 16, 23])
def test_equals_the_definition(n: int, causal: bool) -> None:
    part, (q, v) = _part(causal=causal), _qv(n)
    rows = [
        [
            reformer_reference(q[b, h], v[b, h], part.rotations[h], chunk=4, causal=causal)
            for h in range(HEADS)
        ]
        for b in range(2)
    ]
    fast, slow = part.attend(q, v), torch.stack([torch.stack(row) for row in rows])
    torch.testing.assert_close(fast, slow, rtol=1e-9, atol=1e-10)
    cotangent = torch.randn_like(fast)
    ours = torch.autograd.grad((fast * cotangent).sum(), (q, v))
    theirs = torch.autograd.grad((slow * cotangent).sum(), (q, v), materialize_grads=True)
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)


def test_one_chunk_is_dense_attention_with_shared_queries_and_keys() -> None:
    part, (q, v) = _part(chunk=16), _qv(16)
    keys = q / q.norm(dim=-1, keepdim=True)
    own = torch.eye(16, dtype=torch.bool)
    dense = (q @ keys.mT).masked_fill(own, -1e5).softmax(dim=-1) @ v
    torch.testing.assert_close(part.attend(q, v), dense, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("compat", ["none", "transformers"])
def test_the_published_causal_form_leaks_and_ours_does_not(compat: str) -> None:
    part, (q, v) = _part(causal=True, compat=compat), _qv(24)
    out = part.attend(q, v)[:, :, :12]
    worst = 0.0
    for _ in range(8):
        later = [torch.cat([x[:, :, :12], 6 * torch.randn_like(x[:, :, 12:])], 2) for x in (q, v)]
        worst = max(worst, float((part.attend(*later)[:, :, :12] - out).detach().abs().max()))
    worst /= float(out.detach().abs().max())
    assert worst < 1e-10 if compat == "none" else worst > 1e-3


@pytest.mark.parametrize("n", [3, 9, 20])
def test_keys_met_twice_count_once(n: int) -> None:
    # two equal rounds meet the same pairs: counted once, they weigh as one round does
    q, v = _qv(n)
    one, two = _part(rounds=1), _part(rounds=2, once=True)
    two.rotations.copy_(one.rotations.expand_as(two.rotations))
    torch.testing.assert_close(two.attend(q, v), one.attend(q, v), rtol=1e-6, atol=1e-8)


def test_rotations_depend_on_seed_and_layer_only() -> None:
    def rotations(seed: int, layer: int) -> torch.Tensor:
        site = Site(dim=24, heads=3, layer=layer)
        return Reformer(Reformer.Config(seed=seed), site).rotations

    assert torch.equal(rotations(1, 2), rotations(1, 2))
    assert not torch.equal(rotations(1, 2), rotations(2, 2))
    assert not torch.equal(rotations(1, 2), rotations(1, 3))


@pytest.mark.parametrize(("tokens", "buckets"), [(None, 32), (16, 2), (1024, 32), (1100, 32)])
def test_buckets_follow_the_tokens_of_the_model(tokens: int | None, buckets: int) -> None:
    part = Reformer(Reformer.Config(), Site(dim=24, heads=3, length=tokens))
    assert part.buckets == buckets


def test_models_take_it() -> None:
    attn = {"name": "reformer", "chunk": 16, "rounds": 2}
    for name in ("dit-nano", "flowformer-gpt-nano", "bert-tiny"):
        model = effformer.build_model(name, attn=attn).eval()
        model(**model.example_inputs())


def test_bad_options_and_calls_are_refused() -> None:
    for name in ("chunk", "rounds"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1"):
            Reformer.Config(**{name: 0})
    with pytest.raises(ValueError, match="buckets must be one of 2, 4, 6"):
        Reformer.Config(buckets=5)
    with pytest.raises(ValueError, match="once is not offered for the causal form"):
        Reformer.Config(causal=True, once=True)
    with pytest.raises(ValueError, match="not divisible by 5 heads"):
        Reformer(Reformer.Config(), Site(dim=24, heads=5))
    packing = Packing.from_mask(torch.ones(1, 5, dtype=torch.bool))
    with pytest.raises(CapabilityError, match="packing goes with neither"):
        _part()(torch.randn(1, 5, 24).double(), Context(packing=packing, tap=Tap()))


@pytest.mark.slow
def test_one_compiled_graph_serves_every_length() -> None:
    part = _part().float()
    torch.compiler.reset()
    counters.clear()
    compiled = torch.compile(part, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (7, 16, 33, 64):
        x = torch.randn(2, n, SITE.dim, requires_grad=True)
        assert_close(compiled(x), part(x), rtol=1e-4, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"across": False}, {"once": True}], ids=str)
def test_one_graph_of_its_options_serves_every_length(
    options: dict[str, Any], tmp_path: Path
) -> None:
    serves_every_length(_part(chunk=8, **options).float(), tmp_path)


@pytest.mark.slow
def test_published_rounding_has_no_graph_for_every_length(tmp_path: Path) -> None:
    part = _part(compat="transformers").float()
    with pytest.raises(ExportError, match=r"compat='transformers' rounds as .* compat='none'"):
        serves_every_length(part, tmp_path)
    exports(part, tmp_path, fixed=True)
