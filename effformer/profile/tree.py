"""The modules of a profile as a tree in which equal neighbours are one node."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from .tables import amount, table

__all__ = ["Node", "module_tree", "tree_text"]


@dataclass(frozen=True, slots=True)
class Node:
    """A module, or several numbered neighbours that cost the same.

    Attributes:
        label: name; ``"0-11"`` for merged neighbours, ``"attn.part"`` where one child does it all.
        macs: multiply-adds of all merged modules together, children included.
        count: number of merged modules.
        children: what is inside one of them; their costs are those of one.
    """

    label: str
    macs: int
    count: int
    children: tuple[Node, ...]

    @property
    def each(self) -> int:
        """Multiply-adds of one of the merged modules."""
        return self.macs // self.count


def module_tree(by_module: Mapping[str, int], name: str) -> Node:
    """Build the tree from paths; modules without multiply-adds are left out."""
    children: dict[str, list[str]] = {}
    for path, count in by_module.items():
        if path and count:
            children.setdefault(path.rpartition(".")[0], []).append(path)
    return _node("", name, by_module, children)


def _node(
    path: str, label: str, by_module: Mapping[str, int], children: Mapping[str, list[str]]
) -> Node:
    inside: list[Node] = []
    for child in children.get(path, []):
        node = _node(child, child.rpartition(".")[2], by_module, children)
        if inside and _alike(inside[-1], node):
            last = inside.pop()
            first = last.label.split("-")[0]
            node = replace(
                node,
                label=f"{first}-{node.label}",
                macs=last.macs + node.macs,
                count=last.count + 1,
            )
        inside.append(node)
    if len(inside) == 1 and inside[0].macs == by_module[path] and path and not label.isdigit():
        return replace(inside[0], label=f"{label}.{inside[0].label}")
    return Node(label, by_module[path], 1, tuple(inside))


def _alike(last: Node, node: Node) -> bool:
    numbered = last.label.split("-")[-1].isdigit() and node.label.isdigit()
    return numbered and last.each == node.macs and last.children == node.children


def tree_text(by_module: Mapping[str, int], name: str, depth: int) -> str:
    """Modules with their MACs and shares, indented, down to ``depth`` levels below the model."""
    rows: list[tuple[str, str, str]] = []
    total = by_module[""]

    def visit(node: Node, level: int, times: int) -> None:
        label = (
            node.label if node.count == 1 else f"{node.label} ({node.count} x {amount(node.each)})"
        )
        share = node.macs * times / total if total else 0.0
        rows.append(("  " * level + label, amount(node.macs * times), f"{share:.1%}"))
        if level < depth:
            for child in node.children:
                visit(child, level + 1, times * node.count)

    visit(module_tree(by_module, name), 0, 1)
    return table(("module", "MACs", "share"), rows)
