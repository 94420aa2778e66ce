"""A thin ONNX Runtime session: names in, names out, threads and providers explicit."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effformer.arguments import checked
from effformer.checks import FormatError, RunError, check_values, need, shown
from effformer.values import Threads

from .opened import refusal

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Session"]


class Session:
    """An ONNX file, ready to run.

    Products of bytes are exact on every CPU: where one without VNNI would saturate, ONNX Runtime is asked
    to widen them first, which takes longer (``session.x64quantprecision``).

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

    @checked
    def __init__(
        self,
        path: str | Path,
        *,
        threads: Threads | None = None,
        spinning: bool = True,
        providers: Sequence[str] = ("CPUExecutionProvider",),
    ) -> None:
        ort = need("onnxruntime")
        available = ort.get_available_providers()
        if absent := [p for p in providers if p not in available]:
            raise ValueError(
                f"session: no provider {absent[0]!r} here; available: {', '.join(available)}"
            )
        if not Path(path).is_file():
            raise FormatError(f"{path}: no such file")
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads or 0
        if not spinning:
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.add_session_config_entry("session.x64quantprecision", "1")
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

    @checked
    def run(self, feed: Mapping[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
        """Outputs by name for inputs by name (arrays or tensors; names that the graph does not have
        are ignored).

        Raises:
            ValueError: an input is missing.
            TypeError: one is neither an array nor a tensor.
            RunError: the graph does not run on them, because it refuses their lengths (see
                `export_onnx`) or for another reason.
        """
        if missing := [name for name in self.inputs if name not in feed]:
            raise ValueError(
                f"session: input {missing[0]!r} is missing; inputs: {', '.join(self.inputs)}"
            )
        arrays = {name: _array(feed[name], f"session: input {name!r}") for name in self.inputs}
        own = (self._errors.Fail, self._errors.InvalidArgument, self._errors.RuntimeException)
        failures = (*own, self._errors.NotImplemented, RuntimeError)
        try:
            values = self._session.run(None, arrays)
        except failures as error:
            shapes = ", ".join(f"{name} {tuple(array.shape)}" for name, array in arrays.items())
            why = refusal(error) or f"ONNX Runtime: {_CODE.sub('', str(error))[:300]}"
            raise RunError(f"session: {why}, got {shapes}") from error
        return dict(zip(self.outputs, values, strict=True))


_CODE = re.compile(r"\[ONNXRuntimeError\] : \d+ : \w+ : ")


def _array(value: Any, where: str) -> Any:
    import numpy as np

    if hasattr(value, "detach"):
        check_values(value, where=where)
        value = value.detach().cpu().numpy()
    if not isinstance(value, np.ndarray):
        raise TypeError(f"{where}: expected an array or a tensor, got {shown(value)}")
    return value
