"""GenCompositor whole: tokens, what the branch adds, the first blocks, and the output."""

from __future__ import annotations

from typing import Any

import torch
from effformer.models import GenCompositor
from harness import Golden

import effformer

UNUSED = ("branch.branch_x_embedder.", "branch.norm_final.", "branch.norm_out.", "branch.proj_out.")


@torch.no_grad()
def check(golden: Golden) -> None:
    model = build(golden)
    given = {
        "x": golden.tensor("in.noisy"), "t": golden.tensor("in.timestep"),
        "text": golden.tensor("in.text"), "background": golden.tensor("in.masked_video"),
        "foreground": golden.tensor("in.foreground"), "mask": golden.tensor("in.mask"),
    }  # fmt: skip
    assert torch.equal(model.editable(given["mask"]), golden.tensor("out.token_mask"))
    seen: dict[str, tuple[Any, Any]] = {}

    def keep(name: str) -> Any:
        return lambda _, args, out: seen.__setitem__(name, (args, out))

    watched = {"0": model.blocks[0], "1": model.blocks[1]}
    watched |= {f"branch_{i}": out for i, out in enumerate(model.branch.outs)}
    for name, module in watched.items():
        module.register_forward_hook(keep(name))
    v = model(**given)
    entered = seen["0"][0]
    golden.assert_close(torch.cat([entered[1], entered[0]], dim=1), "out.embeds")
    golden.assert_close(seen["0"][1][0], "out.block0_hidden")
    golden.assert_close(seen["1"][0][0], "in.block1_hidden")
    for i in range(len(model.branch.outs)):
        golden.assert_close(seen[f"branch_{i}"][1], f"out.branch_{i}")
    golden.assert_close(v, "out.velocity")
    saved = model.LAYOUTS[0].from_ours(model.state_dict(), model.config)
    weights = {k: w for k, w in golden.weights().items() if not k.startswith(UNUSED)}
    assert saved.keys() == weights.keys()
    assert all(torch.equal(saved[key], value) for key, value in weights.items())


def build(golden: Golden) -> GenCompositor:
    c, b = golden.meta["transformer_config"], golden.meta["branch_config"]
    for option in ("use_rotary_positional_embeddings", "use_learned_positional_embeddings"):
        golden.only(option, True, why="GenCompositor has no other", among=c)
    width = c["attention_head_dim"]
    model = effformer.build_model(
        "gencompositor-tiny",
        dim=c["num_attention_heads"] * width,
        depth=c["num_layers"],
        heads=c["num_attention_heads"],
        branch_depth=b["num_layers"],
        frames=golden.meta["latent"][0],
        size=(c["sample_height"], c["sample_width"]),
        channels=c["out_channels"],
        patch=c["patch_size"],
        text_dim=c["text_embed_dim"],
        text_length=c["max_text_seq_length"],
        time_dim=c["time_embed_dim"],
        order="release",
        rope={"widths": (width // 4, *[3 * width // 8] * 2)},
    )
    assert isinstance(model, GenCompositor)
    for name, stem in (("transformer", model.stem), ("branch", model.branch.stem)):
        golden.assert_close(stem.pos_embed, f"w.{name}.patch_embed.pos_embedding")
    report = effformer.load_weights(model, golden.weights())
    assert report.layout == "official"
    return model.eval()
