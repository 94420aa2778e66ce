"""`effformer doctor`: what is installed, what this machine can do, whether it computes right."""

from __future__ import annotations

from importlib import metadata, util
from typing import Any

import typer

from ..version import VERSION
from .common import Json, emit, stages

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


def doctor(as_json: Json = False) -> None:
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
    backends = ["sdpa", "reference"] + ["xformers"] * (
        place.cuda is not None and packages["xformers"] is not None
    )
    counts = {kind: len(registry) for kind, registry in KINDS.items()}
    data: dict[str, Any] = {
        "effformer": VERSION, "machine": str(place), "cpu_flags": list(place.flags),
        "cores": place.cores, "threads": place.threads, "cuda": place.cuda, "packages": packages,
        "softmax_backends": backends, "registered": counts, "self_test": tests,
    }  # fmt: skip
    lines = [f"effformer {VERSION}", f"  {place}", "", "packages"]
    found = {name: version or "not installed" for name, version in packages.items()}
    wide = max(map(len, found.values()))
    for name, (_, purpose) in _PACKAGES.items():
        lines.append(f"  {name:<13} {found[name]:<{wide}} {purpose}")
    lines += ["", f"softmax backends here: {', '.join(backends)}"]
    lines += ["registered: " + ", ".join(f"{n} {kind}" for kind, n in counts.items())]
    lines += ["", "self-test"] + [f"  {name}: {answer}" for name, answer in tests.items()]
    emit(data, "\n".join(lines), as_json)
    if any(answer != "ok" for answer in tests.values()):
        raise typer.Exit(1)


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
