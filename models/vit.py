"""ViT: vision transformer for image classification, with the variations of its published family.

Reference: An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale, 2020, arXiv
2010.11929.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from effformer.attention import AdaptiveProjections, Attention
from effformer.blocks import BackboneConfig, Branch, Needs, build_stack, head_width
from effformer.blocks.base import below, make_ffn
from effformer.checks import check_shape
from effformer.config import Config, part
from effformer.context import EMPTY, Context, Ledger, Merging, Rope, Tap, explained
from effformer.ffn import ACM, MLP
from effformer.layout import Layout
from effformer.nn.embeddings import resize_positions
from effformer.nn.init import truncated_normal_linears
from effformer.nn.norms import make_norm
from effformer.nn.patch import PatchEmbed
from effformer.nn.rope import GridRope
from effformer.nn.stems import Stem, build_stem
from effformer.site import NormRule, Site
from effformer.values import Count, Natural, NonNegative, Positive

from .base import Model, Preset, register_presets
from .layouts.vit import LAYOUTS

__all__ = ["PRESETS", "Head", "Norm", "Positions", "Prefix", "ViT"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefix(Config):
    """Learned tokens in front of the patches.

    Attributes:
        class_token: the first token is a class token.
        registers: number of tokens behind it that hold nothing but scratch space.
        positions: these tokens have entries in the absolute position table.
    """

    class_token: bool = True
    registers: Natural = 0
    positions: bool = True

    @property
    def count(self) -> int:
        """Number of tokens."""
        return self.class_token + self.registers


@dataclass(frozen=True, slots=True, kw_only=True)
class Positions(Config):
    """How patches know where they are. Cores such as "relative" add their own way.

    Attributes:
        absolute: a learned table is added to the tokens; it fixes the image size.
        rope: rotary tables for every attention, or None.
    """

    absolute: bool = True
    rope: GridRope.Config | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Norm(Config):
    """The norms of the model.

    Attributes:
        kind: "layer" or "rms".
        eps: epsilon of every norm.
        before: one stands before the first block (CLIP); the patch projection then has no bias.
    """

    kind: Literal["layer", "rms"] = "layer"
    eps: Positive = 1e-6
    before: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Head(Config):
    """From tokens to one vector.

    Attributes:
        pool: "token" (the class token), "avg" (mean) or "map" (attention from one learned query).
        norm: the last norm acts on the "tokens", on the "pooled" vector, or is absent ("none").
        prefix: "avg" and "map" read class token and registers too.
        heads: heads of "map"; None means those of the model.
        ffn: position-wise network of "map".
    """

    pool: Literal["token", "avg", "map"] = "token"
    norm: Literal["tokens", "pooled", "none"] = "tokens"
    prefix: bool = False
    heads: Count | None = None
    ffn: Config = part("ffn", MLP.Config(act="gelu"))


class AttentionPool(nn.Module):
    """``y + ffn(norm(y))`` with ``y = attn(query = a learned vector, memory = tokens)``.

    Args:
        config: heads and FFN.
        site: the place in the model.

    Reference: Set Transformer, 2018, arXiv 1810.00825; Scaling Vision Transformers, 2021, arXiv
    2106.04560.
    """

    def __init__(self, config: Head, site: Site) -> None:
        super().__init__()
        plain = replace(site, layer_scale=None, heads=config.heads or site.heads)
        here = below(plain, "attn", memory_dim=site.dim)
        self.latent = nn.Parameter(torch.empty(1, 1, site.dim))
        self.attn = Attention(Attention.Config(), here)
        here = below(plain, "ffn")
        self.ffn = Branch(make_ffn(config.ffn, here), here)

    def forward(self, x: Tensor, merging: Merging | None = None) -> Tensor:
        """(B, N, D) -> (B, D)."""
        query = self.latent.expand(x.shape[0], -1, -1)
        return self.ffn(self.attn(query, Context(memory=x, merging=merging)), EMPTY)[:, 0]


class Classifier(nn.Module):
    """Pooling, perhaps a norm, and a linear map to classes.

    Args:
        config: how to pool.
        site: the place in the model.
        front: number of tokens before the patches.
        num_classes: outputs of the linear map; 0 leaves it out.
    """

    ROLES: ClassVar[Mapping[str, str]] = {"": "head"}

    def __init__(self, config: Head, site: Site, *, front: int, num_classes: int) -> None:
        super().__init__()
        self.config = config
        self.front = 0 if config.prefix else front
        if config.pool == "map":
            self.pool = AttentionPool(config, below(site, "pool"))
        self.norm = make_norm(site) if config.norm == "pooled" else nn.Identity()
        self.linear = nn.Linear(site.dim, num_classes) if num_classes else nn.Identity()

    def forward(self, x: Tensor, merging: Merging | None = None) -> Tensor:
        """(B, N, D) -> (B, num_classes); merged tokens count as often as their sizes say."""
        return self.linear(self.norm(self._pooled(x, merging)))

    def _pooled(self, x: Tensor, merging: Merging | None) -> Tensor:
        if self.config.pool == "token":
            return x[:, 0]
        x = x[:, self.front :]
        if merging is not None and merging.sizes is not None:
            merging = replace(merging, sizes=merging.sizes[:, self.front :])
        if self.config.pool == "map":
            return self.pool(x, merging)
        if merging is None or merging.sizes is None:
            return x.mean(dim=1)
        sizes = merging.sizes[..., None]
        return ((x * sizes).sum(dim=1) / sizes.sum(dim=1)).to(x.dtype)


class ViT(Model):
    """Vision transformer: patches of an image, a stack of blocks, a pooled vector, class logits.

    ``forward(x)`` gives logits (B, num_classes), or the pooled vector (B, dim) with
    ``num_classes=0``.

    Args:
        config: the config.
        name: preset name.

    Reference: An Image is Worth 16x16 Words, 2020, arXiv 2010.11929; How to train your ViT?, 2021,
    arXiv 2106.10270.
    """

    FAMILY: ClassVar[str] = "vit"
    ROLES: ClassVar[Mapping[str, str]] = {"stem": "patch_embed"}
    LAYOUTS: ClassVar[tuple[Layout, ...]] = LAYOUTS

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(BackboneConfig):
        """Knobs of `ViT`, beside `BackboneConfig`.

        Attributes:
            image_size: side of the square input, or (height, width).
            channels: input channels.
            patch: patch side, in pixels or in cells of the stem's feature map.
            num_classes: number of classes; 0 leaves the classifier out.
            stem: convolutional network before the patches, or None.
            prefix: class token and registers.
            positions: absolute table and rotary tables.
            norm: kind and epsilon of the norms.
            layer_scale: initial value of a learned factor per channel on every branch, or None.
            head: pooling and last norm.
        """

        ffn: Config = part("ffn", MLP.Config(act="gelu"))
        image_size: Count | tuple[Count, Count] = 224
        channels: Count = 3
        patch: Count = 16
        num_classes: Natural = 1000
        stem: Stem | None = None
        prefix: Prefix = Prefix()
        positions: Positions = Positions()
        norm: Norm = Norm()
        layer_scale: NonNegative | None = None
        head: Head = Head()

        def check(self) -> None:
            if any(size % self.stride for size in self.size):
                raise ValueError(
                    f"image_size {self.image_size} is not divisible by {self.stride} "
                    f"(patch {self.patch}{'' if self.stem is None else ' times the stem stride'})"
                )
            if self.head.pool == "token" and not self.prefix.class_token:
                raise ValueError(
                    "head pool 'token' needs prefix class_token=True; or use pool 'avg' or 'map'"
                )

        @property
        def size(self) -> tuple[int, int]:
            """Height and width of the input."""
            size = self.image_size
            return (size, size) if isinstance(size, int) else size

        @property
        def stride(self) -> int:
            """Pixels per patch side."""
            return self.patch * (1 if self.stem is None else self.stem.stride)

        @property
        def grid(self) -> tuple[int, int]:
            """Rows and columns of patches."""
            return self.size[0] // self.stride, self.size[1] // self.stride

    def __init__(self, config: ViT.Config, name: str | None = None) -> None:
        super().__init__(config, name)
        rows, columns = config.grid
        site = Site(
            dim=config.dim, heads=config.heads, length=config.prefix.count + rows * columns,
            grid=config.grid, norm=NormRule(kind=config.norm.kind, eps=config.norm.eps),
            layer_scale=config.layer_scale,
        )  # fmt: skip
        self._build_embedding(config)
        rope = config.positions.rope
        if rope is not None:
            self.rope = GridRope(rope, head_width(config), heads=config.heads, depth=config.depth)
        self.norm_before = make_norm(site) if config.norm.before else nn.Identity()
        front = config.prefix.count > 0
        turned = None if rope is None else head_width(config)
        needs = Needs(front=front, rope=turned, shrinks=True)
        self.blocks = build_stack(config, site, needs, name=self.name)
        self.norm = make_norm(site) if config.head.norm == "tokens" else nn.Identity()
        self.head = Classifier(
            config.head, replace(site, path="head", dropout=config.dropout),
            front=config.prefix.count, num_classes=config.num_classes,
        )  # fmt: skip
        self.reset_parameters()

    def _build_embedding(self, config: ViT.Config) -> None:
        channels, stem = config.channels, config.stem
        if stem is not None:
            self.stem = build_stem(stem, channels, config.dim)
            channels = stem.width(config.dim)
        if stem is None or stem.projected:
            bias = not config.norm.before
            self.patch_embed = PatchEmbed(channels, config.dim, config.patch, bias=bias)
        if config.prefix.class_token:
            self.class_token = nn.Parameter(torch.empty(1, 1, config.dim))
        if config.prefix.registers:
            self.registers = nn.Parameter(torch.empty(1, config.prefix.registers, config.dim))
        if config.positions.absolute:
            front = config.prefix.count if config.prefix.positions else 0
            tokens = front + config.grid[0] * config.grid[1]
            self.pos_embed = nn.Parameter(torch.empty(1, tokens, config.dim))

    def reset_parameters(self) -> None:
        """Normal weights of standard deviation 0.02 cut at 2, zero biases, prefix tokens near
        zero.
        """
        truncated_normal_linears(self)
        if self.config.positions.absolute:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
        if self.config.prefix.class_token:
            nn.init.normal_(self.class_token, std=1e-6)
        if self.config.prefix.registers:
            nn.init.normal_(self.registers, std=1e-6)
        if self.config.head.pool == "map":
            nn.init.trunc_normal_(self.head.pool.latent, std=self.config.dim**-0.5)

    def forward(
        self,
        x: Tensor,
        *,
        ledger: Ledger | None = None,
        tap: Tap | None = None,
        complete: bool = False,
    ) -> Tensor:
        """Classify images.

        Args:
            x: (B, C, H, W) images.
            ledger: where dynamic parts report.
            tap: reads or replaces values at named places.
            complete: dynamic parts do all of their work, as if the model had none.

        Returns:
            (B, num_classes).

        Raises:
            ValueError: a shape does not fit; with absolute positions the size is the config's, and
                `resized` gives a model of another one.
            TypeError: images are not floating point.
        """
        return self.head(*self._features(x, ledger, tap, complete))

    def forward_features(
        self,
        x: Tensor,
        *,
        ledger: Ledger | None = None,
        tap: Tap | None = None,
        complete: bool = False,
    ) -> Tensor:
        """Tokens behind the last block (and its norm), prefix first: (B, prefix + N, D), fewer if
        some were merged.
        """
        return self._features(x, ledger, tap, complete)[0]

    def _features(
        self, x: Tensor, ledger: Ledger | None, tap: Tap | None, complete: bool
    ) -> tuple[Tensor, Merging | None]:
        """The tokens, and how many each of them stands for if a part reduces them."""
        self._check(x)
        stride = self.config.stride
        grid = (x.shape[2] // stride, x.shape[3] // stride)
        h = self.norm_before(self._embed(x))
        merging = None
        if any(block.tokens is not None for block in self.blocks):
            merging = Merging(tokens=h.shape[1], front=self.config.prefix.count)
        positions, ropes = self._places(grid, h)
        ctx = Context(
            grid=grid, positions=positions, merging=merging, ledger=ledger, tap=tap,
            complete=complete,
        )  # fmt: skip
        for block, rope in zip(self.blocks, ropes, strict=True):
            h = block(h, ctx if rope is None else replace(ctx, rope=rope))
        return self.norm(h), merging

    def resized(self, image_size: int | tuple[int, int]) -> ViT:
        """The same model for another image size: the absolute position table is interpolated.

        Args:
            image_size: side, or (height, width).

        Returns:
            A new model, in the same mode, on the same device; this one does not change.

        Raises:
            ValueError: the size does not fit the patch, or the model was structurally changed
                (quantized): resize first.
        """
        if self.transforms:
            done = _verb(self.transforms[0])
            raise ValueError(f"{self.name}: was changed by {done!r}; resize before that, not after")
        config = self.config.replace(where=self.name, image_size=image_size)
        model = ViT(config, name=self.name)
        state = self.state_dict()
        if config.positions.absolute:
            front = config.prefix.count if config.prefix.positions else 0
            state["pos_embed"] = resize_positions(
                state["pos_embed"], self.config.grid, config.grid, front=front
            )
        model.to(next(self.parameters())).load_state_dict(state)
        return model.train(self.training)

    @explained
    def example_inputs(
        self, batch: int = 1, *, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        like = next(p for p in self.parameters() if p.is_floating_point())
        shape = (batch, self.config.channels, *self.config.size)
        return {"x": torch.randn(shape, dtype=like.dtype, device=like.device, generator=generator)}

    def dynamic_axes(self) -> dict[str, dict[int, str]]:
        space = {} if self.config.positions.absolute else {2: "height", 3: "width"}
        return {"x": {0: "batch", **space}}

    def _embed(self, x: Tensor) -> Tensor:
        config = self.config
        if config.stem is not None:
            x = self.stem(x)
        projected = config.stem is None or config.stem.projected
        h = self.patch_embed(x) if projected else x.flatten(2).transpose(1, 2)
        front = []
        if config.prefix.class_token:
            front.append(self.class_token.expand(h.shape[0], -1, -1))
        if config.prefix.registers:
            front.append(self.registers.expand(h.shape[0], -1, -1))
        if config.positions.absolute and not config.prefix.positions:
            h = h + self.pos_embed
        if front:
            h = torch.cat([*front, h], dim=1)
        if config.positions.absolute and config.prefix.positions:
            h = h + self.pos_embed
        return h

    def _places(
        self, grid: tuple[int, int], h: Tensor
    ) -> tuple[Tensor | None, Sequence[Rope | None]]:
        """Coordinates of the tokens, and the rotary tables of every block."""
        depth = len(self.blocks)
        if self.config.positions.rope is None:
            return None, [None] * depth
        positions = self.rope.positions(grid, front=self.config.prefix.count, device=h.device)
        tables: tuple[Rope, ...] = self.rope(positions, like=h)
        return positions, tables * (depth // len(tables))

    def _check(self, x: Tensor) -> None:
        config = self.config
        fixed = config.size if config.positions.absolute else (None, None)
        shown = f"(B, {config.channels}, {fixed[0] or 'H'}, {fixed[1] or 'W'})"
        check_shape(x, shown, (None, config.channels, *fixed), where=f"{self.name}: x")
        if not x.is_floating_point():
            raise TypeError(f"{self.name}: x must be floating point, got {x.dtype}")
        if x.shape[2] % config.stride or x.shape[3] % config.stride:
            raise ValueError(
                f"{self.name}: {tuple(x.shape[2:])} is not divisible by {config.stride}"
            )


def _verb(record: Mapping[str, Any]) -> str:
    """What a record of a structural change says, "quantize (int8)"."""
    scheme = record.get("scheme")
    return f"{record['kind']} ({scheme['name']})" if isinstance(scheme, Mapping) else record["kind"]


_SIZES: dict[str, tuple[str, int, int, int, int | None]] = {
    "ti": ("tiny", 192, 12, 3, None),
    "s": ("small", 384, 12, 6, None),
    "b": ("base", 768, 12, 12, None),
    "l": ("large", 1024, 24, 16, None),
    "h": ("huge", 1280, 32, 16, None),
    "g": ("giant", 1408, 40, 16, 6144),
    "gg": ("gigantic", 1664, 48, 16, 8192),
}
_PARAMS = {
    "ti-16": 5_717_416, "s-8": 22_055_272, "s-16": 22_050_664, "s-32": 22_878_952,
    "b-8": 86_576_872, "b-16": 86_567_656, "b-32": 88_224_232,
    "l-14": 304_203_752, "l-16": 304_326_632, "l-32": 306_535_400,
    "h-14": 632_045_800, "g-14": 1_012_611_432, "gg-14": 1_844_440_680,
}  # fmt: skip
_TINY = {"tiny": (96, 4, 3, 28, 4), "nano": (48, 2, 2, 8, 2)}


def _presets() -> dict[str, Preset]:
    presets = {}
    for key, params in _PARAMS.items():
        size, patch = key.split("-")
        word, dim, depth, heads, hidden = _SIZES[size]
        presets[f"vit-{key}"] = Preset(
            config=ViT.Config(
                dim=dim, depth=depth, heads=heads, patch=int(patch),
                ffn=MLP.Config(act="gelu", hidden=hidden),
            ),
            params=params,
            source="arXiv 2010.11929, table 1; arXiv 2106.04560, table 2; counts of timm",
            aliases=(f"vit_{word}_patch{patch}_224",),
        )  # fmt: skip
    for name, (dim, depth, heads, side, cell) in _TINY.items():
        presets[f"vit-{name}"] = Preset(
            config=ViT.Config(
                dim=dim, depth=depth, heads=heads, patch=cell,
                image_size=side, channels=1, num_classes=10,
            ),
            summary=f"A size of ours for tests and examples: grey {side} x {side} images.",
        )  # fmt: skip
    return presets


def _adaptive() -> dict[str, Preset]:
    """ViT-B/16 whose FFNs and projections are adaptive computation modules."""
    attn = Attention.Config(projections=AdaptiveProjections())
    config = ViT.Config(dim=768, depth=12, heads=12, attn=attn, ffn=ACM.Config(hidden=3072))
    preset = Preset(
        config=config,
        params=87_298_852,
        source="arXiv 2312.10193: 7,145,733 parameters in projections, FFN and gates of a block",
        summary="ViT-B/16 whose projections and FFNs run as many learners per token as gates choose.",
    )
    return {"vit-b-16-acm": preset}


PRESETS = _presets() | _adaptive()
register_presets(ViT, PRESETS, paper="2010.11929")
