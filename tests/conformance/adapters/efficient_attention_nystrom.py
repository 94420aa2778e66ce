"""Nystrom attention of two packages, with their defects, and the pseudo-inverse without."""

from __future__ import annotations

from functools import partial

import torch
from closeness import assert_close
from harness import Golden
from torch import Tensor

from effformer.attention import Attention, Nystrom
from effformer.attention.nystrom import iterative_pinv
from effformer.config import resolve
from effformer.context import Context
from effformer.site import Site


def check(golden: Golden) -> None:
    steps = golden.config["pinv_iterations"]
    matrices = golden.tensor("in.pinv.A")
    for key, coupled in (("lib", True), ("hf", True), ("per_matrix_init", False)):
        found = iterative_pinv(matrices, steps, coupled=coupled)
        golden.assert_close(found, f"out.pinv.{key}")
    _check_transformers(golden)
    _check_package(golden)


TRANSFORMERS_ITERATIONS = 6
"""Of the pseudo-inverse inside the layer of transformers, whatever the set's config says."""


def _attention(
    golden: Golden, compat: str, *, landmarks: int | None = None, iterations: int, bias: bool
) -> Attention:
    c = golden.config
    core = Nystrom.Config(
        landmarks=landmarks or c["landmarks"],
        iterations=iterations,
        conv=c["conv_kernel"],
        compat=compat,
    )
    config = resolve("attention", core).replace(qkv_bias=bias)
    return Attention(config, Site(dim=c["dim"], heads=c["heads"])).eval()


def _check_transformers(golden: Golden) -> None:
    w, c = golden.weights("hf."), golden.config
    build = partial(_attention, golden, iterations=TRANSFORMERS_ITERATIONS, bias=True)

    def load(part: Attention) -> Attention:
        state = {
            f"qkv.{kind}": torch.cat([w[f"{x}.{kind}"] for x in ("query", "key", "value")])
            for kind in ("weight", "bias")
        }
        state |= {f"core.{key}": w[key] for key in ("conv.weight",) if key in w}
        state |= {"proj.weight": torch.eye(c["dim"]), "proj.bias": torch.zeros(c["dim"])}
        part.load_state_dict(state)
        return part

    part = load(build("transformers"))
    x = golden.tensor("in.hf.x").requires_grad_()
    out = part(x)
    golden.assert_close(out, "out.hf")
    (grad,) = torch.autograd.grad(out, x, golden.tensor("in.hf.cotangent"))
    golden.assert_close(grad, "grad.hf.x")
    mask = golden.tensor("in.hf.key_mask").bool()
    golden.assert_close(part(x, Context(mask=mask)), "out.hf_masked")
    golden.assert_close(part(x[:1]), "out.hf_single_first_sample")
    exact = load(build("transformers", landmarks=c["n"]))
    golden.assert_close(exact(x), "out.hf_exact_when_landmarks_equal_n")
    ours = load(build("none"))
    assert_close(ours(x)[:1], ours(x[:1]), rtol=1e-4, atol=1e-5)
    ours = load(build("none", landmarks=c["n"]))
    golden.assert_close(ours(x), "out.hf_exact_when_landmarks_equal_n")


def _check_package(golden: Golden) -> None:
    w = golden.weights("lib.")
    iterations = golden.config["pinv_iterations"]
    part = _attention(golden, "nystrom-attention", iterations=iterations, bias=False)
    names = {
        "qkv.weight": "to_qkv.weight",
        "core.conv.weight": "res_conv.weight",
        "proj.weight": "to_out.0.weight",
        "proj.bias": "to_out.0.bias",
    }
    part.load_state_dict({ours: w[theirs] for ours, theirs in names.items() if theirs in w})
    mask: Tensor = golden.tensor("in.lib.mask").bool()
    golden.assert_close(part(golden.tensor("in.lib.x_divisible")), "out.lib")
    golden.assert_close(part(golden.tensor("in.lib.x")), "out.lib_unpadded_length")
    golden.assert_close(part(golden.tensor("in.lib.x"), Context(mask=mask)), "out.lib_masked")
