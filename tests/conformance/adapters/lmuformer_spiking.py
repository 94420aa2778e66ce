"""Spiking LMUFormer: spikes to the bit, potentials, logits, surrogate gradients, and the stream."""

from __future__ import annotations

from typing import Any

import torch
from harness import Golden
from lmuformer_model import build, finish, turned, watch
from torch import Tensor

_SPIKES = ("spikes_in", "lmu_spikes", "u_spikes", "memory_spikes", "head_spikes")


def check(golden: Golden) -> None:
    c = golden.config
    neurons = _neurons(golden)
    first = neurons | {"threshold": c["lif"]["v_threshold_prev_lif"]}
    model = build(
        golden,
        "spiking-lmuformer-tiny",
        attn={"memory": c["memory_size"], "theta": float(c["theta"]), "lif": neurons},
        ffn={"ratio": float(c["mlp_ratio"]), "lif": neurons},
        block={"attn_lif": first, "ffn_lif": neurons},
        lif=neurons,
    )
    x = golden.tensor("in.x").requires_grad_()
    seen: dict[str, Tensor] = {}
    for i, block in enumerate(model.blocks):
        unit = block.attn.part
        watch(block.attn.lif, seen, f"block{i}.spikes_in", lambda out: turned(out[0]))
        watch(unit.write_lif, seen, f"block{i}.u_spikes", _fired)
        watch(unit.memory, seen, f"block{i}.memory")
        watch(unit.recall_lif, seen, f"block{i}.memory_spikes", _fired)
        watch(unit.read_lif, seen, f"block{i}.lmu_spikes", _fired)
        watch(block.attn.close, seen, f"block{i}.attn", turned)
        watch(block.ffn.part, seen, f"block{i}.mlp", turned)
        watch(block, seen, f"block{i}", turned)
    watch(model.embed, seen, "patch_embed", turned)
    watch(model.head_lif, seen, "head_spikes", lambda out: turned(out[0]))
    logits = model(x)
    for name, value in seen.items():
        if name.rpartition(".")[2] in _SPIKES:
            assert torch.equal(value.detach(), golden.tensor(f"out.{name}")), name
        else:
            golden.assert_close(value, f"out.{name}")
    finish(golden, model, logits, x)


def _neurons(golden: Golden) -> dict[str, Any]:
    lif = golden.config["lif"]
    kind, _, alpha = lif["surrogate"].partition(" alpha=")
    golden.only("surrogate", "sigmoid", why="the neurons have one", among={"surrogate": kind})
    return {
        "tau": lif["tau"],
        "threshold": lif["v_threshold"],
        "reset": lif["v_reset"],
        "decay_input": lif["decay_input"],
        "detach_reset": lif["detach_reset"],
        "alpha": float(alpha),
    }


def _fired(out: tuple[Tensor, Tensor]) -> Tensor:
    return out[0]
