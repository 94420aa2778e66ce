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
FACTS = ("masks", "rotary", "cross", "streaming", "packed", "cost", "paper")


def forms() -> list[dict[str, Any]]:
    """One entry a form, with its numbers by length."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    with SOURCE.open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            key = row["attn"], row["causal"]
            facts = {name: row[name] for name in FACTS}
            one = found.setdefault(
                key,
                {"attn": row["attn"], "causal": row["causal"] == "True", **facts, "at": {}},
            )
            one["at"][int(row["tokens"])] = {
                "ms": float(row["milliseconds"]), "memory": int(row["memory"]),
                "macs": int(row["macs"] or 0), "parameters": int(row["parameters"]),
                "state": int(row["state"] or 0),
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
