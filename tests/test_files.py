from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import effformer
from effformer import files
from effformer.checks import FormatError
from effformer.files import (
    DiskError,
    atomic_folder,
    atomic_path,
    check_file,
    check_folder,
    inside,
    mark,
    read_whole,
    write_json,
)

POSIX = pytest.mark.skipif(os.name == "nt", reason="permissions, links and signals of POSIX")
DEAD = subprocess.Popen([sys.executable, "-c", ""])
DEAD.wait()


def write(path: Path, text: str, *kinds: str, force: bool = False) -> None:
    with atomic_path(path, *kinds, force=force) as temporary:
        temporary.write_text(text)


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


# -- what may be replaced --------------------------------------------------------------------------


def test_only_files_that_carry_a_mark_are_replaced(tmp_path: Path) -> None:
    target = tmp_path / "x"
    write(target, mark("report"), "report")
    write(target, "x" * 100_000 + mark("report"), "report")  # at the end of a long one
    write(target, "thesis", "report")
    for kinds in (["report"], ["weights", "report"]):
        with pytest.raises(FormatError, match=r"did not write as .*report; choose .* --force"):
            write(target, "new", *kinds)
    assert target.read_text() == "thesis"
    write(target, "new", "report", force=True)
    assert target.read_text() == "new"
    assert names(tmp_path) == ["x"]


def test_what_came_to_the_place_meanwhile_stays(tmp_path: Path) -> None:
    target = tmp_path / "x"

    def file() -> None:
        with atomic_path(target, "report") as part:
            part.write_text(mark("report"))
            target.write_text("thesis")

    with pytest.raises(FormatError, match="did not write"):
        file()
    assert target.read_text() == "thesis"
    folder = tmp_path / "m"

    def whole() -> None:
        with atomic_folder(folder, marker="a") as new:
            (new / "a").write_text("new")
            folder.mkdir()
            (folder / "thesis").write_text("mine")

    with pytest.raises(FormatError, match="holds other"):
        whole()
    assert names(folder) == ["thesis"]


@POSIX
def test_links_are_written_through_or_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "x").write_text("old")
    for name, to in (("link", "real/x"), ("nowhere", "gone"), ("a", "b"), ("b", "a")):
        (tmp_path / name).symlink_to(to)
    write(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "x").read_text() == "new"
    with pytest.raises(FormatError, match=r"link to .*gone, which does not exist"):
        write(tmp_path / "nowhere", "new")
    with pytest.raises(FormatError, match="leads in a circle"):
        write(tmp_path / "a", "new", force=True)
    with pytest.raises(FormatError, match="leads in a circle"):
        effformer.save_pretrained(effformer.build_model("vit-nano"), tmp_path / "a")
    assert names(tmp_path) == ["a", "b", "link", "nowhere", "real"]


@POSIX
def test_a_folder_behind_a_link_is_replaced_and_the_link_stays(tmp_path: Path) -> None:
    model = effformer.build_model("vit-nano")
    effformer.save_pretrained(model, tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    effformer.save_pretrained(model, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    weights = tmp_path / "real" / "model.safetensors"
    weights.rename(tmp_path / "elsewhere")
    weights.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FormatError, match=r"also holds model\.safetensors"):
        effformer.save_pretrained(model, tmp_path / "link", force=True)
    assert weights.is_symlink()


@POSIX
def test_devices_folders_and_protected_files_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FormatError, match="no regular file"):
        write(tmp_path / "pipe", "x", force=True)
    with pytest.raises(FormatError, match="no regular file"):
        check_file("/dev/null", force=True)
    with pytest.raises(FormatError, match="is a folder"):
        write(tmp_path, "x", force=True)
    (tmp_path / "x").write_text("mine")
    (tmp_path / "x").chmod(0o444)
    with pytest.raises(FormatError, match="write-protected"):
        write(tmp_path / "x", "new")
    write(tmp_path / "x", "new", force=True)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o444


def test_places_below_a_file_are_refused_before_anything_is_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file/new", tmp_path / "file/deep/new"):
        with pytest.raises(DiskError, match="Not a directory"):
            check_file(place)
        with pytest.raises(DiskError, match="Not a directory"):
            check_folder(place, marker="config.json")


def test_the_root_is_a_folder_with_other_files() -> None:
    with pytest.raises(FormatError, match=r"holds other files and no some\.json"):
        check_folder(Path("/"), marker="some.json")


def test_folders_of_others_with_the_same_names_stay(tmp_path: Path) -> None:
    """Other libraries save config.json and model.safetensors as well."""
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    save_file({"w": torch.ones(1)}, tmp_path / "model.safetensors")
    model = effformer.build_model("vit-nano")
    with pytest.raises(FormatError, match=r"config\.json that effformer did not write"):
        effformer.save_pretrained(model, tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == {"w"}
    effformer.save_pretrained(model, tmp_path, force=True)
    assert effformer.load_model(tmp_path).name == "vit-nano"


def test_weights_replace_what_is_worth_no_more(tmp_path: Path) -> None:
    fresh, trained = (effformer.build_model("vit-nano") for _ in range(2))
    assert fresh.drawn
    with torch.no_grad():
        next(trained.parameters()).add_(1)
    assert not trained.drawn
    for save, place in (
        (effformer.save_pretrained, tmp_path / "m"),
        (effformer.save_weights, tmp_path / "w.safetensors"),
    ):
        save(fresh, place)
        save(trained, place)
        save(trained, place)
        with pytest.raises(FormatError, match=r"--force \(force=True in Python\)"):
            save(fresh, place)
        save(fresh, place, force=True)
    effformer.save_pretrained(trained, tmp_path / "m", by="train", force=True)
    with pytest.raises(FormatError, match="a model that 'train' wrote, not 'build'"):
        effformer.save_pretrained(trained, tmp_path / "m", by="build")


# -- permissions, disks, leftovers -----------------------------------------------------------------


@POSIX
def test_new_files_get_what_the_umask_leaves(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        model = effformer.build_model("vit-nano")
        effformer.save_pretrained(model, tmp_path / "m")
        effformer.save_weights(model, tmp_path / "w.safetensors")
        write_json(tmp_path / "x.json", 1)
    finally:
        os.umask(before)
    modes = {p.name: p.stat().st_mode & 0o777 for p in tmp_path.rglob("*")}
    assert modes.pop("m") == 0o750
    assert set(modes.values()) == {0o640}, modes
    (tmp_path / "x.json").chmod(0o600)
    write_json(tmp_path / "x.json", 2)
    assert (tmp_path / "x.json").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError("4096 requested and 512 written"),
        RuntimeError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_said_in_words(tmp_path: Path, error: Exception) -> None:
    target = tmp_path / "x"
    target.write_text("old")

    def half() -> None:
        with atomic_path(target) as part:
            part.write_text("half")
            raise error

    with pytest.raises(DiskError, match=r"x: the disk is full .* free some space"):
        half()
    assert (target.read_text(), names(tmp_path)) == ("old", ["x"])


@pytest.mark.parametrize("stage", ["before", "after"])
@pytest.mark.parametrize("moved", ["x.data", "x"])
def test_an_interruption_of_the_moves_leaves_both_files_or_none(
    moved: str, stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = os.replace

    def interrupted(one: Path, other: Path) -> None:
        hit = other.name == moved
        if not hit or stage == "after":
            replace(one, other)
        if hit:
            raise KeyboardInterrupt

    def both() -> None:
        with atomic_path(tmp_path / "x") as part:
            part.write_text("new")
            part.with_name("x.data").write_text("new")

    (tmp_path / "x").write_text("old")
    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        both()
    new = (moved, stage) == ("x", "after")
    assert names(tmp_path) == (["x", "x.data"] if new else ["x"])
    assert (tmp_path / "x").read_text() == ("new" if new else "old")


def leave(folder: Path, pid: int, *, host: str = "", age: float = 0) -> str:
    path = folder / f".effformer-{host or files.host()}-{pid}-0123abcd"
    path.mkdir()
    (path / "half").write_text("half")
    os.utime(path, (time.time() - age,) * 2)
    return path.name


@POSIX
def test_leftovers_of_killed_processes_are_swept(tmp_path: Path) -> None:
    leave(tmp_path, DEAD.pid)
    leave(tmp_path, os.getpid(), host="00000000", age=8 * 86_400)
    living = leave(tmp_path, os.getpid())
    remote = leave(tmp_path, DEAD.pid, host="11111111")
    (tmp_path / ".effformer-notes").mkdir()
    write(tmp_path / "x", "new")
    assert names(tmp_path) == sorted([living, remote, ".effformer-notes", "x"])


@POSIX
@pytest.mark.parametrize("taken", [False, True])
def test_a_folder_that_a_killed_process_moved_away_comes_back(taken: bool, tmp_path: Path) -> None:
    """Where the system cannot exchange two folders, the place is empty for a moment."""
    name = leave(tmp_path, DEAD.pid)
    for folder, text in ((f"{name}-m", "old"), ("m", "half")):
        (tmp_path / name / folder).mkdir()
        (tmp_path / name / folder / "a").write_text(text)
    if taken:
        (tmp_path / "m").mkdir()
        (tmp_path / "m" / "a").write_text("of another")
    files.sweep(tmp_path)
    assert (tmp_path / "m" / "a").read_text() == ("of another" if taken else "old")
    assert names(tmp_path) == ["m"]


@pytest.mark.parametrize("at", [0, 1])
def test_an_interruption_between_two_renames_loses_nothing(
    at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def put(text: str) -> None:
        with atomic_folder(tmp_path / "m", marker="a") as new:
            (new / "a").write_text(text)

    rename, calls = os.rename, 0

    def interrupted(one: Path, other: Path) -> None:
        nonlocal calls
        rename(one, other)
        calls += one.name == "m"
        if calls > at:
            monkeypatch.undo()
            raise KeyboardInterrupt

    put("old")
    monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        put("new")
    assert (tmp_path / "m" / "a").read_text() == ("new" if at else "old")
    assert names(tmp_path) == ["m"]


# -- two who write ---------------------------------------------------------------------------------


@pytest.mark.parametrize("system", ["exchanges", "renames"])
def test_a_folder_is_exchanged_whole(
    system: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if system == "renames":
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    for text in ("first", "second"):
        with atomic_folder(tmp_path / "m", marker="marker") as new:
            (new / "marker").write_text(text)
        assert (tmp_path / "m" / "marker").read_text() == text
    assert names(tmp_path) == ["m"]


WRITER = """
import sys, time
from pathlib import Path
from effformer.files import atomic_folder
folder, count, start = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
time.sleep(max(0, start - time.time()))
for i in range(count):
    with atomic_folder(folder, marker="a", own=("b",)) as new:
        for name in "ab":
            (new / name).write_text(f"{sys.argv[4]} {i}")
"""


def several_write(tmp_path: Path, count: int, many: int = 2) -> None:
    """Aligned processes save to one place while this one reads it."""
    target = tmp_path / "m"
    with atomic_folder(target, marker="a", own=("b",)) as new:
        for name in "ab":
            (new / name).write_text("first")
    start = str(time.time() + 1)
    words = [sys.executable, "-c", WRITER, str(target), str(count), start]
    writers = [subprocess.Popen([*words, str(i)], stderr=subprocess.PIPE) for i in range(many)]
    seen = set()
    while any(w.poll() is None for w in writers):
        one, other = read_whole(target, lambda: [(target / n).read_text() for n in "ab"])
        assert one == other
        seen.add(one)
    for writer in writers:
        said = writer.communicate()[1]
        assert writer.returncode == 0, said.decode()
    assert len(seen) > 2
    assert names(tmp_path) == ["m"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="others have a moment without it")
def test_two_save_to_one_place_and_readers_find_whole_results(tmp_path: Path) -> None:
    several_write(tmp_path, 40)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="others have a moment without it")
def test_three_hundred_saves_by_several_writers(tmp_path: Path) -> None:
    several_write(tmp_path, 300, many=3)


def test_two_save_where_the_system_cannot_exchange(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    failures: list[BaseException] = []

    def save(name: str) -> None:
        try:
            for _ in range(40):
                with atomic_folder(tmp_path / "m", marker="a", own=("b",)) as new:
                    for file in "ab":
                        (new / file).write_text(name)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=save, args=(name,)) for name in "xy"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert (tmp_path / "m" / "a").read_text() == (tmp_path / "m" / "b").read_text()
    assert names(tmp_path) == ["m"]


def test_a_read_across_an_exchange_is_made_again(tmp_path: Path) -> None:
    def put(text: str) -> None:
        with atomic_folder(tmp_path / "m", marker="a", own=("b",)) as new:
            for name in "ab":
                (new / name).write_text(text)

    put("old")
    pending = [lambda: put("new")]

    def read() -> list[str]:
        first = (tmp_path / "m" / "a").read_text()
        if pending:
            pending.pop()()
        return [first, (tmp_path / "m" / "b").read_text()]

    assert read_whole(tmp_path / "m", read) == ["new", "new"]
    with pytest.raises(FileNotFoundError):
        read_whole(tmp_path / "gone", lambda: (tmp_path / "gone" / "a").read_text())


# Saves one model after the other until it is killed.
VICTIM = """
import sys, torch
torch.set_num_threads(1)
import effformer
from effformer.io import save_pretrained
for depth in range(1, 10_000):
    model = effformer.build_model("vit-nano", depth=1 + depth % 2)
    save_pretrained(model, sys.argv[1])
    print(depth, flush=True)
"""


@pytest.mark.slow
@POSIX
def test_saves_that_are_killed_lose_nothing(tmp_path: Path) -> None:
    target = tmp_path / "m"
    for i in range(8):
        victim = subprocess.Popen(
            [sys.executable, "-c", VICTIM, str(target)], stdout=subprocess.PIPE, text=True
        )
        assert victim.stdout is not None
        victim.stdout.readline()
        time.sleep(0.01 * i)
        victim.send_signal(signal.SIGKILL)
        victim.communicate()
        assert effformer.load_model(target).config.depth in (1, 2)
    effformer.save_pretrained(effformer.build_model("vit-nano"), target)
    assert names(tmp_path) == ["m"]


# -- paths in foreign files ------------------------------------------------------------------------


@POSIX
def test_paths_of_foreign_files_stay_inside(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    (folder / "link").symlink_to("../notes.txt")
    (folder / "w").write_text("weights")
    assert inside(folder, "w") == folder / "w"
    assert inside(folder, "sub/../w") is not None
    for name in (
        "../notes.txt",
        "link",
        str(tmp_path / "notes.txt"),
        "a\0b",
        "sub/../../notes.txt",
    ):
        assert inside(folder, name) is None


def test_what_is_no_json_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"the data are no JSON values .*set is not JSON"):
        write_json(tmp_path / "x.json", {"a": {1}})
    assert list(tmp_path.iterdir()) == []
