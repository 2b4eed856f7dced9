"""Containers run batch norm and ReLU together with the convolution before them.

Three modules ``conv, norm, relu`` make three passes over the features and three times the work of
the host. Containers run the three as one. While gradients are off, that is one launch: the
convolution normalises and clamps its sums before it rounds them. In training, where a norm needs
all sums first, it is one node of the autograd graph. :mod:`tritonspconv.nn.fusable` decides which
modules may be run so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tritonspconv.kernel_map import KernelMap
from tritonspconv.kernels import acc_dtype
from tritonspconv.kernels.batch_norm import fuses_training
from tritonspconv.kernels.channel_norm import TrainingNorm
from tritonspconv.kernels.gather_gemm import fuses_epilogue
from tritonspconv.nn.fusable import LayerFamily, Norm, norm_numbers
from tritonspconv.ops.batch_norm import takes_training_norm, train_norm
from tritonspconv.ops.conv import Precision, WeightLayout, compute_dtype, sparse_conv

if TYPE_CHECKING:
    from jaxtyping import Float


def fuses_on(device: torch.device) -> bool:
    """Return whether containers fuse on ``device``: on a GPU with Triton, on a CPU with numba."""
    return fuses_epilogue(device)


def trains_on(device: torch.device) -> bool:
    """Return whether a norm in training is fused on ``device``: on a GPU with Triton.

    On a CPU torch's own batch norm of training is faster.
    """
    return fuses_training(device)


def run_chain(
    family: LayerFamily,
    modules: Sequence[nn.Module],
    value: Any,
    apply: Callable[[nn.Module, Any], Any],
    *,
    traced: bool = False,
) -> Any:
    """Run modules in order, each convolution together with the norm and the ReLU behind it.

    A norm in training that follows no convolution runs together with the ReLU behind it.

    Nothing is remembered between calls: modules may be replaced, switched to training or hooked at
    any time.

    Args:
        family: The layers that may be fused.
        modules: The container's children.
        value: The input of the first module.
        apply: The function by which the container runs a single module.
        traced: True while ``torch.compile`` traces the call: convolutions become operators.
    """
    place, end = 0, len(modules)
    name = family.feature_name  # torch.compile does not trace the attrgetter of the family.
    while place < end:
        module = modules[place]
        place += 1
        if isinstance(value, family.tensor) and fuses_on((feats := getattr(value, name)).device):
            conv = family.conv(module) if place < end else None
            if conv is not None:
                follower = family.batch_norm(modules[place])
                norm = None if follower is None else norm_numbers(follower, conv.out_channels)
                if isinstance(norm, TrainingNorm) and (traced or not trains_on(feats.device)):
                    norm = None
                behind = place + (norm is not None)
                relu = behind < end and family.is_relu(modules[behind])
                # While gradients are on, fusing a ReLU without a norm saves nothing.
                if norm is not None or (relu and not torch.is_grad_enabled()):
                    run = conv.trace_fused if traced else conv.forward_fused
                    value = run(value, norm, relu)
                    place = behind + relu
                    continue
            elif traced:
                found = family.batch_norm(module)
                relu = place < end and family.is_relu(modules[place])
                out = None if found is None else trace_training_norm(found, feats, relu)
                if out is not None:
                    value = family.with_features(value, out)
                    place += relu
                    continue
            elif (norm := _training_norm(family, module, feats)) is not None:
                relu = place < end and family.is_relu(modules[place])
                value = family.with_features(value, train_norm(feats, norm, relu=relu))
                place += relu
                continue
        value = apply(module, value)
    return value


def _training_norm(family: LayerFamily, module: nn.Module, feats: Tensor) -> TrainingNorm | None:
    """Return a batch norm in training that :func:`train_norm` can run on ``feats``, or None."""
    found = family.batch_norm(module)
    if (
        found is None
        or not found.training
        or not trains_on(feats.device)
        or not takes_training_norm(feats, None)
    ):
        return None
    # Torch's batch norm keeps the dtype of the features, also under autocast.
    norm = norm_numbers(found, feats.shape[1])
    return norm if isinstance(norm, TrainingNorm) else None


def trace_training_norm(
    norm: nn.BatchNorm1d | nn.SyncBatchNorm, feats: Tensor, relu: bool = False
) -> Tensor | None:
    """Return what a batch norm in training, and a ReLU, make of ``feats`` [N, C], by one operator.

    Call this function only where ``torch.compile`` traces. The result is None in evaluation, and
    where torch needs Python, as for a cumulative average or for several processes.
    """
    if (
        not norm.training
        or norm.momentum is None
        or isinstance(norm, nn.SyncBatchNorm)
        or type(feats) is not Tensor
        or feats.ndim != 2
        or feats.shape[1] != norm.num_features
    ):
        return None
    mean = variance = count = None
    if norm.track_running_stats:
        mean, variance, count = norm.running_mean, norm.running_var, norm.num_batches_tracked
    return torch.ops.tritonspconv.batch_norm(
        feats, norm.weight, norm.bias, mean, variance, count, norm.momentum, norm.eps, relu
    )


def convolve(
    feats: Float[Tensor, "n_in c_in"],
    weight: Float[Tensor, "..."],
    kernel_map: KernelMap,
    bias: Float[Tensor, "c_out"] | None,
    precision: Precision,
    norm: Norm | None,
    relu: bool,
    *,
    weight_layout: WeightLayout = "VIO",
    residual: Float[Tensor, "n_out c_out"] | None = None,
) -> Float[Tensor, "n_out c_out"]:
    """Convolve, normalise, add a residual and clamp, in one call where torch gives the same result.

    Torch's batch norm refuses some dtypes of features and parameters, and in training a single row.
    Torch's addition broadcasts and promotes dtypes. In these cases torch runs the layer in question
    and those behind it, so that results, dtypes and errors are torch's.

    Args:
        feats: Input rows [n_in, c_in].
        weight: See :func:`sparse_conv`, like ``kernel_map``, ``bias``, ``precision`` and
            ``weight_layout``.
        kernel_map: The pairs of input and output rows of each tap.
        bias: [c_out], or None.
        precision: Products of float32 operands.
        norm: The batch norm behind the convolution, or None.
        relu: True: a ReLU comes last.
        weight_layout: The layout of ``weight``.
        residual: Added after the norm, before the ReLU; None: nothing.
    """
    if norm is None and residual is None:
        return sparse_conv(
            feats, weight, kernel_map, bias, weight_layout=weight_layout, precision=precision,
            relu=relu,
        )  # fmt: skip
    dtype = compute_dtype(feats, weight)
    norm_apart = norm is not None and not takes_norm(norm, kernel_map, dtype)
    add_apart = residual is not None and (
        norm_apart
        or residual.dtype != dtype
        or residual.shape != (kernel_map.n_out, weight.shape[0 if weight_layout == "OVI" else 2])
    )
    ends = not (norm_apart or add_apart)
    out = sparse_conv(
        feats, weight, kernel_map, bias, weight_layout=weight_layout, precision=precision,
        norm=None if norm_apart else norm, residual=None if add_apart else residual,
        relu=relu and ends,
    )  # fmt: skip
    if ends:
        return out
    return normalise(out, norm if norm_apart else None, relu, residual if add_apart else None)


def normalise(
    feats: Float[Tensor, "N C"],
    norm: Norm | None,
    relu: bool,
    residual: Float[Tensor, "..."] | None = None,
) -> Float[Tensor, "..."]:
    """Return torch's batch norm, addition and ReLU of ``feats`` [N, C], in that order.

    On a GPU with Triton a norm in training, the addition and the ReLU are one node of the autograd
    graph.
    """
    if isinstance(norm, TrainingNorm):
        if trains_on(feats.device) and takes_training_norm(feats, residual):
            return train_norm(feats, norm, residual=residual, relu=relu)
        mean, variance, weight, bias, count, momentum, eps = norm
        if count is not None:
            count.add_(1)
        feats = F.batch_norm(feats, mean, variance, weight, bias, True, momentum, eps)
    elif norm is not None:
        mean, variance, weight, bias, eps = norm
        feats = F.batch_norm(feats, mean, variance, weight, bias, eps=eps)
    if residual is not None:
        feats = feats + residual
    return feats.relu() if relu else feats


def takes_norm(norm: Norm, kernel_map: KernelMap | None, dtype: torch.dtype) -> bool:
    """Return whether torch's batch norm takes the output of a convolution, on every device.

    Args:
        norm: The batch norm.
        kernel_map: The map of the convolution; a :class:`ChannelNorm` needs none.
        dtype: The dtype of the output.
    """
    if isinstance(norm, TrainingNorm):
        return kernel_map is not None and kernel_map.n_out > 1 and dtype != torch.float64
    mean, variance, weight, bias, _ = norm
    held = mean.dtype
    return (
        (held == dtype or held == acc_dtype(dtype))
        and variance.dtype == held
        and (weight is None or weight.dtype == held)
        and (bias is None or bias.dtype == held)
    )
