from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from effformer.compress import quantize
from effformer.export import BundleReport, VerificationError, export_bundle
from effformer.export.quantize import named_form
from effformer.export.run import Bundle, BundleError
from torch import Tensor, nn

import effformer
from effformer.checks import FormatError
from effformer.flow import Guidance, adapt, get_convention, sample

from .networks import Flow, randomize

SLOW = pytest.mark.slow
SIZES = {"shape": (1, 8, 8), "num_classes": 3, "null_label": 3, "convention": "effformer"}


def test_facts(bundle: BundleReport) -> None:
    facts = json.loads((bundle.folder / "bundle.json").read_text())
    assert facts["shape"] == [1, 8, 8]
    assert (facts["num_classes"], facts["null_label"]) == (3, 3)
    assert facts["sampler"]["steps"] == 10
    assert facts["convention"]["data_at"] == 1
    runner = {"run.py", "opened.py", "facts.py", "choice.py", "pictures.py"}
    own = {"velocity.onnx", "self_test.npy", "self_test_sample.npy", *runner}
    assert set(facts["files"]) == own
    assert bundle.parity is not None
    assert bundle.parity.max_rel <= 1e-4
    assert bundle.bytes == sum(f.stat().st_size for f in bundle.folder.iterdir())
    assert Bundle(bundle.folder).self_test() <= 1e-4


@pytest.mark.parametrize("sampler", ["euler", "midpoint", "heun", "rk4"])
@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_the_runner_samples_as_torch_does(
    sampler: str, guidance: float, bundle: BundleReport, flow: Flow
) -> None:
    labels, noise = [0, 2, 1], torch.randn(3, 1, 8, 8)
    rule = None if guidance == 1 else Guidance(guidance, null={"y": 3})
    expected = sample(
        flow.eval(), noise, sampler=sampler, steps=7, guidance=rule, y=torch.tensor(labels)
    )
    actual = Bundle(bundle.folder, threads=1).sample(
        labels, sampler=sampler, steps=7, guidance=guidance, noise=noise.numpy()
    )
    torch.testing.assert_close(torch.from_numpy(actual), expected.x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "convention",
    ["instaflow", pytest.param("triposg", marks=SLOW), pytest.param("dit", marks=SLOW)],
)
def test_networks_that_count_otherwise(convention: str, tmp_path: Path) -> None:
    rule = get_convention(convention)

    class Network(Flow):
        def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            out = super().forward(x, t / 1000, y)
            return torch.cat([out, out.exp()], dim=1) if rule.variance else out

    torch.manual_seed(0)
    network = Network().eval()
    export_bundle(network, tmp_path / "b", **(SIZES | {"convention": convention}))  # type: ignore[arg-type]
    facts = json.loads((tmp_path / "b" / "bundle.json").read_text())
    assert facts["network_convention"] == rule.to_dict()
    noise = torch.randn(2, 1, 8, 8)
    expected = sample(
        adapt(network, rule),
        noise,
        guidance=Guidance(2.0, null={"y": 3}),
        steps=10,
        y=torch.tensor([1, 2]),
    )
    actual = Bundle(tmp_path / "b").sample([1, 2], noise=noise.numpy())
    scale = float(expected.x.abs().max())
    torch.testing.assert_close(torch.from_numpy(actual), expected.x, rtol=0, atol=1e-4 * scale)


def test_our_models_describe_themselves_and_quantize(tmp_path: Path) -> None:
    model = effformer.build_model(
        "sit-nano", input_size=8, channels=1, depth=1, num_classes=4, learn_sigma=False
    )
    randomize(model)
    report = export_bundle(model, tmp_path / "b", quantize="int8")
    assert report.quantized is not None
    assert report.quantized.quantized > 5
    assert report.quantized.path == tmp_path / "b" / "velocity.onnx"
    assert report.parity is not None
    assert 1e-4 < report.parity.max_rel < 0.1  # of what was written
    edge = Bundle(tmp_path / "b")
    assert (edge.shape, edge.facts["null_label"]) == ((1, 8, 8), 4)
    assert edge.sample([0, 3]).shape == (2, 1, 8, 8)
    assert model.training


def test_guided_channels_and_a_decoder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    flow, decoder = Flow(channels=4).eval(), nn.Conv2d(4, 3, 1)
    export_bundle(
        flow, tmp_path / "b", shape=(4, 8, 8), num_classes=3, null_label=3,
        guidance_channels=3, decoder=decoder, convention="effformer",
    )  # fmt: skip
    edge, noise = Bundle(tmp_path / "b"), torch.randn(1, 4, 8, 8)
    rule = Guidance(2.0, null={"y": 3}, channels=3)
    expected = sample(flow, noise, guidance=rule, y=torch.tensor([1])).x
    actual = edge.sample([1], noise=noise.numpy())
    torch.testing.assert_close(torch.from_numpy(actual), expected, rtol=1e-4, atol=1e-4)
    pixels = edge.images(actual)
    assert (pixels.shape, pixels.dtype) == ((1, 8, 8, 3), np.uint8)
    with torch.no_grad():
        colours = ((decoder(expected).clamp(-1, 1) + 1) * 127.5).round()
    assert np.abs(pixels[0] - colours[0].permute(1, 2, 0).numpy()).max() <= 1


def test_bad_requests(flow: Flow, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown sampler 'eulr'; did you mean 'euler'"):
        export_bundle(flow, tmp_path / "b", sampler="eulr", **SIZES)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown convention 'triposq'; did you mean 'triposg'"):
        export_bundle(flow, tmp_path / "b", **(SIZES | {"convention": "triposq"}))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="export_bundle: quantize: unknown form 'int9'"):
        export_bundle(flow, tmp_path / "b", quantize="int9", **SIZES)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="export_bundle: steps must be at least 1, got 0"):
        export_bundle(flow, tmp_path / "b", steps=0, **SIZES)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="guidance must be finite, got nan"):
        export_bundle(flow, tmp_path / "b", guidance=float("nan"), **SIZES)  # type: ignore[arg-type]
    for far in ({"steps": 10_001}, {"guidance": 1001.0}):
        with pytest.raises(
            ValueError, match=r"steps must lie in 1..10000 and guidance in -1000..1000"
        ):
            export_bundle(flow, tmp_path / "b", **far, **SIZES)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="Flow does not say its shape"):
        export_bundle(flow, tmp_path / "b", num_classes=3, convention="effformer")
    with pytest.raises(ValueError, match=r"guidance 2\.0 needs a null class"):
        export_bundle(flow, tmp_path / "b", guidance=2.0, **(SIZES | {"null_label": None}))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="Flow does not say what it was trained to predict"):
        export_bundle(flow, tmp_path / "b", **(SIZES | {"convention": None}))  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_foreign_folders_and_failures_leave_everything(
    flow: Flow, bundle: BundleReport, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "me.png").touch()
    with pytest.raises(FormatError, match="holds other files"):
        export_bundle(flow, tmp_path / "photos", **SIZES)  # type: ignore[arg-type]
    before = {f.name: f.read_bytes() for f in bundle.folder.iterdir()}

    def fail(*args: object, **kwargs: object) -> None:
        raise VerificationError("no")

    monkeypatch.setattr("effformer.export.velocity.export_onnx", fail)
    with pytest.raises(VerificationError):
        export_bundle(flow, bundle.folder, **SIZES)  # type: ignore[arg-type]
    assert {f.name: f.read_bytes() for f in bundle.folder.iterdir()} == before
    assert [f.name for f in bundle.folder.parent.iterdir()] == [bundle.folder.name]


def test_a_self_test_that_fails(bundle: BundleReport) -> None:
    edge = Bundle(bundle.folder)
    edge.facts["self_test"]["t"] = 0.9
    with pytest.raises(BundleError, match=r"differs by .* from the recorded one"):
        edge.self_test()


def test_what_cannot_be_quantized_or_integrated_is_said_in_one_sentence(tmp_path: Path) -> None:
    """No file of ours that is gone by then, and something that works."""
    torch.manual_seed(0)
    sizes = {"depth": 1, "dim": 32, "heads": 2, "input_size": 8, "channels": 1, "num_classes": 3}
    packed, _ = quantize(effformer.build_model("sit-nano", **sizes).eval(), "int8")
    with pytest.raises(ValueError, match="'static-int8' finds no product with a floating") as told:
        export_bundle(packed, tmp_path / "b", quantize="static-int8", steps=1, verify=False)
    assert str(tmp_path) not in str(told.value)
    assert "packed layers are exported as they are" in str(told.value)
    flow = effformer.build_model("tarflow-tiny").eval()
    for more in ({}, {"convention": "effformer"}):
        with pytest.raises(ValueError, match=r"tarflow-tiny has no times; effformer\.flow\.invert"):
            export_bundle(flow, tmp_path / "b", **more)  # type: ignore[arg-type]
    assert not (tmp_path / "b").exists()


def test_options_of_a_form() -> None:
    where = {"where": "here"}
    assert named_form("int4", **where) == ("int4", {})
    given = {"name": "int4", "block": 64}
    assert named_form(given, **where) == ("int4", {"block": 64})
    for wrong, said in (
        ({"name": "int4", "blok": 64}, "unknown option of 'int4' 'blok'; did you mean 'block'"),
        ({"name": "dynamic-int8", "block": 64}, "unknown option of 'dynamic-int8' 'block'"),
        ({"name": "float32", "block": 64}, "'float32' has no options, got block"),
        ({"block": 64}, "unknown form 'None'"),
    ):
        with pytest.raises(ValueError, match=said):
            named_form(wrong, **where)


@pytest.mark.slow
def test_a_form_with_options_in_a_bundle(flow: Flow, tmp_path: Path) -> None:
    wide, narrow = (
        export_bundle(flow, tmp_path / str(block), quantize={"name": "int8", "block": block}, steps=2, **SIZES)  # type: ignore[arg-type]
        for block in (128, 16)
    )  # fmt: skip
    assert wide.quantized.bytes_after < narrow.quantized.bytes_after


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_bundles_in_half_precision_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    model = effformer.build_model("sit-nano").to(dtype)
    with pytest.raises(ValueError, match=rf"in float32, and sit-nano in {dtype}.*model\.float\(\)"):
        export_bundle(model, tmp_path / "bundle")
    assert not list(tmp_path.iterdir())
