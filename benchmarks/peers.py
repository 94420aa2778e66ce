"""Against packages of the same algorithms, with the same weights: equal outputs, then time.

Needs the bench extra: pip install 'effformer[bench]'.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from cpu_time import take_turns
from markdown import Row, write
from torch import Tensor, nn

import effformer
from effformer import registry
from effformer.attention import Attention
from effformer.checks import need
from effformer.config import resolve
from effformer.io import load_weights
from effformer.profile import Machine
from effformer.site import Site

Call = Callable[[], Tensor]


@dataclass(frozen=True, kw_only=True)
class Pair:
    """The same computation twice.

    Attributes:
        title: package and setting.
        theirs: the package.
        ours: the same algorithm of ours, with their weights and, where the published code has a
            defect, in the form that reproduces it.
        default: the form of ours that a user gets by name, if that is another one.
    """

    title: str
    theirs: Call
    ours: Call
    default: Call | None = None


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is measured; the small form only shows that the script runs."""

    dim: int = 512
    heads: int = 8
    tokens: int = 4096
    landmarks: int = 256
    window: int = 128
    chunk: int = 64
    vit: str = "vit_base_patch16_224"
    bert: str = "bert-base"
    batches: tuple[int, ...] = (1,)
    words: int = 128
    runs: int = 21


SMALL = Sizes(
    dim=24, heads=3, tokens=48, landmarks=6, window=4, chunk=6, vit="vit_tiny_patch16_224",
    bert="bert-tiny", batches=(1,), words=12, runs=1,
)  # fmt: skip


def mixer(
    sizes: Sizes, spec: dict[str, Any], state: dict[str, Tensor], **options: Any
) -> nn.Module:
    """A mixer of ours with given weights; options are those of the projections."""
    config = resolve("attention", spec)
    if isinstance(config, Attention.Config):
        config = config.replace(**options)
    part: nn.Module = config.build(Site(dim=sizes.dim, heads=sizes.heads))
    part.load_state_dict(state)
    return part.eval()


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def performer(sizes: Sizes) -> Iterator[Pair]:
    package = need("performer_pytorch", "bench")
    width = sizes.dim // sizes.heads
    theirs = package.SelfAttention(sizes.dim, heads=sizes.heads, dim_head=width).eval()
    w = theirs.state_dict()
    state = {
        "core.projection": w["fast_attention.projection_matrix"],
        "qkv.weight": torch.cat([w[f"to_{x}.weight"] for x in "qkv"]),
        "proj.weight": w["to_out.weight"],
        "proj.bias": w["to_out.bias"],
    }
    ours, x = mixer(sizes, {"name": "performer"}, state, qkv_bias=False), tokens(sizes)
    title = "performer-pytorch, softmax kernel"
    yield Pair(title=title, theirs=lambda: theirs(x), ours=lambda: ours(x))


def linformer(sizes: Sizes) -> Iterator[Pair]:
    package = need("linformer", "bench")
    k = sizes.landmarks
    theirs = package.LinformerSelfAttention(sizes.dim, sizes.tokens, k=k, heads=sizes.heads).eval()
    w = theirs.state_dict()
    state = {
        "qkv.weight": torch.cat([w[f"to_{x}.weight"] for x in "qkv"]),
        "core.key": w["proj_k"],
        "core.value": w["proj_v"],
        "proj.weight": w["to_out.weight"],
        "proj.bias": w["to_out.bias"],
    }
    spec = {"name": "linformer", "tokens": sizes.tokens, "projected": k}
    ours, x = mixer(sizes, spec, state, qkv_bias=False), tokens(sizes)
    title = f"linformer, {k} projected keys"
    yield Pair(title=title, theirs=lambda: theirs(x), ours=lambda: ours(x))


def nystrom(sizes: Sizes) -> Iterator[Pair]:
    package = need("nystrom_attention", "bench")
    theirs = package.NystromAttention(
        sizes.dim,
        dim_head=sizes.dim // sizes.heads,
        heads=sizes.heads,
        num_landmarks=sizes.landmarks,
    ).eval()
    w = theirs.state_dict()
    state = {
        "qkv.weight": w["to_qkv.weight"],
        "core.conv.weight": w["res_conv.weight"],
        "proj.weight": w["to_out.0.weight"],
        "proj.bias": w["to_out.0.bias"],
    }
    spec = {"name": "nystrom", "landmarks": sizes.landmarks}
    ours = mixer(sizes, spec | {"compat": "nystrom-attention"}, state, qkv_bias=False)
    default, x = mixer(sizes, spec, state, qkv_bias=False), tokens(sizes)
    yield Pair(
        title=f"nystrom-attention, {sizes.landmarks} landmarks",
        theirs=lambda: theirs(x), ours=lambda: ours(x), default=lambda: default(x),
    )  # fmt: skip


def local(sizes: Sizes) -> Iterator[Pair]:
    package = need("local_attention", "bench")
    for causal in (False, True):
        theirs = package.LocalAttention(
            sizes.window, causal=causal, look_forward=int(not causal), exact_windowsize=True,
            use_rotary_pos_emb=False,
        ).eval()  # fmt: skip
        config = resolve(
            "attention", {"name": "longformer", "window": 2 * sizes.window, "causal": causal}
        )
        entry, site = registry.attention.get("longformer"), Site(dim=sizes.dim, heads=sizes.heads)
        ours, x = entry.build(config, site).eval(), tokens(sizes)

        def wrapped(theirs: nn.Module = theirs, ours: nn.Module = ours, x: Tensor = x) -> Tensor:
            """The package has no projections: it gets ours."""
            q, k, v = ours.qkv(x).unflatten(-1, (3, sizes.heads, -1)).permute(2, 0, 3, 1, 4)
            return ours.proj(theirs(q, k, v).transpose(1, 2).flatten(2))

        yield Pair(
            title=f"local-attention, {sizes.window} on {'one side' if causal else 'each side'}",
            theirs=wrapped,
            ours=lambda ours=ours, x=x: ours(x),
        )


def reformer(sizes: Sizes) -> Iterator[Pair]:
    package = need("reformer_pytorch", "bench")
    chunk, rounds = sizes.chunk, 4
    for causal in (False, True):
        theirs = package.LSHSelfAttention(
            sizes.dim, heads=sizes.heads, bucket_size=chunk, n_hashes=rounds, causal=causal
        ).eval()
        w, width, buckets = theirs.state_dict(), sizes.dim // sizes.heads, sizes.tokens // chunk
        torch.manual_seed(0)  # the package draws its rotations in every call
        rotations = torch.randn(1, width, rounds, buckets // 2).expand(sizes.heads, -1, -1, -1)
        state = {
            "qk.weight": w["toqk.weight"], "v.weight": w["tov.weight"], "rotations": rotations,
            "proj.weight": w["to_out.weight"], "proj.bias": w["to_out.bias"],
        }  # fmt: skip
        spec = {
            "name": "reformer", "chunk": chunk, "rounds": rounds, "buckets": buckets,
            "causal": causal,
        }  # fmt: skip
        ours = mixer(sizes, spec | {"compat": "reformer-pytorch"}, state)
        default, x = mixer(sizes, spec, state), tokens(sizes)

        def seeded(theirs: nn.Module = theirs, x: Tensor = x) -> Tensor:
            torch.manual_seed(0)
            return theirs(x)

        yield Pair(
            title=f"reformer-pytorch, {rounds} hashes{', causal' if causal else ''}",
            theirs=seeded,
            ours=lambda ours=ours, x=x: ours(x),
            default=lambda default=default, x=x: default(x),
        )


def timm(sizes: Sizes) -> Iterator[Pair]:
    package = need("timm")
    name = sizes.vit
    theirs = package.create_model(name).eval()
    ours = effformer.build_model(name).eval()
    load_weights(ours, theirs.state_dict())
    for batch in sizes.batches:
        x = drawn(batch, 3, 224, 224)
        yield Pair(
            title=f"timm {name}, batch {batch}",
            theirs=lambda x=x: theirs(x), ours=lambda x=x: ours(x),
        )  # fmt: skip
    attention, part = theirs.blocks[0].attn, ours.blocks[0].attn.part
    x = drawn(8, 197, ours.config.dim)
    title = f"timm Attention of {name}, batch 8, 197 tokens"
    yield Pair(title=title, theirs=lambda: attention(x), ours=lambda: part(x))


def transformers(sizes: Sizes) -> Iterator[Pair]:
    package = need("transformers", "bench")
    ours = effformer.build_model(sizes.bert).eval()
    c = ours.config
    config = package.BertConfig(
        vocab_size=c.vocab, hidden_size=c.dim, num_hidden_layers=c.depth,
        num_attention_heads=c.heads, intermediate_size=c.ffn.width(c.dim),
        max_position_embeddings=c.context,
    )  # fmt: skip
    theirs = package.BertModel(config).eval()
    load_weights(ours, theirs.state_dict())
    for batch in sizes.batches:
        ids = torch.randint(0, c.vocab, (batch, sizes.words))
        yield Pair(
            title=f"transformers BertModel ({sizes.bert}), batch {batch}, {sizes.words} tokens",
            theirs=lambda ids=ids: theirs(ids).last_hidden_state,
            ours=lambda ids=ids: ours(ids).hidden,
        )


def tokens(sizes: Sizes) -> Tensor:
    return drawn(1, sizes.tokens, sizes.dim)


PEERS = (performer, linformer, nystrom, local, reformer, timm, transformers)


def measure(pair: Pair, runs: int) -> tuple[list[Row], Machine]:
    with torch.inference_mode():
        torch.testing.assert_close(pair.ours(), pair.theirs(), rtol=1e-3, atol=1e-4)
    calls = {"theirs": pair.theirs, "ours": pair.ours}
    if pair.default is not None:
        calls["ours, by name"] = pair.default
    found = take_turns(calls, runs=runs)
    rows = [
        Row(
            what=pair.title if name == "theirs" else name,
            value=found.median(name),
            spread=found.spread(name),
            ratio=None if name == "theirs" else found.ratio(name),
            target=None if name == "theirs" else 1.0,
        )
        for name in calls
    ]
    return rows, found.machine


def main(*, small: bool = False, only: str = "") -> None:
    sizes, rows = SMALL if small else Sizes(), []
    for peer in PEERS:
        if only and peer.__name__ != only:
            continue
        torch.manual_seed(0)
        for pair in peer(sizes):
            measured, here = measure(pair, sizes.runs)
            rows += measured
    notes = [
        f"layers: {sizes.heads} heads, width {sizes.dim}, {sizes.tokens} tokens, batch 1, projections "
        "included; float32, eager, no gradients; outputs are equal to 1e-3 relative before time is taken",
        "time is CPU time of one thread, so that other work on the machine counts for little",
        "'ours': the same numbers as the package, its defects included (`compat`); 'ours, by name': "
        'what `attn="nystrom"` or `attn="reformer"` builds, which does not have them',
        "timm and transformers spend nearly all of their time in the matrix products that ours runs, too, "
        "with the same shapes: within half a percent of 1 the two are equal",
        f"versions: {versions()}",
    ]
    write("peers", "Against packages of the same algorithms", rows, here, notes,
          keep=not small and not only)  # fmt: skip


def versions() -> str:
    from importlib.metadata import version

    names = (
        "performer-pytorch", "linformer", "nystrom-attention", "local-attention", "reformer-pytorch",
        "timm", "transformers",
    )  # fmt: skip
    return ", ".join(f"{name} {version(name)}" for name in names)


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if not word.startswith("--")]
    main(small="--small" in sys.argv[1:], only=(words or [""])[0])
