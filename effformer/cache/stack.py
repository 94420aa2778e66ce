"""A list of blocks, some of which are not computed at some evaluations.

The model itself stays as it is: a shallow copy runs, whose blocks ask before they work.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from effformer.attention import Mixer
from effformer.blocks import Block, Joint
from effformer.checks import CapabilityError
from effformer.config import Config
from effformer.context import Context
from effformer.nn.cut import twin
from effformer.nn.norms import modulate

from .policies import Evaluation, Policy
from .predict import Predictor

__all__ = ["Branch", "Stack"]

Streams = tuple[Tensor, ...]


@dataclass(slots=True)
class Branch:
    """What one branch of guidance remembers within a run.

    Attributes:
        policy: decides.
        values: what skipped work gives, by place: the blocks ("", the row of all streams), or the
            attentions and streams by path.
        evaluations: how many it had.
        skipped: samples that were not computed, by path of the module.
        computed: share of the samples that each evaluation computed, by its number in the run.
        shown: inputs of the network, whose costs are counted afterwards.
    """

    policy: Policy
    values: dict[str, Predictor] = field(default_factory=dict)
    evaluations: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    computed: dict[int, float] = field(default_factory=dict)
    shown: tuple[Tensor, Tensor, dict[str, Any]] | None = None

    def value(self, place: str) -> Predictor:
        """The predictor of a place."""
        if place not in self.values:
            self.values[place] = self.policy.predictor()
        return self.values[place]


class Stack:
    """The blocks of a model under a policy.

    Args:
        model: with a list ``blocks``.
        policy: config of a registered policy.
        blocks: the range that is cached, None for as many as the policy leaves.

    Attributes:
        changed: the copy that runs, unless the whole network is skipped.

    Raises:
        CapabilityError: the model has no such list, or tokens leave the range from its middle.
        ValueError: the range is empty.
    """

    def __init__(self, model: nn.Module, policy: Config, blocks: slice | None) -> None:
        self.model, self.name = model, str(getattr(model, "name", type(model).__name__))
        self.policy, self.range = policy, blocks
        own: Policy = policy.build()
        self.place = own.place
        if self.place == "network":
            return
        found = getattr(model, "blocks", None)
        if not isinstance(found, nn.ModuleList) or not all(isinstance(b, Block) for b in found):
            raise CapabilityError(
                f"cached: {self.name} has no list of blocks, of which {policy.entry.name} skips some; "
                "choices: easycache, which skips the whole network"
            )
        taken = range(len(found))[
            slice(own.front, len(found) - own.back) if blocks is None else blocks
        ]
        if not taken or taken.step != 1 or taken.start < own.front:
            raise ValueError(
                f"cached: no blocks are left to be cached of the {len(found)} of {self.name} (front "
                f"{own.front}, back {own.back}, blocks {blocks})"
            )
        self.start, self.stop = taken.start, taken.stop
        for i, j in getattr(model, "long_skips", ()):
            if i in taken and j >= self.stop:
                inside = j < len(found)
                where = f"block {j}" if inside else "what follows all blocks"
                able = (
                    f"a range that ends at {len(found)}" if inside else f"a range without block {i}"
                )
                raise CapabilityError(
                    f"cached: what leaves block {i} of {self.name} enters {where}, too, and of blocks "
                    f"{self.start}:{self.stop} only what leaves the last one is kept; choices: {able}, or "
                    "over='attention'"
                )
        self.changed = self._twin(found)

    def run(
        self, branch: Branch, now: Evaluation, x: Tensor, t: Tensor, cond: dict[str, Any]
    ) -> Any:
        """The output of the model, computed or not."""
        self._branch, self._now, self._batch = branch, now, x.shape[0]
        self._rows: Tensor | None = None
        self._skips = False
        try:
            return self.changed(x, t, **cond)
        finally:
            del self._branch, self._now

    def _twin(self, blocks: nn.ModuleList) -> nn.Module:
        copy = twin(self.model)
        copy.blocks = nn.ModuleList(_Asking(self, i, b) for i, b in enumerate(blocks))
        return copy

    def visit(self, index: int, block: nn.Module, args: tuple[Any, ...]) -> Any:
        """One block, called by the model."""
        streams = cast(Streams, tuple(a for a in args if isinstance(a, Tensor)))
        if index == 0:
            self._entry = streams
        if index == self.start:
            self._decide(block, streams, args)
        if not self.start <= index < self.stop or self.place == "attention":
            return block(*args)
        if index == self.start:
            self._in = streams
        out = self._compute(f"blocks.{index}", block, streams, args)
        if index == self.stop - 1:
            out = self._close(streams if out is None else _tuple(out))
        elif out is None:
            out = streams if len(streams) > 1 else streams[0]
        return out

    def _decide(self, block: nn.Module, streams: Streams, args: tuple[Any, ...]) -> None:
        """Whether, and for which samples, the range is computed."""
        if any(c.packing is not None for c in _contexts(args)):
            raise CapabilityError(
                f"cached: {self.name} got a packed row, whose change cannot be kept; choices: "
                "text_mask without packed=True"
            )
        branch, now, looks = self._branch, self._now, self._branch.policy.looks
        if looks == "residual":
            now.look = lambda: self._image(streams) - self._entry[0]
        elif looks == "entry":
            now.look = partial(_entry, block, streams[0], _contexts(args)[0])
        wanted = branch.policy.wants(now)
        if self.place == "attention":
            ready = bool(branch.values) and all(v.ready for v in branch.values.values())
        else:
            ready = branch.value("").ready
        share = 1.0
        if isinstance(wanted, Tensor) and wanted.dim() and ready:
            rows = wanted.nonzero().flatten()
            share = len(rows) / len(wanted)
            self._rows = rows if 0 < share < 1 else None
            self._skips = not len(rows)
        else:
            self._skips = ready and not bool(wanted if isinstance(wanted, bool) else wanted.any())
            share = 0.0 if self._skips else 1.0
        branch.computed[now.index] = share

    def _compute(
        self, path: str, block: nn.Module, streams: Streams, args: tuple[Any, ...]
    ) -> Any | None:
        """The block on the samples that are computed, None for none."""
        if not self._skips and self._rows is None:
            return block(*args)
        self._note(path, args)
        if self._skips:
            return None
        rows = self._rows
        assert rows is not None
        own = [a.rows(rows) if isinstance(a, Context) else a.index_select(0, rows) for a in args]
        made = zip(streams, _tuple(block(*own)), strict=True)
        out = tuple(old.index_copy(0, rows, new) for old, new in made)
        return out if len(out) > 1 else out[0]

    def _note(self, path: str, args: tuple[Any, ...]) -> None:
        """Write down what is not computed."""
        left = self._batch if self._rows is None else self._batch - len(self._rows)
        skipped = self._branch.skipped
        skipped[path] = skipped.get(path, 0) + left
        ctx = _contexts(args)[0]
        if ctx.ledger is not None:
            done = torch.zeros(self._batch, device=args[0].device)
            if self._rows is not None:
                done[self._rows] = 1
            ctx.ledger.work(path, done)

    def _close(self, out: Streams) -> Any:
        """What leaves the range; the change that it made is learned, or put in."""
        value, now = self._branch.value(""), self._now
        policy = self._branch.policy
        before = _row(self._in)
        counts = [s.shape[1] for s in reversed(self._in)]
        if not self._skips:
            after = _row(out)
            if after.shape != before.shape:
                raise CapabilityError(
                    f"cached: the blocks of {self.name} turn tokens {tuple(before.shape)} into "
                    f"{tuple(after.shape)}, so that their change cannot be kept; choices: another "
                    "range of blocks, tokens=None, or easycache"
                )
            made = after - before
            if self._rows is None:
                value.learn(made, now.index, now.time)
            else:
                value.put(self._rows, made[self._rows])
            policy.learn(now, self._rows, self._image((made,)))
            if self._rows is None:
                return out if len(out) > 1 else out[0]
        change = value.predict(now.index, now.time).to(before.dtype)
        if not policy.text:
            change = change.clone()
            change[:, : change.shape[1] - self._entry[0].shape[1]] = 0
        carried = before + change
        if self._rows is not None:
            carried = carried.index_copy(0, self._rows, _row(out)[self._rows])
        if len(out) == 1:
            return carried
        return tuple(reversed(carried.split(counts, dim=1)))

    def _image(self, streams: Streams) -> Tensor:
        """The tokens of the image, which stand behind those of a text."""
        return streams[0][:, streams[0].shape[1] - self._entry[0].shape[1] :]

    def attend(self, path: str, mix: Callable[..., Any], h: Any, ctxs: Any) -> Any:
        """An attention, called by its block: what it gives is learned, or carried on."""
        now, branch = self._now, self._branch
        if not self._skips:
            out = mix(h, ctxs)
            for i, some in enumerate(out if isinstance(out, list) else [out]):
                if some is not None:
                    branch.value(f"{path}.{i}").learn(some, now.index, now.time)
            return out
        self._note(path, (h[0] if isinstance(h, list) else h, *_contexts(ctxs)))
        if not isinstance(h, list):
            return branch.value(f"{path}.0").predict(now.index, now.time).to(h.dtype)
        places = [branch.values.get(f"{path}.{i}") for i in range(len(h))]
        return [
            None if place is None else place.predict(now.index, now.time).to(some.dtype)
            for place, some in zip(places, h, strict=True)
        ]


class _Asking(nn.Module):
    """A block in the copy of a model."""

    def __init__(self, stack: Stack, index: int, block: nn.Module) -> None:
        super().__init__()
        self.index = index
        attention = stack.place == "attention" and stack.start <= index < stack.stop
        inner = _attending(stack, f"blocks.{index}", block) if attention else block
        self.stack, self.block = stack, inner

    def forward(self, *args: Any) -> Any:
        return self.stack.visit(self.index, self.block, args)


def _attending(stack: Stack, path: str, block: nn.Module) -> nn.Module:
    """A copy of a block whose attentions ask."""
    copy: Any = twin(block)
    if isinstance(block, Joint):
        copy.meet = partial(stack.attend, path, block.meet)
        return cast(nn.Module, copy)
    assert isinstance(block, Block)
    for name, branch in zip(block.order, block.branches, strict=True):
        if isinstance(branch.part, Mixer):
            own: Any = twin(branch)
            own.run = partial(stack.attend, f"{path}.{name}", branch.run)
            setattr(copy, name, own)
    return cast(nn.Module, copy)


def _entry(block: nn.Module, h: Tensor, ctx: Context) -> Tensor:
    """What enters the first attention of a block: normed and modulated image tokens."""
    stream = block.x if isinstance(block, Joint) else block
    assert isinstance(stream, Block)
    mods = None if stream.site.cond_dim is None else stream.modulations(ctx)[:3]
    first = stream.branches[0]
    norm = first.norm if not isinstance(first.norm, nn.Identity) else getattr(stream, "norm", None)
    if norm is None:
        raise CapabilityError(
            f"cached: {type(stream).__name__} has no norm in front of its attention, by which teacache "
            "decides; choices: residual, magcache"
        )
    if first.norm is norm:
        return first.enter(h, mods)
    return norm(h) if mods is None else modulate(norm(h), mods[0], mods[1])


def _contexts(args: Any) -> list[Context]:
    found = [
        a for a in (args if isinstance(args, (tuple, list)) else [args]) if isinstance(a, Context)
    ]
    return found or [Context()]


def _tuple(out: Any) -> Streams:
    return out if isinstance(out, tuple) else (out,)


def _row(streams: Streams) -> Tensor:
    """The tokens of text and image, one behind the other."""
    return streams[0] if len(streams) == 1 else torch.cat([*reversed(streams)], dim=1)
