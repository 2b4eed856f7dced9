"""Submanifold convolutions as ``torch.compile`` traces them.

The kernel map is found when the registered operator runs. So the entry that a layer records under
its ``indice_key`` has no map yet. On first access, the entry finds the map in the cache of its
sites.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from compat.spconv import constants
from compat.spconv.core import Activation, ConvAlgo
from compat.spconv.pytorch._records import record_type
from compat.spconv.pytorch._sites import IndiceDict, LocatedSites
from compat.spconv.pytorch.core import SparseConvTensor
from compat.spconv.pytorch.ops import window
from tritonspconv.coords import ActiveSites
from tritonspconv.debug import checks_coords
from tritonspconv.kernel_map import KernelMap, kernel_map
from tritonspconv.opaque_types import schema_name
from tritonspconv.ops.conv import compute_dtype
from tritonspconv.ops.registered import register_conv

if TYPE_CHECKING:
    from compat.spconv.pytorch._convolution import SparseConvolution


def trace_submanifold(
    layer: SparseConvolution, input: SparseConvTensor, add_input: SparseConvTensor | None
) -> SparseConvTensor | None:
    """Return the output of a submanifold layer; None where Python has to run the layer."""
    if not _is_plain(layer, input, add_input):
        return None
    weight, feats = layer.weight, input._features
    if feats.dtype != weight.dtype and not torch.is_autocast_enabled(feats.device.type):
        feats = feats.to(weight.dtype)
    dtype = compute_dtype(feats, weight)
    # Under autocast the operator sums the gradient of a float32 weight in float32; torch would not.
    if layer.conv1x1 and dtype == weight.dtype:
        indice_dict, matrix = input.indice_dict, weight.reshape(layer.in_channels, -1)
        bias = layer.bias
        out = feats.mm(matrix) if bias is None else torch.addmm(bias, feats, matrix)
    else:
        record = input.find_indice_pair(layer.indice_key)
        if record is None:
            located, indices = _own_sites(input), input.indices
        elif _may_reuse(layer, input, record):
            # It is not known if the indices were edited before a traced layer made the entry.
            located, indices = record.located, record.indices if record.follows_window else None
        else:
            return None
        if located is None or not located.are_distinct:
            return None
        indice_dict = IndiceDict(input.indice_dict)
        if record is None and layer.indice_key is not None:
            indice_dict[layer.indice_key] = _entry(layer, input, located)
        layout, precision = "OVI", "tf32" if constants.SPCONV_ALLOW_TF32 else "ieee"
        if layer.conv1x1:
            weight, layout = weight.reshape(1, layer.in_channels, -1), "VIO"
        out = torch.ops.tritonspconv.spconv_submanifold(
            feats, weight, layer.bias, indices, located.sites, located.version,
            layer.kernel_size, layer.dilation, feats.shape[0], layout, dtype, precision,
        )  # fmt: skip
    if add_input is not None:
        out = out + add_input._features
    out = out.relu() if layer.act_type is Activation.ReLU else out
    return input._derive(out, indice_dict)


def _is_plain(layer: SparseConvolution, input: Any, add_input: Any) -> bool:
    """Return whether nothing about the call needs Python: errors, users' methods, padded rows."""
    return (
        type(input) is SparseConvTensor
        and (add_input is None or type(add_input) is SparseConvTensor)
        and "shadow_copy" not in input.__dict__
        and layer.has_own_methods()
        and layer.act_type in (Activation.None_, Activation.ReLU)
        and type(input._features) is Tensor
        and input._features.ndim == 2
        and input._features.shape[1] == layer.in_channels
        and len(input.spatial_shape) == layer.ndim
        and all(size % 2 for size in layer.kernel_size)
    )


def _may_reuse(layer: SparseConvolution, input: SparseConvTensor, record: Any) -> bool:
    """Return whether the layer may reuse a recorded map; if not, Python raises the error."""
    return (
        record.located is not None
        and record.is_subm
        and record.algo is _algo(layer, input)
        and record.ksize == layer.kernel_size
        and record.dilation == layer.dilation
        and record.spatial_shape == input.spatial_shape
        and record.indices.shape[0] == input.indices.shape[0]
    )


def _own_sites(input: SparseConvTensor) -> LocatedSites | None:
    """Return the sites of ``input.indices`` if they were located before."""
    located = getattr(input.indice_dict, "located", None)
    if (
        located is not None
        and located.indices is input.indices
        and located.spatial_shape == tuple(input.spatial_shape)
        and located.batch_size == input.batch_size
    ):
        return located
    return None


def _entry(layer: SparseConvolution, input: SparseConvTensor, located: LocatedSites) -> Any:
    """Return the entry of the layer for ``indice_dict``."""
    algo = _algo(layer, input)
    return record_type(algo).of_map(
        None, located, located, is_subm=True, algo=algo, ksize=layer.kernel_size,
        stride=layer.stride, dilation=layer.dilation, padding=layer.padding,
    )  # fmt: skip


def _algo(layer: SparseConvolution, input: SparseConvTensor) -> ConvAlgo:
    return layer.algo if input.force_algo is None else input.force_algo


def _map_at(
    indices: Tensor | None,
    sites: ActiveSites,
    version: int | None,
    kernel_size: list[int],
    dilation: list[int],
) -> KernelMap:
    """Return the map of a submanifold window at ``sites``, or at ``indices`` if these were edited.

    Args:
        indices: The user's ``indices`` tensor of ``sites``; None: the recorded map is used
            unchecked.
        sites: The sites that the tensor had when the layer was traced.
        version: Number of writes to ``indices`` when they were located.
        kernel_size: Window.
        dilation: Its dilation.
    """
    if indices is not None and not _describes(indices, sites, version):
        sites = ActiveSites(indices.clone(memory_format=torch.contiguous_format), sites.grid)
        if sites.has_repeats():
            raise RuntimeError(
                "SubMConv: indices that were edited in place now repeat a site, which a compiled "
                "network cannot handle. Edit indices before the compiled function."
            )
    ones = [1] * len(kernel_size)
    geometry = window(kernel_size, ones, ones, dilation, ones, subm=True, transposed=False)
    assert geometry is not None
    return kernel_map(sites, geometry)


def _describes(indices: Tensor, sites: ActiveSites, version: int | None) -> bool:
    """Return whether ``indices`` is unchanged, as far as that can be known."""
    if indices is sites.coords or indices.device.type == "cpu" or checks_coords():
        return torch.equal(indices, sites.coords)
    return version is None or indices.is_inference() or indices._version == version


register_conv(
    "spconv_submanifold",
    f"Tensor? indices, {schema_name(ActiveSites)} sites, int? version, int[] kernel_size, "
    "int[] dilation",
    _map_at,
)
