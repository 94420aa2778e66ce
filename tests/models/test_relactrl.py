from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from effformer.export import export_onnx
from effformer.models import DiT, LightningDiT, RelaCtrl, SiT
from effformer.models.layouts.relactrl import BRANCH
from effformer.models.relactrl import PRESETS, ControlBlock, relevance_scores
from torch import Tensor, nn
from torch.nn import functional as F

import effformer
from effformer.attention.tdsm import TDSM, reshuffle
from effformer.checks import CapabilityError, FormatError
from effformer.context import Tap
from effformer.site import Site

SMALL = {"depth": 5, "input_size": 8, "num_classes": 10}


def _stir(model: nn.Module) -> None:
    """Move all weights; the table of positions is no weight, and exported as a formula."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if not name.endswith("pos_embed"):
                p.add_(torch.randn_like(p) * 0.1)


def awake(**options: Any) -> RelaCtrl:
    """A small model with nothing at zero."""
    model = effformer.build_model("relactrl-nano", **{"changes": SMALL, **options}).eval()
    _stir(model)
    assert isinstance(model, RelaCtrl)
    return model


@pytest.fixture(scope="module")
def published() -> RelaCtrl:
    with torch.device("meta"):
        model = effformer.build_model("relactrl-dit-xl-2")
    assert isinstance(model, RelaCtrl)
    return model


def test_published_parameter_counts(published: RelaCtrl) -> None:
    by_groups = {6: 3_552_768, 4: 3_995_136, 2: 5_322_240}
    for groups, block in zip(published.config.groups, published.control.blocks, strict=True):
        assert sum(p.numel() for p in block.parameters()) == by_groups[groups]
    assert sum(p.numel() for p in published.control.parameters()) == 45_715_968


def test_published_work_without_attention_products(published: RelaCtrl) -> None:
    n, dim = 1024, 1152
    total = 0
    for block in published.control.blocks:
        mixer = block.mixer.part
        assert mixer.macs(n) - 4 * n * sum(w * w for w in mixer.widths) == n * n * dim // 2
        total += 2 * n * dim * dim + mixer.macs(n) - n * n * dim // 2
    assert round(total / 1e9, 2) == 46.66


@pytest.mark.parametrize("backbone", ["dit-nano", "sit-nano", "lightningdit-nano"])
def test_starts_as_the_backbone_for_any_condition(backbone: str) -> None:
    model = effformer.build_model("relactrl-nano", backbone=backbone, changes=SMALL).eval()
    assert type(model.backbone) in (DiT, SiT, LightningDiT)
    _stir(model.backbone)
    given = model.example_inputs(2)
    condition = given.pop("condition")
    expected = model.backbone(**given)
    assert expected.any()
    for scale in (1, 100):
        torch.testing.assert_close(
            model(**given, condition=condition * scale), expected, rtol=0, atol=0
        )


def test_a_control_block_is_the_equation() -> None:
    for first in (True, False):
        block = ControlBlock(TDSM.Config(groups=2), Site(dim=48, length=16), first=first)
        for parameter in block.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        x, c, time = torch.randn(2, 16, 48), torch.randn(2, 16, 48), torch.randn(2, 6, 48)
        u = x + block.before(c) if first else c + block.before(x)
        shift, scale, gate = (block.table[i] + time[:, i, None] for i in range(3))
        z = F.layer_norm(u, (48,), eps=1e-6) * (1 + scale) + shift
        expected = u + gate * block.mixer.part(z)
        state, skip = block(x, c, time)
        torch.testing.assert_close(state, expected)
        torch.testing.assert_close(skip, block.after(expected))


def _released_loop(model: RelaCtrl, given: dict[str, Tensor], *, reuse: bool) -> Tensor:
    backbone, positions = model.backbone, model.config.positions
    ctx = backbone.context(given["x"], given["t"], given["y"])
    assert ctx.time is not None
    linear = model.modulation.linear
    time = (F.silu(ctx.time) @ linear.weight.T + linear.bias).unflatten(1, (3, -1))
    x, c = backbone.embed(given["x"]), backbone.embed(given["condition"])
    x = backbone.blocks[0](x, ctx)
    skip = torch.zeros_like(x)
    for k in range(1, len(backbone.blocks)):
        if k - 1 in positions:
            c, skip = model.control.blocks[positions.index(k - 1)](x, c, time)
        elif not reuse:
            skip = torch.zeros_like(x)
        x = backbone.blocks[k](x + skip, ctx)
    return backbone.head(x, ctx)


@pytest.mark.parametrize("positions", [(0, 2), (1,), (0, 1, 2, 3)])
def test_order_of_the_released_loop_and_its_reused_additions(positions: tuple[int, ...]) -> None:
    groups = (2, 4, 1, 2)[: len(positions)]
    plain = awake(positions=positions, groups=groups)
    quirk = awake(positions=positions, groups=groups, reuse_skip=True)
    quirk.load_state_dict(plain.state_dict())
    given = plain.example_inputs(2)
    torch.testing.assert_close(plain(**given), _released_loop(plain, given, reuse=False))
    torch.testing.assert_close(quirk(**given), _released_loop(plain, given, reuse=True))
    same = torch.allclose(plain(**given), quirk(**given), atol=1e-4)
    assert same == (positions == (0, 1, 2, 3))


def test_gradients_reach_the_branch_only_and_the_backbone_stays_in_evaluation() -> None:
    model = awake().train()
    assert model.control.training
    assert not model.backbone.training
    model(**model.example_inputs(2)).square().sum().backward()
    assert all(p.grad is None for p in model.backbone.parameters())
    branch = [*model.control.named_parameters(), *model.modulation.named_parameters()]
    assert not [name for name, p in branch if p.grad is None or not p.grad.any()]
    reshuffle(model, torch.Generator().manual_seed(1))


def test_samples_are_independent() -> None:
    model = awake()
    given = model.example_inputs(3)
    whole = model(**given)
    one = {name: value[1:2] for name, value in given.items()}
    torch.testing.assert_close(model(**one), whole[1:2], rtol=1e-4, atol=1e-5)


def test_taps_read_the_branch() -> None:
    model, tap = awake(), Tap(keep=("control.*",))
    model(**model.example_inputs(1), tap=tap)
    assert "control.blocks.1.mixer" in tap.seen
    assert "control.blocks.0.mixer.experts.3.q" in tap.seen


def test_saved_models_come_back(tmp_path: Path) -> None:
    model = awake(reuse_skip=True)
    effformer.save_pretrained(model, tmp_path / "m")
    again = effformer.load_model(tmp_path / "m").eval()
    assert again.config == model.config
    given = model.example_inputs(2)
    torch.testing.assert_close(again(**given), model(**given), rtol=0, atol=0)


def test_official_branch_loads_beside_a_foreign_backbone() -> None:
    model = awake()
    official = BRANCH.from_ours(model.control.state_dict(), None)
    assert official["controlnet.0.process.scale_shift_table"].shape == (6, 48)
    assert "controlnet.1.process.experts_attn.1.attn.qkv.weight" in official
    again = awake()
    official["base_model.x_embedder.proj.weight"] = torch.zeros(1)
    effformer.load_weights(again.control, official, BRANCH)
    torch.testing.assert_close(again.control.state_dict(), model.control.state_dict())
    official["controlnet.0.odd"] = torch.zeros(1)
    with pytest.raises(FormatError, match=r"unexpected: controlnet\.0\.odd"):
        effformer.load_weights(again.control, official, BRANCH)


@pytest.mark.slow
def test_exports(tmp_path: Path) -> None:
    model = awake(changes={**SMALL, "depth": 3})
    report = export_onnx(model, tmp_path / "m.onnx")
    assert report.parity is not None
    assert report.parity.passed


def test_relevance_scores() -> None:
    quality, fidelity = torch.tensor([1.0, 3.0, 2.0]), torch.tensor([10.0, 10.0, 30.0])
    scores = relevance_scores(quality, fidelity)
    torch.testing.assert_close(scores, torch.tensor([0.0, 0.5, 0.75]))
    constant = relevance_scores(torch.ones(3), fidelity)
    torch.testing.assert_close(constant, torch.tensor([0.0, 0.0, 0.5]))
    assert not relevance_scores(torch.ones(1), torch.zeros(1)).any()
    for wrong in (torch.ones(2), torch.ones(3, 1)):
        with pytest.raises(ValueError, match=r"expected two tensors \(K,\)"):
            relevance_scores(quality, wrong)
    with pytest.raises(ValueError, match=r"expected two tensors \(K,\)"):
        relevance_scores(torch.ones(0), torch.ones(0))


def test_errors() -> None:
    def build(**options: Any) -> None:
        effformer.build_model("relactrl-nano", **options)

    with pytest.raises(CapabilityError, match=r"'vit-nano' has no blocks .*; choices: .*dit-nano"):
        build(backbone="vit-nano", changes={})
    with pytest.raises(ValueError, match="unknown model 'dit-nan'; did you mean 'dit-nano'"):
        build(backbone="dit-nan")
    with pytest.raises(ValueError, match="relactrl-nano backbone: unknown option 'deph'"):
        build(changes={"deph": 3})
    with pytest.raises(ValueError, match=r"positions lie in 0\.\.2 for 4 blocks, got \(0, 3\)"):
        build(positions=(0, 3))
    for positions in ((1, 0), (1, 1), ()):
        with pytest.raises(ValueError, match="positions must increase"):
            build(positions=positions)
    with pytest.raises(ValueError, match="2 groups for 3 positions"):
        build(positions=(0, 1, 2))
    with pytest.raises(ValueError, match="width 48 cannot be cut into 13 groups"):
        build(groups=(13, 2))
    model = awake()
    given = model.example_inputs(2)
    given["condition"] = given["condition"][:, :1]
    with pytest.raises(
        ValueError, match=r"relactrl-nano: condition: expected shape \(2, 4, 8, 8\)"
    ):
        model(**given)


def test_presets_build() -> None:
    with torch.device("meta"):
        for name in PRESETS:
            assert effformer.build_model(name).config == PRESETS[name].config


def test_learns_to_follow_the_condition() -> None:
    """The sign of the condition is to be added to the frozen backbone's output: error 1 without."""
    changes = {**SMALL, "depth": 4, "learn_sigma": False}
    model = effformer.build_model("relactrl-nano", changes=changes)
    assert isinstance(model, RelaCtrl)
    _stir(model.backbone)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(40):
        given = model.example_inputs(16)
        sign = torch.randint(0, 2, (16, 1, 1, 1)) * 2.0 - 1
        given["condition"] = sign + 0.1 * given["condition"]
        condition = given.pop("condition")
        with torch.no_grad():
            target = model.backbone(**given) + sign
        loss = (model(**given, condition=condition) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[0] == pytest.approx(1.0)
    assert sum(losses[-5:]) / 5 < 0.4
