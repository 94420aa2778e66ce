"""Everything of this package that writes a file: the suffix decides what, and a file appears
complete or not at all.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from effformer.arguments import checked
from effformer.files import atomic_path, mark
from effformer.notebook import Shown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["BREAKDOWN", "COMPARISON", "PROFILE", "QUALITY", "SUFFIXES", "Saved", "save_figure"]

SUFFIXES = (".json", ".html", ".txt")
BREAKDOWN, PROFILE, COMPARISON = "breakdown", "profile", "comparison"
FIGURE, QUALITY = "figure", "quality"


class Saved(Shown):
    """A result that becomes a file: of its ``to_dict``, of its text, or of its page."""

    __slots__ = ()
    KIND: ClassVar[str]
    """Of result, see `effformer.files.mark`; the page carries it already."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""

    @abstractmethod
    def _page(self) -> str:
        """The HTML document."""

    @checked
    def save(self, path: str | Path, *, force: bool = False) -> None:
        """Write as .json, .html (one self-contained page) or .txt, by the suffix.

        Args:
            path: the file: new, or an earlier result of the same kind.
            force: replace any file.

        Raises:
            ValueError: another suffix.
            FormatError: the file cannot be written, or is something else; what was there before is
                intact.
        """
        suffix = Path(path).suffix
        if suffix not in SUFFIXES:
            raise ValueError(
                f"save: {str(path)!r} must end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
            )
        if suffix == ".json":
            content = json.dumps({"generator": mark(self.KIND), **self.to_dict()}, indent=2) + "\n"
        else:
            content = self._page() if suffix == ".html" else f"{self}\n\n{mark(self.KIND)}\n"
        with atomic_path(path, self.KIND, force=force) as temporary:
            temporary.write_text(content, encoding="utf-8")


def save_figure(path: str | Path, figure: Figure, *, where: str, force: bool = False) -> None:
    """Write a figure as .png, .svg, .pdf or whatever else matplotlib knows.

    Args:
        path: the file: new, or an earlier .png, .svg or .pdf of this function.
        figure: what to draw.
        where: the public entry point, for messages.
        force: replace any file.

    Raises:
        ValueError: a suffix that matplotlib cannot write.
        FormatError: the file cannot be written, or is something else; an existing one is intact.
    """
    suffix = Path(path).suffix.lstrip(".")
    known = sorted(figure.canvas.get_supported_filetypes())
    if suffix not in known:
        raise ValueError(f"{where}: cannot write {str(path)!r}; suffixes: {', '.join(known)}")
    keys = {"png": "Software", "svg": "Creator", "pdf": "Creator"}
    facts = {keys[suffix]: mark(FIGURE)} if suffix in keys else None
    with atomic_path(path, FIGURE, force=force) as temporary:
        figure.savefig(temporary, format=suffix, metadata=facts)
