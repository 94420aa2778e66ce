"""Selective hard attention: values, probabilities, gradients, masks, layers of a BERT; and the search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from effformer.compress.prune.greedy import greedy
from harness import Golden
from torch import Tensor, nn

import effformer
from effformer.attention.topk import TopK
from effformer.context import Context
from effformer.site import Site


def check(golden: Golden) -> None:
    c = golden.config["attention"]
    site = Site(dim=c["heads"] * c["head_dim"], heads=c["heads"])
    for path in ("dense", "gather"):
        for keep in c["K"]:
            _check_core(golden, TopK(TopK.Config(keep=keep, path=path), site), f"k{keep}")
        soft = TopK(TopK.Config(keep=c["k_len"], path=path), site)
        golden.assert_close(soft(*(golden.tensor(f"in.{x}") for x in "qkv")), "out.soft")
    _check_bert(golden, {}, "out.bert.dense")
    _check_bert(golden, {}, "out.bert.pruned", removed=golden.config["removed"])
    layers = {
        i: {"attn": {"name": "topk", "keep": k}} for i, k in golden.config["hard_layers"].items()
    }
    _check_bert(golden, layers, "out.bert.hard")
    _check_bert(golden, layers, "out.bert.pruned_and_hard", removed=golden.config["removed"])
    _check_search(golden.meta["greedy_contract_example"])


def _check_search(given: dict[str, Any]) -> None:
    """Visits, losses and decisions on a loss that is a table."""

    def measure(removed: Sequence[str], keys: Mapping[str, int]) -> float:
        alone = sum(given["element_cost"][name] for name in removed)
        pairs = [cost for a, b, cost in given["pair_cost"] if a in removed and b in removed]
        return float(given["base_loss"] + alone + sum(pairs))

    found = greedy(
        given["block_order"], given["children"], {}, measure, threshold=given["fine_threshold"]
    )
    seen = [(v.element, v.accepted) for v in found.visits]
    assert seen == [(name, accepted) for name, _, accepted in given["expected_visits"]]
    losses = torch.tensor([v.loss for v in found.visits])
    expected = torch.tensor([loss for _, loss, _ in given["expected_visits"]])
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-6)
    assert found.removed == given["expected_removed_in_order"]
    assert abs(found.best - given["expected_final_loss"]) < 1e-6


def _check_core(golden: Golden, core: TopK, case: str) -> None:
    q, k, v = (golden.tensor(f"in.{x}").clone().requires_grad_() for x in "qkv")
    out = core(q, k, v)
    golden.assert_close(out, f"out.{case}")
    mask = golden.tensor("in.key_mask").bool()
    golden.assert_close(core(q, k, v, Context(mask=mask)), f"out.{case}_masked")
    unit = torch.eye(k.shape[2]).expand(*k.shape[:3], -1)  # the weighted sum of unit vectors
    golden.assert_close(core(q, k, unit), f"out.{case}.probs")
    grads = torch.autograd.grad(out, (q, k, v), golden.tensor("in.cotangent"))
    for name, grad in zip("qkv", grads, strict=True):
        golden.assert_close(grad, f"grad.{case}.{name}")


def _check_bert(
    golden: Golden, layers: dict[str, Any], key: str, *, removed: dict[str, Any] | None = None
) -> None:
    c = golden.config["bert"]
    model = effformer.build_model(
        "bert-tiny",
        dim=c["hidden_size"],
        depth=c["layers"],
        heads=c["heads"],
        ffn={"hidden": c["intermediate_size"]},
        vocab=c["vocab"],
        context=c["max_len"],
        segments=len(golden.weights("embeddings.token_type_embeddings.")["weight"]),
        layers=layers,
        pooler=False,
    ).eval()
    # the attention of some blocks approximates that of the weights
    report = effformer.load_weights(model, golden.weights(), strict=False)
    assert not report.missing
    assert not report.unexpected
    if removed is not None:
        _remove(model, removed, c["weight_group_size"])
    with torch.no_grad():
        out = model(golden.tensor("in.input_ids"), mask=golden.tensor("in.attention_mask").bool())
    golden.assert_close(out.hidden, key)


class _Nothing(nn.Module):
    """A removed attention or FFN: its residual branch adds nothing, the norm stays."""

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        return torch.zeros_like(x)


def _remove(model: nn.Module, removed: dict[str, Any], group: int) -> None:
    """Cut heads and runs of ``group`` hidden channels out of the weights, and whole parts off."""
    cuts: dict[tuple[str, int], list[int]] = {}
    for i, head in removed["heads"]:
        cuts.setdefault(("attn", i), []).append(head)
    for i, which in removed["weight_groups"]:
        cuts.setdefault(("ffn", i), []).extend(range(which * group, (which + 1) * group))
    for (name, i), units in cuts.items():
        branch = getattr(model.blocks[i], name)
        kept = [unit for unit in range(_units(branch.part)) if unit not in units]
        branch.part = branch.part.select(torch.tensor(kept))
    for name in ("attn", "ffn"):
        for i in removed[f"{name}_blocks"]:
            getattr(model.blocks[i], name).part = _Nothing()


def _units(part: nn.Module) -> int:
    return len(part.magnitudes())
