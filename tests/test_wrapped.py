"""Every public function does to a wrapped model what it does to the model inside."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from closeness import assert_close
from effformer.compress import acmize, dequantize, optimize, quantize, quantize_
from effformer.export import export_bundle, export_onnx, verify_onnx
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.optim.swa_utils import AveragedModel

import effformer
from effformer.calls import bind
from effformer.checks import CapabilityError
from effformer.io import read_weights
from effformer.profile import latency, profile
from effformer.train import EMA, Classification, Dataset, TrainConfig, load_checkpoint, train
from effformer.wrapped import bare, plain_keys, unwrapped

CPU = torch.device("cpu")
pytestmark = [  # what torch says of itself
    pytest.mark.filterwarnings("ignore:When using ``NO_SHARD``"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]


@pytest.fixture(scope="module", autouse=True)
def _one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def _blocks(wrap: Callable[[nn.Module], nn.Module]) -> Callable[[Any], nn.Module]:
    def inside(model: Any) -> nn.Module:
        for i, block in enumerate(model.blocks):
            model.blocks[i] = wrap(block)
        return model  # type: ignore[no-any-return]

    return inside


def _compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


def _sharded(model: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old, says torch; and that one process divides nothing
        return FullyShardedDataParallel(model, device_id=CPU, use_orig_params=True)


def _method(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


WRAPPERS: dict[str, Callable[[Any], nn.Module]] = {
    "compile": _compiled,
    "compile()": _method,
    "compiled blocks": _blocks(_compiled),
    "DataParallel": nn.DataParallel,
    "DDP": nn.parallel.DistributedDataParallel,
    "FSDP": _sharded,
    "FSDP blocks": lambda model: _sharded(_blocks(_sharded)(model)),
    "AveragedModel": AveragedModel,
    "checkpoint": checkpoint_wrapper,
    "checkpointed blocks": _blocks(checkpoint_wrapper),
    "DDP of compiled of checkpointed": lambda model: nn.parallel.DistributedDataParallel(
        _compiled(_blocks(checkpoint_wrapper)(model))
    ),
}
every = pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)


def _small(name: str = "vit-nano", seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return effformer.build_model(name, depth=1)


def _state(model: nn.Module) -> dict[str, Tensor]:
    with unwrapped(model) as plain:
        return {key: value.clone() for key, value in plain.state_dict().items()}


def _equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@every
def test_wrappers_come_off_and_back(wrap: Callable[[Any], nn.Module]) -> None:
    model = _small()
    names = [name for name, _ in model.named_modules()]
    tensors, inside = list(model.state_dict()), [type(module) for module in model.modules()]
    wrapped = wrap(model)
    before = [type(module) for module in wrapped.modules()]
    with unwrapped(wrapped) as plain:
        assert plain is bare(wrapped)
        assert [type(module) for module in plain.modules()] == inside
        assert [name for name, _ in plain.named_modules()] == names
        assert list(plain.state_dict()) == tensors
        assert all(module._compiled_call_impl is None for module in plain.modules())
    assert [type(module) for module in wrapped.modules()] == before


@every
def test_weights_are_saved_and_loaded(wrap: Callable[[Any], nn.Module], tmp_path: Path) -> None:
    want, given = _small(), _small(seed=1)
    model = wrap(copy.deepcopy(want))
    for layout in ("effformer", "timm"):
        path = effformer.save_weights(model, tmp_path / f"{layout}.safetensors", layout)
        torch.save(wrap(copy.deepcopy(want)).state_dict(), tmp_path / "w.pt")
        target = wrap(copy.deepcopy(given))
        assert effformer.load_weights(target, path).layout == layout
        assert _equal(_state(target), want.state_dict())
    # what torch itself makes of a wrapped model's state dict
    assert effformer.load_weights(given, tmp_path / "w.pt").missing == ()
    assert _equal(_state(given), want.state_dict())
    folder = effformer.save_pretrained(model, tmp_path / "folder")
    again = effformer.load_model(folder)
    assert again.config == want.config
    assert _equal(again.state_dict(), want.state_dict())


@every
def test_copies_are_made_of_the_model_inside(wrap: Callable[[Any], nn.Module]) -> None:
    want = _small().eval()
    model = wrap(copy.deepcopy(want))
    x = want.example_inputs()
    small, report = quantize(want, "int8", inputs=x)
    same, said = quantize(model, "int8", inputs=x)
    assert said == report
    assert type(same) is type(want)
    assert same.transforms == small.transforms
    assert _equal(same.state_dict(), small.state_dict())
    quantize_(model, "int8")
    assert _equal(_state(model), small.state_dict())
    assert bare(model).transforms == small.transforms
    assert _equal(dequantize(model).state_dict(), dequantize(small).state_dict())

    model = wrap(copy.deepcopy(want))
    torch.manual_seed(0)
    adaptive, changed = acmize(want)
    torch.manual_seed(0)
    other, again = acmize(model)
    assert again == changed
    assert _equal(other.state_dict(), adaptive.state_dict())
    assert_close(optimize(model)(**x), want(**x), rtol=1e-4, atol=1e-5)


@every
def test_it_is_measured(wrap: Callable[[Any], nn.Module]) -> None:
    want = _small().eval()
    model = wrap(copy.deepcopy(want))
    assert profile(model) == profile(want)
    timed = latency(model, warmup=0, runs=1)
    assert (timed.name, timed.runs) == ("vit-nano", 1)


_SOON = ("compiled blocks", "DDP of compiled of checkpointed", "FSDP blocks")


@pytest.mark.parametrize(
    "wrap",
    [
        pytest.param(wrap, id=name, marks=() if name in _SOON else pytest.mark.slow)
        for name, wrap in WRAPPERS.items()
    ],
)
def test_it_is_exported(wrap: Callable[[Any], nn.Module], tmp_path: Path) -> None:
    want = _small().eval()
    model = wrap(copy.deepcopy(want))
    report = export_onnx(model, tmp_path / "m.onnx", dynamic=None)
    assert report.parity is not None
    assert report.parity.passed
    expected = export_onnx(want, tmp_path / "n.onnx", dynamic=None).graph
    assert replace(report.graph, path=expected.path) == expected
    assert verify_onnx(tmp_path / "n.onnx", model).passed


@pytest.mark.slow
@pytest.mark.parametrize("name", ["compile", "DDP", "checkpointed blocks"])
def test_a_bundle_is_that_of_the_model_inside(name: str, tmp_path: Path) -> None:
    model = WRAPPERS[name](_small("sit-nano"))
    report = export_bundle(model, tmp_path / "bundle", verify=False)
    assert report.folder == tmp_path / "bundle"


def _data() -> Dataset:
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(16, 1, 8, 8, generator=draws)
    y = torch.randint(0, 10, (16,), generator=draws)
    return Dataset("random", {"x": x, "y": y}, classes=tuple(map(str, range(10))))


@every
def test_a_run_goes_on_with_or_without_wrappers(
    wrap: Callable[[Any], nn.Module], tmp_path: Path
) -> None:
    config = TrainConfig(steps=4, batch=4, warmup=0, weight_decay=0.1)

    def run(model: nn.Module, out: Path) -> dict[str, Tensor]:
        train(
            model,
            _data(),
            Classification(),
            config,
            out=out,
            resume=True,
            save_every=2,
        )
        return _state(model)

    want = run(_small(), tmp_path / "plain")
    model = wrap(_small())
    got = run(model, tmp_path / "wrapped")
    assert got.keys() == want.keys()
    for key in want:
        assert_close(got[key], want[key], rtol=1e-4, atol=1e-5)
    newest = tmp_path / "wrapped" / "checkpoints" / "step-00000004.safetensors"
    newest.unlink()
    again = run(wrap(_small(seed=5)), tmp_path / "wrapped")  # from step 2
    assert _equal(again, got)
    newest.unlink()
    for key, value in run(_small(seed=5), tmp_path / "wrapped").items():
        assert_close(value, want[key], rtol=1e-4, atol=1e-5)
    target = wrap(_small(seed=5))
    assert load_checkpoint(tmp_path / "plain", target) == 4
    assert _equal(_state(target), want)


@every
def test_averages_have_the_names_of_the_model_inside(wrap: Callable[[Any], nn.Module]) -> None:
    model = _small()
    ema = EMA(wrap(copy.deepcopy(model)), 0.5)
    assert ema.shadow.keys() == EMA(model, 0.5).shadow.keys()
    ema.update(model)


@every
def test_its_own_examples_and_arguments(wrap: Callable[[Any], nn.Module]) -> None:
    want = _small()
    call = bind(wrap(_small()), where="here")
    assert list(call.tensors) == list(want.example_inputs())


@pytest.mark.parametrize(
    ("keys", "own", "plain"),
    [
        (["blocks.0._orig_mod.w", "b"], [], ["blocks.0.w", "b"]),
        (["_orig_mod.module.w", "_orig_mod.module.b"], [], ["w", "b"]),
        (["module._fsdp_wrapped_module.a._checkpoint_wrapped_module.w"], [], ["a.w"]),
        (["n_averaged", "module.w"], [], ["w"]),
        (["n_averaged", "w"], [], ["n_averaged", "w"]),
        (["module.w", "module.b"], ["module.w", "module.b"], ["module.w", "module.b"]),
        (
            ["module.module.w", "module.module.b"],
            ["module.w", "module.b"],
            ["module.w", "module.b"],
        ),
        (["n_averaged", "module.w"], ["n_averaged", "module.w"], ["n_averaged", "module.w"]),
        (["blocks.0.module.w", "b"], ["blocks.0.w", "b"], ["blocks.0.w", "b"]),
        (["a.module.w", "b"], ["a.module.w", "b"], ["a.module.w", "b"]),
        (["submodule.w", "my_orig_mod.b"], [], ["submodule.w", "my_orig_mod.b"]),
    ],
)
def test_names_of_wrappers_leave_keys(keys: list[str], own: list[str], plain: list[str]) -> None:
    assert list(plain_keys(keys, own).values()) == plain


def test_a_model_may_call_its_own_child_module(tmp_path: Path) -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(2, 2)

    source, model = Outer(), Outer()
    assert bare(source) is source
    effformer.save_weights(source, tmp_path / "w.safetensors")
    for state in (tmp_path / "w.safetensors", AveragedModel(source).state_dict()):
        nn.init.zeros_(model.module.weight)
        effformer.load_weights(model, state)
        assert torch.equal(model.module.weight, source.module.weight)
    assert set(read_weights(AveragedModel(nn.Linear(2, 2)).state_dict())) == {"weight", "bias"}


def test_divided_parameters_are_refused_in_words() -> None:
    mesh = dist.init_device_mesh("cpu", (1,))
    model = fully_shard(_small(), mesh=mesh)
    with pytest.raises(CapabilityError, match="get_model_state_dict"):
        quantize(model, "int8")
