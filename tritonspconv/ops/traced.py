"""Convolutions as ``torch.compile`` traces them: calls of registered operators.

Call these functions only where :func:`tritonspconv.graph_capture.is_traced` is true.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tritonspconv.coords import ActiveSites
from tritonspconv.geometry import ConvGeometry
from tritonspconv.ops.conv import Precision, WeightLayout, compute_dtype


def convolve_between(
    feats: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_sites: ActiveSites,
    out_sites: ActiveSites,
    geometry: ConvGeometry,
    precision: Precision,
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
        weight_layout: The layout of ``weight``.
    """
    n_out = feats.shape[0] if geometry.sites == "same" else out_sites.coords.shape[0]
    return torch.ops.tritonspconv.conv_between(
        feats, weight, bias, in_sites, out_sites, geometry, n_out, weight_layout,
        compute_dtype(feats, weight), precision,
    )  # fmt: skip


def convolve_inverse(
    feats: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_sites: ActiveSites,
    out_sites: ActiveSites,
    kernel_size: tuple[int, ...],
    precision: Precision,
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
    """
    return torch.ops.tritonspconv.conv_inverse(
        feats, weight, bias, in_sites, out_sites, kernel_size, out_sites.coords.shape[0], "VIO",
        compute_dtype(feats, weight), precision,
    )  # fmt: skip
