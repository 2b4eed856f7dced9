"""Layers as ``torch.compile`` traces them: calls of registered operators.

Call these functions only where :func:`tritonspconv.graph_capture.is_traced` is true. Where eager
mode makes one launch of a convolution and the norm and the ReLU behind it, a graph holds one
operator, which makes the same launch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tritonspconv.coords import ActiveSites
from tritonspconv.geometry import ConvGeometry
from tritonspconv.kernels.channel_norm import ChannelNorm
from tritonspconv.nn.chain import normalise, takes_norm
from tritonspconv.nn.fusable import Norm
from tritonspconv.ops.conv import Precision, WeightLayout, call_fused, compute_dtype


def run_operator(
    name: str,
    operands: tuple[Any, ...],
    norm: Norm | None,
    relu: bool,
    residual: Tensor | None = None,
) -> Tensor:
    """Convolve, normalise, add and clamp, as :func:`tritonspconv.nn.chain.convolve` does.

    Args:
        name: Name of a registered convolution.
        operands: Its arguments; the last two are the dtype of its output and the precision.
        norm: The batch norm behind the convolution, or None.
        relu: True: a ReLU comes last.
        residual: [n_out, c_out], added before the ReLU by an operation of its own; or None.
    """
    # Fused operators have no gradient.
    if not torch.is_grad_enabled() and residual is None:
        if norm is None and relu:
            return call_fused(name, operands, None, None, True)
        if isinstance(norm, ChannelNorm) and takes_norm(norm, None, operands[-2]):
            return call_fused(name, operands, norm, None, relu)
    out = getattr(torch.ops.tritonspconv, name)(*operands)
    return normalise(out, norm, relu, residual)


def convolve_between(
    feats: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_sites: ActiveSites,
    out_sites: ActiveSites,
    geometry: ConvGeometry,
    precision: Precision,
    norm: Norm | None = None,
    relu: bool = False,
    *,
    weight_layout: WeightLayout = "VIO",
) -> Tensor:
    """Convolve along the kernel map of a geometry between two sets of sites.

    Args:
        feats: Input rows [n_in, c_in].
        weight: See :func:`tritonspconv.ops.sparse_conv`, like ``bias``, ``precision`` and
            ``weight_layout``.
        bias: [c_out], or None.
        in_sites: The sites of the input rows.
        out_sites: The sites of the output rows; the same object for a submanifold geometry.
        geometry: The relation.
        precision: Products of float32 operands.
        norm: The batch norm behind the convolution, or None.
        relu: True: a ReLU comes last.
        weight_layout: The layout of ``weight``.
    """
    n_out = feats.shape[0] if geometry.sites == "same" else out_sites.coords.shape[0]
    operands = (
        feats, weight, bias, in_sites, out_sites, geometry, n_out, weight_layout,
        compute_dtype(feats, weight), precision,
    )  # fmt: skip
    return run_operator("conv_between", operands, norm, relu)


def convolve_inverse(
    feats: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_sites: ActiveSites,
    out_sites: ActiveSites,
    kernel_size: tuple[int, ...],
    precision: Precision,
    relu: bool = False,
) -> Tensor:
    """Convolve along the map of an earlier layer read backwards.

    Args:
        feats: Input rows [n_in, c_in].
        weight: [V, c_in, c_out].
        bias: [c_out], or None.
        in_sites: The output sites of the earlier layer.
        out_sites: Its input sites.
        kernel_size: Its window.
        precision: Products of float32 operands.
        relu: True: a ReLU comes last.
    """
    operands = (
        feats, weight, bias, in_sites, out_sites, kernel_size, out_sites.coords.shape[0], "VIO",
        compute_dtype(feats, weight), precision,
    )  # fmt: skip
    return run_operator("conv_inverse", operands, None, relu)
