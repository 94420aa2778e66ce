"""Facts about the machine that a measured number depends on."""

from __future__ import annotations

import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

__all__ = ["Machine", "machine"]

_FLAGS = (
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "amx_tile",
    "asimd",
    "asimddp",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Where something was measured.

    Attributes:
        cpu: name of the processor.
        cores: logical processors that this process may use.
        threads: threads that torch uses.
        flags: vector extensions that matter for matrix products.
        capability: the instruction set that torch's kernels were chosen for.
        cuda: name of the first CUDA device, or None.
        torch: version.
        python: version.
        system: operating system and architecture.
    """

    cpu: str
    cores: int
    threads: int
    flags: tuple[str, ...]
    capability: str
    cuda: str | None
    torch: str
    python: str
    system: str

    def __str__(self) -> str:
        device = f"; {self.cuda}" if self.cuda else ""
        flags = " ".join(self.flags) or "no vector extensions found"
        return (
            f"{self.cpu}, {self.cores} cores, {self.threads} threads ({flags}){device}; "
            f"torch {self.torch}, Python {self.python}, {self.system}"
        )


def machine() -> Machine:
    """Describe this machine."""
    name, flags = _cpu()
    return Machine(
        cpu=name,
        cores=len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        flags=tuple(flag for flag in _FLAGS if flag in flags),
        capability=torch.backends.cpu.get_cpu_capability(),
        cuda=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        torch=torch.__version__,
        python=".".join(map(str, sys.version_info[:3])),
        system=f"{platform.system()} {platform.machine()}",
    )


def _cpu() -> tuple[str, set[str]]:
    """Name and flags of the processor; only Linux tells the flags without a package."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    facts: dict[str, str] = {}
    for line in text.splitlines():
        key, _, value = line.partition(":")
        facts.setdefault(key.strip().lower(), value.strip())
    name = facts.get("model name") or platform.processor() or platform.machine()
    return name, set((facts.get("flags") or facts.get("features") or "").split())
