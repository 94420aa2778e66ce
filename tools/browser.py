"""Headless Chromium over its debugging pipe, and a server for a static folder: the standard library
alone.
"""

from __future__ import annotations

import base64
import functools
import http.server
import itertools
import json
import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

__all__ = ["Page", "browser", "find_chromium", "served"]

ISOLATED = {
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
}
"""Headers that allow a page to share memory between threads."""


def find_chromium() -> str | None:
    """The browser: $CHROMIUM, or one on the path."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)


class _Handler(http.server.SimpleHTTPRequestHandler):
    def __init__(self, *args: Any, headers: dict[str, str], without: tuple[str, ...], **rest: Any):
        self._extra, self._without = headers, without
        super().__init__(*args, **rest)

    def do_GET(self) -> None:
        if self.path.lstrip("/") in self._without:
            self.send_error(404)
        else:
            super().do_GET()

    def end_headers(self) -> None:
        for name, value in self._extra.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, *args: Any) -> None:
        pass


@contextmanager
def served(
    folder: Path, *, headers: dict[str, str] | None = None, without: tuple[str, ...] = ()
) -> Iterator[str]:
    """Serve a folder on this machine; yields its address.

    Args:
        folder: what is served.
        headers: further headers of every answer.
        without: names for which the answer is 404.
    """
    handler = functools.partial(
        _Handler, directory=str(folder), headers=headers or {}, without=without
    )
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()


class Page:
    """One page of a browser.

    Args:
        send: sends a command of Chrome's DevTools protocol, gives its answer.
    """

    def __init__(self, send: Callable[..., dict[str, Any]]) -> None:
        self._send = send

    def before(self, code: str) -> None:
        """Run JavaScript in every page before its own."""
        self._send("Page.enable")
        self._send("Page.addScriptToEvaluateOnNewDocument", source=code)

    def open(self, address: str, width: int = 1200, height: int = 900) -> None:
        """Go to an address, in a window of this size."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self._send("Emulation.setDeviceMetricsOverride", **size)
        self._send("Page.navigate", url=address)

    def value(self, code: str) -> Any:
        """What a JavaScript expression, or its promise, gives, as JSON.

        Raises:
            RuntimeError: it throws.
        """
        found = self._send(
            "Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in found:
            raise RuntimeError(json.dumps(found["exceptionDetails"])[:1000])
        return found["result"].get("value")

    def wait(self, code: str, seconds: float = 60) -> Any:
        """The first true value of an expression.

        Raises:
            TimeoutError: there is none so soon; the message holds the page's text.
        """
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            with suppress(RuntimeError):  # a page that is about to change
                if found := self.value(code):
                    return found
            time.sleep(0.02)
        raise TimeoutError(f"{code}: not in {seconds} s; {self.value('document.body.innerText')}")

    def text(self, element: str) -> str:
        """The text of an element, by its id."""
        return str(self.value(f"document.getElementById({element!r}).innerText"))

    def picture(self, path: Path) -> None:
        """Write what the whole page looks like as a PNG file."""
        found = self._send("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(found["data"]))


@contextmanager
def browser(*options: str) -> Iterator[Page]:
    """An empty page of a fresh headless Chromium, which is ended afterwards.

    Args:
        *options: further options of its command line.

    Raises:
        FileNotFoundError: there is no Chromium.
    """
    program = find_chromium()
    if program is None:
        raise FileNotFoundError("no chromium on the path; install it, or set CHROMIUM")
    (theirs, ours), (out, end) = os.pipe(), os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        # what is run takes commands from descriptor 3 and answers on 4
        command = [program, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
        command += [
            f"--user-data-dir={profile}",
            "--remote-debugging-pipe",
            *options,
            "about:blank",
        ]
        shell = f'exec "$@" 3<&{theirs} 4>&{end}'
        process = subprocess.Popen(
            ["bash", "-c", shell, "bash", *command], pass_fds=(theirs, end),
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(theirs)
        os.close(end)
        try:
            with os.fdopen(ours, "wb", buffering=0) as commands, os.fdopen(out, "rb") as answers:
                yield Page(_sender(commands, answers))
                with suppress(OSError):
                    commands.write(b'{"id": 0, "method": "Browser.close"}\0')
                    process.wait(10)
        finally:
            process.kill()
            process.wait()


def _sender(commands: Any, answers: Any) -> Callable[..., dict[str, Any]]:
    numbers = itertools.count(1)

    def send(method: str, **params: Any) -> dict[str, Any]:
        number = next(numbers)
        command = {"id": number, "method": method, "params": params} | session
        commands.write(json.dumps(command).encode() + b"\0")
        while True:
            answer = json.loads(_message(answers))
            if answer.get("id") == number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return dict(answer["result"])

    session: dict[str, str] = {}
    (target,) = (
        t["targetId"] for t in send("Target.getTargets")["targetInfos"] if t["type"] == "page"
    )
    session["sessionId"] = send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
    return send


def _message(answers: Any) -> bytes:
    data = bytearray()
    while (byte := answers.read(1)) != b"\0":
        if not byte:
            raise RuntimeError("the browser ended")
        data += byte
    return bytes(data)
