"""GenCompositor: what the branch, the mask, the text and the foreground do; sizes, files, bad input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from effformer.export import export_onnx
from effformer.models import GenCompositor
from torch import Tensor

import effformer
from effformer.blocks import ExpertAdaLN, Joint
from effformer.checks import CapabilityError, FormatError
from effformer.profile import profile

from .small import inputs, woken


def awake(**options: Any) -> GenCompositor:
    """A small model with nothing at zero."""
    model = woken("gencompositor-tiny", **options)
    assert isinstance(model, GenCompositor)
    return model


@torch.no_grad()
def test_the_branch_adds_where_the_mask_keeps_the_background() -> None:
    model = awake()
    given = inputs(model)
    ones, zeros = torch.ones_like(given["mask"]), torch.zeros_like(given["mask"])
    for mask, matters in ((ones, False), (given["mask"], True), (zeros, True)):
        own = given | {"mask": mask}
        alone = model(**own, branch_scale=0.0)
        assert torch.equal(model(**own), alone) != matters
    for out in model.branch.outs:
        torch.nn.init.zeros_(out.weight)  # type: ignore[arg-type]
        torch.nn.init.zeros_(out.bias)  # type: ignore[arg-type]
    assert torch.equal(model(**given), model(**given, branch_scale=0.0))


@torch.no_grad()
def test_a_block_of_the_branch_serves_several_others_and_no_token_of_the_foreground() -> None:
    model = awake(depth=5, branch_depth=2)
    given, seen = inputs(model), {}
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(
            lambda _, args, out, i=i: seen.__setitem__(i, (args[0], out[0]))
        )
    added: list[Tensor] = []
    for out in model.branch.outs:
        out.register_forward_hook(lambda _, args, made: added.append(made))
    model(**given)
    kept = ~model.editable(given["mask"])
    assert 0 < kept.sum() < kept.numel()
    for i in range(4):
        change = seen[i + 1][0] - seen[i][1]
        expected = added[0 if i < 3 else 1] * kept
        torch.testing.assert_close(change[:, :12], expected, rtol=1e-4, atol=1e-5)
        assert not change[:, 12:].any()


@torch.no_grad()
def test_text_has_no_places_and_a_foreground_has_its_own() -> None:
    model = awake()
    given = inputs(model)
    out = model(**given)
    turned = given | {"text": given["text"].flip(1)}
    torch.testing.assert_close(model(**turned), out, rtol=1e-4, atol=1e-5)
    assert out.shape == given["x"].shape
    for changed in (given["foreground"].flip(4), given["foreground"].flip(1)):
        assert not torch.allclose(model(**given | {"foreground": changed}), out, atol=1e-4)
    released = awake(order="release")
    assert not torch.allclose(released(**given), out, atol=1e-4)


def test_published_size_is_that_of_the_base_with_what_is_added() -> None:
    with torch.device("meta"):
        model = effformer.build_model("gencompositor")
    count = sum(p.numel() for p in model.parameters())
    assert count == effformer.registry.model.get("gencompositor").facts["params"]
    base = count - sum(p.numel() for p in model.branch.parameters())
    assert base / 1e9 == pytest.approx(5.57, abs=0.005)  # CogVideoX-5B-I2V
    assert model.config.order == "release"


@pytest.mark.parametrize(
    "options",
    [
        {"attn": "flow", "layers": {"0": {"ffn": "swiglu"}, "-1": {"attn": "softmax"}}},
        pytest.param({"block": "joint"}, marks=pytest.mark.slow),
    ],
    ids=["others", "joint"],
)
def test_every_parameter_learns_and_saved_models_come_back(
    options: dict[str, Any], tmp_path: Path
) -> None:
    model = awake(**options).train()
    given = inputs(model)
    (model(**given) * torch.randn_like(given["x"])).sum().backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert all(
        ".y.attn.part.q_norm" in n for n in silent
    )  # of two streams, one ends in the last block
    kind = Joint if "block" in options else ExpertAdaLN
    assert all(isinstance(b, kind) for b in (*model.blocks, *model.branch.blocks))
    effformer.save_pretrained(model.eval(), tmp_path / "m")
    again = effformer.load_model(tmp_path / "m").eval()
    torch.testing.assert_close(again(**given), model(**given), rtol=0, atol=0)


def test_profiles_add_up() -> None:
    model = awake(depth=1, branch_depth=1)
    found = profile(model, inputs(model, 1))
    assert not found.uncounted
    assert found.by_module["blocks"] == sum(block.macs(24, 4) for block in model.blocks)
    branch = sum(block.macs(12, 4) for block in model.branch.blocks)
    assert found.by_module["branch.blocks"] == branch


def test_published_files_of_both_folders_are_one() -> None:
    model = awake(order="release")
    state = model.LAYOUTS[0].from_ours(model.state_dict(), model.config)
    unused = {"branch.norm_final.weight": torch.ones(32), "branch.proj_out.bias": torch.ones(12)}
    again = effformer.build_model("gencompositor-tiny", order="release").eval()
    report = effformer.load_weights(again, state | unused)
    assert report.layout == "official"
    given = inputs(model)
    torch.testing.assert_close(again(**given), model(**given), rtol=0, atol=0)
    alone = {k: v for k, v in state.items() if not k.startswith("branch.transformer_blocks.1")}
    with pytest.raises(FormatError, match=r"missing: branch\.blocks\.1"):
        effformer.load_weights(awake(order="release"), alone)


@pytest.mark.slow
def test_exported_graphs_compute_the_same(tmp_path: Path) -> None:
    report = export_onnx(awake(), tmp_path / "model.onnx")
    assert report.parity is not None
    assert report.parity.passed


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"x": torch.zeros(2, 2, 3, 4, 8)}, r"x: expected .*\(B, 2, 3, 4, 6\)"),
        ({"background": torch.zeros(2, 3, 3, 4, 6)}, "background: expected"),
        ({"foreground": torch.zeros(1, 2, 3, 4, 6)}, "foreground: expected"),
        ({"mask": torch.zeros(2, 2, 3, 4, 6)}, r"mask: expected .*\(B, 2, 1, 4, 6\)"),
        ({"text": torch.zeros(2, 5, 10)}, r"text: expected .*\(B, 4, 10\)"),
        ({"t": torch.zeros(3)}, r"t: expected .*\(B,\)"),
    ],
)
def test_wrong_inputs_are_named(changes: dict[str, Any], match: str) -> None:
    model = awake()
    with pytest.raises(ValueError, match=f"gencompositor-tiny: {match}"):
        model(**inputs(model) | changes)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"attn": "longformer"}, CapabilityError, r"blocks\[0:2\]\.attn: .*; choices: .*flow"),
        ({"block": "adaln-zero"}, CapabilityError, "has one stream; choices: expert-adaln, joint"),
        ({"tokens": "tome"}, CapabilityError, "two streams share one"),
        ({"size": (5, 6)}, ValueError, r"size \(5, 6\) is not divisible by patch 2"),
        ({"dim": 24}, ValueError, "divisible by 16"),
        ({"branch_depth": 3}, ValueError, "branch_depth=3 blocks .* depth is 2"),
        ({"heads": 4}, ValueError, r"widths \(4, 6, 6\) .* heads of width 8"),
    ],
)
def test_sizes_and_parts_that_do_not_fit_are_refused(
    options: dict[str, Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        effformer.build_model("gencompositor-tiny", **options)
