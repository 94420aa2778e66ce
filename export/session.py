"""A thin ONNX Runtime session: names in, names out, threads and providers explicit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effformer.checks import FormatError, need

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

__all__ = ["Session"]


class Session:
    """An ONNX file, ready to run.

    Args:
        path: the file.
        threads: threads of one operator; None leaves the choice to ONNX Runtime (all cores).
        spinning: threads that have nothing to do wait actively for a while, as is ONNX Runtime's
            default; they take the processors from whatever else runs.
        providers: execution providers in order of preference.

    Attributes:
        inputs: names of the inputs.
        outputs: names of the outputs.
        metadata: what the producer wrote into the file.

    Raises:
        FormatError: missing file, or not a model that ONNX Runtime accepts.
        ValueError: a provider that this ONNX Runtime does not have.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        threads: int | None = None,
        spinning: bool = True,
        providers: Sequence[str] = ("CPUExecutionProvider",),
    ) -> None:
        ort = need("onnxruntime")
        available = ort.get_available_providers()
        if absent := [p for p in providers if p not in available]:
            raise ValueError(
                f"session: no provider {absent[0]!r} here; available: {', '.join(available)}"
            )
        if threads is not None and threads < 1:
            raise ValueError(f"session: threads must be at least 1, got {threads}")
        if not Path(path).is_file():
            raise FormatError(f"{path}: no such file")
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads or 0
        if not spinning:
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 4  # warnings are about its own optimisations, errors raised
        self._errors = errors = ort.capi.onnxruntime_pybind11_state
        try:
            self._session = ort.InferenceSession(str(path), options, providers=list(providers))
        except (
            errors.Fail,
            errors.InvalidGraph,
            errors.InvalidProtobuf,
            errors.InvalidArgument,
            errors.NotImplemented,
        ) as error:
            raise FormatError(f"{path}: ONNX Runtime cannot load it ({error})") from error
        self.inputs = tuple(i.name for i in self._session.get_inputs())
        self.outputs = tuple(o.name for o in self._session.get_outputs())
        self.metadata: dict[str, str] = self._session.get_modelmeta().custom_metadata_map

    def run(
        self, feed: Mapping[str, np.ndarray[Any, Any] | Tensor]
    ) -> dict[str, np.ndarray[Any, Any]]:
        """Outputs by name for inputs by name (arrays or tensors; names that the graph does not have
        are ignored).

        Raises:
            ValueError: an input is missing.
            RuntimeError: the graph does not run on them.
        """
        if missing := [name for name in self.inputs if name not in feed]:
            raise ValueError(
                f"session: input {missing[0]!r} is missing; inputs: {', '.join(self.inputs)}"
            )
        arrays = {name: _array(feed[name]) for name in self.inputs}
        failures = (self._errors.Fail, self._errors.InvalidArgument, self._errors.RuntimeException)
        try:
            values = self._session.run(None, arrays)
        except failures as error:
            raise RuntimeError(f"session: ONNX Runtime: {error}") from error
        return dict(zip(self.outputs, values, strict=True))


def _array(value: Any) -> Any:
    return value.detach().cpu().numpy() if hasattr(value, "detach") else value
