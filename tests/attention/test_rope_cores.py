"""Rotary positions in every attention that takes them.

Streams, padding, packing and causal order with tables: ``tests/test_contract_pairs.py``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from contract import mixers
from effformer.export import export_onnx
from torch import Tensor, nn
from torch.nn import functional as F

import effformer
from effformer.attention import Core, Linear, Longformer, Performer, Reformer
from effformer.attention.flow import FLOW_PRESETS, Flow
from effformer.attention.heads import Opened
from effformer.attention.reference import (
    flow_reference,
    linear_reference,
    rotations,
    softmax_reference,
    turned,
)
from effformer.attention.reference_efficient import (
    efficient_reference,
    linformer_reference,
    longformer_reference,
    nystrom_reference,
    performer_reference,
    reformer_reference,
)
from effformer.config import resolve
from effformer.context import Context, Rope
from effformer.site import Site

HEADS, WIDTH, FRONT = 3, 8, 2
ROTARY = [
    "differential", "efficient", "flow", "linear", "linformer", "longformer", "nystrom",
    "performer", "reformer", "sana",
]  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    "linformer": {"tokens": 64, "projected": 5},
    "longformer": {"window": 4, "global_tokens": 2},
    "nystrom": {"landmarks": 4, "conv": 3},
    "reformer": {"chunk": 4, "rounds": 2, "buckets": 4},
}
FREQUENCIES = torch.tensor([1.0, 0.4, 0.09, 0.02], dtype=torch.float64)


def tables(n: int, *, start: float = 0.0, front: int = 0, interleaved: bool = False) -> Rope:
    """1-D tables; ``front`` tokens have no place."""
    places = F.pad(torch.arange(n - front, dtype=torch.float64) + start, (front, 0))
    angles = places[:, None] * FREQUENCIES
    angles = angles.repeat_interleave(2, dim=1) if interleaved else angles.repeat(1, 2)
    return Rope(angles.cos(), angles.sin(), interleaved=interleaved)


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    largest = float(expected.detach().abs().max())
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * largest)


def build(name: str, *, causal: bool = False, **options: Any) -> nn.Module:
    options = {**OPTIONS.get(name, {}), **options}
    config = resolve("attention", {"name": name, "causal": causal, **options})
    part = config.build(Site(dim=HEADS * WIDTH, heads=HEADS))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in part.parameters():
            p.normal_(std=0.3, generator=generator)
    return part.double().eval()


def qkv(n: int, batch: int = 2) -> list[Tensor]:
    torch.manual_seed(4)
    shape = (3, batch, HEADS, n, WIDTH)
    return [x.requires_grad_() for x in torch.randn(shape, dtype=torch.float64)]


def mixed(part: Any, q: Tensor, k: Tensor, v: Tensor, rope: Rope | None) -> Tensor:
    """What happens between the heads."""
    if isinstance(part, Reformer):
        return part.attend(q, v, rope=rope)
    return part.mix(Opened(q, k, v, {}), Context(rope=rope))


def test_the_list_is_complete() -> None:
    """Others turn queries and keys before an ordinary product."""
    ordinary = {"axes", "softmax", "topk", "retention"}
    assert set(mixers(rope=True)) - ordinary == set(ROTARY)


def _halves(core: Any, q: Tensor, k: Tensor, v: Tensor, rope: Rope) -> Tensor:
    """Differential attention of one head: each half turns by every second pair."""
    half = [i for i in range(WIDTH // 2) if i % 2 == 0]
    angles = [i + j * WIDTH // 2 for j in range(2) for i in half]
    if rope.interleaved:
        angles = [2 * i + j for i in half for j in range(2)]
    turns = rotations(Rope(rope.cos[:, angles], rope.sin[:, angles], interleaved=rope.interleaved))
    maps = [
        softmax_reference(turned(a, turns), turned(b, turns), v)
        for a, b in zip(q.chunk(2, dim=1), k.chunk(2, dim=1), strict=True)
    ]
    weight = (core.lambda_q1 @ core.lambda_k1).exp() - (core.lambda_q2 @ core.lambda_k2).exp()
    out = maps[0] - (weight + core.lambda_init) * maps[1]
    scale = (out.square().mean(dim=1, keepdim=True) + core.config.eps).rsqrt()
    return out * scale * core.norm.weight * (1 - core.lambda_init)


def definition(
    part: Any, head: int, q: Tensor, k: Tensor, v: Tensor, rope: Rope, *, causal: bool
) -> Tensor:
    """One head of one sample, token by token."""
    turns = rotations(rope)
    if isinstance(part, Reformer):
        buckets = part.rotations[head]
        return reformer_reference(q, v, buckets, chunk=4, causal=causal, turns=turns)
    core, name = part.core, part.config.core.entry.name
    far = turned(q, turns), turned(k, turns)
    if name in ("linear", "sana"):
        phi = (lambda x: F.elu(x) + 1) if name == "linear" else F.relu
        return linear_reference(q, k, v, causal=causal, eps=core.config.eps, phi=phi, turns=turns)
    if name == "flow":
        return flow_reference(q, k, v, core.config, turns)
    if name == "performer":
        return performer_reference(*far, v, core.projection, core.config)
    if name == "efficient":
        return efficient_reference(q, k, v, turns)
    if name == "linformer":
        return linformer_reference(*far, v, core.key, core.value)
    if name == "nystrom":
        taps = core.conv.weight[head, 0, :, 0]
        return nystrom_reference(*far, v, landmarks=4, iterations=6, taps=taps)
    assert name == "differential"
    return _halves(core, q, k, v, rope)


CAUSAL = {False: [n for n in ROTARY if n != "longformer"]}
CAUSAL[True] = ["flow", "linear", "performer", "reformer", "sana"]


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("name", "causal"), [(n, causal) for causal, names in CAUSAL.items() for n in names]
)
def test_equals_the_definition(name: str, causal: bool, interleaved: bool) -> None:
    part, inputs = build(name, causal=causal), qkv(11)
    rope = tables(11, front=FRONT, interleaved=interleaved)
    if isinstance(part, Reformer):
        inputs = [inputs[0], inputs[0], inputs[2]]
    fast = mixed(part, *inputs, rope)
    slow = torch.stack(
        [
            torch.stack(
                [
                    definition(part, h, *(x[b, h] for x in inputs), rope, causal=causal)
                    for h in range(HEADS)
                ]
            )
            for b in range(2)
        ]
    )
    close(fast, slow)
    wanted, cotangent = [inputs[0], inputs[2]], torch.randn_like(fast)
    ours = torch.autograd.grad((fast * cotangent).sum(), wanted)
    theirs = torch.autograd.grad((slow * cotangent).sum(), wanted)
    for a, b in zip(ours, theirs, strict=True):
        close(a, b, 1e-9)


@pytest.mark.parametrize("preset", FLOW_PRESETS)
def test_flow_presets_equal_the_definition(preset: str) -> None:
    config = FLOW_PRESETS[preset].replace(chunk=4)
    q, k, v = (x[:1, :1] for x in qkv(9))
    rope = tables(9)
    fast = Flow(config, Site(dim=WIDTH, heads=1))(q, k, v, Context(rope=rope))
    slow = flow_reference(q[0, 0], k[0, 0], v[0, 0], config, rotations(rope))
    close(fast[0, 0], slow)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("marked", [False, True])
def test_longformer_equals_the_definition(causal: bool, interleaved: bool, marked: bool) -> None:
    options = {"marked": True, "global_tokens": 0} if marked else {}
    part = build("longformer", causal=causal, **options)
    assert isinstance(part, Longformer)
    x = torch.randn(2, 13, HEADS * WIDTH, dtype=torch.float64)
    marks = (torch.rand(2, 13) > 0.7) if marked else (torch.arange(13) < 2).expand(2, -1)
    rope = tables(13, front=1, interleaved=interleaved)
    turns = rotations(rope)

    def heads(y: Tensor, parts: int) -> list[Tensor]:
        return list(y.unflatten(-1, (parts, HEADS, -1)).unbind(-3))

    local, far = heads(part.qkv(x), 3), heads(part.q_global(x), 1) + heads(part.kv_global(x), 2)

    def one(qkv: list[Tensor], b: int, h: int) -> tuple[Tensor, ...]:
        q, k, v = (y[b, :, h] for y in qkv)
        return turned(q, turns), turned(k, turns), v

    rows = [
        torch.cat(
            [
                longformer_reference(
                    one(local, b, h), one(far, b, h), marks[b], half=2, causal=causal
                )
                for h in range(HEADS)
            ],
            dim=1,
        )
        for b in range(2)
    ]
    found = part(x, Context(rope=rope), marks=marks if marked else None)
    close(found, part.proj(torch.stack(rows)))


@pytest.mark.parametrize("name", ROTARY)
def test_no_angle_is_no_rotation(name: str) -> None:
    part, x = build(name), torch.randn(2, 11, HEADS * WIDTH, dtype=torch.float64)
    still = tables(11, front=11)
    close(part(x, Context(rope=still)), part(x))
    moved = part(x, Context(rope=tables(11)))
    assert not torch.allclose(moved, part(x), rtol=0, atol=1e-4)


RELATIVE = [n for n in ROTARY if n != "performer"]
"""Of random features only the expectation depends on differences alone."""


@pytest.mark.parametrize("name", RELATIVE)
def test_only_differences_of_places_count(name: str) -> None:
    part, x = build(name), torch.randn(2, 11, HEADS * WIDTH, dtype=torch.float64)
    found = part(x, Context(rope=tables(11, start=1000.0)))
    close(found, part(x, Context(rope=tables(11))), 1e-10)


@pytest.mark.parametrize("name", RELATIVE)
def test_two_axes_shift_one_by_one(name: str) -> None:
    part, x = build(name), torch.randn(1, 12, HEADS * WIDTH, dtype=torch.float64)

    def turned_by(row: float, column: float) -> Tensor:
        rows, columns = torch.meshgrid(torch.arange(3.0), torch.arange(4.0), indexing="ij")
        parts = [(rows + row).flatten()[:, None], (columns + column).flatten()[:, None]]
        angles = torch.cat([p.double() * FREQUENCIES[:2] for p in parts], dim=1).repeat(1, 2)
        return part(x, Context(rope=Rope(angles.cos(), angles.sin())))

    close(turned_by(5.0, 0.0), turned_by(0.0, 0.0), 1e-10)
    close(turned_by(0.0, 7.0), turned_by(0.0, 0.0), 1e-10)


ORDER = torch.cat([torch.arange(0, WIDTH, 2), torch.arange(1, WIDTH, 2)])


def _halved(x: Tensor, name: str) -> Tensor:
    """Channels of the last dimension so that interleaved pairs become halves."""
    if name != "differential":
        return x[..., ORDER]
    inner = torch.cat([torch.arange(0, WIDTH // 2, 2), torch.arange(1, WIDTH // 2, 2)])
    return x[..., torch.cat([inner, inner + WIDTH // 2])]


@pytest.mark.parametrize("name", [n for n in ROTARY if n != "longformer"])
def test_both_pairings_are_one_up_to_the_order_of_channels(name: str) -> None:
    part, (q, k, v) = build(name), qkv(11)
    k = q if name == "reformer" else k
    expected = mixed(part, q, k, v, tables(11, interleaved=True))
    if name == "performer":
        part.core.projection.copy_(part.core.projection[:, ORDER].clone())
    if name == "reformer":
        part.rotations.copy_(part.rotations[:, ORDER].clone())
    found = mixed(part, _halved(q, name), _halved(k, name), v, tables(11))
    close(found, expected)


def test_both_pairings_are_one_in_longformer() -> None:
    part, x = build("longformer"), torch.randn(2, 11, HEADS * WIDTH, dtype=torch.float64)
    expected = part(x, Context(rope=tables(11, interleaved=True)))
    with torch.no_grad():
        for linear, parts, turning in (
            (part.qkv, 3, 2),
            (part.q_global, 1, 1),
            (part.kv_global, 2, 1),
        ):
            for p in (linear.weight, linear.bias):
                rows = p.unflatten(0, (parts, HEADS, WIDTH))
                rows[:turning] = rows[:turning, :, ORDER].clone()
    close(part(x, Context(rope=tables(11))), expected)


@pytest.mark.parametrize("name", ["linear", "sana", "flow", "efficient"])
def test_the_normaliser_is_that_of_the_plain_core(name: str) -> None:
    """Outputs of unit vectors are the weights: rotary ones are plain ones times a quotient of
    products.
    """
    part, (q, k, _) = build(name), [x.detach() for x in qkv(8)]
    if name == "sana":
        q, k = q.abs(), k.abs()
    unit = torch.eye(8, dtype=torch.float64).expand(2, HEADS, 8, 8)
    plain, rotary = mixed(part, q, k, unit, None), mixed(part, q, k, unit, tables(8))
    assert bool((plain > 0).all())
    if name == "efficient":
        a, b = q.softmax(dim=-1), k.softmax(dim=2)
    else:
        a, b = (torch.sigmoid(x) if name == "flow" else part.core.phi(x) for x in (q, k))
    rope = tables(8)
    close(rotary * (a @ b.mT), plain * (rope.query(a) @ rope.key(b).mT), 1e-9)


def test_a_constant_value_is_not_kept() -> None:
    """The weights of a row do not sum to one; outputs shrink."""
    part, (q, k, v) = build("linear"), qkv(64)
    one = torch.ones_like(v)
    sums = mixed(part, q, k, one, tables(64))
    assert 0.2 < float(sums.detach().mean()) < 0.95
    close(mixed(part, q, k, 3 * one, tables(64)), 3 * sums)


def test_the_first_token_of_a_causal_row_is_whole() -> None:
    part, (q, k, v) = build("linear", causal=True), qkv(6)
    close(mixed(part, q, k, v, tables(6))[:, :, 0], v[:, :, 0], 1e-5)


def test_performer_estimates_softmax_with_the_same_positions() -> None:
    q, k, v = (x.detach() for x in qkv(24, batch=4))
    q, k, rope = q / 4, k / 4, tables(24)
    exact = F.scaled_dot_product_attention(rope.query(q), rope.key(k), v)
    errors = []
    for features in (64, 512, 4096):
        config = {"name": "performer", "features": features, "eps": 1e-12}
        part = resolve("attention", config).build(Site(dim=HEADS * WIDTH, heads=HEADS)).double()
        error = (mixed(part, q, k, v, rope) - exact).square().mean().sqrt()
        errors.append(float(error / exact.square().mean().sqrt()))
    assert errors[1] < errors[0] / 2
    assert errors[2] < errors[1] / 2
    assert errors[2] < 0.01


def test_forms_that_see_everything_are_softmax_with_rotary_positions() -> None:
    (q, k, v), rope = qkv(12), tables(12, front=1)
    exact = F.scaled_dot_product_attention(rope.query(q), rope.key(k), v)
    close(mixed(build("nystrom", landmarks=12, conv=None), q, k, v, rope), exact, 1e-9)
    part = build("linformer", tokens=12, projected=12)
    with torch.no_grad():
        part.core.key.copy_(torch.eye(12))
        part.core.value.copy_(torch.eye(12))
    close(mixed(part, q, k, v, rope), exact, 1e-9)


def test_a_full_window_is_softmax_with_rotary_positions() -> None:
    x = torch.randn(2, 9, HEADS * WIDTH, dtype=torch.float64)
    for count in (0, 2):
        part = build("longformer", window=64, global_tokens=count)
        dense = build("softmax")
        dense.load_state_dict({n: p for n, p in part.state_dict().items() if "global" not in n})
        if count:
            with torch.no_grad():
                for p, q in zip(part.qkv.parameters(), part.q_global.parameters(), strict=True):
                    q.copy_(p[: HEADS * WIDTH])
                for p, q in zip(part.qkv.parameters(), part.kv_global.parameters(), strict=True):
                    q.copy_(p[HEADS * WIDTH :])
        rope = Context(rope=tables(9, front=1))
        close(part(x, rope), dense(x, rope), 1e-9)


def test_one_chunk_is_dense_with_rotary_positions() -> None:
    part, (q, _, v) = build("reformer", chunk=16), qkv(12)
    rope = tables(12)
    keys = part._keys(q)
    own = torch.eye(12, dtype=torch.bool)
    scores = (rope.query(q) @ rope.query(keys).mT).masked_fill(own, -1e5)
    close(mixed(part, q, q, v, rope), scores.softmax(dim=-1) @ v, 1e-9)


def test_reformer_hashes_what_is_not_turned() -> None:
    part, (q, _, v) = build("reformer"), qkv(16)
    seen = []
    hashed = part.hash
    part.hash = lambda x, mask=None: seen.append(x) or hashed(x, mask)
    part.attend(q, v, rope=tables(16))
    close(seen[0], q)


def test_half_precision_is_wide_inside() -> None:
    """Features and sums of the linear core are in float32: products of bfloat16 would be off."""
    core: Core = Linear(Linear.Config(), Site(dim=HEADS * WIDTH, heads=HEADS))
    q, k, v = (x.detach().bfloat16() for x in qkv(32))
    rope = tables(32)
    rope = Rope(rope.cos.float(), rope.sin.float())
    exact = core(q.float(), k.float(), v.float(), Context(rope=rope))
    found = core(q, k, v, Context(rope=rope))
    torch.testing.assert_close(found.float(), exact, rtol=2**-8, atol=2**-12)


def test_performer_is_the_same_object_of_estimates() -> None:
    """Turned vectors have the length of plain ones, so that the stabilizers do not move much."""
    part, (q, k, _) = build("performer"), [x.detach() for x in qkv(8)]
    assert isinstance(part.core, Performer)
    rope = tables(8)
    close(rope.query(q).norm(dim=-1), q.norm(dim=-1))
    assert float(part.core.key_features(rope.key(k)).min()) > 0


ROTARY_VIT = {"positions": {"absolute": False, "rope": {"kind": "axial"}}}


@pytest.mark.parametrize("name", ROTARY)
@pytest.mark.parametrize("model", ["lightningdit-nano", "vit"])
@torch.no_grad()
def test_rotary_backbones_take_it(model: str, name: str) -> None:
    net = _backbone(model, name)
    inputs = net.example_inputs(2)
    out = net(**inputs)
    out = out if isinstance(out, Tensor) else out["logits"]
    assert torch.isfinite(out).all()


def _backbone(model: str, name: str) -> Any:
    attn = {"name": name, **OPTIONS.get(name, {})}
    if name == "linformer":
        attn = {"name": name, "tokens": 300}
    torch.manual_seed(0)
    if model == "vit":
        options = {"dim": 32, "depth": 2, "heads": 2, "num_classes": 5, "attn": attn}
        return effformer.build_model("vit-nano", **options, **ROTARY_VIT).eval()
    return effformer.build_model(model, attn=attn, num_classes=5).eval()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["linear", "flow", "longformer"])
def test_rotary_backbones_export_for_other_sizes(name: str, tmp_path: Path) -> None:
    net = _backbone("lightningdit-nano", name)
    report = export_onnx(net, tmp_path / "net.onnx")
    assert report.parity is not None
    assert report.parity.passed
