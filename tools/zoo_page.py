"""Write ``docs/zoo.html`` from ``benchmarks/results/zoo.csv``: one page without outside resources to
filter, sort and plot what was measured, and to copy the line that builds it.
"""

from __future__ import annotations

import csv
import json
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


def main() -> None:
    """Write the page."""
    data = json.dumps(forms(), separators=(",", ":")).replace("</", "<\\/")
    template = (Path(__file__).parent / "zoo_page.html").read_text(encoding="utf-8")
    with atomic_path(PAGE) as path:
        path.write_text(template.replace("/*DATA*/[]", data), encoding="utf-8")


if __name__ == "__main__":
    main()
