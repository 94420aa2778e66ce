"""ViT-B/16 with adaptive computation modules against the dense ViT-B/16: does skipping pay?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from effformer.models.vit import ViT
from markdown import Row, write
from torch import Tensor, nn

import effformer
from effformer.context import Ledger
from effformer.nn.learners import Gate, Learners
from effformer.profile import Counter, Machine, interleave

THREADS, RUNS, AIM = 1, 15, 0.62


@dataclass(frozen=True)
class Form:
    """A way to spend half of the multiply-adds.

    Attributes:
        what: words for the table.
        projections: query, key, value and output projections are adaptive, too.
        shares: share of the learners that run, in FFNs and in projections.
        aim: the ratio aimed at, None for a row that is shown only.
    """

    what: str
    projections: bool
    shares: tuple[float, float]
    aim: float | None


FORMS = (
    Form("FFNs and projections adaptive: 50 % of the whole model", True, (0.47, 0.47), AIM),
    Form("FFNs adaptive: 50 % of the whole model", False, (0.215, 1.0), AIM),
    Form("FFNs adaptive: 50 % of the FFNs", False, (0.5, 1.0), None),
    Form("FFNs adaptive, every token runs 2 of 4", False, (-2, 1.0), None),
    Form("FFNs and projections adaptive, everything runs", True, (-4, -4), None),
)


class Chosen(nn.Module):
    """A gate that does its work and then chooses what it is told.

    Real gates of an untrained model would choose at random; here the executed share is exact.
    """

    def __init__(self, gate: Gate, learners: int) -> None:
        super().__init__()
        self.inner, self.count, self.share = gate, learners, 1.0
        self.choices: dict[tuple[float, int], Tensor] = {}
        self.one_hot = gate.one_hot

    def chosen(self, x: Tensor) -> Tensor:
        """What `Gate.chosen` says, replaced."""
        own = self.inner.chosen(x)
        key = (self.share, own.numel())
        if key not in self.choices:
            self.choices[key] = _spread(key[1], self.share, self.inner.least, self.count)
        return self.choices[key].view_as(own)

    def macs(self, n: int) -> int:
        """Multiply-adds of the gate."""
        return self.inner.macs(n)


def _spread(tokens: int, share: float, least: int, most: int) -> Tensor:
    """Numbers of learners from least to most in random order, with the mean ``share * most``; a
    negative share is one number for all tokens.
    """
    if share < 0:
        return torch.full((tokens,), int(-share))
    generator = torch.Generator().manual_seed(tokens)
    k = torch.randint(least, most + 1, (tokens,), generator=generator)
    missing = round(share * most * tokens) - int(k.sum())
    step = 1 if missing > 0 else -1
    while missing:
        i = int(torch.randint(0, tokens, (1,), generator=generator))
        if least <= int(k[i]) + step <= most:
            k[i] += step
            missing -= step
    return k


def build(**parts: object) -> ViT:
    """A ViT-B/16 with weights that are nowhere zero, whose gates obey `choose`."""
    model = effformer.build_model("vit-b-16", **parts).eval()
    for module in model.modules():
        if isinstance(module, Learners):
            module.gate = Chosen(module.gate, module.count)
    return model


def gates(model: ViT) -> dict[str, Chosen]:
    """The gates of a model by name."""
    return {name: gate for name, gate in model.named_modules() if isinstance(gate, Chosen)}


def choose(gates: dict[str, Chosen], form: Form) -> None:
    """Make the gates choose what the form says."""
    for name, gate in gates.items():
        gate.share = form.shares[0 if ".ffn." in name else 1]


def executed(model: nn.Module, x: Tensor) -> int:
    """Multiply-adds of the operators that really run."""
    with Counter(model) as counter, torch.inference_mode():
        model(x, ledger=Ledger())
    return sum(tally.macs for tally in counter.rows.values() if tally.kind == "counted")


def measure(batch: int, dense: ViT, ffns: ViT, both: ViT) -> tuple[list[Row], Machine]:
    """Interleaved times for a batch size."""
    x = torch.randn(batch, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    calls: dict[str, Callable[[], Tensor]] = {"dense": lambda: dense(x)}
    whole, shares = executed(dense, x), {"dense": 1.0}
    forms = [form for form in FORMS if batch == 1 or form.aim is not None]
    for form in forms:
        model = both if form.projections else ffns
        found = gates(model)
        choose(found, form)
        shares[form.what] = executed(model, x) / whole
        calls[form.what] = partial(_run, model, found, form, x)
    side = interleave(calls, warmup=1, runs=RUNS, threads=THREADS)
    aims = {form.what: form.aim for form in forms}
    rows = [
        Row(
            what=f"batch {batch}: {name} ({shares[name]:.1%} of the dense MACs executed)",
            value=f"{1e3 * latency.median:.0f} ms",
            spread=f"{1e3 * latency.p10:.0f} to {1e3 * latency.p90:.0f}",
            ratio=side.ratios[name],
            target=aims.get(name),
        )
        for name, latency in side.rows.items()
    ]
    return rows, side.rows["dense"].machine


def _run(model: ViT, gates: dict[str, Chosen], form: Form, x: Tensor) -> Tensor:
    choose(gates, form)
    return model(x)


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(THREADS)
    ffn = {"name": "acm", "act": "gelu"}
    models = (build(), build(ffn=ffn), build(ffn=ffn, attn={"projections": {}}))
    rows: list[Row] = []
    for batch in (1, 8):
        more, machine = measure(batch, *models)
        rows += more
        print(*(row.line() for row in more), sep="\n", flush=True)
    notes = [
        "float32, eager, 197 tokens; one thread; every gate does its work, then its choice is replaced by a "
        "random one with the stated mean, different for every token",
        "executed shares count every operator of the whole model: patches, projections, attention, "
        "FFNs, gates, head; the FFNs are 64 % of the dense model, the projections 32 %",
        "half of the FFNs' work is a third of the model's, so no evaluation of it can reach 0.62; for "
        "half of the whole model either the projections are adaptive as well, or the FFNs run about "
        "a fifth of their learners",
        "at batch 1 a learner has about 100 tokens: bringing its 768 x 768 matrix in, which is the same "
        "for any number of tokens, takes a tenth of its product, and 60 gates and sortings take 6 % of the model",
    ]
    write("acm", "Adaptive computation modules in ViT-B/16 on the CPU", rows, machine, notes)


if __name__ == "__main__":
    main()
