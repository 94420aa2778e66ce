"""Flow-Attention alone: self, cross and causal with gradients and flows, and the task variants."""

from __future__ import annotations

import torch
from effformer.models.layouts.flowformer import ATTENTION, CROSS_ATTENTION, VISION_ATTENTION
from harness import Golden

import effformer
from effformer.attention import Attention, Flow
from effformer.attention.flow import FLOW_PRESETS
from effformer.config import resolve
from effformer.context import Context
from effformer.layout import Layout
from effformer.site import Site


def check(golden: Golden) -> None:
    _check_self(golden, "normal", "normal_self", "in.self", "flowformer")
    _check_self(golden, "causal", "causal", "in.causal", "gpt")
    _check_cross(golden)
    _check_variant(golden, "rl", "out.rl_causal", "reinforcement-learning", ATTENTION)
    _check_variant(golden, "cv", "out.cv", "vision", VISION_ATTENTION)
    core = Flow(_core(golden, "time-series"), Site(dim=1))
    q, k, v = (golden.tensor(f"in.heads.{x}").transpose(1, 2) for x in "qkv")
    out = core(q, k, v, Context(memory=k.transpose(1, 2).flatten(2)))
    golden.assert_close(out.transpose(1, 2), "out.timeseries_core")


def _core(golden: Golden, preset: str) -> Flow.Config:
    config = FLOW_PRESETS[preset].replace(eps=golden.config["eps"])
    assert config == resolve("core", config.to_dict())
    return config


def _load(
    golden: Golden, prefix: str, preset: str, layout: Layout, dim: int, memory: int | None = None
) -> Attention:
    """Our attention with the official weights; widths come from the weights and the config."""
    c = golden.config
    weights = golden.weights(f"{prefix}.")
    proj = weights["proj.weight" if "proj.weight" in weights else "out_projection.weight"]
    site = Site(dim=dim, heads=c["n_heads"], memory_dim=memory, out_dim=proj.shape[0])
    head_dim = proj.shape[1] // c["n_heads"]
    config = Attention.Config(core=_core(golden, preset), head_dim=head_dim)
    mixer = Attention(config, site).eval()
    effformer.load_weights(mixer, weights, layout)
    return mixer


def _check_self(golden: Golden, prefix: str, case: str, given: str, preset: str) -> None:
    x = golden.tensor(f"{given}.x").clone().requires_grad_()
    mixer = _load(golden, prefix, preset, ATTENTION, x.shape[-1])
    y = mixer(x)
    golden.assert_close(y, f"out.{case}")
    (y * golden.tensor(f"{given}.cotangent")).sum().backward()
    assert x.grad is not None
    golden.assert_close(x.grad, f"grad.{case}.x")
    grads = {k: p.grad for k, p in mixer.named_parameters() if p.grad is not None}
    official = ATTENTION.from_ours(grads, None)
    for key in golden.keys(f"grad.{case}."):
        if not key.endswith(".x"):
            golden.assert_close(official[key.removeprefix(f"grad.{case}.")], key)
    q, k, _ = mixer.qkv(x).unflatten(-1, (3, mixer.heads, mixer.head_dim)).unbind(2)
    _check_flows(golden, mixer, q, k, case, Context())


def _check_cross(golden: Golden) -> None:
    x = golden.tensor("in.cross.q").clone().requires_grad_()
    memory = golden.tensor("in.cross.kv").clone().requires_grad_()
    width = memory.shape[-1]
    mixer = _load(golden, "normal", "flowformer", CROSS_ATTENTION, x.shape[-1], memory=width)
    y = mixer(x, Context(memory=memory))
    golden.assert_close(y, "out.normal_cross")
    (y * golden.tensor("in.cross.cotangent")).sum().backward()
    assert x.grad is not None
    assert memory.grad is not None
    golden.assert_close(x.grad, "grad.normal_cross.q")
    golden.assert_close(memory.grad, "grad.normal_cross.kv")
    q = mixer.q(x).unflatten(-1, (mixer.heads, mixer.head_dim))
    k = mixer.kv(memory).unflatten(-1, (2, mixer.heads, mixer.head_dim))[:, :, 0]
    _check_flows(golden, mixer, q, k, "normal_cross", Context(memory=memory))


def _check_flows(
    golden: Golden, mixer: Attention, q: torch.Tensor, k: torch.Tensor, case: str, ctx: Context
) -> None:
    assert isinstance(mixer.core, Flow)
    flows = mixer.core.flows(q.transpose(1, 2), k.transpose(1, 2), ctx)
    counted = "_times_count" if mixer.core.config.causal else ""
    names = (
        f"sink_incoming{counted}",
        f"source_outgoing{counted}",
        "conserved_sink",
        "conserved_source_preclamp",
    )
    for name, value in zip(names, flows, strict=True):
        golden.assert_close(value.squeeze(-1), f"out.{case}.{name}")


def _check_variant(golden: Golden, prefix: str, key: str, preset: str, layout: Layout) -> None:
    x = golden.tensor(f"in.{prefix}.x")
    with torch.no_grad():
        golden.assert_close(_load(golden, prefix, preset, layout, x.shape[-1])(x), key)
