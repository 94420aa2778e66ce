"""Bundles of `effformer export` that draw no pictures: of texts and of streams."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from effformer.models.base import Model

__all__ = ["kind_of_bundle", "write_bundle"]


def kind_of_bundle(model: Model, tokenizer: Path | None, given: dict[str, Any]) -> str:
    """What a bundle of a model makes: "texts", "streams" or "pictures".

    Args:
        model: the model.
        tokenizer: what was given as ``--tokenizer``.
        given: options of the other kinds, and their values.

    Raises:
        ValueError: an option that means nothing to this kind.
    """
    if tokenizer is not None:
        kind = "texts"
    else:
        streams = hasattr(model, "init_state") and not hasattr(model.config, "input_size")
        kind = "streams" if streams else "pictures"
    own = {"pictures": {*given}, "texts": {"--quantize", "--no-verify"}, "streams": set()}[kind]
    if wrong := [option for option, value in given.items() if value and option not in own]:
        raise ValueError(
            f"export: {', '.join(wrong)} means nothing to a bundle of {kind}; leave it out, or write a graph "
            "(-o NAME.onnx)"
        )
    if kind == "texts" and len(given["--quantize"] or []) > 1:
        raise ValueError("export: --quantize: a bundle of texts holds one form")
    return kind


def write_bundle(
    kind: str, model: Model, place: Path, tokenizer: Path | None, options: dict[str, Any]
) -> tuple[dict[str, Any], int]:
    """Write a bundle of texts or streams; what there is to say of it, and its size."""
    from ..export import export_stream_bundle, export_text_bundle

    if kind == "streams":
        report = export_stream_bundle(model, place, force=options["force"])
        return {"parity": None, "kind": kind, **report.to_dict()}, report.bytes
    assert tokenizer is not None
    form = options["quantize"][0]
    made = export_text_bundle(
        model, place, tokenizer, quantize=form, verify=options["verify"], force=options["force"]
    )
    return {"kind": kind, **made.to_dict()}, made.bytes
