from __future__ import annotations

import copy
import functools
import gc
import sys
from collections.abc import Callable, Generator
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


@functools.cache
def _seeding() -> Callable[[int], object]:
    """For accelerators that are not there, `torch.manual_seed` writes down three call stacks for
    later: a millisecond a test, and memory that is never given back.
    """
    import torch  # not above: the process that only hands out tests does without

    return torch.manual_seed if torch.cuda.is_available() else torch.default_generator.manual_seed


@pytest.fixture(autouse=True)
def _deterministic() -> None:
    import torch

    torch.set_num_threads(1)
    _seeding()(0)


@pytest.fixture(autouse=True, scope="session")
def _operators_are_read_once() -> Generator[None, None, None]:
    """The exporter parses the sources of its 500 operators for every graph, half of the time that a
    small one takes, and looks up all composite operators of torch 60 times, a seventh of it.
    """
    with pytest.MonkeyPatch.context() as patch:
        if "effformer.export.onnx" in sys.modules:
            from torch._export import utils
            from torch.onnx._internal.exporter._registration import ONNXRegistry

            looked_up = functools.cache(utils._materialize_cpp_cia_ops)
            patch.setattr(utils, "_materialize_cpp_cia_ops", looked_up)

            read = functools.cache(ONNXRegistry.from_torchlib)

            def fresh(**opset: int) -> ONNXRegistry:
                registry = copy.copy(read(**opset))
                registry.functions = {name: [*each] for name, each in registry.functions.items()}
                return registry

            patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(fresh))
        yield
