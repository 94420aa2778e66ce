"""TriFlow: the slow obvious form, work linear in the data, order of tokens, what the text reaches, parts, bad input."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import assert_close
from effformer.export import export_onnx
from effformer.models import TriFlow
from torch import Tensor
from torch.nn import functional as F

import effformer
from effformer.cache import cached
from effformer.checks import CapabilityError
from effformer.context import Context, Tap
from effformer.flow import adapt, sample
from effformer.profile import profile

from .small import inputs, woken

Weights = dict[str, Tensor]


def awake(**options: Any) -> TriFlow:
    """A small model in double precision with nothing at zero."""
    model = woken("triflow-tiny", **options).double()
    assert isinstance(model, TriFlow)
    return model


# -- the obvious form: one sample, one token, one head at a time ---------------------------------------


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def norm(x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Queries (N, D) over keys and values (M, D)."""
    width, rows = q.shape[1] // heads, []
    for i in range(len(q)):
        mixed = []
        for h in range(heads):
            part = slice(h * width, (h + 1) * width)
            scores = torch.stack(
                [q[i, part] @ k[j, part] / math.sqrt(width) for j in range(len(k))]
            )
            share = scores.exp() / scores.exp().sum()
            mixed.append(sum(share[j] * v[j, part] for j in range(len(k))))
        rows.append(torch.cat(mixed))
    return torch.stack(rows)


def ffn(w: Weights, name: str, x: Tensor) -> Tensor:
    return linear(w, f"{name}.fc2", F.gelu(linear(w, f"{name}.fc1", x), approximate="tanh"))


def vectors(w: Weights, block: str, time: Tensor) -> tuple[Tensor, ...]:
    return linear(w, f"{block}.modulation.linear", F.silu(time)).chunk(6)


def looks(w: Weights, block: str, x: Tensor, memory: Tensor, time: Tensor, heads: int) -> Tensor:
    """What reads, or writes."""
    a, b, c, d, e, f = vectors(w, block, time)
    q = linear(w, f"{block}.cross.part.q", norm(x) * (1 + b) + a)
    k, v = linear(w, f"{block}.cross.part.kv", norm(memory)).chunk(2, -1)
    x = x + c * linear(w, f"{block}.cross.part.proj", attend(q, k, v, heads))
    return x + f * ffn(w, f"{block}.ffn.part", norm(x) * (1 + e) + d)


def meets(w: Weights, block: str, streams: dict[str, Tensor], time: Tensor) -> dict[str, Tensor]:
    """Streams that mix in one attention; one of them is an ordinary block."""
    mods = {s: vectors(w, f"{block}{s}", time) for s in streams}
    opened = {
        s: linear(w, f"{block}{s}.attn.part.qkv", norm(x) * (1 + mods[s][1]) + mods[s][0]).chunk(
            3, -1
        )
        for s, x in streams.items()
    }
    k, v = (torch.cat([one[i] for one in opened.values()]) for i in (1, 2))
    out = {}
    for s, x in streams.items():
        mixed = linear(w, f"{block}{s}.attn.part.proj", attend(opened[s][0], k, v, 2))
        x = x + mods[s][2] * mixed
        inner = norm(x) * (1 + mods[s][4]) + mods[s][3]
        out[s] = x + mods[s][5] * ffn(w, f"{block}{s}.ffn.part", inner)
    return out


def obvious(model: TriFlow, h: Tensor, text: Tensor, time: Tensor) -> Tensor:
    """One sample: data (N, D), text tokens (L, D), time (D,)."""
    w: Weights = dict(model.state_dict())
    z, y = w["latents"], text
    for run in range(3):
        z = looks(w, f"reads.{run}", z, h, time, 2)
        if run == 0:
            met = meets(w, "blocks.0", {".x": z, ".y": y}, time)
            z, y = met[".x"], met[".y"]
        else:
            z = meets(w, f"blocks.{run}", {"": z}, time)[""]
        h = looks(w, f"writes.{run}", h, z, time, 3)
        z = torch.cat([z, y]) if run == 0 else z
    return h


@torch.no_grad()
def test_the_slow_obvious_form() -> None:
    model = awake()
    given = inputs(model)
    h, y = model.tokens(given["x"]), model.text_embed(given["text"])
    time = model.time_embed(given["t"], torch.float64)
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1, 4:] = False
    found = model.answer(h, y, Context(cond=time, time=time), mask)
    for i, words in enumerate((6, 4)):
        assert_close(found[i], obvious(model, h[i], y[i, :words], time[i]), rtol=1e-10, atol=1e-12)
    whole = model(**given, text_mask=mask)
    tokens = model.head(found).unflatten(1, (3, 2, 2)).unflatten(4, (2, 2, 4))
    planes = tokens.permute(0, 1, 6, 2, 4, 3, 5).reshape(2, 3, 4, 4, 4)
    assert_close(whole, planes, rtol=1e-10, atol=1e-12)


def test_work_is_linear_in_the_data() -> None:
    model = awake()
    work = []
    for cells in (1, 2, 3):
        given = inputs(model, 1, x=torch.randn(1, 3, 4, 4, 4 * cells, dtype=torch.float64))
        work.append(profile(model, given, memory=False).total)
    assert work[2] - work[1] == work[1] - work[0]
    assert work[0] > work[1] - work[0]  # latents and text cost the same for any number


@torch.no_grad()
def test_a_new_model_leaves_the_data_and_answers_zero() -> None:
    model = effformer.build_model("triflow-tiny").eval()
    given = inputs(model)
    time = model.time_embed(given["t"])
    h, y = model.tokens(given["x"]), model.text_embed(given["text"])
    assert torch.equal(model.answer(h, y, Context(cond=time, time=time), None), h)
    assert not model(**given).any()


@torch.no_grad()
def test_tokens_of_data_latents_and_text_are_sets() -> None:
    model = awake()
    given = inputs(model)
    time = model.time_embed(given["t"], torch.float64)
    ctx, y = Context(cond=time, time=time), model.text_embed(given["text"])
    h = model.tokens(given["x"])
    out = model.answer(h, y, ctx, None)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(2))
    assert_close(model.answer(h[:, order], y, ctx, None), out[:, order], rtol=1e-10, atol=1e-12)
    assert_close(model.answer(h, y.flip(1), ctx, None), out, rtol=1e-10, atol=1e-12)
    model.latents.copy_(model.latents.flip(0))
    assert_close(model.answer(h, y, ctx, None), out, rtol=1e-10, atol=1e-12)
    turned = given["x"].flip(1)  # planes are told apart
    assert not torch.allclose(model(**given | {"x": turned}), model(**given).flip(1), atol=1e-3)


@torch.no_grad()
def test_text_reaches_the_data_through_the_latents_alone() -> None:
    model = awake()
    given, other = inputs(model), {"text": torch.randn(2, 6, 12, dtype=torch.float64)}
    assert not torch.allclose(model(**given), model(**given | other), atol=1e-3)
    tap = Tap(keep=("blocks.*.q",))
    model(**given, tap=tap)
    lengths = {place: q.shape[2] for place, q in tap.seen.items()}
    assert lengths["blocks.1.attn.q"] == lengths["blocks.2.attn.q"] == 5 + 6
    for write in model.writes:
        kv = write.cross.part.kv
        half = kv.weight.shape[0] // 2
        kv.weight[half:], kv.bias[half:] = 0.0, 0.0
    assert torch.equal(model(**given), model(**given | other))


def test_every_parameter_learns() -> None:
    model = awake().train()
    model(**inputs(model)).square().sum().backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]


@torch.no_grad()
def test_parts_are_exchanged_and_the_model_comes_back(tmp_path: Path) -> None:
    model = awake(attn="flow", cross="linear", layers={"-1": {"attn": "softmax", "ffn": "swiglu"}})
    given = inputs(model)
    again = effformer.load_model(effformer.save_pretrained(model, tmp_path / "m"))
    assert torch.equal(again(**given), model(**given))
    drawn = sample(adapt(model), given["x"], steps=2, text=given["text"]).x
    assert drawn.shape == given["x"].shape


@torch.no_grad()
def test_one_run_is_cached_and_more_are_refused() -> None:
    model = effformer.build_model("triflow-tiny", depth=5, runs=(1, 3, 1)).eval()
    given = inputs(model)
    field = cached(adapt(model), {"name": "newton", "every": 1}, blocks=slice(1, 3))
    found = sample(field, given["x"], steps=9, text=given["text"]).x
    expected = sample(adapt(model), given["x"], steps=9, text=given["text"]).x
    assert_close(found, expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(
        CapabilityError, match=r"leaves block 0 .* enters what follows .* without block 0"
    ):
        cached(adapt(model), "newton")


@pytest.mark.parametrize(("name", "d"), [("triflow-s", 512), ("triflow-b", 768)])
def test_sizes(name: str, d: int) -> None:
    """Three reading and three writing blocks, three of two streams and six of one."""
    with torch.device("meta"):
        model = effformer.build_model(name)
    each = 4 * d * (d + 1) + 8 * d * d + 5 * d + 6 * d * (d + 1)
    ends = (4 * 80 + 1) * d + 3 * d + (768 + 1) * d + 256 * d + (d + 1) * 4 * 80
    time = (256 + 1) * d + (d + 1) * d
    count = sum(p.numel() for p in model.parameters())
    assert count == (3 + 3 + 2 * 3 + 6) * each + ends + time


@pytest.mark.slow
def test_exports_for_other_sizes_and_texts(tmp_path: Path) -> None:
    report = export_onnx(awake().float(), tmp_path / "m.onnx")
    assert report.parity is not None
    assert report.parity.passed
    assert len({(c.shapes["x"][3], c.shapes["text"][1]) for c in report.parity.cases}) > 1


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.ones(2, 2, 4, 4, 4)}, ValueError, r"x: expected .* \(B, 3, 4, H, W\)"),
        ({"x": torch.ones(2, 3, 4, 4, 3)}, ValueError, r"\(4, 3\) is not divisible by patch 2"),
        ({"text": torch.ones(2, 6, 11)}, ValueError, r"text: expected .* 12\)"),
        ({"text_mask": torch.ones(2, 6)}, TypeError, "text_mask: expected bool"),
        ({"t": torch.ones(3)}, ValueError, r"t: expected shape \(B,\)"),
    ],
)  # fmt: skip
def test_bad_input(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    model = effformer.build_model("triflow-tiny")
    with pytest.raises(error, match=message):
        model(**inputs(model, 2, **changes))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"runs": (1, 1)}, r"runs \(1, 1\) have 2 blocks together, but depth is 3"),
        ({"data_dim": 30}, "data_dim must be divisible by 4"),
        ({"input_size": 5}, "input_size 5 is not divisible by patch 2"),
        ({"cross": "flow"}, r"reads.0.cross: 'flow' lets queries compete .*; choices: .*softmax"),
        ({"single": "joint"}, "has two streams, and this model one"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        effformer.build_model("triflow-tiny", **options)
