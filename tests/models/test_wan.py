"""Wan: the official network and diffusers' compute the same, space and time, sizes, layouts, export, bad
input.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from effformer.export import export_onnx
from effformer.models import Wan
from torch import Tensor
from torch.nn import functional as F

import effformer
from effformer.checks import CapabilityError, FormatError
from effformer.context import Ledger, Tap
from effformer.flow import Guidance, adapt, sample
from effformer.profile import profile

from .small import inputs, woken

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "image": {"condition_channels": 5},
    "patches": {"patch": (2, 2, 3), "frames": 4, "block": {"cross_norm": False}, "heads": 1},
    "factorized": {"axes": "st"},
    "others": {"attn": "flow", "layers": {"0": {"ffn": "swiglu"}, "-1": {"attn": "softmax"}}},
}
TWINS = ("plain", "image", "patches")
"""Options of the published networks."""


def awake(**options: Any) -> Wan:
    """A small model with nothing at zero."""
    model = woken("wan-tiny", **options)
    assert isinstance(model, Wan)
    return model


def obvious(state: dict[str, Tensor], given: dict[str, Tensor], model: Wan) -> Tensor:
    """The official network by its own keys, patch by patch and head by head."""
    c = model.config
    w = {key: value.double() for key, value in state.items()}
    x, text = given["x"].double(), given["text"].double()
    video = torch.cat([x, given["condition"].double()], 1) if "condition" in given else x

    def linear(key: str, h: Tensor) -> Tensor:
        return h @ w[f"{key}.weight"].T + w[f"{key}.bias"]

    def layer_norm(h: Tensor) -> Tensor:
        return (h - h.mean(-1, keepdim=True)) / (
            h.var(-1, keepdim=True, correction=0) + 1e-6
        ).sqrt()

    def rms(key: str, h: Tensor) -> Tensor:
        return h / (h.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[f"{key}.weight"]

    def turned(h: Tensor) -> Tensor:
        pairs = torch.view_as_complex(h.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * turns).flatten(-2)

    def attention(key: str, h: Tensor, source: Tensor, *, rotary: bool) -> Tensor:
        q, k, v = linear(f"{key}.q", h), linear(f"{key}.k", source), linear(f"{key}.v", source)
        q, k = rms(f"{key}.norm_q", q), rms(f"{key}.norm_k", k)
        outs = []
        for q1, k1, v1 in zip(*(y.chunk(c.heads, -1) for y in (q, k, v)), strict=True):
            q2, k2 = (turned(q1), turned(k1)) if rotary else (q1, k1)
            outs.append(torch.softmax(q2 @ k2.mT / math.sqrt(width), -1) @ v1)
        return linear(f"{key}.o", torch.cat(outs, -1))

    width = c.dim // c.heads
    space = 2 * (width // 6)
    cells = [n // p for n, p in zip(x.shape[2:], c.patch, strict=True)]
    tokens, angles = [], []
    for place in torch.cartesian_prod(*(torch.arange(n) for n in cells)).tolist():
        f, i, j = (slice(a * p, (a + 1) * p) for a, p in zip(place, c.patch, strict=True))
        patch = video[:, :, f, i, j].flatten(1)
        tokens.append(patch @ w["patch_embedding.weight"].flatten(1).T + w["patch_embedding.bias"])
        lines = zip(place, (width - 2 * space, space, space), strict=True)
        angles.append([a * 1e4 ** (-2 * n / k) for a, k in lines for n in range(k // 2)])
    turns = torch.polar(torch.ones(len(angles), width // 2).double(), torch.tensor(angles).double())
    h = torch.stack(tokens, 1)
    told = given["t"].double()[:, None] * 1e4 ** (-torch.arange(128).double() / 128)
    e = linear("time_embedding.0", torch.cat([told.cos(), told.sin()], -1))
    e = linear("time_embedding.2", F.silu(e))
    six = linear("time_projection.1", F.silu(e)).unflatten(1, (6, -1))
    text = F.gelu(linear("text_embedding.0", text), approximate="tanh")
    text = linear("text_embedding.2", text)
    for i in range(c.depth):
        b = f"blocks.{i}"
        shift, scale, gate, shift2, scale2, gate2 = (w[f"{b}.modulation"] + six).chunk(6, 1)
        y = layer_norm(h) * (1 + scale) + shift
        h = h + gate * attention(f"{b}.self_attn", y, y, rotary=True)
        y = h
        if f"{b}.norm3.weight" in w:
            y = layer_norm(h) * w[f"{b}.norm3.weight"] + w[f"{b}.norm3.bias"]
        h = h + attention(f"{b}.cross_attn", y, text, rotary=False)
        y = linear(f"{b}.ffn.0", layer_norm(h) * (1 + scale2) + shift2)
        h = h + gate2 * linear(f"{b}.ffn.2", F.gelu(y, approximate="tanh"))
    shift, scale = (w["head.modulation"] + e[:, None]).chunk(2, 1)
    out = linear("head.head", layer_norm(h) * (1 + scale) + shift)
    v = torch.zeros_like(x)
    for n, place in enumerate(torch.cartesian_prod(*(torch.arange(m) for m in cells)).tolist()):
        f, i, j = (slice(a * p, (a + 1) * p) for a, p in zip(place, c.patch, strict=True))
        v[:, :, f, i, j] = out[:, n].unflatten(1, (*c.patch, -1)).movedim(-1, 1)
    return v


@pytest.mark.parametrize("name", TWINS)
@torch.no_grad()
def test_the_official_network_computes_the_same(name: str) -> None:
    model = awake(**OPTIONS[name])
    given = inputs(model)
    official = model.LAYOUTS[0].from_ours(model.state_dict(), model.config)
    assert official["blocks.1.modulation"].shape == (1, 6, 32)
    expected = obvious(official, given, model)
    torch.testing.assert_close(model(**given), expected.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", TWINS)
@torch.no_grad()
def test_diffusers_computes_the_same(name: str, tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    model = awake(**OPTIONS[name])
    layout = next(lay for lay in model.LAYOUTS if lay.name == "diffusers")
    said = layout.options(model.config) | {"patch_size": model.config.patch}
    theirs = diffusers.WanTransformer3DModel(**{k: v for k, v in said.items() if k[0] != "_"})
    file = effformer.save_weights(model, tmp_path / "w.safetensors", layout)
    theirs.load_state_dict(effformer.io.read_weights(file))  # type: ignore[attr-defined]
    given = inputs(model)
    videos = torch.cat([given["x"], *([given["condition"]] if "condition" in given else [])], 1)
    expected = theirs.eval()(videos, given["t"], given["text"]).sample
    torch.testing.assert_close(model(**given), expected, rtol=1e-4, atol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    again = effformer.build_model("wan-tiny", **OPTIONS[name]).eval()
    report = effformer.load_weights(again, tmp_path / "theirs/diffusion_pytorch_model.safetensors")
    assert report.layout == "diffusers"
    assert {"num_layers", "patch_size", "qk_norm", "ffn_dim"} <= set(report.confirmed)
    torch.testing.assert_close(again(**given), model(**given), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("wan-1.3b", 1.4),
        pytest.param("wan2.2-5b", 5.0, marks=pytest.mark.slow),
        pytest.param("wan-14b", 14.3, marks=pytest.mark.slow),
        pytest.param("wan2.2-14b", 14.3, marks=pytest.mark.slow),
        pytest.param("wan2.2-14b-i2v", 14.3, marks=pytest.mark.slow),
    ],
)
def test_published_sizes(name: str, billions: float) -> None:
    with torch.device("meta"):
        model = effformer.build_model(name)
    count = sum(p.numel() for p in model.parameters())
    assert count == effformer.registry.model.get(name).facts["params"]
    assert count / 1e9 == pytest.approx(billions, abs=0.05)


@torch.no_grad()
def test_attention_reaches_all_of_space_and_time_or_the_axes_that_are_asked_for() -> None:
    """A change in one cell of the second frame, and what the frames and cells show of it."""
    seen = {"f": (True, True), "s": (True, False), "t": (False, True)}
    for axes, (inside, across) in seen.items():
        model = awake(axes=axes)
        given = inputs(model, 1)
        changed = given["x"].clone()
        changed[:, :, 1, :2, :2] += 1
        moved = (model(**given) - model(**given | {"x": changed})).abs().amax((0, 1)) > 1e-6
        assert moved[1, :2, :2].all(), axes
        assert moved[1, 2:].any() == inside, axes
        assert moved[0, :2, :2].any() == across, axes
        assert moved[0, 2:].any() == (axes == "f"), axes


@torch.no_grad()
def test_parts_of_published_sizes_are_chosen_by_name() -> None:
    with torch.device("meta"):
        model = effformer.build_model("wan-1.3b", depth=8, attn="flow", layers="3:1")
    names = [block.attn.part.core.config.entry.name for block in model.blocks]
    assert names == ["flow", "flow", "flow", "softmax"] * 2


@torch.no_grad()
def test_padding_of_the_text_is_not_seen() -> None:
    model = awake()
    given = inputs(model)
    out = model(**given)
    padded = given | {"text": F.pad(given["text"], (0, 0, 0, 3), value=9.0)}
    mask = torch.arange(9).expand(2, -1) < 6
    torch.testing.assert_close(model(**padded, text_mask=mask), out, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(model(**padded), out)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_parameter_learns(options: dict[str, Any]) -> None:
    model = awake(**options).train()
    given = inputs(model)
    (model(**given) * torch.randn_like(given["x"])).sum().backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]


@torch.no_grad()
def test_guided_videos_of_a_text() -> None:
    model = awake()
    field, x = adapt(model), torch.randn(2, 4, 2, 4, 8)
    cond = {"text": torch.randn(2, 6, 24)}
    told = torch.full((2,), 750.0)
    torch.testing.assert_close(field(x, 0.25, **cond), -model(x, told, **cond))
    out = sample(field, x, steps=2, guidance=Guidance(5.0, {"text": 0}), **cond).x
    assert out.shape == x.shape
    assert effformer.registry.model.get("wan-14b").facts["sampling"]["shift"] == 5.0


@torch.no_grad()
def test_gates_choose_channels_by_the_time_and_tokens_one_by_one() -> None:
    """DyDiT's gates in a factorized video transformer."""
    over = {"name": "dynamic", "over": "ffn"}
    model = awake(axes="st", width=over, tokens="dynamic")
    for path, p in model.named_parameters():
        if ".gates." in path:  # some open, some closed
            p.copy_(torch.randn_like(p))
    given, ledger = inputs(model), Ledger()
    out = model(**given, ledger=ledger)
    torch.testing.assert_close(out, model(**given, tap=Tap()), rtol=1e-4, atol=1e-5)
    shares = {path: s.fraction for path, s in ledger.shares.items()}
    assert set(shares) == {"blocks.0.ffn", "blocks.1.ffn"}
    assert all(0 < float(s.min()) < 1 for s in shares.values())
    assert not torch.allclose(out, model(**given, complete=True))
    with pytest.raises(CapabilityError, match="heads share a norm"):
        awake(width="dynamic")


def test_profiles_add_up() -> None:
    model = awake(axes="st")
    found = profile(model, inputs(model, 1))
    assert not found.uncounted
    expected = sum(block.macs(18, 6, grid=(3, 2, 3)) for block in model.blocks)
    assert found.by_module["blocks"] == expected


def test_saved_models_come_back(tmp_path: Path) -> None:
    model = awake(**OPTIONS["others"], condition_channels=5)
    effformer.save_pretrained(model, tmp_path / "m")
    again = effformer.load_model(tmp_path / "m").eval()
    assert again.config == model.config
    torch.testing.assert_close(again(**inputs(model)), model(**inputs(model)), rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["image", "patches", "factorized"])
def test_exported_graphs_serve_other_sizes(name: str, tmp_path: Path) -> None:
    report = export_onnx(awake(**OPTIONS[name]), tmp_path / "model.onnx")
    assert report.parity is not None
    assert report.parity.passed
    sizes = {(*c.shapes["x"][2:4], c.shapes["text"][1]) for c in report.parity.cases}
    assert all(len(set(one)) > 1 for one in zip(*sizes, strict=True))


def test_checkpoints_of_others_are_named(tmp_path: Path) -> None:
    model = awake()
    for layout in model.LAYOUTS:
        file = effformer.save_weights(model, tmp_path / "w.safetensors", layout, force=True)
        with pytest.raises(FormatError, match=r"missing: blocks\.2"):
            effformer.load_weights(awake(depth=3), file)
        with pytest.raises(FormatError, match=r"patch_embed\.proj\.weight"):
            effformer.load_weights(awake(condition_channels=2), file)
    official = effformer.save_weights(model, tmp_path / "o.safetensors", "official")
    with pytest.raises(FormatError, match="num_heads is 4 there and 2 here"):
        effformer.load_weights(model, official, config={"num_heads": 4})


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"x": torch.zeros(2, 4, 4, 6)}, r"x: expected .*\(B, 4, T, H, W\)"),
        ({"x": torch.zeros(2, 3, 3, 4, 6)}, r"x: expected .*\(B, 4, T, H, W\)"),
        ({"x": torch.zeros(2, 4, 3, 4, 7)}, r"\(3, 4, 7\) is not divisible by patch \(1, 2, 2\)"),
        ({"t": torch.zeros(3)}, r"t: expected .*\(B,\)"),
        ({"text": torch.zeros(2, 8, 7)}, r"text: .*\(B, L, 24\)"),
        ({"text_mask": torch.ones(2, 5, dtype=torch.bool)}, "text_mask"),
    ],
)
def test_wrong_inputs_are_named(changes: dict[str, Any], match: str) -> None:
    model = awake()
    with pytest.raises(ValueError, match=f"wan-tiny: .*{match}"):
        model(**inputs(model) | changes)


def test_a_condition_is_read_where_there_is_a_place_for_it() -> None:
    plain, image = awake(), awake(condition_channels=5)
    given = inputs(image)
    with pytest.raises(CapabilityError, match="built without a condition"):
        plain(**given)
    with pytest.raises(ValueError, match=r"give condition \(B, 5, T, H, W\)"):
        image(**{k: v for k, v in given.items() if k != "condition"})
    with pytest.raises(ValueError, match="of the size of x"):
        image(**given | {"condition": torch.zeros(2, 5, 1, 4, 6)})
    other = image(**given | {"condition": given["condition"] + 1})
    assert not torch.allclose(image(**given), other)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"attn": "lmu"}, CapabilityError, r"blocks\[0:2\]\.attn: .*; choices: .*flow"),
        (
            {"block": "adaln-zero"},
            CapabilityError,
            "no attention to a memory; choices: adaln-single",
        ),
        ({"axes": "x"}, ValueError, "is no axis"),
        ({"layers": {"0": {"attn": {"head_dim": 8}}}}, CapabilityError, "head_dim=16 would do"),
        ({"size": (5, 6)}, ValueError, r"size \(5, 6\) are not divisible by patch \(1, 2, 2\)"),
        ({"dim": 8}, ValueError, "heads of width 4; it must be even and at least 6"),
    ],
)
def test_sizes_and_parts_that_do_not_fit_are_refused(
    options: dict[str, Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        effformer.build_model("wan-tiny", **options)
