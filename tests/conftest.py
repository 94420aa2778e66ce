from __future__ import annotations

import copy
import functools
import gc
import sys
from collections.abc import Generator
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden",
        default=str(Path(__file__).parent / "golden"),
        help="folder of golden sets for tests/conformance",
    )


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, None, None]:
    """Modules and test items live to the end: the collector need not look at them again and again."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.freeze()


@pytest.fixture(autouse=True)
def _deterministic() -> None:
    import torch  # not above: the process that only hands out tests does without

    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _operators_are_read_once() -> Generator[None, None, None]:
    """The exporter parses the sources of its 500 operators for every graph, half of the time that a
    small one takes.
    """
    with pytest.MonkeyPatch.context() as patch:
        if "effformer.export.onnx" in sys.modules:
            from torch.onnx._internal.exporter._registration import ONNXRegistry

            read = functools.cache(ONNXRegistry.from_torchlib)

            def fresh(**opset: int) -> ONNXRegistry:
                registry = copy.copy(read(**opset))
                registry.functions = {name: [*each] for name, each in registry.functions.items()}
                return registry

            patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(fresh))
        yield
