"""What the adapters of LMUFormer's dense and spiking sets share."""

from __future__ import annotations

from typing import Any

import torch
from closeness import assert_close
from harness import Golden
from torch import Tensor, nn

import effformer


def build(golden: Golden, preset: str, **overrides: Any) -> Any:
    """Our model of the set's size, with the set's weights."""
    c = golden.config
    model = effformer.build_model(
        preset,
        dim=c["dim"],
        depth=c["depth"],
        channels=c["in_channels"],
        frames=c["seq_len"],
        num_classes=c["num_classes"],
        **({"ffn": {"ratio": float(c["mlp_ratio"])}} | overrides),
    ).eval()
    assert effformer.load_weights(model, golden.weights()).layout == "official"
    return model


def watch(
    module: nn.Module, seen: dict[str, Tensor], name: str, change: Any = lambda out: out
) -> None:
    """Keep the output of a module."""
    module.register_forward_hook(lambda _, args, out: seen.update({name: change(out)}))


def turned(out: Tensor) -> Tensor:
    return out.transpose(1, 2)


def finish(golden: Golden, model: Any, logits: Tensor, x: Tensor) -> None:
    """Logits, gradients, prefixes, weights back in the official layout, and the stream."""
    golden.assert_close(logits, "out.logits")
    classes = torch.arange(1, logits.shape[1] + 1, dtype=logits.dtype)
    names = [key.removeprefix("grad.") for key in golden.keys("grad.") if key != "grad.x"]
    own = dict(model.named_parameters())
    layout = model.LAYOUTS[0]
    ours = [next(iter(layout.to_ours({n: golden.tensor(f"grad.{n}")}, None))) for n in names]
    (logits * classes).sum().backward()
    golden.assert_close(x.grad, "grad.x")
    for name, key in zip(names, ours, strict=True):
        grad = own[key].grad.reshape(golden.tensor(f"grad.{name}").shape)
        golden.assert_close(grad, f"grad.{name}")
    with torch.no_grad():
        prefixes = model.prefix_logits(x).transpose(0, 1)
        golden.assert_close(prefixes, "out.logits_all_seq")
        theirs = layout.from_ours(model.state_dict(), model.config)
        for key, value in golden.weights().items():
            assert_close(theirs[key], value, rtol=1e-6, atol=1e-6)
        state, pieces = model.init_state(x.shape[0]), []
        for frame in x.split(1, dim=1):
            piece, state = model.step(frame, state)
            pieces.append(piece)
        pieces.append(model.finish(state))
        golden.assert_close(torch.cat(pieces, dim=1).transpose(0, 1), "out.logits_all_seq")
