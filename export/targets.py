"""Where graphs are going to run: opset, operator sets and providers of a target."""

from __future__ import annotations

from dataclasses import dataclass

from effformer import registry
from effformer.arguments import checked
from effformer.config import Config
from effformer.values import Count

from .graph import GraphFacts

__all__ = ["Target", "get_target"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Target(Config):
    """What a runtime takes.

    Attributes:
        opset: opset that is exported by default.
        newest: newest opset that it runs completely.
        domains: operator sets beside the standard one.
        kernels: operators that multiply with packed weights, of those that packed layers know.
        providers: execution providers of ONNX Runtime.
    """

    opset: Count = 20
    newest: Count = 23
    domains: tuple[str, ...] = ()
    kernels: tuple[str, ...] = ()
    providers: tuple[str, ...] = ("CPUExecutionProvider",)

    @checked
    def problems(self, graph: GraphFacts) -> list[str]:
        """Why a graph does not run here, empty if it does."""
        found = []
        if graph.opset > self.newest:
            found.append(f"opset {graph.opset} is newer than {self.newest}")
        foreign = sorted(set(graph.domains) - set(self.domains))
        used = {o.split("::")[0] for o in graph.operators if "::" in o}
        found += [
            f"operators of {domain!r} are unknown here" for domain in foreign if domain in used
        ]
        return found


_RUNTIME = ("com.microsoft", "ai.onnx.ml")


def get_target(name: str) -> Target:
    """A target by name.

    Raises:
        ValueError: unknown name.
    """
    target: Target = registry.target.get(name).preset
    return target


def _add(name: str, target: Target, summary: str, aliases: tuple[str, ...] = ()) -> None:
    entry = registry.Entry(
        name=name, kind="target", build=Target, config=Target, preset=target,
        summary=summary, aliases=aliases,
    )  # fmt: skip
    registry.target.add(entry)


_add(
    "onnx-cpu",
    Target(domains=_RUNTIME, kernels=("MatMulNBits",)),
    "ONNX Runtime on a CPU, with its kernels for packed weights in rows; nf4 and fp4 are decoded when "
    "the graph is loaded.",
    aliases=("onnxruntime",),
)
_add(
    "onnx-cpu-small",
    Target(domains=_RUNTIME, kernels=("MatMulNBits", "MatMulBnb4")),
    "ONNX Runtime on a CPU in little memory: nf4 and fp4 stay packed while the graph runs (MatMulBnb4), "
    "which takes longer with few tokens.",
)
_add(
    "onnx",
    Target(),
    "Any ONNX runtime: standard operators only; packed weights are decoded in the graph.",
)
_add(
    "web",
    Target(domains=_RUNTIME, kernels=("MatMulNBits",)),
    "onnxruntime-web in a browser; a bundle for it is a static folder with a page.",
)
