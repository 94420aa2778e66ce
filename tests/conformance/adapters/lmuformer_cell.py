"""Legendre memory unit: memory and output of all forms, gradient-free set."""

from __future__ import annotations

import torch
from effformer.models.layouts.lmuformer import UNIT
from harness import Golden

import effformer
from effformer.attention import LMU
from effformer.site import Site

# Both sides compute in float64 and round once, or twice on the way to the discrete form.
ROUNDED = {"rtol": 3e-7, "atol": 1e-7}


def check(golden: Golden) -> None:
    for number, c in enumerate(golden.config):
        _check_case(golden, c, f"c{number}")


def _check_case(golden: Golden, c: dict[str, int], case: str) -> None:
    config = LMU.Config(memory=c["memory_size"], theta=float(c["theta"]), proj=False)
    part = LMU(config, Site(dim=c["input_size"], out_dim=c["hidden_size"])).eval()
    weights = {
        key.removeprefix(f"{case}.w."): golden.tensor(key) for key in golden.keys(f"{case}.w.")
    }
    effformer.load_weights(part, weights, layout=UNIT)
    memory, x = part.memory, golden.tensor(f"{case}.in.x")
    assert x.shape == (c["batch"], c["seq_len"], c["input_size"])
    golden.assert_close(memory.transition, f"{case}.w.A", **ROUNDED)
    golden.assert_close(memory.write[:, None], f"{case}.w.B", **ROUNDED)
    impulse = torch.zeros(1, c["seq_len"])
    impulse[0, 0] = 1
    response = memory.step(impulse, memory.init_state(1))[0][0].T
    golden.assert_close(response, f"{case}.w.H", rtol=0, atol=1e-5)
    u = part.write(x).squeeze(-1).relu()
    for form in (memory, memory.multiply, memory.transform, memory.convolve):
        golden.assert_close(form(u), f"{case}.out.memory")
    golden.assert_close(part(x), f"{case}.out.h_parallel")
    state, pieces = part.init_state(c["batch"], like=x), []
    for token in x.split(1, dim=1):
        piece, state = part.step(token, state)
        pieces.append(piece)
    golden.assert_close(torch.cat(pieces, dim=1), f"{case}.out.h_recurrent")
