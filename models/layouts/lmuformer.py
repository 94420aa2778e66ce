"""Key layouts of the published LMUFormer code: dense, spiking, and one memory unit alone.

Published files hold the constant matrices of every unit as buffers (``A``, ``B``, ``H``, ``fft_H``,
discretised); they are dropped on the way in and computed again on the way out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from effformer.checks import FormatError
from effformer.layout import Layout, StateDict, has_keys, renamed
from effformer.nn.legendre import legendre_system

from .forms import Form, same_table

__all__ = ["DENSE", "SPIKING", "UNIT"]

_CONSTANT = re.compile(r"(.*\.)?(A|B|H|fft_H)")
_CONV = re.compile(r"block\.\d+\.(attn\.proj_conv|mlp\.fc[12]_conv)\.weight")
_UNIT = re.compile(r"(?P<unit>block\.\d+\.attn\.lmu)\.W_h\.weight")
_COUNTER = ".num_batches_tracked"

_BLOCK = "block.{i}"
_SHARED = [
    ("embed.position.conv", "patch_embed.rpe_conv"),
    ("blocks.{i}.attn.part.write", f"{_BLOCK}.attn.lmu.W_u"),
    ("blocks.{i}.attn.part.read", f"{_BLOCK}.attn.lmu.W_h"),
    ("blocks.{i}.attn.part.proj", f"{_BLOCK}.attn.proj_conv"),
    ("blocks.{i}.ffn.part.fc1", f"{_BLOCK}.mlp.fc1_conv"),
    ("blocks.{i}.ffn.part.fc2", f"{_BLOCK}.mlp.fc2_conv"),
    ("head", "head"),
]
_DENSE = [
    ("embed.convs.{i}.conv", "patch_embed.conv_layers.{i}.0"),
    ("embed.norms.{i}", "patch_embed.conv_layers.{i}.3"),
    ("blocks.{i}.attn.norm", f"{_BLOCK}.attn.proj_bn"),
    ("blocks.{i}.ffn.part.norm", f"{_BLOCK}.mlp.fc1_bn"),
    ("blocks.{i}.ffn.norm", f"{_BLOCK}.mlp.fc2_bn"),
]
_SPIKING = [
    *[(f"embed.convs.{i}.conv", f"patch_embed.proj_conv{i or ''}") for i in range(4)],
    *[(f"embed.norms.{i}", f"patch_embed.proj_bn{i or ''}") for i in range(4)],
    ("blocks.{i}.attn.norm", f"{_BLOCK}.attn.prev_bn"),
    ("blocks.{i}.attn.part.write_norm", f"{_BLOCK}.attn.lmu.bn_u"),
    ("blocks.{i}.attn.part.recall_norm", f"{_BLOCK}.attn.lmu.bn_m"),
    ("blocks.{i}.attn.part.read_norm", f"{_BLOCK}.attn.lmu.bn_h"),
    ("blocks.{i}.attn.close", f"{_BLOCK}.attn.proj_bn"),
    ("blocks.{i}.ffn.norm", f"{_BLOCK}.mlp.fc1_bn"),
    ("blocks.{i}.ffn.part.norm", f"{_BLOCK}.mlp.fc2_bn"),
    ("head_norm", "head_bn"),
]


def _constants(order: int, theta: float, frames: int) -> dict[str, Tensor]:
    """The buffers of one unit in the published form, float32 (and complex64)."""
    transition, write = legendre_system(order, theta)
    column, columns = write, []
    for _ in range(frames):
        columns.append(column)
        column = transition @ column
    response = torch.stack(columns, dim=1)
    spectrum = torch.fft.rfft(response, n=2 * frames)
    named = {"A": transition, "B": write[:, None], "H": response}
    return {
        **{name: value.float() for name, value in named.items()},
        "fft_H": spectrum.to(torch.complex64),
    }


def _check_constants(state: StateDict, config: Any) -> None:
    """Refuse units whose matrices belong to another window than the model's."""
    for key, stored in state.items():
        if key.rpartition(".")[2] == "A" and hasattr(config, "attn"):
            transition, _ = legendre_system(stored.shape[0], config.attn.theta)
            if not same_table(stored, transition):
                raise FormatError(
                    f"{key} is not the transition of a window theta={config.attn.theta}"
                )


def _official(
    pairs: Iterable[tuple[str, str]],
    recognise: Callable[[Iterable[str]], bool],
    form: Form | None = None,
) -> Layout:
    names = renamed("official", pairs, recognise=recognise)

    def to_ours(state: StateDict, config: Any) -> StateDict:
        _check_constants(state, config)
        kept = {k: v for k, v in state.items() if not _CONSTANT.fullmatch(k)}
        for key in [k for k in kept if k.endswith(".running_mean")]:
            counter = key.removesuffix(".running_mean") + _COUNTER
            kept.setdefault(counter, torch.tensor(0))  # left out by files without training state
        flat = {k: v.squeeze(-1) if _CONV.fullmatch(k) else v for k, v in kept.items()}
        return names.to_ours(flat, config)

    def from_ours(state: StateDict, config: Any) -> StateDict:
        theirs = names.from_ours(state, config)
        for key, value in list(theirs.items()):
            if _CONV.fullmatch(key):
                theirs[key] = value.unsqueeze(-1)
            if (match := _UNIT.fullmatch(key)) is not None:
                order = value.shape[1] - config.dim
                made = _constants(order, config.attn.theta, config.frames)
                theirs |= {f"{match['unit']}.{name}": x for name, x in made.items()}
        return theirs

    return Layout(
        name="official", recognise=recognise, to_ours=to_ours, from_ours=from_ours,
        strange=(lambda config: {}) if form is None else form.strange,
    )  # fmt: skip


# a unit's matrices are in the file
_FORM = Form(
    free=(
        "dim", "depth", "heads", "channels", "frames", "num_classes", "ffn.ratio", "ffn.hidden", "attn.memory",
        "attn.theta", "attn.hidden", "*.detach_reset", "*.alpha",
    )
)  # fmt: skip


DENSE = _official(
    [*_DENSE, *_SHARED],
    has_keys("patch_embed.conv_layers.0.0.weight", "block.0.attn.lmu.W_u.weight"),
    _FORM,
)
SPIKING = _official(
    [*_SPIKING, *_SHARED],
    has_keys("patch_embed.proj_conv.weight", "block.0.attn.lmu.bn_u.weight"),
    _FORM,
)
UNIT = _official(
    [("write", "W_u"), ("read", "W_h"), ("write_norm", "bn_u"), ("recall_norm", "bn_m"),
     ("read_norm", "bn_h")],
    has_keys("W_u.weight", "W_h.weight"),
)  # fmt: skip
"""One memory unit, dense or spiking, without projection; its constants are not written back."""
