"""Sparse convolution along a kernel map: checks, autograd, launches."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function_unary

from tritonspconv.arguments import check_tensor
from tritonspconv.graph_capture import is_traced, refuse_capture, run_untraced
from tritonspconv.guide import more
from tritonspconv.kernel_map import KernelMap
from tritonspconv.kernels import acc_dtype
from tritonspconv.kernels.batch_norm import batch_norm, batch_norm_grad
from tritonspconv.kernels.channel_norm import ChannelNorm, TrainingNorm
from tritonspconv.kernels.conv_grads import conv_grads
from tritonspconv.kernels.gather_gemm import gather_gemm
from tritonspconv.ops._conv_checks import (
    check_norm,
    check_operands,
    check_residual,
    check_training_norm,
)
from tritonspconv.ops._second_order import conv_gradients, normed_gradients, refuse_second_order

Precision = Literal["ieee", "tf32"]
WeightLayout = Literal["VIO", "OVI"]


def sparse_conv(
    feats: Tensor,
    weight: Tensor,
    kernel_map: KernelMap,
    bias: Tensor | None = None,
    *,
    weight_layout: WeightLayout = "VIO",
    precision: Precision = "ieee",
    norm: ChannelNorm | TrainingNorm | None = None,
    residual: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """Convolve sparse features along a kernel map.

    ``out[o] = bias + sum(feats[i] @ weight[v] for (i, o, v) in kernel_map)``, summed in float32
    (float64 for float64 input).

    Under autocast, in training and evaluation alike, both operands are cast to the autocast dtype.
    Otherwise operands of unlike dtypes are promoted as in torch.

    Args:
        feats: Input rows [n_in, c_in]; float16, bfloat16, float32 or float64.
        weight: One matrix per tap [V, c_in, c_out], any strides; read in place.
        kernel_map: The pairs of input and output rows of each tap.
        bias: [c_out], added to every row before rounding to the output dtype.
        weight_layout: ``"OVI"``: ``weight`` is [c_out, ..., c_in] with the V taps on the axes
            between, as in spconv 2.x. A permuted view of such a weight gives the same result;
            autograd needs longer for it.
        precision: Precision of float32 products on a GPU. ``"ieee"`` keeps the accuracy of float32;
            ``"tf32"`` rounds operands to 10 bits and is faster. For large products, NVIDIA GPUs get
            each operand as float16 parts. An entry that is 2**29 times smaller than the largest
            entry of its tensor then loses bits.
        norm: Batch norm of the output's channels. A :class:`ChannelNorm` normalises by fixed
            statistics, as in evaluation. A :class:`TrainingNorm` normalises by the statistics of
            the output, as in training, and needs two rows.
        residual: [n_out, c_out], added to the output after ``norm``.
        relu: Clamp the output at zero after ``norm`` and ``residual``. If no gradient is needed
            and the statistics are fixed, the kernel does all three before it rounds the output.

    Returns:
        [n_out, c_out] in the compute dtype; a row without pairs is ``bias``, normalised.

    Raises:
        TypeError: A dtype is not supported.
        ValueError: Rows, channels, taps or devices disagree, or there are too few rows.

    Deterministic, forward and backward. Differentiable any number of times in ``feats``,
    ``weight``, ``bias``, ``residual`` and the weight and bias of ``norm``. Fixed statistics get no
    gradient. Each gradient has the dtype of its tensor; the gradient of the weight is summed in
    float32 (float64 for float64 input). The host does not wait for the device. The forward pass
    takes this extra memory: a CPU with numba needs a copy of the weight and the pairs, which the
    map keeps; a CPU without numba needs a buffer for some blocks of gathered rows and products; an
    NVIDIA GPU needs two float16 parts of each float32 operand of a large product. Submanifold
    convolution: arXiv:1711.10275. Masked implicit GEMM: arXiv:2311.12862.
    """
    if is_traced():
        return _trace(
            feats, weight, kernel_map, bias, weight_layout, precision, norm, residual, relu
        )
    refuse_capture("sparse_conv")
    check_tensor("sparse_conv: feats", feats)
    check_tensor("sparse_conv: weight", weight)
    if has_torch_function_unary(feats):
        return handle_torch_function(
            sparse_conv, (feats,), feats, weight, kernel_map, bias, weight_layout=weight_layout,
            precision=precision, norm=norm, residual=residual, relu=relu,
        )  # fmt: skip
    dtype = compute_dtype(feats, weight)
    view = None if weight_layout == "VIO" else as_matrices(weight.detach(), weight_layout)
    matrices = weight if view is None else view
    check_operands(feats, matrices, kernel_map, bias, precision)
    if residual is not None:
        check_residual(residual, matrices, kernel_map)
    if isinstance(norm, TrainingNorm):
        check_training_norm(norm, matrices, kernel_map, dtype)
        call = _Call(view, kernel_map, dtype, precision, norm, relu)
        return _SparseConv.apply(feats, weight, bias, norm.weight, norm.bias, residual, call)
    if norm is not None:
        check_norm(norm, matrices)
    if torch.is_grad_enabled() and _needs_grad(feats, weight, bias, norm, residual):
        call = _Call(view, kernel_map, dtype, precision)
        out: Tensor = _SparseConv.apply(feats, weight, bias, None, None, None, call)
        out = out if norm is None else _normalise(out, norm)
        out = out if residual is None else out + residual.to(dtype)
        return out.relu() if relu else out
    feats, matrices = cast(feats, dtype).contiguous(), cast(matrices, dtype)
    residual = None if residual is None else residual.contiguous()
    return run_convolution(feats, matrices, bias, kernel_map, precision, norm, residual, relu)


def _trace(
    feats: Tensor,
    weight: Tensor,
    kernel_map: KernelMap,
    bias: Tensor | None,
    layout: WeightLayout,
    precision: Precision,
    norm: ChannelNorm | TrainingNorm | None,
    residual: Tensor | None,
    relu: bool,
) -> Tensor:
    """Return the result of :func:`sparse_conv`, in operations that ``torch.compile`` traces."""
    if isinstance(norm, TrainingNorm) or not takes_operator(feats, weight, layout):
        return run_untraced(
            sparse_conv, feats, weight, kernel_map, bias, weight_layout=layout,
            precision=precision, norm=norm, residual=residual, relu=relu,
        )  # fmt: skip
    dtype = compute_dtype(feats, weight)
    operands = (
        feats, weight, bias, kernel_map, kernel_map.out_sites.coords.shape[0], layout, dtype,
        precision,
    )  # fmt: skip
    if not torch.is_grad_enabled() and (norm is not None or residual is not None or relu):
        return call_fused("conv_along_map", operands, norm, residual, relu)
    out = torch.ops.tritonspconv.conv_along_map(*operands)
    out = out if norm is None else _normalise(out, norm)
    out = out if residual is None else out + residual.to(dtype)
    return out.relu() if relu else out


def call_fused(
    name: str,
    operands: tuple[Any, ...],
    norm: ChannelNorm | None,
    residual: Tensor | None,
    relu: bool,
) -> Tensor:
    """Call the operator ``tritonspconv::<name>_fused``, which has no gradient.

    Args:
        name: Name of a registered convolution.
        operands: Its arguments.
        norm: See :func:`sparse_conv`, like ``residual`` and ``relu``.
        residual: [n_out, c_out], or None.
        relu: Clamp last.
    """
    operator = getattr(torch.ops.tritonspconv, f"{name}_fused")
    numbers = (None, None, None, None, 0.0) if norm is None else norm
    return operator(*operands, *numbers, residual, relu)


def takes_operator(feats: Tensor, weight: Tensor, layout: WeightLayout = "VIO") -> bool:
    """Return whether a registered operator takes the operands; else :func:`sparse_conv` raises."""
    return (
        type(feats) is Tensor
        and feats.ndim == 2
        and weight.ndim >= 3
        and feats.shape[1] == weight.shape[-1 if layout == "OVI" else 1]
    )


def as_matrices(weight: Tensor, layout: WeightLayout = "OVI") -> Tensor:
    """Return [c_out, ..., c_in] as [V, c_in, c_out]."""
    if layout != "OVI":
        raise ValueError(f"sparse_conv: weight_layout must be 'VIO' or 'OVI'; got {layout!r}.")
    if weight.ndim < 3:
        raise ValueError(
            "sparse_conv: weight must be [c_out, ..., c_in] in the layout 'OVI', with the window "
            f"between; got {list(weight.shape)}."
        )
    return weight.flatten(1, -2).permute(1, 2, 0)


def _needs_grad(
    feats: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: ChannelNorm | None,
    residual: Tensor | None,
) -> bool:
    learnt = (bias, residual) if norm is None else (bias, residual, norm.weight, norm.bias)
    return (
        feats.requires_grad
        or weight.requires_grad
        or any(x is not None and x.requires_grad for x in learnt)
    )


def _normalise(out: Tensor, norm: ChannelNorm) -> Tensor:
    """Return ``out`` [n_out, c_out] normalised, rounded once more."""
    # Torch accepts vectors of this dtype together with any dtype of ``out``.
    dtype = acc_dtype(out.dtype)
    mean, variance, weight, bias, eps = norm.each(lambda vector: vector.to(dtype))
    return F.batch_norm(out, mean, variance, weight, bias, eps=eps)


class _Call(NamedTuple):
    """The arguments of :class:`_SparseConv` that have no gradient.

    Attributes:
        view: The weight as matrices, where it has another layout; None: it is [V, c_in, c_out].
        kernel_map: The map.
        dtype: The dtype that products are made of.
        precision: Products of float32.
        norm: Batch norm in training, applied to the output.
        relu: Clamp the sum of the normalised output and the residual at zero.
    """

    view: Tensor | None
    kernel_map: KernelMap
    dtype: torch.dtype
    precision: Precision
    norm: TrainingNorm | None = None
    relu: bool = False


class _SparseConv(torch.autograd.Function):
    """Forward: gather_gemm on the table of the outputs. Backward: conv_grads.

    Batch norm in training, the addition of a residual and the ReLU belong to the node. Each
    separate node would cost the host and the autograd thread the same time again, and would need
    passes over the features. ``norm_weight`` and ``norm_bias`` belong to ``call.norm``. They are
    arguments so that autograd sees them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        feats: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        residual: Tensor | None,
        call: _Call,
    ) -> Tensor:
        view, kernel_map, dtype, precision, norm, relu = call
        weight_c = cast(weight if view is None else view, dtype)
        feats_c = cast(feats, dtype).contiguous()
        # The backward pass reads dtypes and layouts of these tensors, and gradients of gradients
        # need the graph behind the tensors.
        ctx.call, ctx.weight, ctx.bias = call, weight, bias
        ctx.feats_dtype = feats.dtype
        ctx.feats_copied = feats_c is not feats
        out = run_convolution(feats_c, weight_c, bias, kernel_map, precision)
        if norm is None:
            ctx.save_for_backward(feats_c, weight_c)
            return out
        if residual is None:
            normed, stats = batch_norm(out, norm, relu, None, kernel_map.out_count)
            ctx.save_for_backward(feats_c, weight_c, out, stats, norm_weight, norm_bias, None)
            return normed
        ctx.residual_dtype = residual.dtype
        addend = cast(residual, dtype).contiguous()
        normed, stats = batch_norm(out, norm, relu, addend, kernel_map.out_count)
        # The next layer keeps this output as its input anyway.
        clamped = normed if relu else None
        ctx.save_for_backward(feats_c, weight_c, out, stats, norm_weight, norm_bias, clamped)
        return normed

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # The caller passed create_graph=True.
            return _second_order(ctx, grad)
        feats, weight, *normed = ctx.saved_tensors
        needs_feats, needs_weight, needs_bias, needs_scale, needs_shift, needs_residual, _ = (
            ctx.needs_input_grad
        )
        grad = cast(grad, feats.dtype).contiguous()
        grad_feats = grad_weight = grad_bias = grad_scale = grad_shift = grad_residual = None
        matrices, kernel_map = None, ctx.call.kernel_map
        if normed:
            out, stats, scale, shift, clamped = normed
            grad, grad_scale, grad_shift, grad_residual = batch_norm_grad(
                grad, out, stats, scale, shift, ctx.call.relu, clamped, kernel_map.out_count
            )
            grad_residual = cast(grad_residual, ctx.residual_dtype) if needs_residual else None
        if needs_weight:
            shape = None if ctx.call.view is None else ctx.weight.shape
            grad_weight, matrices = new_weight_grad(weight, ctx.weight.dtype, shape)
        if needs_feats or needs_weight:
            grad_feats = conv_grads(
                feats, grad, weight, kernel_map,
                needs_feats=needs_feats, grad_weight=matrices, precision=ctx.call.precision,
            )  # fmt: skip
        if grad_feats is not None:
            grad_feats = cast(grad_feats, ctx.feats_dtype)
        if needs_bias and normed:
            # The norm subtracts the bias again, because the bias adds the same to all rows.
            grad_bias = torch.zeros_like(ctx.bias)
        elif needs_bias:
            grad = _without_padding(grad, kernel_map.out_count)
            grad_bias = grad.sum(0, dtype=acc_dtype(grad.dtype)).to(ctx.bias.dtype)
        return (
            grad_feats, grad_weight, grad_bias,
            grad_scale if needs_scale else None, grad_shift if needs_shift else None,
            grad_residual, None,
        )  # fmt: skip


def _without_padding(rows: Tensor, count: Tensor | None) -> Tensor:
    """Return ``rows`` [N, C] with those behind the count replaced by zero."""
    if count is None:
        return rows
    is_real = torch.arange(rows.shape[0], device=rows.device) < count
    return torch.where(is_real[:, None], rows, rows.new_zeros(()))


def new_weight_grad(
    matrices: Tensor, dtype: torch.dtype, shape: torch.Size | None
) -> tuple[Tensor, Tensor]:
    """Return memory for the weight's gradient, in its layout, and as [V, c_in, c_out]."""
    if shape is None:
        grad = torch.empty_like(matrices, dtype=dtype)
        return grad, grad
    grad = matrices.new_empty(shape, dtype=dtype)
    return grad, as_matrices(grad)


def _second_order(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients of ``_SparseConv.backward``, with a graph behind them."""
    feats, _, *normed = ctx.saved_tensors
    view, kernel_map, dtype, precision, norm, relu = ctx.call
    refuse_second_order(kernel_map.out_count)
    needs_feats, needs_weight, needs_bias, _, _, needs_residual, _ = ctx.needs_input_grad
    if needs_feats and ctx.feats_copied:
        raise RuntimeError(
            f"sparse_conv: a gradient of the gradient needs contiguous features of {dtype}, in "
            "which the layer computes. Convert them before the layer, where autograd sees it: "
            f"x.replace(x.feats.to({dtype}).contiguous())." + more("second-order")
        )
    grad = cast(grad, dtype)
    bias, weight = ctx.bias, ctx.weight
    matrices = cast(weight if view is None else as_matrices(weight), dtype)
    grads: dict[int, Tensor | None] = {}
    if normed:
        out = _differentiable(feats, matrices, bias, kernel_map, precision)
        norm = norm._replace(weight=normed[2], bias=normed[3])
        candidates = (feats, weight, bias, *normed[2:4])
        places = [place for place in range(5) if ctx.needs_input_grad[place]]
        found, grad_residual = normed_gradients(
            out, norm, normed[4], relu, grad, [candidates[place] for place in places]
        )
        grads = dict(zip(places, found, strict=True))
        if needs_residual:
            grads[5] = cast(grad_residual, ctx.residual_dtype)
        return tuple(grads.get(place) for place in range(7))
    grad_feats, grad_matrices = conv_gradients(
        _differentiable, feats, matrices, grad, kernel_map, precision, (needs_feats, needs_weight)
    )
    grad_bias = None
    if needs_bias:
        grad_bias = grad.sum(0, dtype=acc_dtype(grad.dtype)).to(bias.dtype)
    if grad_matrices is not None:
        grad_matrices = cast(grad_matrices, weight.dtype)
        if view is not None:
            grad_matrices = grad_matrices.permute(2, 0, 1).reshape(weight.shape)
    return grad_feats, grad_matrices, grad_bias, None, None, None, None


def _differentiable(
    feats: Tensor,
    matrices: Tensor,
    bias: Tensor | None,
    kernel_map: KernelMap,
    precision: Precision,
) -> Tensor:
    """Return a convolution of operands of one dtype, with its graph."""
    call = _Call(None, kernel_map, feats.dtype, precision)
    return _SparseConv.apply(feats.contiguous(), matrices, bias, None, None, None, call)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``x`` in ``dtype``."""
    # A call that changes nothing costs a microsecond.
    return x if x.dtype == dtype else x.to(dtype)


def run_convolution(
    feats: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kernel_map: KernelMap,
    precision: Precision,
    norm: ChannelNorm | None = None,
    residual: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """Return the convolution of operands of one dtype."""
    _, c_in, c_out = weight.shape
    table = kernel_map.out_table_for(c_in, c_out)
    return gather_gemm(
        feats, weight, bias, table, precision=precision, norm=norm, residual=residual, relu=relu,
        in_count=kernel_map.in_count,
    )  # fmt: skip


def compute_dtype(feats: Tensor, weight: Tensor) -> torch.dtype:
    """Return the dtype that products are made of."""
    device_type = feats.device.type
    if torch.is_autocast_enabled(device_type) and feats.dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)
    if feats.dtype == weight.dtype:
        return feats.dtype
    return torch.promote_types(feats.dtype, weight.dtype)
