"""Token merging in blocks and models: exact where it must be, and as much work as it reports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from effformer.export import export_onnx
from effformer.models import ViT, vit_config_from_timm
from torch import Tensor, nn

import effformer
from effformer.attention import Attention
from effformer.attention.backends import attend
from effformer.blocks import ToMe
from effformer.checks import CapabilityError
from effformer.context import Context, Ledger, Merging, Packing, Rope, Stream, Tap
from effformer.nn.merging import most_merges
from effformer.nn.reference import proportional_attention_reference
from effformer.profile import Counter, profile
from effformer.site import Site

TINY = {"depth": 3, "dim": 24, "heads": 2, "image_size": 16, "patch": 2, "channels": 1}


def vit(**options: Any) -> Any:
    model = effformer.build_model("vit-nano", **{**TINY, **options}).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.25)
    return model


def dit(**options: Any) -> Any:
    model = effformer.build_model("dit-nano", input_size=16, **options).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.1)
    return model


def same_weights(model: Any, **options: Any) -> Any:
    """The model with another config, and the weights as they are."""
    other = type(model)(model.config.replace(**options)).eval()
    other.load_state_dict(model.state_dict())
    return other


def operators(model: nn.Module, inputs: dict[str, Tensor]) -> int:
    with Counter(model) as counter, torch.no_grad():
        model(**inputs)
    return sum(t.macs for t in counter.rows.values() if t.kind == "counted")


def test_proportional_attention_counts_keys() -> None:
    q, k, v = (torch.randn(2, 3, n, 4).double() for n in (5, 7, 7))
    sizes = torch.randint(1, 4, (2, 7)).double()
    core = Attention(Attention.Config(), Site(dim=12, heads=3)).core
    out = core(q, k, v, Context(merging=Merging(tokens=9, sizes=sizes)))
    for b in range(2):
        for h in range(3):
            expected = proportional_attention_reference(q[b, h], k[b, h], v[b, h], sizes[b])
            torch.testing.assert_close(out[b, h], expected)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_backends_agree_about_a_bias(causal: bool, masked: bool) -> None:
    q, k, v = (torch.randn(2, 3, 6, 4) for _ in range(3))
    bias = torch.randn(2, 1, 1, 6)
    mask = torch.rand(2, 1, 1, 6) > 0.4 if masked else None
    if mask is not None:
        mask[1] = False  # nothing to attend to gives zeros
    out, expected = (
        attend(name, q, k, v, mask, causal=causal, scale=None, bias=bias)
        for name in ("sdpa", "reference")
    )
    torch.testing.assert_close(out, expected)
    if masked:
        assert not out[1].any()


@pytest.mark.parametrize("pool", ["token", "avg", "map"])
def test_equal_tokens_merge_without_loss(pool: str) -> None:
    plain = vit(head={"pool": pool})
    with torch.no_grad():
        plain.pos_embed[:, 1:] = plain.pos_embed[:, 1:2]
    merged = same_weights(plain, tokens={"name": "tome", "r": 13})
    x = torch.full((2, 1, 16, 16), 0.7)
    x[1] = -0.4
    assert merged.forward_features(x).shape[1] == 1 + 64 - 39
    torch.testing.assert_close(merged(x), plain(x), rtol=1e-4, atol=1e-5)
    counted = same_weights(plain, tokens={"name": "tome", "r": 13, "proportional": False})
    assert (counted(x) - plain(x)).abs().max() > 2e-4


def test_equal_tokens_are_restored_without_loss() -> None:
    plain = dit(positions="learned")
    with torch.no_grad():
        plain.pos_embed[:] = plain.pos_embed[:, :1]
    merged = same_weights(plain, tokens={"name": "tome", "r": 30})
    inputs = plain.example_inputs(2)
    inputs["x"] = inputs["x"][:, :, :1, :1].expand(-1, -1, 16, 16)
    torch.testing.assert_close(merged(**inputs), plain(**inputs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("build", [vit, dit])
def test_nothing_to_merge_changes_nothing(build: Any) -> None:
    plain = build()
    inputs = plain.example_inputs(2)
    none = same_weights(plain, tokens={"name": "tome", "r": 0})
    torch.testing.assert_close(none(**inputs), plain(**inputs), rtol=0, atol=0)


@pytest.mark.parametrize("restore", [None, True])
def test_tokens_that_are_left(restore: bool | None) -> None:
    tokens = {"name": "tome", "r": 40, "inflection": -1.0, "restore": restore}
    model = vit(tokens=tokens, prefix={"registers": 2})
    x, tap = torch.randn(2, 1, 16, 16), Tap(keep=("blocks.*",))
    features = model.forward_features(x, tap=tap)
    n, counts = 3 + 64, []
    for r in (80, 40, 0):
        counts.append(n)
        n -= most_merges(n, r, 3)
    assert features.shape[1] == (n if restore is None else 67)
    groups = {k: v for k, v in tap.seen.items() if k.endswith(".groups")}
    assert len(groups) == 2
    for value in groups.values():  # class token and registers stay alone, in front
        assert torch.equal(value[:, :3], torch.arange(3).expand(2, -1))
        assert (value[:, 3:] >= 3).all()
    if restore is None:
        mixed = [tap.seen[f"blocks.{i}.attn"].shape[1] for i in range(3)]
        assert mixed == counts
        assert all(float(v.sum(1)[0]) == 67 for k, v in tap.seen.items() if k.endswith(".sizes"))


@pytest.mark.parametrize(
    ("build", "options"),
    [
        (vit, {}),
        (vit, {"attn": {"projections": {}}, "ffn": "acm"}),
        (vit, {"block": "macaron"}),
        (vit, {"attn": {"kv_heads": 1}, "tokens": {"name": "tome", "r": 5, "restore": True}}),
        (vit, {"attn": "flow", "tokens": {"name": "tome", "r": 5, "proportional": False}}),
        (dit, {}),
        (dit, {"ffn": "glumbconv"}),
    ],
)
def test_the_profiler_executes_what_the_operators_do(build: Any, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = build(**{"tokens": {"name": "tome", "r": 9}, **options})
    dense = type(model)(model.config.replace(tokens=None)).eval()
    inputs = model.example_inputs(2)
    seen = profile(model, inputs)
    merging = sum(v for k, v in seen.by_module.items() if k.endswith(".tokens"))
    own = merging - sum(
        v for k, v in seen.by_module.items() if ".tokens." in k and k.count(".") == 3
    )
    assert own > 0
    assert seen.total == profile(dense, inputs).total + own
    assert seen.executed is not None
    assert seen.executed < seen.total
    assert seen.executed == pytest.approx(operators(model, inputs), abs=2)


def test_together_with_dynamic_width() -> None:
    model = dit(tokens={"name": "tome", "r": 20}, width="dynamic")
    inputs = model.example_inputs(3)
    with torch.no_grad():
        for block in model.blocks:
            for gate in block.width.gates.values():
                gate.router.bias.zero_()
    ledger = Ledger()
    with Counter(model) as counter, torch.no_grad():
        model(**inputs, ledger=ledger)
    done = sum(t.macs for t in counter.rows.values() if t.kind == "counted")
    dense = profile(model, inputs)
    assert dense.executed == pytest.approx(done, rel=1e-6)
    assert dense.executed < dense.total


def test_weights_of_timm_need_no_training() -> None:
    torch.manual_seed(0)
    theirs = timm.create_model("vit_tiny_patch16_224", img_size=96, num_classes=10, depth=4).eval()
    for p in theirs.parameters():
        nn.init.normal_(p, std=0.05)
    config = vit_config_from_timm(theirs)
    x = torch.randn(4, 3, 96, 96)
    expected, errors = theirs(x).detach(), []
    for r in (0, 1, 4, 8):
        model = ViT(config.replace(tokens={"name": "tome", "r": r})).eval()
        effformer.load_weights(model, theirs.state_dict())
        errors.append(float((model(x).detach() - expected).norm() / expected.norm()))
    assert errors[0] < 1e-5
    assert errors[1] < 0.2
    assert errors == sorted(errors)


def test_gradients_reach_everything() -> None:
    for model in (vit(tokens="tome"), dit(tokens="tome")):
        model.train()(**model.example_inputs(2)).square().sum().backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.slow
@pytest.mark.parametrize("build", [vit, dit])
def test_captured_graphs(build: Any, tmp_path: Path) -> None:
    options = {} if build is vit else {"positions": "learned"}
    model = build(tokens={"name": "tome", "r": 7}, depth=2, **options)
    inputs = model.example_inputs(2)
    expected = model(**inputs)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**inputs), expected, rtol=1e-4, atol=1e-4)
    report = export_onnx(model, tmp_path / "model.onnx")
    assert report.parity is not None
    assert report.parity.passed


def test_iterated_blocks_get_their_tokens_back() -> None:
    model = vit(tokens={"name": "tome", "r": 9}, block={"name": "iterate", "times": 2})
    assert model.forward_features(torch.randn(1, 1, 16, 16)).shape[1] == 65
    seen = profile(model, model.example_inputs(1))
    assert seen.executed is not None
    assert seen.executed < seen.total


def test_complete_runs_on_all_tokens() -> None:
    model = dit(tokens={"name": "tome", "r": 30})
    plain = same_weights(model, tokens=None)
    inputs, ledger = model.example_inputs(2), Ledger()
    out = model(**inputs, complete=True, ledger=ledger)
    torch.testing.assert_close(out, plain(**inputs), rtol=0, atol=0)
    assert not ledger.executed


def test_taps_decide_what_merges() -> None:
    model = vit(tokens={"name": "tome", "r": 4})

    def turned(place: str, value: Tensor) -> Tensor:
        return torch.where(value == 1, 2, value)  # nothing stays in place 1

    x = torch.randn(1, 1, 16, 16)
    changed = model(x, tap=Tap(edit=turned, at=("blocks.0.tokens.groups",)))
    assert not torch.equal(changed, model(x))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("flowformer-gpt-nano", {"attn": "softmax"}, "mixes later tokens into earlier ones"),
        ("bert-tiny", {}, "cannot honour the key mask"),
        ("vit-nano", {"positions": {"absolute": False, "rope": {}}}, "rotary tables need one"),
        ("vit-nano", {"attn": "flow"}, r"proportional=True, but attn 'flow' .* attn: softmax"),
        ("dit-nano", {"attn": "relative"}, "leaves no order of tokens, but attn 'relative'"),
        ("dit-nano", {"attn": "factorized-parallel"}, "compares keys, but attn 'factorized-par"),
        (
            "vit-nano",
            {"ffn": "glumbconv", "prefix": {"class_token": False}, "head": {"pool": "avg"}},
            r"leaves no grid, but ffn 'glumbconv' needs one \(restore=True, or ffn: acm",
        ),
        ("vit-nano", {"block": "parallel"}, r"run side by side \(block: .*prenorm"),
    ],
)
def test_refused_when_the_model_is_built(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(CapabilityError, match=message):
        effformer.build_model(name, tokens="tome", **options)


def test_refused_in_a_model_that_needs_its_tokens() -> None:
    with pytest.raises(CapabilityError, match="restore=False, but this model needs all of its"):
        effformer.build_model("dit-nano", tokens={"name": "tome", "restore": False})


def test_refused_at_call() -> None:
    block, x = dit(tokens="tome").blocks[0], torch.randn(1, 6, 48)
    mask, table = torch.ones(1, 6, dtype=torch.bool), torch.ones(6, 24)
    fields = {
        "mask": mask, "packing": Packing.from_mask(mask), "rope": Rope(table, table),
        "stream": Stream({}),
    }  # fmt: skip
    for name, value in fields.items():
        with pytest.raises(CapabilityError, match=rf"blocks.0.tokens: .* honour ctx\.{name}"):
            block(x, Context(cond=torch.randn(1, 48), **{name: value}))
    with pytest.raises(ValueError, match=r"ctx\.merging is None, but tokens stay merged"):
        vit(tokens="tome").blocks[0](torch.randn(1, 5, 24))
    core = effformer.build_model("vit-nano", attn="flow").blocks[0].attn.part
    merging = Merging(tokens=6, sizes=torch.ones(1, 6))
    with pytest.raises(CapabilityError, match=r"sizes=True; choices that can: softmax"):
        core(x, Context(merging=merging))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": -1}, "r must be at least 0, got -1"),
        ({"r": [3, -2]}, r"r\[1\] must be at least 0, got -2"),
        ({"inflection": 1.5}, r"inflection must lie in \[-1, 1\], got 1.5"),
        ({"r": [3, 2], "inflection": 1.0}, r"r=\[3, 2\] says what every block does"),
        ({"ratio": 0.5}, "unknown option 'ratio'"),
    ],
)
def test_bad_configs(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ToMe.Config.from_dict(options)
