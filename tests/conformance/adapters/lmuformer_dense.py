"""Dense LMUFormer: features of every stage, logits, prefixes, gradients, and the stream."""

from __future__ import annotations

from typing import Any

import torch
from harness import Golden
from lmuformer_model import build, finish, turned, watch
from torch import Tensor


def check(golden: Golden) -> None:
    c = golden.config
    model = build(
        golden, "lmuformer-tiny", attn={"memory": c["memory_size"], "theta": float(c["theta"])}
    )
    x, seen = golden.tensor("in.x").requires_grad_(), {}
    for i, block in enumerate(model.blocks):
        unit = block.attn.part
        watch(unit.write, seen, f"block{i}.u", lambda out: out.relu())
        watch(unit.memory, seen, f"block{i}.memory")
        unit.proj.register_forward_pre_hook(
            lambda _, args, i=i: seen.update({f"block{i}.lmu_h": args[0]})
        )
        watch(block.attn.norm, seen, f"block{i}.attn_parallel", turned)
        watch(block.ffn.act, seen, f"block{i}.mlp", turned)
        watch(block, seen, f"block{i}", turned)
    watch(model.embed, seen, "patch_embed", turned)
    logits = model(x)
    for name, value in seen.items():
        golden.assert_close(value, f"out.{name}")
    for i, block in enumerate(model.blocks):
        golden.assert_close(_recurrent(block, seen, i), f"out.block{i}.attn_recurrent")
    finish(golden, model, logits, x)


def _recurrent(block: Any, seen: dict[str, Tensor], i: int) -> Tensor:
    """The attention branch of a block, token by token."""
    source = seen["patch_embed"] if i == 0 else seen[f"block{i - 1}"]
    x = source.detach().transpose(1, 2)
    state, pieces = block.attn.part.init_state(x.shape[0], like=x), []
    for token in x.split(1, dim=1):
        piece, state = block.attn.part.step(token, state)
        pieces.append(piece)
    return turned(block.attn.norm(torch.cat(pieces, dim=1)))
