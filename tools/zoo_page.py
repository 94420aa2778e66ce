"""Write ``docs/zoo.html`` from ``benchmarks/results/zoo.csv``: one page without outside resources to
filter, sort and plot what was measured, and to copy the line that builds it.
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

from effformer.files import atomic_path

ROOT = Path(__file__).resolve().parent.parent
SOURCE, PAGE = ROOT / "benchmarks" / "results" / "zoo.csv", ROOT / "docs" / "zoo.html"
FACTS = ("attn", "layers", "masks", "rotary", "cross", "streaming", "packed", "cost", "paper")
QUALITY = {"vit": "vit_accuracy", "dit": "dit_distance", "recall": "recall", "nodes": "onnx_nodes"}
"""Names on the page -> columns, empty where a form has none."""


def forms() -> list[dict[str, Any]]:
    """One entry a form, with its numbers by length."""
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    with SOURCE.open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            key = row["attn"], row["layers"], row["causal"]
            known = {name: float(row[column]) for name, column in QUALITY.items() if row[column]}
            facts = {name: row[name] for name in FACTS} | known
            one = found.setdefault(key, {**facts, "causal": row["causal"] == "True", "at": {}})
            one["at"][int(row["tokens"])] = {
                "ms": float(row["milliseconds"]), "memory": int(row["memory"]),
                "macs": float(row["macs"] or 0), "parameters": float(row["parameters"]),
                "state": float(row["state"] or 0),
            }  # fmt: skip
    return list(found.values())


def render() -> str:
    """The page."""
    data = json.dumps(forms(), separators=(",", ":")).replace("</", "<\\/")
    template = (Path(__file__).parent / "zoo_page.html").read_text(encoding="utf-8")
    return template.replace("/*DATA*/[]", data)


if __name__ == "__main__":
    if sys.argv[1:] == ["--check"]:
        stale = PAGE.read_text(encoding="utf-8") != render()
        sys.exit(f"{PAGE.name} is out of date: python tools/zoo_page.py" if stale else 0)
    with atomic_path(PAGE) as path:
        path.write_text(render(), encoding="utf-8")
