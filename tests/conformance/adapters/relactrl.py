"""RelaCtrl: the shuffle mixer of one group, and control blocks chained, with given permutations."""

from __future__ import annotations

from math import gcd

import torch
from effformer.models.layouts.relactrl import BLOCK, EXPERT
from effformer.models.relactrl import ControlBlock
from harness import Golden

import effformer
from effformer.attention.tdsm import TDSM, Shuffle
from effformer.site import Site


@torch.no_grad()
def check(golden: Golden) -> None:
    if "in.token.x" in golden.tensors:
        _check_token_mixer(golden)
    c, time = golden.tensor("in.c"), golden.tensor("in.t").unflatten(1, (6, -1))
    for name in golden.meta["order"]:
        block, x = _build(golden, name), golden.tensor(f"in.{name}.x")
        golden.assert_close(block.entry(x, c), f"out.{name}.tdsm_in")
        c, skip = block(x, c, time)
        golden.assert_close(c, f"out.{name}.c")
        golden.assert_close(skip, f"out.{name}.c_skip")


def _config(golden: Golden, name: str, widths: list[int]) -> TDSM.Config:
    info = golden.meta["info"][name]
    return TDSM.Config(
        groups=len(widths), heads=info["heads"], segments=info["segments"], unit=gcd(*widths)
    )


def _build(golden: Golden, name: str) -> ControlBlock:
    """The first block of the official list has its two inputs the other way round."""
    widths = golden.meta["info"][name]["groups"]
    site = Site(dim=golden.meta["dim"], length=golden.meta["tokens"])
    block = ControlBlock(_config(golden, name, widths), site, first=name == "block0")
    effformer.load_weights(block, golden.weights(f"{name}."), BLOCK)
    mixer = block.mixer.part
    assert isinstance(mixer, TDSM)
    assert list(mixer.widths) == widths
    elements = tuple(golden.tensor(f"in.{name}.elem_perm{i}") for i in range(len(widths)))
    mixer.use(Shuffle(golden.tensor(f"in.{name}.channel_perm"), elements))
    return block.eval()


def _check_token_mixer(golden: Golden) -> None:
    x = golden.tensor("in.token.x")
    config = _config(golden, golden.meta["order"][0], [x.shape[2]])
    mixer = TDSM(config, Site(dim=x.shape[2]))
    effformer.load_weights(mixer, golden.weights("token."), EXPERT)
    mixer.use(Shuffle(torch.arange(x.shape[2]), (golden.tensor("in.token.perm"),)))
    golden.assert_close(mixer.eval()(x), "out.token.y")
