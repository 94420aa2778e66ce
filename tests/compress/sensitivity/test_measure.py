"""One layer at a time: what is measured, and that nothing of it stays."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import assert_close
from effformer.compress import (
    MixedScheme,
    Sensitivity,
    SensitivityRow,
    quantize,
    sensitivity,
)
from effformer.compress.sensitivity.distance import Distance
from torch import Tensor, nn
from typer.testing import CliRunner

import effformer
from effformer.checks import FormatError
from effformer.cli.main import app


class Net(nn.Module):
    """Queries and keys that read one tensor, a layer that is called twice, a tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(12, 32)
        self.attn = nn.ModuleDict({"q": nn.Linear(32, 32), "k": nn.Linear(32, 32)})
        self.shared = nn.Linear(32, 32)
        self.head = nn.Linear(32, 12, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        h = self.table(ids)
        h = h + self.attn["q"](h) * self.attn["k"](h)
        return self.head(self.shared(torch.tanh(self.shared(h))))


def net() -> Net:
    torch.manual_seed(0)
    return Net().train()


def ids(count: int = 40) -> dict[str, Tensor]:
    return {"ids": torch.arange(count * 5).reshape(count, 5) % 12}


def test_numbers_are_those_of_a_model_in_which_one_unit_is_packed() -> None:
    model, data = net(), ids()
    found = sensitivity(model, ["int8", {"name": "int4", "block": 16}], data=data, runs=1)
    assert list(found.units) == ["table+head", "attn.q+k", "shared"]
    assert list(found.schemes) == ["int8", "int4 block=16"]
    assert found.samples == 40
    with torch.no_grad():
        dense = model(**data).double()
    for row in found.rows:
        spec = dict(found.schemes[row.scheme])
        small, report = quantize(model, spec, row.layers, sensitive=None)
        with torch.no_grad():
            y = small.eval()(**data).double()
        assert row.mse == pytest.approx(float((y - dense).square().sum() / dense.square().sum()))
        cosine = nn.functional.cosine_similarity(dense.flatten(1), y.flatten(1)).mean()
        assert row.cosine == pytest.approx(float(cosine))
        p, q = dense.log_softmax(-1), y.log_softmax(-1)
        assert row.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), abs=1e-12)
        weights = {id(w): w.numel() for w in (model.get_submodule(n).weight for n in row.layers)}
        assert row.params == sum(weights.values())
        saved = report.bytes_before - report.bytes_after
        assert row.bytes_before - row.bytes_after - row.header == pytest.approx(saved, abs=40)
        assert row.seconds_before is not None
        assert row.seconds_after is not None
        assert row.seconds_before > 0
        assert row.seconds_after > 0


def test_the_very_modules_stand_there_afterwards_also_if_a_run_fails() -> None:
    model = net()
    seen: list[int] = []
    model.shared.register_forward_hook(lambda *_: seen.append(1))
    parts = dict(model.named_modules())
    state = {k: v.clone() for k, v in model.state_dict().items()}
    facts = {name: sorted(vars(m)) for name, m in parts.items()}

    def intact() -> None:
        assert all(m is parts[name] for name, m in model.named_modules())
        assert {name: sorted(vars(m)) for name, m in model.named_modules()} == facts
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
        assert all(m.training for m in model.modules())

    sensitivity(model, ["int8"], data=ids(4), runs=1)
    intact()
    assert seen
    bad = [ids(2), {"ids": torch.full((2, 5), 99)}]
    with pytest.raises(ValueError, match="sensitivity: data"):
        sensitivity(model, ["int8"], data=bad, runs=1)
    intact()


def test_batches_streams_and_methods_that_need_data_agree() -> None:
    model, whole = net(), ids(64)
    pieces = [{"ids": part} for part in whole["ids"].split(32)]
    one = sensitivity(model, ["gptq", "nf4"], "attn", data=whole, runs=1)
    other = sensitivity(model, ["gptq", "nf4"], "attn", data=iter(pieces), runs=1)
    for a, b in zip(one.rows, other.rows, strict=True):
        assert (a.name, a.scheme) == (b.name, b.scheme)
        assert a.mse == pytest.approx(b.mse, rel=1e-9)
    by = {row.scheme: row.mse for row in one.rows}
    assert by["gptq"] > 0
    assert by["nf4"] > 0


def test_layers_of_other_libraries_and_images() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0)
    found = sensitivity(
        nn.Sequential(layer), ["int8"], data={"input": torch.randn(6, 5, 32)}, runs=1
    )
    rows = {row.name: row for row in found.rows}
    assert set(rows) == {
        f"0.{n}" for n in ("self_attn.in_proj", "self_attn.out_proj", "linear1", "linear2")
    }
    assert all(row.mse > 0 for row in rows.values())
    assert type(layer.self_attn) is nn.MultiheadAttention
    model = effformer.build_model("sit-nano", input_size=8, depth=1)
    assert all(row.kl is None for row in sensitivity(model, ["int8"], "blocks", runs=1).rows)


def test_a_result_is_written_and_read_again(tmp_path: Path) -> None:
    found = sensitivity(net(), ["int8"], data=ids(4), runs=1)
    for name in ("a.json", "a.html", "a.txt"):
        found.save(tmp_path / name)
    assert Sensitivity.read(tmp_path / "a.json") == found
    assert "<svg" in (tmp_path / "a.html").read_text()
    assert "attn.q+k" in (tmp_path / "a.txt").read_text()
    assert "<svg" in found._repr_html_()
    assert [row["scheme"] for row in found._rows()] == ["int8"] * 3
    (tmp_path / "b.json").write_text('{"rows": [{}]}')
    with pytest.raises(FormatError, match="is no result of sensitivity"):
        Sensitivity.read(tmp_path / "b.json")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"schemes": []}, "schemes is empty"),
        ({"schemes": ["int8", "int8"]}, "given twice"),
        ({"schemes": ["int88"]}, "did you mean 'int8'"),
        ({"where": "nowhere"}, "matches no module"),
        ({"data": {"ids": torch.zeros(0, 5).long()}}, "no samples"),
        ({"data": []}, "no samples"),
        ({"data": {"other": torch.zeros(2, 5)}}, "ids"),
    ],
    ids=str,
)
def test_wrong_input_is_refused(options: dict[str, Any], words: str) -> None:
    given = {"data": ids(4), "runs": 1, **options}
    with pytest.raises((ValueError, TypeError), match=words):
        sensitivity(net(), **given)


def test_a_packed_layer_is_refused_unless_it_is_left_out() -> None:
    small, _ = quantize(net(), "int8", "shared")
    with pytest.raises(ValueError, match="already quantized"):
        sensitivity(small, ["int8"], data=ids(4), runs=1)
    assert sensitivity(small, ["int8"], skip="shared", data=ids(4), runs=1).rows


def test_outputs_that_overflow_are_infinitely_far(tmp_path: Path) -> None:
    distance = Distance()
    distance.add([torch.ones(2, 3)], [torch.full((2, 3), math.inf)])
    assert (distance.mse, distance.cosine, distance.kl) == (math.inf, 0.0, math.inf)
    row = SensitivityRow(
        name="a", layers=("a",), scheme="int8", params=1, bytes_before=4, bytes_after=1, header=0,
        mse=distance.mse, cosine=0.0, kl=distance.kl, seconds_before=None, seconds_after=None,
    )  # fmt: skip
    found = Sensitivity(
        rows=(row,), schemes={"int8": {"name": "int8"}}, file_bytes=100, samples=1, machine=""
    )
    json.dumps(found.to_dict(), allow_nan=False)
    found.save(tmp_path / "a.json")
    assert Sensitivity.read(tmp_path / "a.json") == found
    assert found.budget(bits=32).schemes == {"a": None}


def test_the_command_writes_a_report_and_names_the_formats(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = effformer.build_model("vit-nano", depth=1)
    effformer.save_pretrained(model, tmp_path / "model")
    words = ["sensitivity", str(tmp_path / "model"), "--where", "blocks", "--budget", "bits=6"]
    out = tmp_path / "layers.json"
    done = CliRunner().invoke(app, [*words, "-o", str(out), "--json"])
    assert done.exit_code == 0, done.output
    data = json.loads(done.stdout)
    assert {row["scheme"] for row in data["rows"]} == {"int8", "int4"}
    scheme = MixedScheme(schemes=data["budget"]["schemes"])
    found = Sensitivity.read(out)
    assert found.expected(scheme).bits <= 6
    small, _ = quantize(model, scheme)
    x = model.example_inputs(2)
    with torch.no_grad():
        assert_close(small.eval()(**x), model.eval()(**x), rtol=0, atol=0.5)
    assert math.isfinite(found.expected(scheme).error)
