"""Adapters in files of their own, as peft lays them out."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from effformer.arguments import checked
from effformer.checks import CapabilityError, FormatError
from effformer.files import atomic_folder, read_json, write_json
from effformer.wrapped import unwrapping

from .adapt import LoRA, adapt, adapted_layers
from .layers import Adapted
from .timed import TimedLoRALinear

__all__ = ["fuse_adapters", "load_adapter", "save_adapter", "split_adapter"]

M = TypeVar("M", bound=nn.Module)
_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."
_PARTS = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")


@checked
@unwrapping
def save_adapter(model: nn.Module, folder: str | Path, *, force: bool = False) -> Path:
    """Write the changes of an adapted model alone: ``adapter_model.safetensors`` and
    ``adapter_config.json``, keys ``base_model.model.<path>.lora_A.weight``, which peft reads.

    Args:
        model: an adapted model.
        folder: new, empty, or an earlier adapter.
        force: replace what is there.

    Raises:
        ValueError: nothing in the model is adapted.
        CapabilityError: the changes follow the time, which peft has no layout for.
        FormatError: the folder holds something else, or cannot be written.
    """
    from safetensors.torch import save_file

    layers = adapted_layers(model, "save_adapter")
    if any(isinstance(layer, TimedLoRALinear) for layer in layers.values()):
        raise CapabilityError(
            "save_adapter: peft has no layout for changes that follow the time; save_pretrained writes the "
            "whole model, merge(model, time=...) makes an ordinary one"
        )
    tensors = {f"{_PREFIX}{key}": x.contiguous() for key, x in adapter_state(layers).items()}
    facts = _config(layers)
    with atomic_folder(folder, marker=_CONFIG, own=(_WEIGHTS,), force=force) as temporary:
        save_file(tensors, temporary / _WEIGHTS, metadata={"format": "pt"})
        write_json(temporary / _CONFIG, facts)
    return Path(folder)


def adapter_state(layers: Mapping[str, Adapted]) -> dict[str, Tensor]:
    """The tensors of the changes by path."""
    state: dict[str, Tensor] = {}
    for path, layer in layers.items():
        own = layer.state_dict()
        state |= {f"{path}.{name}": own[name].detach() for name in _PARTS if name in own}
    return state


def _config(layers: Mapping[str, Adapted]) -> dict[str, Any]:
    ranks = {p: m.lora_A.get_parameter("weight").shape[0] for p, m in layers.items()}
    first = next(iter(ranks.values()))
    dora = any("lora_magnitude_vector" in m._parameters for m in layers.values())
    # alpha / r, whatever it was trained as: rsLoRA's scale is another alpha
    alphas = {p: m.lora_scale * ranks[p] for p, m in layers.items()}
    alpha = next(iter(alphas.values()))
    return {
        "peft_type": "LORA", "r": first, "lora_alpha": alpha, "target_modules": sorted(layers),
        "rank_pattern": {p: r for p, r in ranks.items() if r != first},
        "alpha_pattern": {p: a for p, a in alphas.items() if a != alpha},
        "use_rslora": False, "use_dora": dora, "bias": "none", "fan_in_fan_out": False,
        "modules_to_save": None, "lora_dropout": 0.0,
    }  # fmt: skip


@checked
@unwrapping
def load_adapter(model: M, folder: str | Path) -> M:
    """A copy of a model with the changes of a folder that `save_adapter` or peft wrote for it.

    Args:
        model: the model that was adapted; paths of layers are those of the folder.
        folder: with ``adapter_config.json`` and ``adapter_model.safetensors``.

    Raises:
        FormatError: no such folder, another kind of adapter, or one of another model.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    facts = read_json(folder / _CONFIG)
    if not isinstance(facts, dict) or facts.get("peft_type") != "LORA":
        raise FormatError(f"{folder / _CONFIG}: is no config of a LoRA adapter")
    try:
        tensors = load_file(folder / _WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{folder / _WEIGHTS}: cannot be read ({error})") from error
    return with_adapter(model, tensors, facts, where=str(folder))


def with_adapter(
    model: M, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], *, where: str
) -> M:
    """As `load_adapter`, from tensors and config that were read."""
    state = {
        key.removeprefix(_PREFIX).removesuffix("_vector.weight"): x for key, x in tensors.items()
    }
    state = {f"{k}_vector" if k.endswith("lora_magnitude") else k: x for k, x in state.items()}
    strange = [key for key in state if not key.endswith(_PARTS)]
    if strange:
        raise FormatError(f"{where}: {strange[0]} belongs to no change of a layer")
    paths = sorted({key.rpartition(".lora_")[0] for key in state})
    known = {path for path, _ in model.named_modules()}
    if foreign := [path for path in paths if path not in known]:
        raise FormatError(f"{where}: was made for another model, which has a layer {foreign[0]!r}")
    scheme = LoRA(
        rank=facts.get("r", 8), alpha=facts.get("lora_alpha"), ranks=facts.get("rank_pattern"),
        alphas=facts.get("alpha_pattern"),
        kind="dora" if facts.get("use_dora") else "rs" if facts.get("use_rslora") else "lora",
    )  # fmt: skip
    changed, _ = adapt(copy.deepcopy(model), scheme, paths)
    own = adapter_state(adapted_layers(changed, "load_adapter"))
    shapes = {key: tuple(x.shape) for key, x in own.items()}
    given = {key: tuple(x.shape) for key, x in state.items()}
    if shapes != given:
        odd = next(k for k in {**shapes, **given} if shapes.get(k) != given.get(k))
        raise FormatError(
            f"{where}: {odd} is {given.get(odd, 'missing')}, the model expects {shapes.get(odd, 'none')}"
        )
    changed.load_state_dict(dict(state), strict=False)
    return changed


def fuse_adapters(
    parts: Sequence[tuple[Tensor, Tensor, float]],
) -> tuple[Tensor, Tensor]:
    """One change of a fused projection from those of separate ones, exactly: A stacked, B block-diagonal.

    Args:
        parts: A (r_i, in), B (out_i, r_i) and the scale of each, in the order of the fused rows (q, k, v).

    Returns:
        A (sum r, in) and B (sum out, sum r) for a scale of 1.
    """
    return torch.cat([a for a, _, _ in parts]), torch.block_diag(*(b * s for _, b, s in parts))


def split_adapter(a: Tensor, b: Tensor, rows: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """The changes of separate projections from that of a fused one, exactly: rows of B, A for each.

    Args:
        a: (r, in).
        b: (sum rows, r).
        rows: outputs of each.
    """
    return [(a.clone(), part.clone()) for part in b.split(list(rows))]
