"""Who rounds and decodes: plain torch, or bitsandbytes' kernels on the same bytes."""

from __future__ import annotations

import importlib.util
from typing import Literal

import torch
from torch import Tensor

from effformer.checks import need, unknown

from .blockwise import DYNAMIC, NESTED_BLOCK
from .calibrate import Seen
from .schemes import FlatFourBit, Int8Dynamic, LLMInt8, Scheme, Tensors

__all__ = ["BACKENDS", "Backend", "decode", "encode", "select_backend"]

Backend = Literal["torch", "bitsandbytes"]
BACKENDS = ("torch", "bitsandbytes", "auto")

_FOUR_BIT_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)


def _obstacle(scheme: Scheme) -> str | None:
    """Why bitsandbytes cannot take the scheme, None if it can."""
    if isinstance(scheme, LLMInt8 | Int8Dynamic):
        return None
    if not isinstance(scheme, FlatFourBit):
        return (
            f"scheme {scheme.name!r} is not a bitsandbytes format; "
            "choices: nf4, fp4, int8-dynamic, llm-int8"
        )
    if scheme.config.block not in _FOUR_BIT_BLOCKS:
        return (
            f"its {scheme.name} kernels have no block {scheme.config.block}; "
            f"choices: {', '.join(map(str, _FOUR_BIT_BLOCKS))}"
        )
    return None


def select_backend(backend: str, scheme: Scheme, device: torch.device) -> Backend:
    """Resolve a backend name.

    Args:
        backend: "torch" (everywhere), "bitsandbytes", or "auto": bitsandbytes where it is
            installed, can take the scheme and the weight is on a CUDA device; on a CPU the two are
            equally fast.
        scheme: the scheme.
        device: where the weight is.

    Raises:
        ValueError: unknown backend, or one that cannot take the scheme.
        MissingExtra: bitsandbytes is asked for and not installed.
    """
    if backend not in BACKENDS:
        raise unknown("backend", backend, BACKENDS)
    obstacle = _obstacle(scheme)
    if backend == "auto":
        installed = importlib.util.find_spec("bitsandbytes") is not None
        able = installed and obstacle is None and device.type == "cuda"
        return "bitsandbytes" if able else "torch"
    if backend == "torch":
        return "torch"
    if obstacle is not None:
        raise ValueError(f"backend 'bitsandbytes': {obstacle}; or backend='torch'")
    need("bitsandbytes")
    return "bitsandbytes"


def encode(
    scheme: Scheme, weight: Tensor, backend: Backend, seen: Seen | None = None
) -> dict[str, Tensor]:
    """`Scheme.fit` by the chosen backend; the bytes are the same on a CPU."""
    if backend == "torch":
        return scheme.fit(weight, seen)
    functional = need("bitsandbytes.functional")
    if isinstance(scheme, FlatFourBit):
        codes, state = functional.quantize_4bit(
            weight.float().contiguous(),
            blocksize=scheme.config.block,
            compress_statistics=scheme.config.double_quant,
            quant_type=scheme.name,
        )
        if not state.nested:
            return {"codes": codes, "absmax": state.absmax}
        nested, offset = state.state2.absmax, state.offset.reshape(1)
        return {"codes": codes, "absmax": state.absmax, "nested_absmax": nested, "offset": offset}
    if isinstance(scheme, Int8Dynamic):
        codes, state = functional.quantize_blockwise(
            weight.float().contiguous(), blocksize=scheme.config.block
        )
        return {"codes": codes, "absmax": state.absmax}
    codes, absmax, _ = functional.int8_vectorwise_quant(weight.half().contiguous())
    return {"codes": codes, "absmax": absmax}


def decode(scheme: Scheme, tensors: Tensors, n: int, k: int, backend: Backend) -> Tensor:
    """`Scheme.decode` by the chosen backend. Exported graphs always hold the torch form."""
    if backend == "torch" or torch.compiler.is_exporting():
        return scheme.decode(tensors, n, k)
    need("bitsandbytes")  # registers the operators
    ops = torch.ops.bitsandbytes
    codes, absmax = tensors["codes"], tensors["absmax"]
    if isinstance(scheme, LLMInt8):
        decoded: Tensor = ops.int8_vectorwise_dequant(codes, absmax.float())
        return decoded
    table = torch.tensor(DYNAMIC, dtype=torch.float32, device=codes.device)
    if isinstance(scheme, Int8Dynamic):
        flat: Tensor = ops.dequantize_blockwise(
            codes, absmax.float(), table, scheme.config.block, torch.float32
        )
        return flat
    if "offset" in tensors:
        nested = tensors["nested_absmax"].float()
        absmax = ops.dequantize_blockwise(absmax, nested, table, NESTED_BLOCK, torch.float32)
        absmax = absmax + tensors["offset"].float()
    block, name = scheme.config.block, scheme.name
    # as one row: its AVX-512 kernel lets a block begin with every row, its quantizer does not
    four: Tensor = ops.dequantize_4bit(codes, absmax.float(), block, name, (n * k,), torch.float32)
    return four.view(n, k)
