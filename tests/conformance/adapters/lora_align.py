"""LoRA as peft has it: adapted and merged outputs, weights, gradients, keys and files.

The set also holds numbers of Muon, of an alignment loss, of predictions of the data and of averaged
weights; those that are parts here are compared.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from closeness import assert_close
from effformer.compress import LoRA, adapt, load_adapter, merge, save_adapter
from harness import Golden
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F


class Net(nn.Module):
    """A convolution to tokens, an attention and an FFN, with the names of the set."""

    def __init__(self, golden: Golden) -> None:
        super().__init__()
        w = golden.weights("base.")
        rows, columns = w["patch.weight"].shape[:2]
        side = w["patch.weight"].shape[2]
        self.heads = golden.config["lora"]["heads"]
        self.patch = nn.Conv2d(columns, rows, side, stride=side, bias="patch.bias" in w)
        for name in ("qkv", "proj", "fc1", "fc2"):
            out, inside = w[f"{name}.weight"].shape
            setattr(self, name, nn.Linear(inside, out, bias=f"{name}.bias" in w))
        self.load_state_dict(w)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).mT
        q, k, v = (
            y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, dim=-1)
        )
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(x)))


def check(golden: Golden) -> None:
    # in float64, so that a difference is one of formulas: gradients reach 2,000 here
    net, x = Net(golden).double().eval(), golden.tensor("in.x").double()
    golden.assert_close(net(x), "out.base")
    c = golden.config["lora"]
    for kind in ("std", "rs", "dora"):
        state = golden.weights(f"{kind}.")
        if state:
            _check_kind(golden, net, state, _facts(c, kind), kind)


def _facts(c: dict[str, Any], kind: str) -> dict[str, Any]:
    return {
        "peft_type": "LORA", "r": c["r"], "lora_alpha": c["alpha"],
        "rank_pattern": c["rank_pattern"], "alpha_pattern": c["alpha_pattern"],
        "use_rslora": kind == "rs", "use_dora": kind == "dora",
    }  # fmt: skip


def _check_kind(
    golden: Golden, net: Net, state: dict[str, Tensor], facts: dict[str, Any], kind: str
) -> None:
    x = golden.tensor("in.x").double()
    kinds: dict[str, Any] = {"std": "lora", "rs": "rs", "dora": "dora"}
    scheme = LoRA(
        rank=facts["r"], alpha=facts["lora_alpha"], kind=kinds[kind], ranks=facts["rank_pattern"],
        alphas=facts["alpha_pattern"],
    )  # fmt: skip
    paths = sorted({key.split(".lora_")[0].removeprefix("base_model.model.") for key in state})
    fresh, _ = adapt(net, scheme, paths)
    assert_close(fresh(x), net(x), rtol=0, atol=1e-12)
    golden.assert_close(fresh(x), "out.base")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        save_file(state, path / "adapter_model.safetensors", metadata={"format": "pt"})
        (path / "adapter_config.json").write_text(json.dumps(facts), encoding="utf-8")
        model = load_adapter(net, path)
        again = load_adapter(net, save_adapter(model, path / "ours"))
        ours = load_file(path / "ours" / "adapter_model.safetensors")
    assert ours.keys() == {k.removesuffix(".weight") if "magnitude" in k else k for k in state}
    out = model(x)
    golden.assert_close(out, f"out.{kind}")
    golden.assert_close(again(x), f"out.{kind}")
    out.backward(golden.tensor("in.cotangent").double())
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, parameter in trained.items():
        key = f"grad.{kind}.base_model.model.{name}"
        key = key if key in golden.tensors else f"{key}.weight"  # one vector, as a module in peft
        assert parameter.grad is not None
        golden.assert_close(parameter.grad, key)
    assert len(trained) == len(golden.keys(f"grad.{kind}."))
    merged = merge(model)
    golden.assert_close(merged(x), f"out.{kind}.merged")
    for name, weight in merged.named_parameters():
        if f"out.{kind}.merged.{name}" in golden.tensors:
            golden.assert_close(weight, f"out.{kind}.merged.{name}")
