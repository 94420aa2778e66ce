from __future__ import annotations

import io
import sys

import pytest

from effformer.train.progress import progress_bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("wanted", "shown"), [(None, True), (False, False)])
def test_on_a_terminal(monkeypatch: pytest.MonkeyPatch, wanted: bool | None, shown: bool) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    with progress_bar(10, 2, wanted) as show:
        show(10, 0.125)
    assert ("10/10" in screen.getvalue() and "loss 0.1250" in screen.getvalue()) == shown


def test_silent_in_logs(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar(10, 0, None) as show:
        show(5, 0.5)
    assert capsys.readouterr().err == ""
