"""Run verbs inside this process."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from typing import Any

from typer.testing import CliRunner, Result

from effformer.cli import main

SMALL = ["--set", "input_size=8", "--set", "channels=1", "--set", "num_classes=10"]


def invoke(*words: str, code: int = 0) -> Result:
    result = CliRunner().invoke(main.app, words)
    assert result.exit_code == code, result.output
    if code == 2:
        assert "Traceback" not in result.output
    return result


def started(*words: str) -> subprocess.Popen[str]:
    """A verb in a process of its own, which Ctrl-C reaches also where this one ignores it, as
    processes in the background do.
    """
    return subprocess.Popen(
        [sys.executable, "-m", "effformer.cli.main", *words],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def answer(*words: str) -> Any:
    return json.loads(invoke(*words, "--json").stdout)


def refusal(*words: str) -> str:
    """The sentence on stderr that goes with exit code 2."""
    result = invoke(*words, code=2)
    assert result.stdout == ""
    return " ".join(result.stderr.split())
