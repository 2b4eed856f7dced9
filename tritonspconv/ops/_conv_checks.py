"""Checks of the arguments of :func:`tritonspconv.ops.sparse_conv`, from metadata alone."""

from __future__ import annotations

import torch
from torch import Tensor

from tritonspconv.kernel_map import KernelMap
from tritonspconv.kernels.channel_norm import ChannelNorm, TrainingNorm

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def check_operands(
    feats: Tensor,
    weight: Tensor,
    kernel_map: KernelMap,
    bias: Tensor | None,
    precision: str,
) -> None:
    """Check all facts that metadata give; never waits for the device."""
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
    device = kernel_map.out_sites.device
    if (
        feats.device != device
        or weight.device != device
        or (bias is not None and bias.device != device)
    ):
        raise ValueError(
            f"sparse_conv: feats ({feats.device}), weight ({weight.device}) and the kernel map "
            f"({device}) must be on one device. Move module, features and coordinates with .to()."
        )
    if precision not in ("ieee", "tf32"):
        raise ValueError(f"sparse_conv: precision must be 'ieee' or 'tf32'; got {precision!r}.")


def check_norm(norm: ChannelNorm, weight: Tensor) -> None:
    expected, device = weight.shape[2:], weight.device
    for name, vector in zip(ChannelNorm._fields, norm[:4], strict=False):
        if vector is None:
            continue
        if vector.dtype not in _DTYPES:
            raise TypeError(
                f"sparse_conv: norm.{name} must be float16, bfloat16, float32 or float64; got "
                f"{vector.dtype}."
            )
        if vector.shape != expected or vector.device != device:
            raise _not_channels(name, vector, weight)


def check_training_norm(
    norm: TrainingNorm, weight: Tensor, kernel_map: KernelMap, dtype: torch.dtype
) -> None:
    if dtype == torch.float64 or kernel_map.n_out < 2:
        raise ValueError(
            "sparse_conv: norm by the output's own statistics takes at least two rows of float16, "
            f"bfloat16 or float32; got {kernel_map.n_out} of {dtype}. Pass norm=None and call "
            "torch.nn.functional.batch_norm on the result."
        )
    expected, device = weight.shape[2:], weight.device
    for name, vector in zip(TrainingNorm._fields, norm[:4], strict=False):
        if vector is None:
            continue
        if vector.dtype is not torch.float32 or not vector.is_contiguous():
            raise TypeError(
                f"sparse_conv: norm.{name} must be float32 and contiguous; got {vector.dtype} of "
                f"stride {vector.stride()}."
            )
        if vector.shape != expected or vector.device != device:
            raise _not_channels(name, vector, weight)
    count = norm.num_batches
    if count is not None and (
        count.dtype != torch.int64 or count.numel() != 1 or count.device != device
    ):
        raise ValueError(
            f"sparse_conv: norm.num_batches must be one int64 on {device}; got {count.dtype} "
            f"{list(count.shape)} on {count.device}."
        )


def _not_channels(name: str, vector: Tensor, weight: Tensor) -> ValueError:
    return ValueError(
        f"sparse_conv: norm.{name} must be {list(weight.shape[2:])} on {weight.device}, one number "
        f"for each output channel; got {list(vector.shape)} on {vector.device}."
    )


def check_residual(residual: Tensor, weight: Tensor, kernel_map: KernelMap) -> None:
    expected = (kernel_map.n_out, weight.shape[2])
    if residual.shape != expected or residual.device != weight.device:
        raise ValueError(
            f"sparse_conv: residual must be {list(expected)} on {weight.device}, like the output; "
            f"got {list(residual.shape)} on {residual.device}."
        )
