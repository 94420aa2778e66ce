"""Weights from one layout to another without a model that holds them: tensor by tensor, from and to files of any
size.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import checked
from .files import atomic_path, check_file, mark
from .io import WEIGHTS, metadata_of, translated
from .layout import Layout, StateDict
from .loading import LoadReport, by_name, matched, tensors_of
from .shards import INDEX, shards_of, write_shards, write_tensors
from .values import Count
from .weights import open_weights
from .wrapped import unwrapping

if TYPE_CHECKING:
    from effformer.models.base import Model

__all__ = ["convert_weights"]


@checked
@unwrapping
def convert_weights(
    model: Model,
    source: str | Path | Mapping[str, Any],
    path: str | Path,
    layout: str | Layout = "effformer",
    *,
    source_layout: str | Layout = "auto",
    strict: bool = True,
    weights: str = "auto",
    config: Any = None,
    shard: Count | None = None,
    force: bool = False,
) -> LoadReport:
    """Write weights of a model in another layout, as they are: nothing is loaded, and no more than a tensor
    and what it is made of are in memory at a time. Numbers keep their type.

    Args:
        model: the model that the weights are of, best built on the meta device (``with
            torch.device("meta")``); what a file lacks comes from it.
        source: see `effformer.load_weights`; safetensors files, alone or in shards with an index, are read
            tensor by tensor, torch files whole.
        path: the file to write. With shards its name is that of an index (``x.safetensors.index.json``), and they
            lie beside it: ``x-00001-of-00003.safetensors``.
        layout: layout to write.
        source_layout: layout of the source.
        strict: as for `effformer.load_weights`.
        weights: which of several weights.
        config: options of the checkpoint's model.
        shard: largest number of bytes in a file; None: one file of all.
        force: replace any file.

    Raises:
        FormatError: the source cannot be read or does not fit the model, the layout cannot hold it, or the place
            cannot be written.
        ValueError: unknown layout, or the model lacks values that the source has not.

    Example:
        >>> with torch.device("meta"):
        ...     model = effformer.build_model("mmdit-nano")  # or "sd3-medium"
        >>> index = "sd3/diffusion_pytorch_model.safetensors.index.json"
        >>> convert_weights(model, index, "sd3.safetensors", "official")  # doctest: +SKIP
    """
    path, own = Path(path), tensors_of(model)
    if shard is not None and not path.name.endswith(f".safetensors{INDEX}"):
        raise ValueError(
            f"{path}: shards have an index; name it {path.stem}.safetensors{INDEX}, or leave shard out"
        )
    check_file(path, *WEIGHTS, force=force)
    file = open_weights(source, weights, config, own, lazy=True)
    found = matched(model, file, source_layout, strict=strict, keep=())
    state = _whole(found.state, own, file.where)
    if layout == "effformer":
        out = _once(state, own)
    else:
        chosen = layout if isinstance(layout, Layout) else by_name(model, layout)
        out = translated(model, chosen, state)
    facts = metadata_of(model, found.trained) | {"generator": mark(WEIGHTS[-1])}
    if shard is None:
        with atomic_path(path, *WEIGHTS, force=force) as temporary:
            write_tensors(temporary, out, facts)
        return found.report
    shards = shards_of(out, shard)
    stem = path.name.removesuffix(f".safetensors{INDEX}")
    names = [f"{stem}-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for name in names:
        check_file(path.with_name(name), *WEIGHTS, force=force)
    with atomic_path(path, *WEIGHTS, force=force) as temporary:
        write_shards(temporary, names, shards, facts)
    return found.report


def _whole(state: StateDict, own: StateDict, where: str) -> StateDict:
    """All tensors of a model in its order: one with two names has both, and what the file lacks is the
    model's.
    """
    first = {id(own[key]): value for key, value in state.items()}
    out = {key: state.get(key, first.get(id(x), x.detach())) for key, x in own.items()}
    if empty := [key for key, x in out.items() if x.is_meta]:
        raise ValueError(
            f"{where}: lacks {empty[0]} and {len(empty) - 1} more, and the model is on the meta device; build it "
            "on the CPU, so that they have values"
        )
    return out


def _once(state: StateDict, own: StateDict) -> StateDict:
    """Tied tensors under the first of their names."""
    names: dict[int, str] = {}
    for key, x in own.items():
        names.setdefault(id(x), key)
    return {key: state[key] for key in names.values()}
