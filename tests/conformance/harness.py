"""Golden sets and the adapters that compare our models with them.

An adapter is a module ``adapters/<name>.py`` with a function ``check(golden)``; dashes in a set's
name are underscores in the file's. It serves every set whose name begins with its own, as a whole
word (``dit_nosigma`` is a ``dit``); the longest name wins.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from closeness import assert_close
from safetensors.torch import load_file
from torch import Tensor

from effformer.nn.activations import ACTIVATIONS

ADAPTERS = Path(__file__).parent / "adapters"
GOLDEN = Path(__file__).parents[1] / "golden"


@dataclass(frozen=True)
class Golden:
    """One golden set: ``<name>.json`` and, if the set has tensors, ``<name>.safetensors``."""

    name: str
    meta: dict[str, Any]
    tensors: dict[str, Tensor]

    @classmethod
    def read(cls, path: Path) -> Golden:
        tensors = path.with_suffix(".safetensors")
        return cls(
            path.stem,
            json.loads(path.read_text(encoding="utf-8")),
            load_file(tensors) if tensors.exists() else {},
        )

    @property
    def config(self) -> Any:
        return self.meta["config"]

    def tensor(self, key: str) -> Tensor:
        return self.tensors[key]

    def weights(self, prefix: str = "") -> dict[str, Tensor]:
        """State dict of ``w.<prefix>...`` with that beginning stripped."""
        start = f"w.{prefix}"
        return {
            k.removeprefix(start): v.clone() for k, v in self.tensors.items() if k.startswith(start)
        }

    def keys(self, prefix: str) -> list[str]:
        return [k for k in self.tensors if k.startswith(prefix)]

    def assert_close(
        self, actual: Tensor, key: str, *, rtol: float | None = None, atol: float | None = None
    ) -> None:
        """Compare with a stored tensor at the set's tolerance (rtol 1e-4, atol 1e-5 unless it says
        otherwise); atol counts in units of the tensor's largest value. Integers are equal."""
        set_rtol, set_atol = self.tolerance
        expected = self.tensors[key]
        assert_close(
            actual.detach().to(expected.dtype),
            expected,
            rtol=set_rtol if rtol is None else rtol,
            atol=set_atol if atol is None else atol,
            what=f"{self.name}: {key}: ",
        )

    @property
    def tolerance(self) -> tuple[float, float]:
        words = re.findall(r"(rtol|atol)\W+([\d.]+(?:e[+-]?\d+)?)", str(self.meta.get("tolerance")))
        found = {k: float(v) for k, v in words}
        return found.get("rtol", 1e-4), found.get("atol", 1e-5)

    @property
    def dtype(self) -> torch.dtype:
        """The precision that the set was made in."""
        found = {x.dtype for x in self.tensors.values() if x.is_floating_point()}
        return torch.float64 if found == {torch.float64} else torch.float32

    @contextmanager
    def precision(self) -> Iterator[None]:
        """Models are built in the precision of the set."""
        before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(before)

    def activation(self, name: str) -> str:
        """Our name of an activation that a set calls "gelu (erf)", "gelu_new", "swish" or "ReLU".

        Raises:
            NotImplementedError: this package has none of that name.
        """
        known = {
            "gelu (erf)": "gelu", "gelu_new": "gelu-tanh", "gelu (tanh)": "gelu-tanh",
            "gelu_pytorch_tanh": "gelu-tanh", "gelu_tanh": "gelu-tanh", "swish": "silu",
        }  # fmt: skip
        found = known.get(name.lower(), name.lower())
        if found not in ACTIVATIONS:
            raise NotImplementedError(
                f"{self.name}: no activation {name!r} here, only {', '.join(ACTIVATIONS)}"
            )
        return found

    def only(
        self, option: str, *values: Any, why: str, among: dict[str, Any] | None = None
    ) -> None:
        """Refuse a set whose option has another value than these, if it names the option at all.

        Args:
            option: the option.
            values: what it may be.
            why: the reason.
            among: the options, None for the set's config.

        Raises:
            NotImplementedError: it has another value.
        """
        given = (self.config if among is None else among).get(option, values[0])
        if given not in values:
            allowed = " or ".join(map(repr, values))
            raise NotImplementedError(
                f"{self.name}: {option}={given!r} is not supported, only {allowed}: {why}"
            )


def adapter_names() -> list[str]:
    return sorted(p.stem for p in ADAPTERS.glob("*.py") if not p.stem.startswith("_"))


def adapter_for(name: str) -> Callable[[Golden], None] | None:
    """The adapter with the longest name that begins the set's name."""
    plain = name.replace("-", "_")
    fitting = [a for a in adapter_names() if re.match(rf"{a}(?![a-z])", plain)]
    if not fitting:
        return None
    return load_adapter(max(fitting, key=len)).check


def load_adapter(stem: str) -> ModuleType:
    """The module of an adapter."""
    spec = importlib.util.spec_from_file_location(f"conformance_{stem}", ADAPTERS / f"{stem}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
