"""Linear attention of MLLA."""

from __future__ import annotations

import torch
from harness import Golden
from vision_linear import Options, Weights, check_cases, close, plain

from effformer.attention import MLLA
from effformer.site import Site


def check(golden: Golden) -> None:
    check_cases(golden, MLLA, _config, plain(lepe="lepe.conv"), tables=(_TABLE,))
    for case, options in golden.config.items():
        if f"w.{case}.{_TABLE}" in golden.tensors:
            _check_table(golden, case, options)


_TABLE = "rope.rotations"


def _config(options: Options, weights: Weights) -> MLLA.Config:
    return MLLA.Config(
        qk_bias="qk.bias" in weights,
        kernel=weights["lepe.weight"].shape[-1],
        eps=options.get("eps", 1e-6),
    )


def _check_table(golden: Golden, case: str, options: Options) -> None:
    """The official table is fixed, (h, w, D/2, 2); ours is made for the grid."""
    stored = golden.tensor(f"w.{case}.{_TABLE}")
    part = MLLA(MLLA.Config(), Site(dim=options["dim"], heads=options["heads"]))
    cos, sin = part.tables(tuple(options["grid"]), stored)
    made = torch.stack([cos[:, ::2], sin[:, ::2]], dim=-1)
    close(golden, made, stored.reshape(made.shape), f"w.{case}.{_TABLE}")
