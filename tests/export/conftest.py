from __future__ import annotations

import pytest
import torch
from effformer.export import BundleReport, ExportReport, export_bundle, export_onnx

from .networks import Flow, Mlp


@pytest.fixture(scope="session")
def mlp() -> Mlp:
    torch.manual_seed(0)
    return Mlp()


@pytest.fixture(scope="session")
def exported(mlp: Mlp, tmp_path_factory: pytest.TempPathFactory) -> ExportReport:
    return export_onnx(mlp, tmp_path_factory.mktemp("mlp") / "mlp.onnx", torch.randn(2, 5, 32))


@pytest.fixture(scope="session")
def flow() -> Flow:
    torch.manual_seed(0)
    return Flow()


@pytest.fixture(scope="session")
def bundle(flow: Flow, tmp_path_factory: pytest.TempPathFactory) -> BundleReport:
    folder = tmp_path_factory.mktemp("flow") / "bundle"
    return export_bundle(
        flow, folder, shape=(1, 8, 8), num_classes=3, null_label=3, convention="effformer"
    )
