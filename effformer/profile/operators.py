"""Multiply-adds of the operators that multiply, and a class for those that do not.

Every operator that runs falls into one of four classes, so that nothing is hidden:

- *counted*: it has a formula here (matrix products, convolutions, fused attention, recurrent
layers);
- *elementwise*: pointwise operators, reductions and normalisations, reported as numbers of
elements, 0 MACs;
- *moved*: views, copies, indexing, creation of tensors; free;
- *unknown*: everything else; it is listed as uncounted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import log2, prod
from typing import Any, Literal

import torch
from torch import Tensor

__all__ = ["Formula", "Kind", "elements", "kind", "macs", "name", "register_formula"]

Kind = Literal["counted", "elementwise", "moved", "unknown"]
Formula = Callable[[Sequence[Any], Mapping[str, Any], Any], int]
"""``formula(args, kwargs, output) -> multiply-adds``, with the operator's own arguments."""

_FORMULAS: dict[str, Formula] = {}


def register_formula(*names: str) -> Callable[[Formula], Formula]:
    """Decorator: give operators a formula; kernels of other packages are added the same way.

    Args:
        names: qualified operator names, for instance ``"aten::mm"`` or ``"mylib::fused_linear"``.

    Raises:
        ValueError: an operator has a formula already.

    Example:
        >>> @register_formula("mylib::fused_linear")
        ... def fused_linear(args, kwargs, out):
        ...     return out.numel() * args[0].shape[-1]
    """

    def add(formula: Formula) -> Formula:
        for name in names:
            if name in _FORMULAS:
                raise ValueError(f"register_formula: operator {name!r} already has a formula")
            _FORMULAS[name] = formula
        return formula

    return add


Operator = torch._ops.OpOverload | torch._ops.HigherOrderOperator


def name(op: Operator) -> str:
    """Qualified name of an operator; those that take functions are "higher_order::..."."""
    if isinstance(op, torch._ops.HigherOrderOperator):
        return f"higher_order::{op.name()}"
    return op._schema.name


def kind(op: Operator) -> Kind:
    """Class of an operator."""
    full = name(op)
    if full in _FORMULAS:
        return "counted"
    if isinstance(op, torch._ops.HigherOrderOperator):
        return "unknown"
    space, _, base = full.partition("::")
    if base.endswith("_") and not base.endswith("__"):
        base = base[:-1]
    if op.is_view or space == "prim" or base in _MOVED:
        return "moved"
    if not _POINTWISE.isdisjoint(op.tags) or base in _ELEMENTWISE or "quant" in base:
        return "elementwise"
    return "unknown"


def macs(op: Operator, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> int:
    """Multiply-adds of one call of a counted operator."""
    return int(_FORMULAS[name(op)](args, kwargs, out))


def elements(args: Sequence[Any], out: Any) -> int:
    """Work of an elementwise operator: the larger of its first input and its first output."""
    return max(_numel(args), _numel(out))


def _numel(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel()
    if isinstance(value, (tuple, list)):
        return next((v.numel() for v in value if isinstance(v, Tensor)), 0)
    return 0


_POINTWISE = {torch.Tag.pointwise} | {
    tag for tag in [getattr(torch.Tag, "reduction", None)] if tag is not None
}
_ELEMENTWISE_NAMES = """
    sum nansum mean amax amin max min prod var var_mean std std_mean any all argmax argmin norm
    linalg_vector_norm logsumexp cumsum cumprod cummax cummin logcumsumexp softmax _softmax
    _safe_softmax _log_softmax native_layer_norm native_group_norm native_batch_norm
    _native_batch_norm_legit _native_batch_norm_legit_no_training cudnn_batch_norm
    batch_norm_with_update _fused_rms_norm native_dropout _softmax_backward_data
    _log_softmax_backward_data native_layer_norm_backward native_group_norm_backward
    native_batch_norm_backward _fused_rms_norm_backward gelu_backward silu_backward
    threshold_backward glu glu_backward tril triu dropout bernoulli bucketize searchsorted
    masked_fill _masked_softmax fire fire_backward avg_pool1d avg_pool2d avg_pool3d _adaptive_avg_pool2d
    _adaptive_avg_pool3d max_pool2d_with_indices upsample_nearest1d upsample_nearest2d
    upsample_bilinear2d upsample_bicubic2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa
    grid_sampler_2d mse_loss _foreach_add _foreach_mul _thnn_fused_lstm_cell
    _thnn_fused_gru_cell
"""
_ELEMENTWISE = frozenset(_ELEMENTWISE_NAMES.split())
_MOVED_NAMES = """
    clone copy _to_copy _copy_from cat stack complex diag_embed empty empty_strided empty_like new_empty
    new_empty_strided new_zeros new_ones new_full zeros zeros_like ones ones_like full full_like
    scalar_tensor arange linspace eye tril_indices triu_indices rand randn rand_like randn_like
    randint randperm uniform normal fill zero lift lift_fresh lift_fresh_copy detach alias
    _unsafe_view _reshape_alias _local_scalar_dense item embedding embedding_dense_backward
    index index_select index_put _index_put_impl index_copy index_add index_fill gather scatter
    scatter_add scatter_reduce select_scatter slice_scatter select_backward slice_backward
    masked_select masked_scatter take take_along_dim one_hot constant_pad_nd reflection_pad1d
    reflection_pad2d replication_pad2d roll flip rot90 repeat repeat_interleave im2col col2im
    pixel_shuffle pixel_unshuffle channel_shuffle split_with_sizes_copy unfold_copy
    unfold_backward unsafe_split unsafe_split_with_sizes set resize resize_as to_dense to_mkldnn
    _to_dense _reorder_linear_weight _reorder_convolution_weight _assert_async _assert_scalar
    _assert_tensor_metadata sym_size sym_numel sym_stride is_same_size
    _has_compatible_shallow_copy_type linear_prepack record_stream
"""
_MOVED = frozenset(_MOVED_NAMES.split())


@register_formula("aten::mm", "aten::bmm", "aten::mv", "aten::dot", "aten::vdot", "aten::_int_mm")
def _product(args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor) -> int:
    """Every output element is a dot product over the last axis of the first operand."""
    return out.numel() * int(args[0].shape[-1])


@register_formula("higher_order::flex_attention")
def _flex_attention(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> int:
    """All pairs, as for a mask: queries (B, H, N, K), keys (B, ., M, K), values (B, ., M, V)."""
    q, k, v = (x.shape for x in args[:3])
    return int(q[0] * q[1] * q[2] * k[2] * (q[3] + v[3]))


@register_formula(
    "aten::addmm", "aten::addmm_", "aten::baddbmm", "aten::baddbmm_", "aten::addmv", "aten::addmv_",
    "aten::_addmm_activation",
)  # fmt: skip
def _added_product(args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor) -> int:
    return out.numel() * int(args[1].shape[-1])


@register_formula("aten::linalg_solve_triangular")
def _triangular_solve(args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor) -> int:
    """Half a product of the triangle (..., C, C) with the solution."""
    return out.numel() * int(args[0].shape[-1]) // 2


@register_formula("effformer::chunk_states", "effformer::chunk_states_backward")
def _chunk_states(args: Sequence[Any], kwargs: Mapping[str, Any], out: tuple[Tensor, ...]) -> int:
    """Products of what writes into the states, (c Z, K, C), and of what reads from them, if anything
    does, with V columns; decays are elementwise.
    """
    write, read = args[:2]
    return int(write.numel()) * int(out[0].shape[-1]) * (1 if read is None else 2)


@register_formula("aten::addbmm")
def _summed_product(args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor) -> int:
    return out.numel() * int(args[1].shape[-1]) * int(args[1].shape[0])


@register_formula(
    "aten::_scaled_mm",
    "aten::_weight_int8pack_mm",
    "aten::_weight_int4pack_mm",
    "aten::_weight_int4pack_mm_for_cpu",
    "aten::_dyn_quant_matmul_4bit",
    "aten::mkldnn_linear",
    "mkldnn::_linear_pointwise",
    "quantized::linear",
    "quantized::linear_relu",
    "quantized::linear_dynamic",
    "quantized::linear_relu_dynamic",
    "quantized::linear_dynamic_fp16",
    "onednn::qlinear_pointwise",
    "onednn::linear_dynamic_fp16",
    "bitsandbytes::gemv_4bit",
    "bitsandbytes::gemm_4bit",
    "bitsandbytes::int8_linear_matmul",
    "bitsandbytes::int8_scaled_mm",
    "bitsandbytes::int8_mixed_scaled_mm",
)
def _packed_linear(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> int:
    """Linear layers with packed or quantized weights: only the input tells the inner size."""
    return _numel(out) * int(args[0].shape[-1])


@register_formula(
    "aten::convolution",
    "aten::_convolution",
    "aten::convolution_overrideable",
    "aten::cudnn_convolution",
    "aten::miopen_convolution",
    "aten::_slow_conv2d_forward",
)
def _convolution(args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor) -> int:
    x, weight = args[0], args[1]
    transposed = len(args) > 6 and args[6] is True
    return _convolved(x, weight, out, transposed=transposed)


@register_formula("aten::mkldnn_convolution", "mkldnn::_convolution_pointwise")
def _mkldnn_convolution(args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor) -> int:
    return _convolved(args[0], args[1], out, transposed=False)


def _convolved(x: Tensor, weight: Tensor, out: Tensor, *, transposed: bool) -> int:
    """Weight is (out, in / groups, ...), transposed (in, out / groups, ...)."""
    return int((x if transposed else out).numel() * prod(weight.shape[1:]))


@register_formula("aten::convolution_backward")
def _convolution_backward(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> int:
    """Each of the two gradients costs as much as the forward convolution."""
    once = _convolved(args[1], args[2], args[0], transposed=args[7] is True)
    return once * sum(bool(wanted) for wanted in args[10][:2])


@register_formula(
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_fused_attention_overrideable",
    "aten::_scaled_dot_product_attention_math_for_mps",
)
def _attention(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> int:
    """Scores and their product with v, masked or not; q (B, H, N, K), k, v (B, G, M, K or V)."""
    q, k, v = args[:3]
    return int(prod(q.shape[:-1]) * k.shape[-2] * (q.shape[-1] + v.shape[-1]))


@register_formula(
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
    "aten::_scaled_dot_product_flash_attention_backward",
    "aten::_scaled_dot_product_efficient_attention_backward",
    "aten::_scaled_dot_product_cudnn_attention_backward",
)
def _attention_backward(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> int:
    """Scores again, gradients of scores, v, q and k: three products over K, two over V."""
    q, k, v = args[1:4]
    return int(prod(q.shape[:-1]) * k.shape[-2] * (3 * q.shape[-1] + 2 * v.shape[-1]))


@register_formula("aten::_flash_attention_forward", "aten::_efficient_attention_forward")
def _attention_heads_third(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> int:
    """Fused attention with q (B, N, H, K), or (T, H, K) with cumulative lengths."""
    q, k, v = args[:3]
    offsets = [a for a in args[3:6] if isinstance(a, Tensor) and a.dim() == 1]
    width = q.shape[-1] + v.shape[-1]
    if len(offsets) < 2:
        return int(q.shape[0] * q.shape[-2] * q.shape[-3] * k.shape[-3] * width)
    queries, keys = (o.diff() for o in offsets[:2])
    return int((queries * keys).sum()) * int(q.shape[-2] * width)


@register_formula("aten::mkldnn_rnn_layer")
def _recurrent_layer(args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> int:
    x, w_input, w_state = args[:3]
    return int(prod(x.shape[:-1]) * (w_input.numel() + w_state.numel()))


@register_formula("aten::_fft_r2c", "aten::_fft_c2r", "aten::_fft_c2c")
def _fourier_transform(args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor) -> int:
    """5/2 L log2 L per complex transform of length L: the 5 L log2 L operations of radix 2, two of
    them one multiply-add. Half of it along the axis (the last named) on whose other side numbers
    are real.
    """
    real = next((x for x in (args[0], out) if not x.is_complex()), None)
    wide = out if out.is_complex() else args[0]
    axes = list(args[1])
    total = 0.0
    if real is not None:
        axis = axes.pop()
        total = 1.25 * real.numel() * log2(real.shape[axis])
    return round(total + sum(2.5 * wide.numel() * log2(wide.shape[axis]) for axis in axes))
