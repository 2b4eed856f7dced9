"""Convolution and pooling along pair lists and pair tables, as ``ops`` names them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from compat.spconv import constants
from compat.spconv.core import Activation, ConvAlgo
from compat.spconv.pytorch._errors import SpconvError
from compat.spconv.pytorch._pairs import map_of_pairs, map_of_table
from tritonspconv import ops
from tritonspconv.kernel_map import KernelMap


def indice_conv(
    features: Tensor,
    filters: Tensor,
    indice_pairs: Tensor,
    indice_pair_num: Tensor,
    num_activate_out: int,
    inverse: bool = False,
    subm: bool = False,
    algo: ConvAlgo = ConvAlgo.Native,
    timer: Any = None,
    bias: Tensor | None = None,
    act_alpha: float = 0.0,
    act_beta: float = 0.0,
    act_type: Activation = Activation.None_,
) -> Tensor:
    """Convolve along a pair list.

    Args:
        features: Input rows ``[n_in, c_in]``.
        filters: ``[c_out, *k, c_in]``.
        indice_pairs: Input and output rows by tap ``[2, V, N]``, of ``get_indice_pairs`` or alike.
        indice_pair_num: Pairs of each tap ``[V]``.
        num_activate_out: Number of output rows.
        inverse: Swap both sides: ``features`` belong to ``indice_pairs[1]``.
        subm: Only the first half of the taps is read; the other half follows by symmetry.
        algo: Accepted, without effect.
        timer: Accepted, without effect.
        bias: ``[c_out]``.
        act_alpha: LeakyReLU's slope.
        act_beta: Accepted, without effect.
        act_type: Activation of the output.

    Returns:
        Output rows ``[num_activate_out, c_out]``.

    Raises:
        SpconvError: Shapes of pairs or filters do not fit.
        ValueError: Rows are out of range or repeat within a tap, or operands do not fit the pairs.

    Differentiable in ``features``, ``filters`` and ``bias``. If ``get_indice_pairs`` did not make
    the pairs, the first call with them waits for the device.
    """
    n_in, n_out = features.shape[0], int(num_activate_out)
    if inverse:
        kernel_map = map_of_pairs(indice_pairs, indice_pair_num, n_out, n_in, subm).inverse()
    else:
        kernel_map = map_of_pairs(indice_pairs, indice_pair_num, n_in, n_out, subm)
    return activate(_convolve(features, filters, kernel_map, bias), act_type, act_alpha)


def indice_conv_backward(
    features: Tensor,
    filters: Tensor,
    out_bp: Tensor,
    indice_pairs: Tensor,
    indice_pair_num: Tensor,
    inverse: bool = False,
    subm: bool = False,
    algo: ConvAlgo = ConvAlgo.Native,
    timer: Any = None,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of ``features`` and ``filters`` in :func:`indice_conv`."""

    def forward(feats: Tensor, weight: Tensor) -> Tensor:
        rows = out_bp.shape[0]
        return indice_conv(feats, weight, indice_pairs, indice_pair_num, rows, inverse, subm)

    grad_feats, grad_weight = _gradients(forward, (features, filters), out_bp)
    return grad_feats, grad_weight


def implicit_gemm(
    features: Tensor,
    filters: Tensor,
    pair_fwd: Tensor,
    pair_mask_fwd_splits: Sequence[Tensor],
    mask_argsort_fwd_splits: Sequence[Tensor],
    num_activate_out: int,
    masks: Sequence[Any],
    is_train: bool,
    is_subm: bool,
    timer: Any = None,
    fp32_accum: bool | None = None,
    bias: Tensor | None = None,
    act_alpha: float = 0.0,
    act_beta: float = 0.0,
    act_type: Activation = Activation.None_,
    output_scale: float = 1.0,
    scale: Tensor | None = None,
    output_add: Tensor | None = None,
    output_add_scale: float = 0.0,
    output_dtype: torch.dtype | None = None,
) -> tuple[Tensor, None, int]:
    """Convolve along a pair table.

    Args:
        features: Input rows ``[n_in, c_in]``.
        filters: ``[c_out, *k, c_in]``.
        pair_fwd: Input row of each tap and output row ``[V, num_activate_out]``, or -1.
        pair_mask_fwd_splits: Accepted, without effect.
        mask_argsort_fwd_splits: Accepted, without effect.
        num_activate_out: Number of output rows.
        masks: Accepted, without effect.
        is_train: Accepted, without effect.
        is_subm: Accepted, without effect.
        timer: Accepted, without effect.
        fp32_accum: Accepted; sums are always float32.
        bias: ``[c_out]``.
        act_alpha: LeakyReLU's slope.
        act_beta: Accepted, without effect.
        act_type: Activation of the output.
        output_scale: Belongs to int8 layers; must be 1.
        scale: Belongs to int8 layers; must be None.
        output_add: Belongs to int8 layers; must be None.
        output_add_scale: Belongs to int8 layers; must be 0.
        output_dtype: Cast the output.

    Returns:
        Output rows ``[num_activate_out, c_out]``, None and -1: spconv's mask and its width belong
        to its kernels.

    Raises:
        NotImplementedError: An argument of int8 layers is given.
        SpconvError: Shapes of the table or filters do not fit.

    Differentiable in ``features``, ``filters`` and ``bias``.
    """
    if output_scale != 1.0 or scale is not None or output_add is not None or output_add_scale:
        raise NotImplementedError(
            "implicit_gemm: output_scale, scale, output_add and output_add_scale belong to int8 "
            "layers, which do not exist here. Use float16 or bfloat16, and add rows with +."
        )
    kernel_map = map_of_table(pair_fwd, features.shape[0], int(num_activate_out))
    out = activate(_convolve(features, filters, kernel_map, bias), act_type, act_alpha)
    return (out if output_dtype is None else out.to(output_dtype)), None, -1


def implicit_gemm_backward(
    features: Tensor,
    filters: Tensor,
    out_bp: Tensor,
    pair_fwd: Tensor,
    pair_bwd: Tensor,
    pair_mask_fwd_splits: Sequence[Tensor],
    pair_mask_bwd_splits: Sequence[Tensor],
    mask_argsort_fwd_splits: Sequence[Tensor],
    mask_argsort_bwd_splits: Sequence[Tensor],
    mask_output_fwd: Tensor | None,
    masks: Sequence[Any],
    mask_width: int,
    is_subm: bool,
    timer: Any = None,
    fp32_accum: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of ``features`` and ``filters``; of the rest, ``pair_fwd`` is read."""

    def forward(feats: Tensor, weight: Tensor) -> Tensor:
        return _convolve(feats, weight, map_of_table(pair_fwd, *rows), None)

    rows = features.shape[0], out_bp.shape[0]
    grad_feats, grad_weight = _gradients(forward, (features, filters), out_bp)
    return grad_feats, grad_weight


def indice_maxpool(
    features: Tensor, indice_pairs: Tensor, indice_pair_num: Tensor, num_activate_out: int
) -> Tensor:
    """Max-pool along a pair list, with spconv's floor of zero; differentiable.

    Args:
        features: Input rows ``[n_in, C]``.
        indice_pairs: Input and output rows by tap ``[2, V, N]``.
        indice_pair_num: Pairs of each tap ``[V]``.
        num_activate_out: Number of output rows.
    """
    rows = features.shape[0], int(num_activate_out)
    return _max_pool(features, map_of_pairs(indice_pairs, indice_pair_num, *rows))


def indice_maxpool_backward(
    features: Tensor,
    out_features: Tensor,
    out_bp: Tensor,
    indice_pairs: Tensor,
    indice_pair_num: Tensor,
) -> Tensor:
    """Return the gradient of ``features`` in :func:`indice_maxpool`, from outputs made again."""
    kernel_map = map_of_pairs(
        indice_pairs, indice_pair_num, features.shape[0], out_features.shape[0]
    )
    return _gradients(lambda feats: _max_pool(feats, kernel_map), (features,), out_bp)[0]


def indice_maxpool_implicit_gemm(
    features: Tensor, indice_pairs: Tensor, num_activate_out: int
) -> Tensor:
    """Max-pool along a pair table ``[V, num_activate_out]``, with a floor of zero."""
    kernel_map = map_of_table(indice_pairs, features.shape[0], int(num_activate_out))
    return _max_pool(features, kernel_map)


def indice_maxpool_implicit_gemm_backward(
    features: Tensor, out_features: Tensor, out_bp: Tensor, indice_pairs: Tensor
) -> Tensor:
    """Return the gradient of ``features``; ``indice_pairs`` is the table seen from the inputs."""
    kernel_map = map_of_table(indice_pairs, out_features.shape[0], features.shape[0]).inverse()
    return _gradients(lambda feats: _max_pool(feats, kernel_map), (features,), out_bp)[0]


def indice_avgpool_implicit_gemm(
    features: Tensor, indice_pairs: Tensor, num_activate_out: int, calc_count: bool
) -> tuple[Tensor, Tensor]:
    """Average along a pair table ``[V, num_activate_out]``.

    Returns:
        The means of the inputs that are present, and their numbers: int32 ``[num_activate_out]``,
        or an empty tensor without ``calc_count``.
    """
    kernel_map = map_of_table(indice_pairs, features.shape[0], int(num_activate_out))
    count = torch.Tensor()
    if calc_count:
        count = (indice_pairs >= 0).sum(0, dtype=torch.int32)
    return ops.sparse_pool(features, kernel_map, mode="avg"), count


def indice_avgpool_implicit_gemm_backward(
    out_bp: Tensor, indice_pairs: Tensor, count_out: Tensor
) -> Tensor:
    """Return the gradient of ``features``; ``indice_pairs`` is the table seen from the inputs."""
    kernel_map = map_of_table(indice_pairs, out_bp.shape[0], indice_pairs.shape[1])
    shares = out_bp / count_out.clamp(min=1)[:, None].to(out_bp.dtype)
    return ops.sparse_pool(shares, kernel_map, mode="sum")


def activate(feats: Tensor, act_type: Activation, alpha: float) -> Tensor:
    """Apply an activation of ``spconv.core.Activation``; ``alpha`` is LeakyReLU's slope."""
    if act_type is Activation.None_:
        return feats
    if act_type is Activation.ReLU:
        return feats.relu()
    if act_type is Activation.Sigmoid:
        return feats.sigmoid()
    return torch.nn.functional.leaky_relu(feats, alpha)


def apply_act(x: Tensor, act_type: Activation, act_alpha: float, act_beta: float) -> Tensor:
    """Apply an activation, as ``spconv.pytorch.conv._apply_act``; ``act_beta`` has no effect."""
    return activate(x, act_type, act_alpha)


def _convolve(
    features: Tensor, filters: Tensor, kernel_map: KernelMap, bias: Tensor | None
) -> Tensor:
    if filters.ndim < 3 or filters[0, ..., 0].numel() != kernel_map.kernel_volume:
        raise SpconvError(
            f"filters must be [c_out, *k, c_in] with {kernel_map.kernel_volume} taps like the "
            f"pairs; got {list(filters.shape)}."
        )
    return ops.sparse_conv(
        features,
        filters.flatten(1, -2).permute(1, 2, 0),
        kernel_map,
        bias,
        precision="tf32" if constants.SPCONV_ALLOW_TF32 else "ieee",
    )


def _max_pool(features: Tensor, kernel_map: KernelMap) -> Tensor:
    return ops.sparse_pool(features, kernel_map, mode="max", ties="all", floor=0.0)


def _gradients(
    function: Callable[..., Tensor], inputs: tuple[Tensor, ...], out_bp: Tensor
) -> tuple[Tensor, ...]:
    with torch.enable_grad():
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        return torch.autograd.grad(function(*leaves), leaves, out_bp)
