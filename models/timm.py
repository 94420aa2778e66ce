"""Configs of ViT from models of timm."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import torch
from torch import nn

from effformer.arguments import checked
from effformer.attention import Attention, Differential, Relative, Softmax
from effformer.blocks import Parallel, ParallelBranches, PreNorm, ResPost
from effformer.checks import CapabilityError, need, unknown
from effformer.config import Config
from effformer.ffn import MLP, FFNConfig, SwiGLU
from effformer.nn.activations import Activation
from effformer.nn.rope import GridRope
from effformer.nn.stems import Stem

from .vit import Head, Norm, Positions, Prefix, ViT

__all__ = ["vit_config_from_timm"]

_MODELS = ("VisionTransformer", "VisionTransformerRelPos", "Eva")
_ACTIVATIONS: dict[str, Activation] = {
    "GELU": "gelu",
    "GELUTanh": "gelu-tanh",
    "QuickGELU": "quick-gelu",
    "SiLU": "silu",
    "ReLU": "relu",
}
_BLOCKS: dict[str, Config] = {
    "Block": PreNorm.Config(),
    "RelPosBlock": PreNorm.Config(),
    "EvaBlock": PreNorm.Config(),
    "ResPostBlock": ResPost.Config(),
    "ResPostRelPosBlock": ResPost.Config(),
    "ParallelScalingBlock": Parallel.Config(),
    "DiffParallelScalingBlock": Parallel.Config(),
    "ParallelThingsBlock": ParallelBranches.Config(),
}


def _made(name: str) -> nn.Module:
    timm = need("timm")
    if ":" not in name and not timm.is_model(name):
        known = timm.list_models()
        hint = f"{len(known)} known: timm.list_models()"
        raise unknown("model of timm", name, known, where="vit_config_from_timm", hint=hint)
    model: nn.Module = timm.create_model(name)
    return model


@checked
def vit_config_from_timm(model: nn.Module | str) -> ViT.Config:
    """The config of our `ViT` that computes what a timm model computes in evaluation mode.

    The weights follow with ``effformer.load_weights(ViT(config), model.state_dict())``. Rates of
    dropout and stochastic depth are not taken over.

    Args:
        model: a model of timm's vision transformer classes, or the name of one.

    Returns:
        The config.

    Raises:
        CapabilityError: the model holds a part that `ViT` does not have; the message names it.
        TypeError: not a vision transformer of timm.
        ValueError: timm knows no model of this name.
        MissingExtra: timm is not installed.

    Example:
        >>> from effformer.models import vit_config_from_timm
        >>> config = vit_config_from_timm("vit_small_patch16_224")
        >>> config.dim, config.grid
        (384, (14, 14))
    """
    if isinstance(model, str):
        name = model
        with torch.device("meta"):
            model = _made(name)
    else:
        name = type(model).__name__
    return _Reader(model, name).config()


class _Reader:
    """Looks at the modules of one timm model."""

    def __init__(self, model: Any, name: str) -> None:
        if type(model).__name__ not in _MODELS:
            raise TypeError(
                f"{name}: expected one of timm's classes {', '.join(_MODELS)}, "
                f"got {type(model).__name__}"
            )
        self.model, self.name = model, name
        self.kind = type(model.blocks[0]).__name__
        if self.kind not in _BLOCKS:
            raise self._refuse(f"blocks of type {self.kind}")

    def config(self) -> ViT.Config:
        model, parts = self.model, [self._parts(b) for b in self.model.blocks]
        attn, ffn = parts[0]
        first = self._mixers(model.blocks[0])[0]
        size = model.patch_embed.img_size
        return ViT.Config(
            dim=model.embed_dim,
            depth=len(model.blocks),
            heads=first.num_heads,
            attn=attn,
            ffn=ffn,
            block=self._block(),
            layers=_exceptions(parts),
            image_size=size[0] if size[0] == size[1] else tuple(size),
            channels=self._channels(),
            patch=self._patch(),
            num_classes=model.num_classes,
            stem=self._stem(),
            prefix=self._prefix(),
            positions=self._positions(),
            norm=self._norm(),
            layer_scale=self._layer_scale(),
            head=self._head(),
        )

    def _refuse(self, what: str) -> CapabilityError:
        return CapabilityError(f"{self.name}: has {what}, which effformer's ViT has not")

    # -- blocks --------------------------------------------------------------------------------

    def _mixers(self, block: Any) -> list[Any]:
        if self.kind == "ParallelThingsBlock":
            return [branch.attn for branch in block.attns]
        return [block if self.kind.endswith("ParallelScalingBlock") else block.attn]

    def _block(self) -> Config:
        block = self.model.blocks[0]
        if self.kind == "ParallelThingsBlock":
            return ParallelBranches.Config(copies=block.num_parallel)
        alone = getattr(block, "gamma_1", None) is not None and block.gamma_2 is None
        return PreNorm.Config(scale_ffn=False) if alone else _BLOCKS[self.kind]

    def _parts(self, block: Any) -> tuple[Attention.Config, FFNConfig]:
        mixer = self._mixers(block)[0]
        if _present(mixer, "norm"):
            raise self._refuse("a norm inside attention (scale_attn_norm)")
        if _present(mixer, "gate"):
            raise self._refuse("gated attention")
        if self.kind.endswith("ParallelScalingBlock"):
            return self._parallel_parts(block)
        dim = self.model.embed_dim
        separate = getattr(mixer, "q_proj", None) is not None
        query = mixer.q_proj if separate else mixer.qkv
        bias = query.bias is not None or getattr(mixer, "q_bias", None) is not None
        rows = mixer.proj.weight.shape[1]
        attn = Attention.Config(
            core=self._core(mixer),
            qkv_bias=bias,
            proj_bias=mixer.proj.bias is not None,
            qk_norm=_present(mixer, "q_norm"),
            head_dim=None if rows == dim else rows // mixer.num_heads,
            kv_heads=_other(getattr(mixer, "num_kv_heads", mixer.num_heads), mixer.num_heads),
        )
        mlp = block.ffns[0].mlp if self.kind == "ParallelThingsBlock" else block.mlp
        return attn, self._ffn(mlp)

    def _parallel_parts(self, block: Any) -> tuple[Attention.Config, FFNConfig]:
        fused = block.out_proj is not None
        out = block.out_proj if fused else block.attn_out_proj
        attn = Attention.Config(
            core=self._core(block),
            qkv_bias=block.in_proj.bias is not None,
            # one bias stands for both output projections of the fused form
            proj_bias=out.bias is not None and not fused,
            qk_norm=_present(block, "q_norm"),
        )
        if out.bias is None:
            raise self._refuse("parallel blocks without output bias")
        hidden = block.in_proj.weight.shape[0] - 3 * self.model.embed_dim
        return attn, self._mlp(hidden, block.mlp_act, bias=True)

    def _core(self, mixer: Any) -> Any:
        relative = getattr(mixer, "rel_pos", None) or getattr(self.model, "shared_rel_pos", None)
        if relative is not None:
            if type(relative).__name__ != "RelPosMlp" or relative.mode != "cr":
                raise self._refuse("relative positions other than the log-coordinate network")
            return Relative.Config(hidden=relative.mlp.fc1.out_features)
        if not hasattr(mixer, "dual_lambda"):
            return Softmax.Config()
        if mixer.dual_lambda or _present(mixer, "q_norm"):
            raise self._refuse("differential attention with dual_lambda or normed queries")
        return Differential.Config(eps=mixer.sub_norm.eps)

    def _ffn(self, mlp: Any) -> FFNConfig:
        if _present(mlp, "norm"):
            raise self._refuse("a norm inside the FFN (scale_mlp_norm)")
        kind, bias = type(mlp).__name__, mlp.fc2.bias is not None
        if kind == "Mlp":
            return self._mlp(mlp.fc1.out_features, mlp.act, bias=bias)
        act = self._activation(mlp.act)
        if kind not in ("GluMlp", "SwiGLU") or act != "silu" or getattr(mlp, "gate_last", False):
            raise self._refuse(f"an FFN of type {kind} with {act}")
        hidden = mlp.fc2.in_features
        return SwiGLU.Config(
            hidden=_other(hidden, SwiGLU.Config().width(self.model.embed_dim)), bias=bias
        )

    def _mlp(self, hidden: int, act: Any, *, bias: bool) -> MLP.Config:
        width = MLP.Config().width(self.model.embed_dim)
        return MLP.Config(act=self._activation(act), hidden=_other(hidden, width), bias=bias)

    def _activation(self, act: Any) -> Activation:
        kind = type(act).__name__
        if kind == "GELU" and getattr(act, "approximate", "none") == "tanh":
            return "gelu-tanh"
        if kind not in _ACTIVATIONS:
            raise self._refuse(f"the activation {kind}")
        return _ACTIVATIONS[kind]

    def _layer_scale(self) -> float | None:
        block: Any = self.model.blocks[0]
        if self.kind == "ParallelThingsBlock":
            block = block.attns[0]
        present = any(_present(block, name) for name in ("ls", "ls1", "gamma_1"))
        # what the factors start from is a matter of training, and loaded weights replace it
        return 1e-5 if present else None

    # -- around the blocks ---------------------------------------------------------------------

    def _patch(self) -> int:
        height, width = self.model.patch_embed.patch_size
        if height != width:
            raise self._refuse(f"patches of unequal sides ({height}, {width})")
        return int(height)

    def _channels(self) -> int:
        first = next(m for m in self.model.patch_embed.modules() if isinstance(m, nn.Conv2d))
        return first.in_channels

    def _stem(self) -> Stem | None:
        backbone = getattr(self.model.patch_embed, "backbone", None)
        if backbone is None:
            return None
        names = [name for name, _ in backbone.named_children()]
        if type(backbone).__name__ == "ConvStem":
            return Stem(kind="conv")
        if "stages" in names:
            return Stem(layers=tuple(len(stage.blocks) for stage in backbone.stages))
        if "layer1" in names:
            stages = [
                child for name, child in backbone.named_children() if name.startswith("layer")
            ]
            return Stem(kind="resnet-d", layers=tuple(len(stage) for stage in stages))
        if names[:2] == ["conv", "norm"]:
            return Stem()
        raise self._refuse(f"a stem of type {type(backbone).__name__}")

    def _prefix(self) -> Prefix:
        model = self.model
        registers = getattr(model, "reg_token", None)
        return Prefix(
            class_token=model.cls_token is not None,
            registers=0 if registers is None else registers.shape[1],
            positions=not getattr(model, "no_embed_class", False),
        )

    def _positions(self) -> Positions:
        rope = getattr(self.model, "rope", None)
        return Positions(
            absolute=getattr(self.model, "pos_embed", None) is not None,
            rope=None if rope is None else self._rope(rope),
        )

    def _rope(self, rope: Any) -> GridRope.Config:
        kinds: dict[str, Any] = {
            "RotaryEmbeddingCat": "axial",
            "RotaryEmbeddingDinoV3": "centered",
            "RotaryEmbeddingMixed": "mixed",
        }
        kind = kinds.get(type(rope).__name__)
        if kind is None or getattr(rope, "normalize_coords", "separate") != "separate":
            raise self._refuse(f"rotary tables of type {type(rope).__name__}")
        reference = getattr(rope, "ref_feat_shape", None)
        return GridRope.Config(
            kind=kind,
            temperature=float(rope.temperature),
            first="row" if rope.grid_indexing == "ij" else "column",
            offset=float(getattr(rope, "grid_offset", 0.0)),
            reference=None if reference is None else tuple(reference),
            interleaved=not getattr(rope, "rotate_half", False),
        )

    def _norm(self) -> Norm:
        block = self.model.blocks[0]
        if self.kind == "ParallelThingsBlock":
            block = block.attns[0]
        found = next(getattr(block, n) for n in ("norm1", "in_norm", "norm") if hasattr(block, n))
        kinds: dict[str, Any] = {"LayerNorm": "layer", "RmsNorm": "rms", "RMSNorm": "rms"}
        if type(found).__name__ not in kinds:
            raise self._refuse(f"norms of type {type(found).__name__}")
        before = _present(self.model, "norm_pre")
        return Norm(kind=kinds[type(found).__name__], eps=found.eps, before=before)

    def _head(self) -> Head:
        model, pool = self.model, self.model.global_pool
        if pool not in ("token", "avg", "map"):
            raise self._refuse(f"global_pool={pool!r}")
        tokens, pooled = _present(model, "norm"), _present(model, "fc_norm")
        if tokens and pooled:
            raise self._refuse("a norm before and one behind the pooling")
        head = Head(pool=pool, norm="tokens" if tokens else "pooled" if pooled else "none")
        if pool == "token":
            return head
        # Eva's attention pooling reads every token
        whole = getattr(model, "pool_include_prefix", pool == "map")
        if pool == "avg":
            return head.replace(prefix=bool(whole))
        latent = model.attn_pool
        heads = self._mixers(model.blocks[0])[0].num_heads
        if latent.latent_len != 1 or latent.pos_embed is not None or _present(latent, "q_norm"):
            raise self._refuse(
                "attention pooling with several queries, positions or normed queries"
            )
        return head.replace(
            prefix=bool(whole) and self._prefix().count > 0,
            heads=_other(latent.num_heads, heads),
            ffn=self._ffn(latent.mlp),
        )


def _present(module: Any, name: str) -> bool:
    """The module has a child (or parameter) of this name that does something."""
    child = getattr(module, name, None)
    return child is not None and not isinstance(child, nn.Identity)


def _other(value: int, default: int) -> int | None:
    """None where the default says the same."""
    return None if value == default else value


def _exceptions(parts: list[tuple[Attention.Config, FFNConfig]]) -> dict[str, Any]:
    """Entries of ``layers`` for runs of blocks that differ from the first."""
    layers: dict[str, Any] = {}
    for pair, run in groupby(range(len(parts)), key=lambda i: parts[i]):
        places = list(run)
        changed = {
            slot: new.to_dict()
            for slot, new, old in zip(("attn", "ffn"), pair, parts[0], strict=True)
            if new != old
        }
        if changed:
            layers[f"{places[0]}:{places[-1] + 1}"] = changed
    return layers
