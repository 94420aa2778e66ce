"""Losses of distillation: logits, labels, states, attention scores, relations."""

from __future__ import annotations

import torch
from effformer.compress.distill import losses
from harness import Golden
from torch import Tensor


def check(golden: Golden) -> None:
    s, t = golden.tensor("in.logits_s"), golden.tensor("in.logits_t")
    for key in golden.keys("out.kd_ce_T"):
        temperature = float(key.rpartition("T")[2])
        found = {
            "kd_ce": losses.soft_cross_entropy(s, t, temperature),
            "kd_mse": losses.mse_loss(s / temperature, t / temperature),
            "tinybert_soft_ce": losses.soft_cross_entropy(s, t, temperature, classes=True),
            "hinton_kl": losses.logits_loss(s, t, temperature),
        }
        for name, value in found.items():
            golden.assert_close(value[None], f"out.{name}_T{temperature:g}")
    for key in golden.keys("grad.hinton_kl_T"):
        z, teacher = s.clone().requires_grad_(), t.clone().requires_grad_()
        temperature = float(key.split("T")[1].split(".")[0])
        losses.logits_loss(z, teacher, temperature).backward()
        assert z.grad is not None
        golden.assert_close(z.grad, key)
        assert teacher.grad is None
    _check_states(golden)
    _check_relations(golden)
    golden.assert_close(
        losses.hard_loss(s, s, t, golden.tensor("in.labels"))[None], "out.deit_hard"
    )


def _check_states(golden: Golden) -> None:
    mask = golden.tensor("in.mask").bool()
    a, b, c, d = (golden.tensor(f"in.h_{x}") for x in "abcd")
    found = {
        "hid_mse_masked": losses.hidden_loss(a, b, mask),
        "distilbert_cos_masked": losses.cosine_loss(a, b, mask),
        "pkd_cls": losses.patient_loss(a, b),
        "nst_gram": losses.gram_loss((a, c), (b, d)),
        "fsp": losses.flow_loss((a, c), (b, d)),
    }
    for name, value in found.items():
        golden.assert_close(value[None], f"out.{name}")
    c_ = golden.config
    k = c_["teacher_layers"] // c_["student_layers"]
    fit = golden.tensor("in.tb.fit_dense")
    states = [
        losses.hidden_loss(_of(golden, "hs", i), _of(golden, "ht", i * k), fit=fit)
        for i in range(c_["student_layers"] + 1)
    ]
    golden.assert_close(torch.stack(states).sum()[None], "out.tinybert_rep")
    scores = [
        losses.score_loss(_of(golden, "scores_s", i), _of(golden, "scores_t", (i + 1) * k - 1))
        for i in range(c_["student_layers"])
    ]
    golden.assert_close(torch.stack(scores).sum()[None], "out.tinybert_att")


def _of(golden: Golden, name: str, i: int) -> Tensor:
    return golden.tensor(f"in.tb.{name}{i}")


def _check_relations(golden: Golden) -> None:
    mask, heads = golden.tensor("in.mask").bool(), golden.config["relation_heads"]
    s, t = ({x: golden.tensor(f"in.{x}{who}") for x in "qkv"} for who in "st")
    if "out.minilm_v1_at" in golden.tensors:
        attention = losses.relation_loss((s["q"], s["k"]), (t["q"], t["k"]), mask)
        golden.assert_close(attention[None], "out.minilm_v1_at")
        values = losses.relation_loss((s["v"], s["v"]), (t["v"], t["v"]), mask)
        golden.assert_close(values[None], "out.minilm_v1_vr")
    for name in "qkv":
        ours, theirs = (losses.split_heads(x[name], heads) for x in (s, t))
        for rows in ("all", "valid"):
            value = losses.relation_loss((ours, ours), (theirs, theirs), mask, rows=rows)
            golden.assert_close(value[None], f"out.minilm_v2_{name}{name}_{rows}_rows")
