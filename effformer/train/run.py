"""The model of a training run, finished or not."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

from ..arguments import checked
from ..checks import FormatError
from ..io import load_model, rebuilt
from .checkpoint import load_checkpoint, read_run

if TYPE_CHECKING:
    from effformer.models.base import Model

__all__ = ["load_run"]


@checked
def load_run(source: str | os.PathLike[str]) -> tuple[Model, int | None]:
    """The model of a run: the finished one, else the averaged weights of the newest checkpoint, or the
    raw ones where the run averages none.

    Args:
        source: the folder of the run.

    Returns:
        The model in evaluation mode, and the step of its checkpoint, None for a finished run.

    Raises:
        FormatError: no run of one of our models, or one that is damaged.
        FileNotFoundError: the run has no checkpoint yet.
    """
    run = Path(source)
    if (run / "model").is_dir():
        return load_model(run / "model"), None
    facts = read_run(run)
    named, described = (facts.get("about") or {}).get("model"), facts.get("model", {})
    if not isinstance(named, dict) or not {"config", "transforms"} <= set(described):
        raise FormatError(
            f"{run}: does not say which model was trained; build it and load_checkpoint into it"
        )
    model = rebuilt({**described, **named}, run / "run.json")
    config = facts.get("config", {})
    step = load_checkpoint(run, model, "raw" if config.get("ema") is None else "ema")
    return model.eval(), None if step >= config.get("steps", math.inf) else step
