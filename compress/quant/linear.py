"""Layers that keep their weight packed and decode it when they are called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effformer.arguments import checked
from effformer.checks import check_device
from effformer.config import Spec
from effformer.values import Count

from .backends import Backend, decode, encode, select_backend
from .calibrate import Seen
from .schemes import Kernel, MatMulNBits, make_scheme

__all__ = ["PackedWeight", "QuantEmbedding", "QuantLinear"]


class PackedWeight(nn.Module):
    """A (N, K) weight as the plain tensors of a scheme: buffers under the scheme's names.

    Decoding is not cached, because a cache would take the memory that the scheme saves. On a CPU it
    costs about a twentieth (int8) to a sixth (4 bit) of the product with 256 tokens, and torch's
    int8 product is slower than decoding from one token on. Where speed at few tokens matters more
    than memory, `effformer.compress.dequantize` gives dense layers back.

    Args:
        n: rows (output features).
        k: columns (input features).
        scheme: name, dict or Config of a registered quantizer.
        backend: "torch", "bitsandbytes" or "auto".
        device: where the buffers are allocated (zeros, to be loaded or filled).

    Attributes:
        scheme: the format.
        shape: (N, K).
        dtype: type of the decoded weight.
        frozen: the dense weight was not trained, and is not where it comes back.
        backend: "torch" or "bitsandbytes".
    """

    def __init__(
        self,
        n: int,
        k: int,
        scheme: Spec,
        *,
        backend: str = "torch",
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        device = check_device(device, where=f"{type(self).__name__}: device")
        self.scheme = make_scheme(scheme)
        self.shape = (n, k)
        for name, (shape, dtype) in self.scheme.layout(n, k).items():
            self.register_buffer(name, torch.zeros(shape, dtype=dtype, device=device))
        self.dtype = torch.float32
        self.frozen = False
        self.backend: Backend = select_backend(
            backend, self.scheme, self.get_buffer("codes").device
        )

    def tensors(self) -> dict[str, Tensor]:
        """The packed tensors by name."""
        return dict(self.named_buffers(recurse=False))

    def tie(self, other: PackedWeight) -> None:
        """Take the packed tensors of a layer with the same weight."""
        for name, tensor in other.tensors().items():
            self.register_buffer(name, tensor)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # half() and to(dtype) change what the weight decodes to, never the stored scales
        kept = self.tensors()
        super()._apply(fn, recurse)
        for name, tensor in kept.items():
            moved = self.get_buffer(name)
            moved = moved if moved.dtype == tensor.dtype else tensor.to(moved.device)
            if torch._has_compatible_shallow_copy_type(tensor, moved):
                tensor.data = moved  # as torch moves parameters: a tied layer has the same tensor
                moved = tensor
            self.register_buffer(name, moved)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return self

    @property
    def weight(self) -> Tensor:
        """The decoded (N, K) weight, computed in float32; no gradient flows into it."""
        return decode(self.scheme, self.tensors(), *self.shape, self.backend).to(self.dtype)

    @torch.no_grad()
    @checked
    def pack(self, weight: Tensor, *, where: str = "weight", seen: Seen | None = None) -> None:
        """Round a dense weight into the buffers, for the inputs that its layer has seen.

        Raises:
            ValueError: ``weight`` or a scale of it is NaN or infinite; the message names ``where``.
        """
        _check_finite(weight, where)
        for name, tensor in encode(self.scheme, weight, self.backend, seen).items():
            if tensor.is_floating_point():
                _check_finite(tensor, f"{where}: {name} of scheme {self.scheme.name!r}")
            self.get_buffer(name).copy_(tensor)
        self.to(weight.dtype)

    def extra_repr(self) -> str:
        options = {k: v for k, v in self.scheme.config.to_dict().items() if k != "name"}
        shown = ", ".join(f"{k}={v}" for k, v in options.items())
        return f"{self.shape[1]} -> {self.shape[0]}, {self.scheme.name}({shown})"


def _check_finite(x: Tensor, where: str) -> None:
    if not x.isfinite().all():
        nan, inf = int(x.isnan().sum()), int(x.isinf().sum())
        raise ValueError(
            f"{where}: {nan} NaN and {inf} infinite values of {x.numel()}; a block that holds one "
            "has no scale. Load sound weights, or leave the layer out with skip="
        )


class QuantLinear(PackedWeight):
    """``x W^T + b`` with a packed W; differentiable in x and b.

    Args:
        in_features: K.
        out_features: N.
        scheme: name, dict or Config of a registered quantizer.
        bias: has a bias, kept in floating point.
        backend: "torch" or "bitsandbytes".
        device: where the tensors are allocated.

    Example:
        >>> import torch
        >>> dense = torch.nn.Linear(96, 32)
        >>> packed = QuantLinear.from_dense(dense, "int8")
        >>> packed(torch.ones(1, 96)).shape
        torch.Size([1, 32])
    """

    bias: nn.Parameter | None

    @checked
    def __init__(
        self,
        in_features: Count,
        out_features: Count,
        scheme: Spec,
        *,
        bias: bool = True,
        backend: str = "torch",
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(out_features, in_features, scheme, backend=backend, device=device)
        self.in_features = in_features
        self.out_features = out_features
        start = nn.Parameter(torch.zeros(out_features, device=device)) if bias else None
        self.register_parameter("bias", start)

    @classmethod
    @checked
    def from_dense(
        cls, linear: nn.Linear, scheme: Spec, *, backend: str = "torch", where: str = "weight",
        seen: Seen | None = None,
    ) -> Self:  # fmt: skip
        """Pack a linear layer, for the inputs that it has seen; its bias parameter is shared.

        Raises:
            ValueError: a weight is NaN or infinite.
        """
        packed = cls.like(linear, scheme, backend=backend)
        packed.pack(linear.weight, where=where, seen=seen)
        packed.register_parameter("bias", linear.bias)
        return packed

    @classmethod
    def like(cls, linear: nn.Linear, scheme: Spec, *, backend: str = "torch") -> Self:
        """An empty layer of the same shape, to load packed tensors into."""
        packed = cls(
            linear.in_features, linear.out_features, scheme,
            bias=linear.bias is not None, backend=backend, device=linear.weight.device,
        )  # fmt: skip
        packed.frozen = not linear.weight.requires_grad
        return packed.to(linear.weight.dtype).train(linear.training)

    def to_dense(self) -> nn.Linear:
        """A linear layer with the decoded weight."""
        bias = self.bias is not None
        dense = nn.Linear(self.in_features, self.out_features, bias=bias, device="meta")
        dense.weight = nn.Parameter(self.weight, requires_grad=not self.frozen)
        dense.register_parameter("bias", self.bias)
        return dense.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        if not self.scheme.prepares:
            return F.linear(x, self.weight, self.bias)
        y = self.scheme.linear(x, self.tensors(), *self.shape)
        return y if self.bias is None else y + self.bias

    def macs(self, n: int) -> int:
        """Multiply-adds for n tokens."""
        return n * self.scheme.macs(*self.shape)

    def kernel(self) -> Kernel | None:
        """The weight as an operator of ONNX Runtime multiplies prepared inputs with it, None if there
        is none for this scheme or block size.
        """
        return self.scheme.kernel(self.tensors(), *self.shape)

    def to_matmul_nbits(self) -> MatMulNBits | None:
        """Inputs of ONNX Runtime's MatMulNBits with the same weight.

        None if the scheme is not one of the row formats ("int8", "int4", ...), or its block size not
        one of the kernel's.
        """
        found = self.kernel()
        return found if isinstance(found, MatMulNBits) else None


class QuantEmbedding(PackedWeight):
    """Look-up in a packed (num_embeddings, embedding_dim) table; row formats decode only the rows
    asked for.

    Args:
        num_embeddings: N.
        embedding_dim: K.
        scheme: name, dict or Config of a registered quantizer.
        backend: "torch" or "bitsandbytes".
        device: where the tensors are allocated.
    """

    @checked
    def __init__(
        self,
        num_embeddings: Count,
        embedding_dim: Count,
        scheme: Spec,
        *,
        backend: str = "torch",
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, scheme, backend=backend, device=device)
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim

    @classmethod
    @checked
    def from_dense(
        cls, table: nn.Embedding, scheme: Spec, *, backend: str = "torch", where: str = "weight"
    ) -> Self:
        """Pack a table.

        Raises:
            ValueError: a weight is NaN or infinite.
        """
        packed = cls.like(table, scheme, backend=backend)
        packed.pack(table.weight, where=where)
        return packed

    @classmethod
    def like(cls, table: nn.Embedding, scheme: Spec, *, backend: str = "torch") -> Self:
        """An empty table of the same shape."""
        packed = cls(
            table.num_embeddings, table.embedding_dim, scheme,
            backend=backend, device=table.weight.device,
        )  # fmt: skip
        packed.frozen = not table.weight.requires_grad
        return packed.to(table.weight.dtype).train(table.training)

    def to_dense(self) -> nn.Embedding:
        """A table with the decoded weight."""
        return nn.Embedding.from_pretrained(self.weight, freeze=self.frozen).train(self.training)

    def forward(self, ids: Tensor) -> Tensor:
        """(...) integer ids -> (..., K)."""
        if not self.scheme.by_row:
            return F.embedding(ids, self.weight)
        flat = ids.flatten()
        rows = {name: t.index_select(0, flat) for name, t in self.tensors().items()}
        chosen = decode(self.scheme, rows, flat.shape[0], self.embedding_dim, self.backend)
        return chosen.to(self.dtype).view(*ids.shape, self.embedding_dim)
