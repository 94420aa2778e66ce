from __future__ import annotations

import io
import sys

import pytest

from effformer.train import progress
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
        show(10, {"loss": 0.125, "val_loss": 0.25})
    assert "nan" not in screen.getvalue()
    assert ("10/10" in screen.getvalue() and "loss 0.1250" in screen.getvalue()) == shown


def test_a_line_now_and_then_in_logs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 1.0, 40.0, 41.0])
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(clock))
    with progress_bar(100, 20, None) as show:
        show(21, {})
        show(60, {"loss": 0.5, "val_loss": 0.25})
        show(61, {"loss": 0.5})
    line = "training: step 60 of 100, loss 0.5000, val loss 0.2500, 1 steps/s, 0:40 left\n"
    assert capsys.readouterr().err == line


def test_silent_if_asked(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar(10, 0, False) as show:
        show(5, {"loss": 0.5})
    assert capsys.readouterr().err == ""
