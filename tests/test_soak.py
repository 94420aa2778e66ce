"""Nothing grows, however long a process works."""

from __future__ import annotations

import gc
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from effformer.compress import quantize
from torch import nn

import effformer
from effformer import registry

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="counts pages and open files in /proc"),
]
CYCLES, FORWARDS = 500, 4000
MARGIN = 16 * 2**20
"""Growth of the resident memory that is the allocator's: it moves in steps of some megabytes. A leak
of the smallest model's weights, 250 kB in every cycle, is 60 MB in the second half.
"""
MODELS = ("sit-nano", "vit-nano", "bert-tiny")
SCHEMES = ("int8", "int4", "nf4")


def counted() -> dict[str, int]:
    """What must stay as it is."""
    gc.collect()
    compiled = (
        sys.modules["torch._dynamo.utils"].counters if "torch._dynamo.utils" in sys.modules else {}
    )
    hooks = [
        v for k, v in vars(nn.modules.module).items() if k.startswith("_global") and "hooks" in k
    ]
    return {
        "open files": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
        "threads of the system": len(os.listdir("/proc/self/task")),
        "entries": sum(len(kind) for kind in registry.KINDS.values()),
        "hooks": sum(len(each) for each in hooks if isinstance(each, dict)),
        "modules": len(sys.modules),
        "compilations": sum(sum(c.values()) for c in compiled.values()),
        "objects": len(gc.get_objects()),
    }


def resident() -> int:
    """Bytes of memory that the process has."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def stays(work: Callable[[int], Any], count: int) -> None:
    """Work ``count`` times; what the second half leaves must be nothing."""
    for i in range(count // 2):
        work(i)
    before, memory = counted(), resident()
    for i in range(count // 2):
        work(i)
    after, grown = counted(), resident() - memory
    objects = after.pop("objects") - before.pop("objects")
    assert after == before
    assert objects < count // 4, f"{objects} objects more"
    assert grown < MARGIN, f"{grown / 2**20:.0f} MB more"


def test_quantizing_saving_and_loading_leave_nothing(tmp_path: Path) -> None:
    kinds = [(name, scheme) for name in MODELS for scheme in SCHEMES]

    def cycle(i: int) -> None:
        name, scheme = kinds[i % len(kinds)]
        model = effformer.build_model(name, depth=1).eval()
        inputs = model.example_inputs(1)
        small, _ = quantize(model, scheme)
        effformer.save_pretrained(small, tmp_path / "m", force=True)
        again = effformer.load_model(tmp_path / "m")
        with torch.no_grad():
            again(**inputs)

    stays(cycle, CYCLES)
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_forwards_and_backwards_leave_nothing() -> None:
    models = [effformer.build_model(name, depth=1) for name in MODELS]
    models += [effformer.build_model("vit-nano", depth=1, attn=attn) for attn in ("flow", "linear")]
    models += [effformer.build_model("lmuformer-tiny", depth=1)]
    inputs = [model.example_inputs(1) for model in models]

    def forward(i: int) -> None:
        model, given = models[i % len(models)], inputs[i % len(models)]
        learns = i % 4 == 0
        with torch.set_grad_enabled(learns):
            out = effformer.calls.outputs(model(**given))
        if learns:
            sum(y.float().sum() for y in out if y.is_floating_point()).backward()
            model.zero_grad()

    stays(forward, FORWARDS)


@pytest.mark.parametrize("what", ["objects", "memory", "files"])
def test_leaks_are_found(what: str, tmp_path: Path) -> None:
    kept: list[Any] = []

    def leaks(i: int) -> None:
        if what == "memory":
            kept.append(bytearray(250_000))
        elif what == "objects":
            kept.append([i])
        else:
            kept.append((tmp_path / "x").open("w"))

    message = {"objects": "objects more", "memory": "MB more", "files": "open files"}[what]
    try:
        with pytest.raises(AssertionError, match=message):
            stays(leaks, 400)
    finally:
        for file in kept if what == "files" else ():
            file.close()
