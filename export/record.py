"""What a bundle records of its own graphs, so that other machines can tell whether they compute the same."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from effformer.calls import device_of
from effformer.files import write_json
from effformer.flow.conventions import VelocityField
from effformer.flow.samplers import sample

from . import run
from .packed import step_of
from .velocity import Graphs, Velocity, guidance_of
from .verify import VerificationError

__all__ = ["ROUNDED", "error_of", "finish", "record_forms", "record_graphs"]

_log = logging.getLogger(__name__)
ROUNDED = 5e-2
"""By how much more a velocity of 8-bit products may differ on another machine."""


def record_graphs(
    folder: Path,
    facts: dict[str, Any],
    network: tuple[Velocity, VelocityField] | None,
) -> None:
    """Checksums of the files, and what the graph computes here, for `run.Bundle.self_test`
    elsewhere; a short sample of torch, with which the runner's is compared here already.
    """
    import numpy as np

    labels = [0] if facts["null_label"] is None else [0, facts["null_label"]]
    exact = facts["quantization"] is None
    tolerance = (
        1e-3 if exact else ROUNDED
    )  # 8-bit kernels round differently from machine to machine
    if network is not None:
        tolerance = max(tolerance, step_of(network[0]))
    facts["self_test"] = {
        "file": "self_test.npy",
        "seed": 0,
        "t": 0.5,
        "labels": labels,
        "tolerance": tolerance,
    }
    (folder / "self_test.npy").touch()  # a bundle lists what it names; filled below
    finish(folder, facts)
    bundle = run.Bundle(folder)
    noise = np.random.default_rng(0).standard_normal((len(labels), *bundle.shape), dtype=np.float32)
    np.save(
        folder / "self_test.npy",
        bundle.velocity(noise, 0.5, np.asarray(labels)),
        allow_pickle=False,
    )
    if network is not None:
        facts["self_test"]["sample"] = _drawn(folder, facts, *network, bundle, tolerance)
    finish(folder, facts)


def record_forms(
    folder: Path, facts: dict[str, Any], graphs: Graphs, forms: Sequence[str]
) -> dict[str, float]:
    """Run every form and record how far it is from the first one.

    Raises:
        VerificationError: nothing is left of what the first one computes.
    """
    import numpy as np

    test, drawn, found = facts["self_test"], facts["self_test"].get("sample"), {}
    facts["forms"] = {
        form: {**graphs.of(form), "narrow": form.endswith("-int7"), "tolerance": 1.0, "sample_tolerance": 1.0}
        for form in forms
    }  # fmt: skip
    finish(folder, facts)
    for form, own in facts["forms"].items():
        if form == forms[0]:
            own["tolerance"] = test["tolerance"]
            own["sample_tolerance"] = drawn["tolerance"] if drawn else 1.0
            continue
        bundle = run.Bundle(folder, form=form)
        labels, expected = np.asarray(test["labels"]), np.load(folder / test["file"])
        noise = np.random.default_rng(0).standard_normal(expected.shape, dtype=np.float32)
        found[form] = error_of(bundle.velocity(noise, test["t"], labels), expected)
        own["tolerance"] = min(1.0, found[form] + ROUNDED)
        if drawn:
            made = bundle.sample(drawn["labels"], steps=drawn["steps"], seed=drawn["seed"])
            own["sample_tolerance"] = min(
                1.0, error_of(made, np.load(folder / drawn["file"])) + ROUNDED
            )
        if not found[form] < 1.0:
            raise VerificationError(
                f"export_bundle: nothing is left of the velocity in {form}: it differs by {found[form]:.1e}"
            )
    finish(folder, facts)
    return found


def error_of(actual: Any, expected: Any) -> float:
    """Largest difference by the largest value."""
    return float(abs(actual - expected).max()) / max(float(abs(expected).max()), 1e-12)


def _drawn(
    folder: Path, facts: dict[str, Any], network: Velocity, field: VelocityField,
    bundle: run.Bundle, tolerance: float,
) -> dict[str, Any]:  # fmt: skip
    """Draw two samples in at most two steps by torch, under a cache in as many as show one that is
    skipped, and compare the runner's with them.

    Raises:
        VerificationError: the runner draws something else.
    """
    import numpy as np

    own, labels, shape = facts["sampler"], [0, facts["num_classes"] - 1], bundle.shape
    cache = own.get("cache") or {"warm": 0, "every": 0}
    steps = min(own["steps"], 2 + cache["warm"] + cache["every"])
    rule = guidance_of(own, facts["null_label"])
    noise = np.random.default_rng(0).standard_normal((len(labels), *shape), dtype=np.float32)
    device = device_of(network)
    expected = sample(
        field, torch.from_numpy(noise).to(device), sampler=own["name"], steps=steps, guidance=rule,
        y=torch.tensor(labels, device=device),
    ).x.cpu().numpy()  # fmt: skip
    actual = bundle.sample(labels, steps=steps, noise=noise)
    error = error_of(actual, expected)
    exact = facts["quantization"] is None
    if exact and not error <= tolerance:
        raise VerificationError(
            f"export_bundle: what the runner draws differs by {error:.1e} from what torch draws "
            f"(allowed {tolerance:.0e})"
        )
    black, white = facts["value_range"]
    if expected.std() > 10 * max(abs(black), abs(white)):
        _log.warning(
            "%s: samples have a standard deviation of %.0f, as weights that were trained to predict "
            "something else, or not at all; see effformer.flow.trained_of", facts["model"], expected.std(),
        )  # fmt: skip
    np.save(folder / "self_test_sample.npy", expected, allow_pickle=False)
    return {
        "file": "self_test_sample.npy", "seed": 0, "labels": labels, "steps": steps,
        "tolerance": tolerance if exact else error + tolerance,
    }  # fmt: skip


def finish(folder: Path, facts: dict[str, Any]) -> None:
    """Write what a bundle says of itself, with the checksums of its files."""
    files = sorted(f for f in folder.iterdir() if f.name != "bundle.json")
    facts["files"] = {
        f.name: {"bytes": f.stat().st_size, "sha256": hashlib.sha256(f.read_bytes()).hexdigest()}
        for f in files
    }
    write_json(folder / "bundle.json", facts)
