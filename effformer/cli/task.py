"""What a model is trained for, which its family decides: to draw images of classes, or to tell them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..checks import unknown
from .common import named

if TYPE_CHECKING:
    from effformer.train import Dataset, Objective

__all__ = ["FITTED", "Task", "task_of"]

DRAWN = ("input_size", "channels", "num_classes", "learn_sigma")
SEEN = ("image_size", "channels", "num_classes")
FITTED = (*DRAWN, *SEEN)
"""Options of a model that the data decide."""
CROSS_ENTROPY = "cross-entropy"
LABEL_DROP, HELD_OUT = 0.1, 0.1


@dataclass(frozen=True, slots=True)
class Task:
    """What a model is trained for.

    Attributes:
        draws: images of classes; else it tells the classes of images.
        objective: the loss.
        validation: share of the data that is held out where nobody says it.
    """

    draws: bool
    objective: Objective
    validation: float

    def fitted(self, images: Dataset) -> dict[str, Any]:
        """Options of the model that the data decide."""
        height, width = images["x"].shape[2:]
        size = height if height == width else (height, width)
        values = (size, images["x"].shape[1], len(images.classes), False)
        return dict(zip(DRAWN if self.draws else SEEN, values, strict=False))


def task_of(model: str, loss: str | None, label_drop: float | None) -> Task:
    """What a model of a name is trained for.

    Args:
        model: a registered name.
        loss: how ``--loss`` names it; None: the usual one.
        label_drop: share of labels that a generator does not see; None: the usual one.

    Raises:
        ValueError: the model is of neither kind, or an option that belongs to the other one.
    """
    from ..train import Classification, Generation

    if _has(model, DRAWN):
        share = LABEL_DROP if label_drop is None else label_drop
        given = {"loss": named(loss or "flow-matching"), "label_drop": share}
        return Task(True, Generation.from_dict(given, where="train"), 0.0)
    if not _has(model, SEEN):
        raise ValueError(
            f"train: {model} neither draws images of classes nor tells them, as sit-tiny and vit-tiny do; "
            "in Python effformer.train.train takes any model and objective"
        )
    made = named(loss or CROSS_ENTROPY)
    name, options = (made, {}) if isinstance(made, str) else (made.pop("name"), made)
    if label_drop is not None or name != CROSS_ENTROPY:
        word = "--label-drop" if label_drop is not None else f"--loss {name}"
        raise ValueError(
            f"train: {model} tells the classes of images, {word} is for models that draw them (as are the "
            f"recipes); leave it out, or choose --loss {CROSS_ENTROPY}:smoothing=0.1"
        )
    return Task(False, Classification(**_known(options)), HELD_OUT)


def _has(model: str, fields: tuple[str, ...]) -> bool:
    from ..registry import model as registry

    return set(fields) <= set(registry.get(model).preset.to_dict())


def _known(options: dict[str, Any]) -> dict[str, Any]:
    """Options of the cross entropy.

    Raises:
        ValueError: another one.
    """
    if wrong := sorted(set(options) - {"smoothing"}):
        raise unknown("option", wrong[0], ["smoothing"], where=f"train: --loss {CROSS_ENTROPY}")
    return options
