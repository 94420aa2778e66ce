"""`effformer doctor`: what is installed, what this machine can do, whether it computes right."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata, util
from typing import Annotated, Any

import typer

from ..values import QUIET
from ..version import VERSION
from .common import Json, emit, stages

_SLOWER = 1.1  # times as long as one thread

# package -> (import name, what it brings)
_PACKAGES = {
    "torch": ("torch", "everything"),
    "onnxruntime": ("onnxruntime", "running exports"),
    "onnx": ("onnx", "export"),
    "onnxscript": ("onnxscript", "export"),
    "bitsandbytes": ("bitsandbytes", "compress --backend bitsandbytes"),
    "timm": ("timm", "reference for ViT weights"),
    "fvcore": ("fvcore", "profile --cross-check"),
    "torchvision": ("torchvision", "data sets by path (extra: vision)"),
    "diffusers": ("diffusers", "reference for diffusers' layouts (extra: diffusers)"),
    "torchdiffeq": ("torchdiffeq", "reference for adaptive solvers (extra: ode)"),
    "xformers": ("xformers", "softmax backend on CUDA (extra: xformers)"),
}


def doctor(
    busy: Annotated[
        bool,
        typer.Option(
            "--busy",
            help="Time all threads beside one busy program as well, which takes half a minute: threads that "
            "spin while they wait may be slower than one.",
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Show versions, processor, threads, packages and selectable backends; run a self-test.

    Exit code 1 means that the self-test failed.
    """
    from ..profile import machine
    from ..registry import KINDS

    with stages() as stage:
        stage("looking around")
        place = machine()
        packages = {name: _version(name, module) for name, (module, _) in _PACKAGES.items()}
        stage("self-test")
        tests = _self_test()
        shared = None
        if busy and place.cores > 1:
            stage("beside a busy program")
            shared = _beside_another(place.cores)
    backends = ["sdpa", "reference"] + ["xformers"] * (
        place.cuda is not None and packages["xformers"] is not None
    )
    counts = {kind: len(registry) for kind, registry in KINDS.items()}
    data: dict[str, Any] = {
        "effformer": VERSION, "machine": str(place), "cpu_flags": list(place.flags),
        "cores": place.cores, "threads": place.threads, "cuda": place.cuda, "packages": packages,
        "softmax_backends": backends, "registered": counts, "self_test": tests, "busy": shared,
    }  # fmt: skip
    lines = [f"effformer {VERSION}", f"  {place}", "", "packages"]
    found = {name: version or "not installed" for name, version in packages.items()}
    wide = max(map(len, found.values()))
    for name, (_, purpose) in _PACKAGES.items():
        lines.append(f"  {name:<13} {found[name]:<{wide}} {purpose}")
    lines += ["", f"softmax backends here: {', '.join(backends)}"]
    lines += ["registered: " + ", ".join(f"{n} {kind}" for kind, n in counts.items())]
    lines += ["", "self-test"] + [f"  {name}: {answer}" for name, answer in tests.items()]
    if busy:
        lines += ["", "beside one busy program", *_told(shared)]
    emit(data, "\n".join(lines), as_json)
    if any(answer != "ok" for answer in tests.values()):
        raise typer.Exit(1)


_FLOW = """
import sys, time, torch
from statistics import median
from effformer.attention.flow import Flow
from effformer.site import Site
torch.set_num_threads(int(sys.argv[1]))
core, x = Flow(Flow.Config(), Site(dim=768, heads=12)), torch.randn(3, 1, 12, 4096, 64)
times = []
with torch.inference_mode():
    while len(times) < 9 and sum(times) < 6:
        start = time.perf_counter()
        core(*x)
        times.append(time.perf_counter() - start)
print(median(times[1:]))
"""


def _beside_another(threads: int) -> dict[str, float]:
    """Seconds of a linear attention (12 heads of 64, 4,096 tokens), each case in a process of its own."""
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    plain = {name: value for name, value in os.environ.items() if name not in QUIET}
    cases = {"one": (1, plain), "spin": (threads, plain), "sleep": (threads, plain | dict(QUIET))}
    try:
        return {
            name: float(_answer([sys.executable, "-c", _FLOW, str(count)], environment))
            for name, (count, environment) in cases.items()
        }
    finally:
        busy.kill()
        busy.wait()


def _answer(command: list[str], environment: dict[str, str]) -> str:
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return done.stdout


def _told(shared: Mapping[str, float] | None) -> list[str]:
    """What the times say."""
    if shared is None:
        return ["  there is one thread"]
    one, spin, sleep = (shared[name] for name in ("one", "spin", "sleep"))
    lines = [
        f"  linear attention: one thread {1e3 * one:.0f} ms, all {1e3 * spin:.0f} ms where they spin while they "
        f"wait, {1e3 * sleep:.0f} ms where they sleep"
    ]
    if spin <= _SLOWER * one:
        return [*lines, "  spinning does not hurt here"]
    return [
        *lines,
        "  spinning hurts here: set OMP_WAIT_POLICY=PASSIVE before a program imports torch, or "
        "torch.set_num_threads(1); this command line sleeps already",
    ]


def _version(package: str, module: str) -> str | None:
    if util.find_spec(module) is None:
        return None
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown version"


def _self_test() -> dict[str, str]:
    """Small computations whose results are known."""
    import torch

    from effformer.site import Site

    from ..attention.flow import Flow
    from ..attention.reference import flow_reference
    from ..build import build_model
    from ..compress import quantize

    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 1, 5, 4, generator=generator, dtype=torch.float64)
    core = Flow(Flow.Config(), Site(dim=4))
    exact = flow_reference(q[0, 0], k[0, 0], v[0, 0], core.config)
    flow = bool(torch.allclose(core(q, k, v)[0, 0], exact, rtol=1e-9, atol=1e-12))
    model = build_model("sit-nano", attn="flow").eval()
    small, report = quantize(model, "int8")
    with torch.no_grad():
        finite = bool(torch.isfinite(small(**small.example_inputs())).all())
    checks = {
        "flow attention equals its definition": flow,
        "int8 weights within 1 %": all(layer.error < 0.01 for layer in report.layers),
        "a quantized model runs": finite,
    }
    return {name: "ok" if good else "FAILED" for name, good in checks.items()}
