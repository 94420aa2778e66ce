"""Write models/sizes.json: parameters, multiply-adds of one sample and its inputs, for every model.

`effformer list models` shows them without building 170 models. They are counted on the meta device.

Usage: python tools/sizes.py [--check [NAME ...]]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from effformer import registry
from effformer.profile import count_parameters, profile

PATH = Path(__file__).resolve().parent.parent / "models" / "sizes.json"


def size(name: str) -> dict[str, Any]:
    """What is written of one model."""
    entry = registry.model.get(name)
    with torch.device("meta"):
        model = entry.build(entry.preset, name=entry.name)
    given = model.example_inputs(1)
    return {
        "parameters": count_parameters(model),
        "macs": profile(model, given, memory=False).total,
        "inputs": {key: list(x.shape[1:]) for key, x in given.items()},
    }


def render(sizes: dict[str, Any]) -> str:
    """One line for every model."""
    lines = [f"  {json.dumps(name)}: {json.dumps(sizes[name])}" for name in sorted(sizes)]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def stale(names: list[str]) -> list[str]:
    """Names whose line is missing, wrong, or of no model."""
    written = json.loads(PATH.read_text(encoding="utf-8"))
    every = registry.model.names()
    wrong = [*({*written} ^ {*every}), *(n for n in names if written.get(n) != size(n))]
    return sorted({*wrong})


def main(arguments: list[str]) -> int:
    """Write the file, or with ``--check`` compare it; 1 means that it is out of date."""
    torch.set_num_threads(1)
    if arguments[:1] == ["--check"]:
        if wrong := stale(arguments[1:] or registry.model.names()):
            print(f"models/sizes.json is out of date for {', '.join(wrong)}: python tools/sizes.py")
        return int(bool(wrong))
    PATH.write_text(render({name: size(name) for name in registry.model.names()}), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
