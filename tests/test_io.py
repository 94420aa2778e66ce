from __future__ import annotations

import json
import os
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import effformer
from effformer.checks import FormatError
from effformer.io import atomic_folder, atomic_path, read_json, read_weights, write_json


def small(**options: Any) -> Any:
    return effformer.build_model("vit-nano", **options).eval()


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(model: nn.Module, state: dict[str, Tensor]) -> bool:
    return all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def left_behind(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir() if p.name.startswith(".")]


# -- folders -------------------------------------------------------------------------------------


def test_a_saved_model_comes_back(tmp_path: Path) -> None:
    model = small(attn={"name": "flow", "eps": 1e-5}, layers={"0": {"ffn": "swiglu"}})
    folder = effformer.save_pretrained(model, tmp_path / "deep" / "model")
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
    again = effformer.load_model(folder)
    assert (again.config, again.name, again.training) == (model.config, "vit-nano", False)
    assert same(again, state_of(model))
    assert left_behind(tmp_path / "deep") == []


def test_saving_again_replaces_the_model_and_loses_nothing_else(tmp_path: Path) -> None:
    effformer.save_pretrained(small(), tmp_path / "m")
    effformer.save_pretrained(small(depth=1), tmp_path / "m")
    assert effformer.load_model(tmp_path / "m").config.depth == 1
    (tmp_path / "m" / "notes.txt").write_text("x")
    with pytest.raises(FormatError, match=r"also holds notes\.txt; move it away or choose another"):
        effformer.save_pretrained(small(), tmp_path / "m")
    assert (tmp_path / "m" / "notes.txt").read_text() == "x"
    assert effformer.load_model(tmp_path / "m").config.depth == 1


def test_foreign_folders_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FormatError, match=r"holds other files and no config\.json"):
        effformer.save_pretrained(small(), tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    with pytest.raises(FormatError, match="is a file; choose a folder"):
        effformer.save_pretrained(small(), tmp_path / "notes.txt")
    with pytest.raises(FormatError, match="cannot be written"):
        effformer.save_pretrained(small(), tmp_path / "notes.txt" / "m")


def test_a_failed_save_keeps_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = small()
    effformer.save_pretrained(first, tmp_path / "m")

    def broken(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("effformer.io.write_json", broken)
    with pytest.raises(OSError, match="No space left"):
        effformer.save_pretrained(small(depth=1), tmp_path / "m")
    monkeypatch.undo()
    assert same(effformer.load_model(tmp_path / "m"), state_of(first))
    assert left_behind(tmp_path) == []


def test_a_failed_rename_puts_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "m"
    target.mkdir()
    (target / "marker").write_text("old")
    rename = os.rename

    def broken(one: Path, other: Path) -> None:
        if other == target and one.name == target.name:
            raise OSError(5, "Input/output error")
        rename(one, other)

    monkeypatch.setattr("effformer.files._exchange", lambda one, other: False)
    monkeypatch.setattr(os, "rename", broken)
    with pytest.raises(OSError, match="Input/output"), atomic_folder(target, marker="marker") as t:
        (t / "marker").write_text("new")
    monkeypatch.undo()
    assert (target / "marker").read_text() == "old"
    assert left_behind(tmp_path) == []


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_half_written_folders(tmp_path: Path, missing: str) -> None:
    effformer.save_pretrained(small(), tmp_path / "m")
    (tmp_path / "m" / missing).unlink()
    with pytest.raises(FormatError, match=missing.replace(".", r"\.")):
        effformer.load_model(tmp_path / "m")


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"no config\.json; expected a folder written by"):
        effformer.load_model(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"format": 99},
            FormatError,
            r"in format 99, this is effformer .* pip install -U effformer",
        ),
        ({"format": "two"}, FormatError, "is not an effformer config; format is 'two', expected"),
        ({"format": True}, FormatError, "format is True, expected int"),
        ({"format": 0}, FormatError, "format or transforms are damaged"),
        ({"name": 5}, FormatError, "name is 5, expected str"),
        ({"transforms": 5}, FormatError, "transforms is 5, expected list"),
        ({"transforms": [5]}, FormatError, "format or transforms are damaged"),
        (
            {"transforms": [{"kind": "pruned"}]},
            FormatError,
            "'pruned': unknown; known: 'lora', 'prune', 'quantize'",
        ),
        ({"transforms": [{"kind": "quantize"}]}, FormatError, "expected a scheme and a list"),
        ({"config": [1]}, FormatError, "is not an effformer config"),
        ({"family": "vti"}, ValueError, "unknown model family 'vti'; did you mean 'vit'"),
        ({"family": None}, FormatError, "is not an effformer config"),
        ({"config": {"dim": 48}}, ValueError, "missing options"),
        ({"config": {"dim": 48, "depth": 2, "heads": 2, "wings": 2}}, ValueError, "option 'wings'"),
        ({"config": {"dim": 40, "depth": 2, "heads": 2}}, FormatError, "does not fit vit-nano"),
    ],
)
def test_changed_configs(
    tmp_path: Path, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    effformer.save_pretrained(small(), tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(error, match=message):
        effformer.load_model(tmp_path / "m")


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "\x00", '"config"'])
def test_configs_that_are_none(tmp_path: Path, text: str) -> None:
    effformer.save_pretrained(small(), tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text(text)
    with pytest.raises(FormatError, match="is not"):
        effformer.load_model(tmp_path / "m")


# -- single files --------------------------------------------------------------------------------


def test_atomic_path_leaves_nothing_on_failure(tmp_path: Path) -> None:
    target = tmp_path / "x.json"
    write_json(target, {"a": 1})

    def write_half() -> None:
        with atomic_path(target) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert read_json(target) == {"a": 1}
    assert left_behind(tmp_path) == []
    assert oct(target.stat().st_mode)[-3:] == "644"
    with pytest.raises(FormatError, match="is a folder; give the name of a file"):
        effformer.save_weights(small(), tmp_path)
    with pytest.raises(FormatError, match="cannot be written"):
        effformer.save_weights(small(), target / "w.safetensors")


def test_read_json_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="no such file"):
        read_json(tmp_path / "x.json")
    (tmp_path / "x.json").write_bytes(b"\xff\xfe{")
    with pytest.raises(FormatError, match="is not readable JSON"):
        read_json(tmp_path / "x.json")


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_truncated_files(tmp_path: Path, suffix: str) -> None:
    model, path = small(), tmp_path / f"w{suffix}"
    if suffix == ".pt":
        torch.save(model.state_dict(), path)
    else:
        save_file(model.state_dict(), path)
    whole, before = path.read_bytes(), state_of(model)
    for size in (0, 1, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(FormatError, match=r"w\.\w+: "):
            effformer.load_weights(model, path)
    assert same(model, before)


@pytest.mark.parametrize(
    "content", [b"hello\n", b"\x80\x04.", b"PK\x03\x04rubbish", bytes(range(256))]
)
@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".bin"])
def test_foreign_files(tmp_path: Path, content: bytes, suffix: str) -> None:
    path = tmp_path / f"w{suffix}"
    path.write_bytes(content)
    with pytest.raises(FormatError):
        effformer.load_weights(small(), path)


class Evil:
    def __reduce__(self) -> Any:
        return (os.mkdir, (os.environ["EVIL_TARGET"],))


@pytest.mark.parametrize(
    "wrap", [lambda x: x, lambda x: {"model": {"w": torch.ones(1)}, "args": x}]
)
@pytest.mark.parametrize("write", ["torch", "pickle"])
def test_pickles_are_never_executed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrap: Any, write: str
) -> None:
    monkeypatch.setenv("EVIL_TARGET", str(tmp_path / "owned"))
    path = tmp_path / "w.pt"
    if write == "torch":
        torch.save(wrap(Evil()), path)
    else:
        path.write_bytes(pickle.dumps(wrap(Evil())))
    with pytest.raises(FormatError, match="reads data, not code"):
        effformer.load_weights(small(), path)
    assert not (tmp_path / "owned").exists()


def test_archives_that_unpack_to_gigabytes(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data/0", bytes(1000))
    raw = bytearray(path.read_bytes())
    struct.pack_into("<I", raw, raw.index(b"PK\x01\x02") + 24, 3 * 2**30)
    path.write_bytes(raw)
    with pytest.raises(FormatError, match=r"would unpack from .* to 3,221,225,472 bytes"):
        read_weights(path)


def test_files_without_tensors(tmp_path: Path) -> None:
    torch.save([torch.ones(1)], tmp_path / "list.pt")
    with pytest.raises(FormatError, match="holds a list, expected a state dict"):
        effformer.load_weights(small(), tmp_path / "list.pt")
    torch.save({"epoch": 3}, tmp_path / "none.pt")
    with pytest.raises(FormatError, match="holds no tensors by name"):
        effformer.load_weights(small(), tmp_path / "none.pt")
    with pytest.raises(FormatError, match="no such file"):
        effformer.load_weights(small(), tmp_path / "missing.safetensors")


# -- weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"state_dict": s},
        lambda s: {"model": s, "optimizer": {"lr": torch.ones(1)}, "epoch": 3},
        lambda s: {"model": {k: v + 1 for k, v in s.items()}, "ema": s},
        lambda s: {f"module.{k}": v for k, v in s.items()},
        lambda s: {f"module._orig_mod.{k}": v for k, v in s.items()},
        lambda s: {"state_dict": {f"_orig_mod.module.{k}": v for k, v in s.items()}},
    ],
)
def test_wrappers_are_taken_off(tmp_path: Path, wrap: Any) -> None:
    source, model = small(), small()
    torch.save(wrap(source.state_dict()), tmp_path / "w.pt")
    report = effformer.load_weights(model, tmp_path / "w.pt")
    assert report.layout == "effformer"
    assert same(model, state_of(source))


def test_half_precision_files_fill_full_precision_models() -> None:
    source, model = small(), small()
    effformer.load_weights(model, {k: v.half() for k, v in source.state_dict().items()})
    assert model.class_token.dtype == torch.float32
    torch.testing.assert_close(model.pos_embed, source.pos_embed.half().float())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("norm.weight"), r"does not fit vit-nano: missing: norm\.weight"),
        (lambda s: s.update(extra=torch.ones(1)), "unexpected: extra"),
        (
            lambda s: s.update({"norm.weight": torch.ones(7)}),
            r"wrong shapes: norm\.weight is \(7,\), the model has \(48,\)",
        ),
        (
            lambda s: s.update({"head.linear.weight": torch.ones(48, 10)}),
            r"head\.linear\.weight is \(48, 10\), the model has \(10, 48\)",
        ),
        (lambda s: [s.pop(k) for k in list(s)[:9]], "and 5 more"),
    ],
)
def test_nothing_changes_unless_everything_fits(change: Any, message: str) -> None:
    model, state = small(), state_of(small())
    before = state_of(model)
    change(state)
    with pytest.raises(FormatError, match=message):
        effformer.load_weights(model, state)
    assert same(model, before)


def test_loose_loading_reports() -> None:
    model, state = small(), state_of(small())
    value = state.pop("norm.weight")
    state["extra"] = torch.ones(1)
    state["pos_embed"] = state["pos_embed"][0]
    given = set(state)
    report = effformer.load_weights(model, state, strict=False)
    assert (report.missing, report.unexpected) == (("norm.weight",), ("extra",))
    assert report.reshaped == ("pos_embed",)
    assert set(state) == given
    assert state["pos_embed"].dim() == 2
    assert model.norm.weight.equal(value)
    torch.testing.assert_close(model.pos_embed[0], state["pos_embed"])


def test_layouts_by_name(tmp_path: Path) -> None:
    source, model = small(), small()
    path = effformer.save_weights(source, tmp_path / "w.safetensors", "timm")
    assert "cls_token" in load_file(path)
    assert effformer.load_weights(model, path, "timm").layout == "timm"
    assert same(model, state_of(source))
    with pytest.raises(ValueError, match="unknown layout 'tim'; did you mean 'timm'"):
        effformer.load_weights(model, path, "tim")
    with pytest.raises(ValueError, match="unknown layout 'official'"):
        effformer.save_weights(model, tmp_path / "x.safetensors", "official")
    with pytest.raises(FormatError, match="does not fit"):
        effformer.load_weights(model, path, "effformer")
    layout = model.LAYOUTS[-1]
    assert effformer.load_weights(model, path, layout).layout == layout.name
    assert left_behind(tmp_path) == []


def test_unrecognised_layouts() -> None:
    with pytest.raises(
        FormatError,
        match=r"keys such as conv\.weight fit none of the layouts of vit-nano \(effformer",
    ):
        effformer.load_weights(small(), {"conv.weight": torch.ones(1)})


def test_parts_load_and_save_alone(tmp_path: Path) -> None:
    source, part = small().blocks[0], small().blocks[0]
    path = effformer.save_weights(source, tmp_path / "block.safetensors")
    effformer.load_weights(part, path)
    assert same(part, state_of(source))
    with pytest.raises(FormatError, match="does not fit PreNorm: missing"):
        effformer.load_weights(part, {"attn.norm.weight": torch.ones(48)}, "effformer")


def test_reading_does_not_touch_the_source() -> None:
    state = {"module.a": torch.ones(1), "module.b": torch.ones(2)}
    assert set(read_weights(state)) == {"a", "b"}
    assert set(state) == {"module.a", "module.b"}
