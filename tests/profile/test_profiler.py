from __future__ import annotations

import json

import pytest
import timm
import torch
from effformer.compress import quantize
from torch import Tensor, nn

from effformer import build_model
from effformer.checks import FormatError
from effformer.context import Ledger
from effformer.profile import Profile, profile
from effformer.profile.formulas import dit_params, dit_parts


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(8, 16)
        self.fc2 = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(self.fc1(x).relu())


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def sums(p: Profile) -> None:
    assert p.total == p.by_module[""] == sum(p.by_op.values()) == sum(p.by_part.values())


def test_modules_blocks_and_operators() -> None:
    p = profile(Net(), torch.randn(3, 8))
    assert p.total == 2 * 2 * 3 * 8 * 16
    sums(p)
    assert list(p.by_module) == [
        "", "blocks", "blocks.0", "blocks.0.fc1", "blocks.0.fc2",
        "blocks.1", "blocks.1.fc1", "blocks.1.fc2",
    ]  # fmt: skip
    assert p.by_module["blocks.1"] == 2 * 3 * 8 * 16
    assert p.by_block == {"blocks.0": {"other": 768}, "blocks.1": {"other": 768}}
    assert p.flops == 2 * p.total
    assert p.calls == {"aten::addmm": 4}
    assert p.elements == {"aten::relu": 96, "aten::add": 48}
    assert p.uncounted == {}
    assert p.executed == p.total
    assert "1 MAC" in p.convention


@pytest.mark.parametrize("form", ["tensor", "tuple", "list", "dict"])
def test_inputs_in_every_form(form: str) -> None:
    x = torch.randn(3, 8)
    inputs = {"tensor": x, "tuple": (x,), "list": [x], "dict": {"x": x}}[form]
    assert profile(Net(), inputs).total == 1536


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        (None, "no example_inputs"),
        ("x", "expected Tensor or a list or a dict, got 'x'"),
        (3, "got 3"),
        ((), "missing a required argument: 'x'"),
        ({"y": torch.zeros(1)}, "argument"),
    ],
)
def test_wrong_inputs_are_refused(inputs: object, words: str) -> None:
    with pytest.raises(TypeError, match=f"profile: .*{words}"):
        profile(Net(), inputs)  # type: ignore[arg-type]


def test_a_model_that_fails_fails_with_its_own_error() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        profile(Net(), torch.randn(3, 9))


def test_the_model_is_left_as_it_was() -> None:
    net = Net().train()
    net.blocks[0].eval()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    profile(net, torch.randn(3, 8))
    assert net.training
    assert net.blocks[1].fc1.training
    assert not net.blocks[0].training
    for module in net.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    for key, value in net.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0)


def test_meta_models_need_no_memory_and_count_the_same() -> None:
    with torch.device("meta"):
        net = Net()
    assert profile(net, torch.randn(3, 8)).by_module == profile(Net(), torch.randn(3, 8)).by_module


def test_batch_multiplies_the_cost() -> None:
    model = build_model("dit-nano")
    one, three = (profile(model, model.example_inputs(batch)) for batch in (1, 3))
    assert three.by_module == {path: 3 * n for path, n in one.by_module.items()}


def test_data_dependent_models_run_on_real_tensors_and_say_so() -> None:
    class Choosing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x[x.sum(-1) > 0])

    x = torch.tensor([[1.0], [-1.0], [1.0]]).expand(3, 8)
    p = profile(Choosing(), (x,))
    assert p.total == 2 * 8 * 8
    assert p.memory is not None
    assert p.memory.method == "real tensors"
    assert "counted on real tensors" in p.notes[0]
    with torch.device("meta"):
        model = Choosing()
    with pytest.raises(RuntimeError):
        profile(model, (x,))


def test_compiled_models_are_looked_into() -> None:
    assert profile(torch.compile(Net()), torch.randn(3, 8)).by_block  # type: ignore[arg-type]


def test_an_error_that_the_model_handles_does_not_confuse_modules() -> None:
    class Trying(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.narrow = nn.Linear(4, 4)
            self.wide = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            try:
                return self.narrow(x)
            except RuntimeError:
                return self.wide(x)

    p = profile(Trying(), torch.randn(3, 8))
    assert p.by_module == {"": 192, "narrow": 0, "wide": 192}


def test_shared_modules_count_every_call() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(8, 8)
            self.b = self.a

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x))

    p = profile(Twice(), torch.randn(1, 8))
    assert p.total == 128
    assert p.params == 72


def test_frozen_parameters() -> None:
    net = Net()
    net.blocks[0].requires_grad_(False)
    p = profile(net, torch.randn(3, 8))
    assert p.trainable == p.params // 2


@pytest.mark.parametrize("core", ["softmax", "linear", "flow"])
@pytest.mark.parametrize("options", [{}, {"dim": 32, "heads": 4, "patch": 4, "depth": 3}])
def test_dit_equals_its_closed_formula(core: str, options: dict[str, int]) -> None:
    model = build_model("dit-nano", attn=core, **options)
    config = model.config
    shape = {
        "tokens": (config.input_size // config.patch) ** 2, "dim": config.dim,
        "depth": config.depth, "patch": config.patch,
    }  # fmt: skip
    p = profile(model)
    sums(p)
    assert p.by_part == dit_parts(**shape, heads=config.heads, attention=core)
    assert p.params == dit_params(**shape)
    assert not p.uncounted
    assert set(p.by_block) == {f"blocks.{i}" for i in range(config.depth)}
    assert set(p.by_block["blocks.0"]) == {"adaln_blocks", "qkv", "attn", "proj", "mlp"}


def test_largest_published_size_on_meta() -> None:
    with torch.device("meta"):
        model = build_model("dit-xl", input_size=64)
    p = profile(model)
    assert p.total == 524_538_298_368
    assert p.params == 676_014_368


def test_timm_vit_parts() -> None:
    p = profile(timm.create_model("vit_tiny_patch16_224"), torch.zeros(1, 3, 224, 224))
    n, d, depth = 197, 192, 12
    assert p.by_part == {
        "patch_embed": 196 * 3 * 256 * d, "qkv": 3 * depth * n * d * d,
        "attn": 2 * depth * n * n * d, "proj": depth * n * d * d, "mlp": 8 * depth * n * d * d,
        "head": d * 1000,
    }  # fmt: skip
    assert not p.uncounted


def test_diffusers_dit_parts() -> None:
    diffusers = pytest.importorskip("diffusers", reason="extra diffusers is not installed")
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=24, num_layers=2, sample_size=8,
        num_embeds_ada_norm=10, out_channels=8,
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.zeros(1, 4, 8, 8), "timestep": torch.zeros(1, dtype=torch.long),
        "class_labels": torch.zeros(1, dtype=torch.long),
    }  # fmt: skip
    parts = profile(model, inputs).by_part
    ours = dit_parts(tokens=16, dim=48, depth=2, heads=2, patch=2)
    # one time MLP per block, and one more for the last layer
    assert parts == {**ours, "t_mlp": 3 * ours["t_mlp"]}


def test_multihead_attention_of_torch() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 2)
    assert profile(encoder, torch.randn(2, 5, 16)).by_part == {
        "attn": 2 * 2 * 2 * 5 * 5 * 16,
        "projections": 2 * 2 * 5 * 4 * 16 * 16,
        "mlp": 2 * 2 * 5 * 2 * 16 * 32,
    }


class GatedFFN(nn.Module):
    """Runs only the samples whose gate is open, and says so."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor, ledger: Ledger | None) -> Tensor:
        gate = (x[:, 0, 0] > 0).float()
        if ledger is not None:
            ledger.work("ffn", gate)
        return x + gate[:, None, None] * self.fc(x)

    def macs(self, n: int) -> int:
        return n * 64


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(8, 8)
        self.ffn = GatedFFN()

    def forward(self, x: Tensor, ledger: Ledger | None = None) -> Tensor:
        return self.ffn(x, ledger) + self.stem(x)


def test_executed_work_follows_the_ledger() -> None:
    x = torch.tensor([1.0, -1.0, 1.0, 1.0])[:, None, None].expand(4, 5, 8)
    p = profile(Gated(), (x,))
    assert p.total == 2 * 4 * 5 * 64
    assert p.executed == 4 * 5 * 64 + 3 * 5 * 64
    assert "executed" in str(p)
    with torch.device("meta"):
        meta = Gated()
    p = profile(meta, (x,))
    assert p.total == 2 * 4 * 5 * 64
    assert p.executed is None
    assert any("meta device" in note for note in p.notes)


def test_skipped_work_is_dense_in_the_total() -> None:
    class Skipping(GatedFFN):
        def forward(self, x: Tensor, ledger: Ledger | None) -> Tensor:
            on = x[:, 0, 0] > 0
            if ledger is not None:
                ledger.work("ffn", on.float())
                ledger.work("nowhere", on.float())
            return x.index_put((on,), self.fc(x[on]))

    model = Gated()
    model.ffn = Skipping()
    x = torch.tensor([1.0, -1.0, 1.0, 1.0])[:, None, None].expand(4, 5, 8)
    p = profile(model, (x,))
    assert p.total == 2 * 4 * 5 * 64
    assert p.by_op["formula: dense"] == 5 * 64
    assert p.executed == 4 * 5 * 64 + 3 * 5 * 64
    sums(p)
    assert any("'nowhere'" in note for note in p.notes)


def test_a_core_counts_by_its_formula() -> None:
    class Weighted(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return (q * k).sum(-1, keepdim=True) * v

        def macs(self, n: int, m: int | None = None, *, heads: int, head_dim: int) -> int:
            return n * heads * head_dim

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.core = Weighted()

        def forward(self, x: Tensor) -> Tensor:
            return self.core(x, x, x)

    p = profile(Around(), torch.randn(2, 3, 5, 7))
    assert p.total == 2 * 3 * 5 * 7
    assert p.by_op == {"formula: Weighted": 210}
    assert p.by_part == {"attn": 210}
    assert "closed formula counts +210" in p.notes[0]
    sums(p)


def test_text_json_and_html(tmp_path) -> None:
    p = profile(build_model("dit-nano"), cross_check=True)
    text = str(p)
    for words in ("FLOPs", "qkv projections", "blocks.0-1 (2 x", "uncounted: nothing", "fvcore"):
        assert words in text
    p.save(tmp_path / "cost.json")
    data = json.loads((tmp_path / "cost.json").read_text())
    assert data == {"generator": "effformer:profile", **json.loads(json.dumps(p.to_dict()))}
    assert data["total"] == p.total
    assert data["flops"] == 2 * p.total
    p.save(tmp_path / "cost.txt")
    assert (tmp_path / "cost.txt").read_text() == f"{text}\n\neffformer:profile\n"
    p.save(tmp_path / "cost.html")
    page = (tmp_path / "cost.html").read_text()
    for words in ("<!doctype html>", "By module", "Other counters", "prefers-color-scheme"):
        assert words in page
    for outside in ("http://", "https://", "<script", "src="):
        assert outside not in page
    with pytest.raises(ValueError, match=r"must end in \.json, \.html or \.txt"):
        p.save(tmp_path / "cost.pdf")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["cost.html", "cost.json", "cost.txt"]


def test_a_report_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch) -> None:
    p = profile(Net(), torch.randn(3, 8))
    target = tmp_path / "cost.json"
    target.write_text("old")
    with pytest.raises(FormatError, match="did not write as profile"):
        p.save(target)

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr("os.replace", full_disk)
        with pytest.raises(OSError, match="No space"):
            p.save(target, force=True)
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]
    p.save(tmp_path / "new" / "cost.json")
    assert (tmp_path / "new" / "cost.json").stat().st_size > 0
    with pytest.raises(FormatError, match=r"cost\.json/more\.json: cannot be written"):
        p.save(target / "more.json")


def test_stages_are_announced() -> None:
    stages: list[str] = []
    profile(Net(), torch.randn(3, 8), cross_check=True, progress=stages.append)
    assert stages == ["counting operators", "comparing with other counters"]


def test_names_are_escaped_in_pages(tmp_path) -> None:
    net = Net()
    net.name = "<b>&"  # type: ignore[assignment]
    profile(net, torch.randn(3, 8)).save(tmp_path / "x.html")
    assert "<b>&<" not in (tmp_path / "x.html").read_text()


def test_quantized_models_count_as_what_they_compute() -> None:
    dense = build_model("dit-nano")
    packed, _ = quantize(dense, "nf4")
    p, d = profile(packed), profile(dense)
    assert p.by_part == d.by_part
    assert p.params == d.params
    assert not p.uncounted
    assert p.memory.weights < 0.3 * d.memory.weights
