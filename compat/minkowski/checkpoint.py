"""Weights of MinkowskiEngine networks for spconv networks of the same layers, and back.

MinkowskiEngine's own checkpoints load without conversion. This module converts between the two
libraries where a layer of each computes the same:

===============================================  ===============================================
MinkowskiEngine                                  spconv, 2.2 and later
===============================================  ===============================================
convolution, odd window, stride 1                ``SubMConv``, same window and dilation
convolution, even window equal to its stride     ``SparseConv``, same window, padding 0
transposed convolution, the same, back           ``SparseInverseConv``, same window
convolution, window 1, stride 1                  ``SubMConv`` or ``SparseConv``, window 1
===============================================  ===============================================

Coordinates must be the same and not negative, spconv's ``spatial_shape`` a multiple of the strides.
Other layers differ in output sites or alignment, and are refused: ``compat/minkowski/QUIRKS.md``.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from compat.minkowski.enums import RegionType
from compat.minkowski.MinkowskiChannelwiseConvolution import MinkowskiChannelwiseConvolution
from compat.minkowski.MinkowskiConvolution import (
    MinkowskiConvolutionBase,
    MinkowskiGenerativeConvolutionTranspose,
)
from compat.minkowski.MinkowskiNonlinearity import MinkowskiNonlinearityBase
from compat.minkowski.MinkowskiNormalization import MinkowskiBatchNorm
from compat.minkowski.MinkowskiOps import MinkowskiLinear

__all__ = ["from_spconv", "to_spconv"]

# Layers around a torch module, and the attribute that holds it; spconv networks hold it directly.
_WRAPPERS = {
    MinkowskiBatchNorm: "bn",
    MinkowskiLinear: "linear",
    MinkowskiNonlinearityBase: "module",
}


def to_spconv(state_dict: Mapping[str, Any], model: nn.Module) -> OrderedDict[str, Any]:
    """Return a state dict for the spconv network with the layers and names of ``model``.

    ``conv.kernel`` becomes ``conv.weight``, ``norm.bn.weight`` becomes ``norm.weight``.

    Args:
        state_dict: State of the MinkowskiEngine network.
        model: That network.

    Raises:
        ValueError: No layer of spconv computes the same as a layer, or a kernel has another shape.
    """
    entries = {entry.name: entry for entry in _entries(model)}
    return OrderedDict(
        (entries[name].spconv_name, entries[name].to_spconv(value))
        if name in entries
        else (name, value)
        for name, value in state_dict.items()
    )


def from_spconv(state_dict: Mapping[str, Any], model: nn.Module) -> OrderedDict[str, Any]:
    """Return a state dict for ``model``, made from the state dict of the matching spconv network.

    Args:
        state_dict: State of the spconv network; weights ``[out, *kernel_size, in]``.
        model: The MinkowskiEngine network.

    Raises:
        ValueError: No layer of spconv computes the same as a layer, or a weight has another shape.
    """
    entries = {entry.spconv_name: entry for entry in _entries(model)}
    return OrderedDict(
        (entries[name].name, entries[name].from_spconv(value)) if name in entries else (name, value)
        for name, value in state_dict.items()
    )


class _Entry(NamedTuple):
    name: str
    spconv_name: str
    to_spconv: Callable[[Tensor], Tensor]
    from_spconv: Callable[[Tensor], Tensor]


def _entries(model: nn.Module) -> Iterator[_Entry]:
    """Yield the entries of a state dict that have another name or layout in spconv."""
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        if isinstance(module, MinkowskiConvolutionBase | MinkowskiChannelwiseConvolution):
            yield from _convolution_entries(prefix, module)
        for wrapper, attribute in _WRAPPERS.items():
            if isinstance(module, wrapper):
                for name in module.get_submodule(attribute).state_dict():
                    own = f"{prefix}{attribute}.{name}"
                    yield _Entry(own, prefix + name, _same, _same)


def _same(value: Tensor) -> Tensor:
    return value


def _convolution_entries(prefix: str, layer: nn.Module) -> Iterator[_Entry]:
    problem = _difference(layer)
    if problem is not None:
        raise ValueError(
            f"checkpoint: {prefix.removesuffix('.')} must be a layer that spconv has too; got "
            f"{layer}: {problem}"
        )
    assert isinstance(layer, MinkowskiConvolutionBase)
    own = tuple(layer.kernel.shape)
    window = tuple(layer.kernel_generator.kernel_size)
    c_in, c_out, ndim = layer.in_channels, layer.out_channels, len(window)

    def to_spconv(kernel: Tensor) -> Tensor:
        _check(f"{prefix}kernel", kernel, own)
        if layer.use_mm:
            # spconv reads the memory of a 1x1 weight as [in, out].
            return kernel.contiguous().view(c_out, *window, c_in)
        taps = kernel.view(*reversed(window), c_in, c_out)
        return taps.permute(ndim + 1, *reversed(range(ndim)), ndim).contiguous()

    def from_spconv(weight: Tensor) -> Tensor:
        _check(f"{prefix}weight", weight, (c_out, *window, c_in))
        if layer.use_mm:
            return weight.contiguous().view(own)
        taps = weight.permute(*reversed(range(1, ndim + 1)), ndim + 1, 0)
        return taps.reshape(own)

    yield _Entry(f"{prefix}kernel", f"{prefix}weight", to_spconv, from_spconv)
    if layer.bias is not None:
        yield _Entry(
            f"{prefix}bias", f"{prefix}bias", lambda bias: bias.view(-1), lambda bias: bias[None]
        )


def _check(name: str, value: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(value.shape) != shape:
        raise ValueError(
            f"checkpoint: {name} must have shape {list(shape)}; got {list(value.shape)}. Pass the "
            "network that the state dict belongs to."
        )


def _difference(layer: nn.Module) -> str | None:
    """Return why no layer of spconv computes the same; None if one does."""
    if not isinstance(layer, MinkowskiConvolutionBase):
        return "spconv has no channelwise convolution."
    generator = layer.kernel_generator
    window, stride = list(generator.kernel_size), list(generator.kernel_stride)
    if generator.region_type != RegionType.HYPER_CUBE:
        return "spconv has no windows but boxes."
    if isinstance(layer, MinkowskiGenerativeConvolutionTranspose) or generator.expand_coordinates:
        return "spconv makes other output sites."
    if max(stride) == 1 and not layer.is_transpose:
        if any(size % 2 == 0 for size in window):
            return "spconv has no submanifold convolution with an even window."
        return None
    if window != stride or any(size % 2 for size in window if size > 1):
        return "only even windows equal to the stride have the same sites and alignment in both."
    if max(generator.kernel_dilation) > 1:
        return "spconv's window would be dilated beyond its stride."
    return None
