from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from effformer.export import ExportReport, Session

from effformer.checks import FormatError, RunError

from .networks import Mlp


def test_runs_arrays_and_tensors_by_name(exported: ExportReport, mlp: Mlp) -> None:
    session = Session(exported.path, threads=1)
    assert (session.inputs, session.outputs) == (("x",), ("output",))
    assert session.metadata["effformer.model"] == "Mlp"
    x = torch.randn(3, 5, 32)
    out = session.run({"x": x, "unused": x})["output"]
    np.testing.assert_array_equal(out, session.run({"x": x.numpy()})["output"])
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(out), mlp.eval()(x), rtol=1e-4, atol=1e-5)


def test_bad_input(exported: ExportReport, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no provider 'NoSuch'.*CPUExecutionProvider"):
        Session(exported.path, providers=["NoSuch"])
    with pytest.raises(ValueError, match=r"Session: threads must lie in \[1, 1024\]"):
        Session(exported.path, threads=0)
    with pytest.raises(ValueError, match="input 'x' is missing"):
        Session(exported.path).run({})
    with pytest.raises(TypeError, match="input 'x': expected an array or a tensor, got 'words'"):
        Session(exported.path).run({"x": "words"})
    with pytest.raises(RunError, match=r"^session: ONNX Runtime: .*Invalid.* got x \(2, 2\)$"):
        Session(exported.path).run({"x": torch.ones(2, 2)})
    with pytest.raises(FormatError, match="no such file"):
        Session(tmp_path / "none.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"nothing of the kind")
    with pytest.raises(FormatError, match="cannot load"):
        Session(tmp_path / "bad.onnx")
