"""Sparse convolution along a kernel map: checks, autograd, launches."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tritonspconv.kernel_map import KernelMap
from tritonspconv.kernels import kernels_for

Precision = Literal["ieee", "tf32"]

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def sparse_conv(
    feats: Tensor,
    weight: Tensor,
    kernel_map: KernelMap,
    bias: Tensor | None = None,
    *,
    precision: Precision = "ieee",
) -> Tensor:
    """Convolve sparse features along a kernel map.

    ``out[o] = bias + sum(feats[i] @ weight[v] for (i, o, v) in kernel_map)``, summed in float32
    (float64 for float64 input).

    Under autocast, in training and evaluation alike, both operands are cast to the autocast dtype.
    Otherwise operands of unlike dtypes are promoted as in torch.

    Args:
        feats: Input rows [n_in, c_in]; float16, bfloat16, float32 or float64.
        weight: One matrix per tap [V, c_in, c_out], any strides; read in place.
        kernel_map: Which rows meet under which tap.
        bias: [c_out], added to every row before rounding to the output dtype.
        precision: Products of float32 operands on a GPU: ``"ieee"`` keeps float32's accuracy,
            ``"tf32"`` rounds operands to 10 bits and is faster.

    Returns:
        [n_out, c_out] in the compute dtype; a row without pairs is ``bias``.

    Raises:
        TypeError: A dtype is not supported.
        ValueError: Rows, channels, taps or devices disagree.

    Deterministic, forward and backward. Differentiable once in ``feats``, ``weight`` and ``bias``;
    each gradient has its tensor's dtype, and the weight's is summed in float32 (float64 for
    float64 input). No wait for the device. Extra memory: none forward.
    Submanifold convolution: arXiv:1711.10275. Masked implicit GEMM: arXiv:2311.12862.
    """
    dtype = _compute_dtype(feats, weight)
    _check(feats, weight, kernel_map, bias, precision)
    return _SparseConv.apply(feats, weight, bias, kernel_map, dtype, precision)


class _SparseConv(torch.autograd.Function):
    """fwd: gather_gemm on out_table; dgrad: the same on in_table; wgrad: weight_grad on pairs."""

    @staticmethod
    def forward(
        ctx: Any,
        feats: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        kernel_map: KernelMap,
        dtype: torch.dtype,
        precision: Precision,
    ) -> Tensor:
        feats_c, weight_c = feats.to(dtype).contiguous(), weight.to(dtype)
        ctx.save_for_backward(feats_c, weight_c)
        ctx.kernel_map, ctx.precision = kernel_map, precision
        ctx.dtypes = feats.dtype, weight.dtype, None if bias is None else bias.dtype
        table = kernel_map.out_table
        return kernels_for("gather_gemm", feats.device).gather_gemm(
            feats_c,
            weight_c,
            bias,
            table.rows,
            table.mask,
            table.order,
            mirrored=table.mirrored,
            precision=precision,
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        feats, weight = ctx.saved_tensors
        feats_dtype, weight_dtype, bias_dtype = ctx.dtypes
        grad = grad.to(feats.dtype).contiguous()
        grad_feats = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            table = ctx.kernel_map.in_table
            kernels = kernels_for("gather_gemm", grad.device)
            grad_feats = kernels.gather_gemm(
                grad,
                weight.transpose(1, 2),
                None,
                table.rows,
                table.mask,
                table.order,
                mirrored=table.mirrored,
                precision=ctx.precision,
            ).to(feats_dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = _weight_grad(feats, grad, weight, weight_dtype, ctx)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum(0, dtype=_sum_dtype(grad.dtype)).to(bias_dtype)
        return grad_feats, grad_weight, grad_bias, None, None, None


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _weight_grad(
    feats: Tensor, grad: Tensor, weight: Tensor, weight_dtype: torch.dtype, ctx: Any
) -> Tensor:
    """Return the weight's gradient in the weight's dtype and memory layout."""
    kernel_map = ctx.kernel_map
    listed = kernel_map.pair_list
    kernels = kernels_for("weight_grad", grad.device)
    out = torch.empty_like(weight, dtype=weight_dtype)
    if not kernel_map.is_inverse:
        return kernels.weight_grad(
            feats, grad, listed.pairs, listed.tap_ptr, out,
            mirrored=listed.mirrored, precision=ctx.precision,
        )  # fmt: skip
    # The list is (input, output) of the forward geometry: the inverse's outputs come first.
    kernels.weight_grad(
        grad, feats, listed.pairs, listed.tap_ptr, out.transpose(1, 2),
        mirrored=listed.mirrored, precision=ctx.precision,
    )  # fmt: skip
    return out


def _compute_dtype(feats: Tensor, weight: Tensor) -> torch.dtype:
    """Return the dtype that products are made of."""
    device_type = feats.device.type
    if torch.is_autocast_enabled(device_type) and feats.dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)
    if feats.dtype == weight.dtype:
        return feats.dtype
    return torch.promote_types(feats.dtype, weight.dtype)


def _check(
    feats: Tensor,
    weight: Tensor,
    kernel_map: KernelMap,
    bias: Tensor | None,
    precision: str,
) -> None:
    """Check everything that metadata can tell; never waits for the device."""
    if feats.dtype not in _DTYPES or weight.dtype not in _DTYPES:
        raise TypeError(
            "sparse_conv: feats and weight must be float16, bfloat16, float32 or float64; got "
            f"{feats.dtype} and {weight.dtype}."
        )
    if feats.ndim != 2 or feats.shape[0] != kernel_map.n_in:
        raise ValueError(
            f"sparse_conv: feats must be [{kernel_map.n_in}, c_in], one row per input site of the "
            f"kernel map; got {list(feats.shape)}."
        )
    if weight.ndim != 3 or weight.shape[0] != kernel_map.kernel_volume:
        raise ValueError(
            f"sparse_conv: weight must be [{kernel_map.kernel_volume}, c_in, c_out], one matrix "
            f"per tap of {kernel_map.geometry}; got {list(weight.shape)}."
        )
    if weight.shape[1] != feats.shape[1]:
        raise ValueError(
            f"sparse_conv: weight must have c_in={feats.shape[1]} to match feats "
            f"{list(feats.shape)}; got {list(weight.shape)}. Build the layer with "
            f"in_channels={feats.shape[1]}."
        )
    if bias is not None and bias.shape != weight.shape[2:]:
        raise ValueError(f"sparse_conv: bias must be [{weight.shape[2]}]; got {list(bias.shape)}.")
    devices = {feats.device, weight.device, kernel_map.out_sites.device}
    if bias is not None:
        devices.add(bias.device)
    if len(devices) > 1:
        raise ValueError(
            f"sparse_conv: feats ({feats.device}), weight ({weight.device}) and the kernel map "
            f"({kernel_map.out_sites.device}) must be on one device. Move the module with .to()."
        )
    if precision not in ("ieee", "tf32"):
        raise ValueError(f"sparse_conv: precision must be 'ieee' or 'tf32'; got {precision!r}.")
