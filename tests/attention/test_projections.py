"""Attention with adaptive projections: sizes, choices, executed work, every kind of attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import assert_close
from effformer.compress.dynamic.adaptive_losses import acm_losses
from effformer.export import export_onnx
from torch import Tensor, nn

import effformer
from effformer.attention import AdaptiveProjections, Attention
from effformer.context import Context, Ledger, Packing
from effformer.profile import Counter, profile
from effformer.site import Site

DIM, HEADS, K = 24, 3, 4
NAMES = ("q", "k", "v", "proj")


def make(site: dict[str, Any] | None = None, **options: Any) -> Attention:
    projections = {"width": 5, **options.pop("projections", {})}
    config = Attention.Config.from_dict({"projections": projections, **options})
    place = {"dim": DIM, "heads": HEADS, "path": "here", **(site or {})}
    part = Attention(config, Site(**place)).eval()
    for p in part.parameters():
        nn.init.normal_(p, std=0.4)
    return part


@pytest.mark.parametrize("k", range(1, K + 1))
def test_fixed_projections_are_matrices_of_low_rank(k: int) -> None:
    part = make(projections={"fixed": k, "bias": False})
    plain = Attention(Attention.Config(qkv_bias=False, proj_bias=False), part.site).eval()
    products = {
        name: sum(b.weight @ a.weight for a, b in zip(m.fc1[:k], m.fc2[:k], strict=True))
        for name in NAMES
        if (m := getattr(part, name))
    }
    with torch.no_grad():
        plain.qkv.weight.copy_(torch.cat([products[n] for n in "qkv"]))
        plain.proj.weight.copy_(products["proj"])
    assert torch.linalg.matrix_rank(plain.proj.weight) == min(5 * k, DIM)
    x = torch.randn(2, 7, DIM)
    assert_close(part(x), plain(x), rtol=1e-4, atol=1e-5)


def test_learners_may_have_an_activation() -> None:
    part, x = make(projections={"fixed": 2, "act": "relu"}), torch.randn(2, 7, DIM)
    query = sum(b(a(x).clamp(min=0)) for a, b in zip(part.q.fc1[:2], part.q.fc2[:2], strict=True))
    assert_close(part.q(x).out, query, rtol=1e-4, atol=1e-5)
    assert part.config.to_dict()["projections"]["act"] == "relu"


def test_equals_the_outputs_of_every_projection_at_the_chosen_numbers() -> None:
    part, x, ledger = make(), torch.randn(2, 9, DIM), Ledger()
    out = part(x, Context(ledger=ledger))
    assert list(ledger.choices) == [f"here.{name}" for name in NAMES]

    def chosen(name: str, y: Tensor) -> Tensor:
        every = getattr(part, name).every(y)
        k = ledger.choices[f"here.{name}"].gate.argmax(-1)
        assert 1 <= k.min() < k.max()
        return every.gather(2, k[..., None, None].expand(-1, -1, 1, DIM))[:, :, 0]

    heads = [chosen(n, x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for n in "qkv"]
    mixed = nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
    assert_close(out, chosen("proj", mixed), rtol=1e-4, atol=1e-5)


FORMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "self": ({}, {}),
    "flow": ({"core": "flow"}, {}),
    "grouped queries": ({"kv_heads": 1}, {}),
    "cross": ({}, {"memory_dim": 10}),
    "other width": ({"head_dim": 5, "qk_norm": True}, {"out_dim": 7}),
}


def context(part: Attention, **fields: Any) -> Context:
    memory = None if part.site.memory_dim is None else torch.randn(3, 6, part.site.memory_dim)
    return Context(memory=memory, **fields)


@pytest.mark.parametrize("form", FORMS)
def test_formula_operators_and_ledger_agree(form: str) -> None:
    options, site = FORMS[form]
    part, x, ledger = make(site, **options), torch.randn(3, 8, DIM), Ledger()
    ctx = context(part, ledger=ledger)
    memory = None if ctx.memory is None else ctx.memory.shape[1]
    with Counter(part) as counter:
        out = part(x, ctx)
    executed = sum(t.macs for t in counter.rows.values()) + sum(counter.corrections.values())
    assert out.shape == (3, 8, part.site.out_dim or DIM)
    fraction = ledger.executed["here"]
    assert fraction.shape == (3,)
    assert (fraction < 1).all()
    assert round(float(fraction.sum()) * part.macs(8, memory)) == executed
    with Counter(part.train()) as counter:
        part(x, ctx)
    traced = sum(t.macs for t in counter.rows.values()) + sum(counter.corrections.values())
    assert traced == 3 * part.macs(8, memory)


@pytest.mark.parametrize("form", FORMS)
def test_every_parameter_learns(form: str) -> None:
    options, site = FORMS[form]
    part = make(site, **options).train()
    for name in NAMES:  # some token draws every choice
        nn.init.normal_(getattr(part, name).gate.net[-1].weight, std=0.02)
        nn.init.zeros_(getattr(part, name).gate.net[-1].bias)
    part(torch.randn(3, 40, DIM), context(part)).square().sum().backward()
    assert not [n for n, p in part.named_parameters() if p.grad is None or not p.grad.any()]


def test_samples_and_sequences_stay_apart() -> None:
    part, x = make(), torch.randn(3, 8, DIM)
    whole = part(x)
    for i in range(3):
        assert_close(part(x[i : i + 1]), whole[i : i + 1], rtol=1e-4, atol=1e-5)
    packing = Packing.from_mask(torch.arange(8) < torch.tensor([[8], [3], [1]]))
    ledger = Ledger()
    packed = packing.unpack(part(packing.pack(x), Context(packing=packing, ledger=ledger)))
    for i, n in enumerate(packing.lengths):
        assert_close(packed[i, :n], part(x[i : i + 1, :n])[0], rtol=1e-4, atol=1e-5)
    assert 0 < ledger.executed["here"].item() < 1


def test_streaming_equals_the_whole() -> None:
    part = make(core={"name": "softmax", "causal": True})
    x = torch.randn(2, 7, DIM)
    state, outputs = part.init_state(2, like=x), []
    for piece in x.split([3, 1, 3], dim=1):
        out, state = part.step(piece, state)
        outputs.append(out)
    assert_close(torch.cat(outputs, 1), part(x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@torch.no_grad()
def test_captured_graphs_run_the_masked_form(tmp_path: Path) -> None:
    part, x = make(), torch.randn(2, 6, DIM)
    torch.compiler.reset()
    compiled = torch.compile(part, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x), part(x), rtol=1e-4, atol=1e-5)
    axes = {"x": {0: "batch", 1: "tokens"}}
    report = export_onnx(part, tmp_path / "part.onnx", (x,), dynamic=axes)
    assert report.parity is not None
    assert report.parity.passed


@pytest.mark.parametrize("dim", [96, 768])
def test_learners_together_are_as_large_as_the_matrix(dim: int) -> None:
    with torch.device("meta"):
        part = Attention(Attention.Config(projections=AdaptiveProjections()), Site(dim=dim))
    learners = sum(p.numel() for n, p in part.named_parameters() if ".gate." not in n)
    assert learners == pytest.approx(4 * (dim * dim + dim), rel=0.02)
    if dim == 768:
        assert part.q.width == 96
        assert part.q.cost == 147_456  # published, per token


def test_any_model_and_any_core() -> None:
    for name, attn in (("vit-nano", "softmax"), ("vit-nano", "flow"), ("dit-nano", "linear")):
        model = effformer.build_model(name, attn={"name": attn, "projections": {}}, ffn="acm")
        model.train()
        ledger = Ledger()
        inputs = model.example_inputs(2)
        out = model(**inputs, ledger=ledger)
        assert len(ledger.choices) == 2 * 5
        acm_losses(ledger, 0.5)
        (out.square().mean() + ledger.total_loss()).backward()
        seen = profile(model, inputs)
        assert seen.executed is not None
        assert seen.executed < seen.total
        assert "other" not in seen.by_part


def test_the_profiler_executes_what_the_operators_do() -> None:
    torch.manual_seed(1)
    model = effformer.build_model("vit-nano", attn={"projections": {}}, ffn="acm").eval()
    inputs = model.example_inputs(2)
    with Counter(model) as counter, torch.no_grad():
        model(**inputs)
    operators = sum(t.macs for t in counter.rows.values() if t.kind == "counted")
    assert profile(model, inputs).executed == pytest.approx(operators, abs=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"least": 4}, "needs least < learners, got least=4"),
        ({"least": 2, "fixed": 1}, r"fixed must lie in \[2, 4\], got 1"),
        ({"width": 0}, "width must be at least 1, got 0"),
        ({"size": 0.0}, "size must be positive, got 0.0"),
        ({"learner": 3}, "unknown option 'learner'; did you mean 'learners'"),
    ],
)
def test_bad_configs(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Attention.Config.from_dict({"projections": options})
