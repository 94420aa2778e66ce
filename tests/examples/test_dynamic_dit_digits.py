from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch

import effformer
from effformer.train import load_data


def test_pieces_fit_together(
    example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(example, "TIMES", torch.tensor([0.0, 0.5]))
    data = load_data("digits")
    dense = example.dense_model(data, 20)
    model = example.dynamic_model(dense, data, 10)
    samples, labels = example.draw(model, 40)
    assert samples.shape == (40, 1, 8, 8)
    assert labels.tolist() == [*range(10)] * 4
    whole, work = (example.work_over_time(m, data) for m in (dense, model))
    assert len(set(whole)) == 1
    assert all(0 < done < whole[0] for done in work)
    table = effformer.prepare_widths(model, example.TIMES)
    example.show(tmp_path / "picture.png", table, [w / whole[0] for w in work], samples, samples)
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_the_dynamic_model_starts_as_the_dense_one(example: ModuleType) -> None:
    data = load_data("digits")
    dense = example.dense_model(data, 20)
    before, _ = example.draw(dense, 10)
    model = example.dynamic_model(dense, data, 1, target=1.0)
    effformer.load_weights(model, dense.state_dict())
    for name, p in model.named_parameters():
        if ".gates." in name and name.endswith("bias"):
            torch.nn.init.constant_(p, 50.0)
    torch.testing.assert_close(example.draw(model, 10)[0], before, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_the_whole_example(example: ModuleType, tmp_path: Path) -> None:
    result = example.main(["--out", str(tmp_path / "out")])
    assert result["dense"] > 0.97
    assert result["dynamic"] >= result["dense"] - 0.02
    assert result["work"] <= 0.6
    assert (tmp_path / "out" / "dynamic_dit_digits.png").exists()
    assert effformer.load_model(tmp_path / "out" / "model").config.width is not None
