"""Channelwise convolution; ``kernel`` is [V, C], bias [1, C]."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from compat.minkowski._errors import MinkowskiError
from compat.minkowski._names import module_getattr
from compat.minkowski.enums import RegionType
from compat.minkowski.MinkowskiCommon import MinkowskiModuleBase, StrideType, renamed_arguments
from compat.minkowski.MinkowskiKernelGenerator import KernelGenerator, check_taps
from compat.minkowski.MinkowskiSparseTensor import SparseTensor
from tritonspconv import ops
from tritonspconv.guide import more


@renamed_arguments(has_bias="bias")
class MinkowskiChannelwiseConvolution(MinkowskiModuleBase):
    """Convolution channel by channel: ``out[u] = sum over taps of kernel[tap] * in[u + offset]``.

    Args:
        in_channels: Channels of input and output.
        kernel_size: Extent of the window; int or one per axis.
        stride: Step of the window; int or one per axis.
        dilation: Step between taps; int or one per axis.
        bias: True: the layer learns a bias.
        kernel_generator: Window, stride and dilation in place of the three arguments.
        dimension: Number of spatial axes D; required.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_channels: int,
        kernel_size: StrideType = -1,
        stride: StrideType = 1,
        dilation: StrideType = 1,
        bias: bool = False,
        kernel_generator: KernelGenerator | None = None,
        dimension: int = -1,
    ) -> None:
        super().__init__()
        if dimension < 1:
            raise MinkowskiError(
                f"MinkowskiChannelwiseConvolution: dimension must be given; got {dimension}."
            )
        if kernel_generator is None:
            kernel_generator = KernelGenerator(kernel_size, stride, dilation, dimension=dimension)
        self.kernel_generator = kernel_generator
        self.in_channels = in_channels
        self.dimension = dimension
        check_taps(kernel_generator.kernel_volume, kernel_generator.kernel_size)
        self.kernel_shape = (kernel_generator.kernel_volume, in_channels)
        self.kernel = nn.Parameter(torch.empty(self.kernel_shape))
        self.bias = nn.Parameter(torch.empty(1, in_channels)) if bias else None
        self.reset_parameters()

    def reset_parameters(self, is_transpose: bool = False) -> None:
        """Draw kernel and bias uniformly from ``+-1 / sqrt(channels * kernel volume)``."""
        bound = 1 / math.sqrt(max(self.in_channels * self.kernel_generator.kernel_volume, 1))
        nn.init.uniform_(self.kernel, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, input: SparseTensor, coords: Any = None) -> SparseTensor:
        """Convolve; ``coords`` is not read, as in the original."""
        if not isinstance(input, SparseTensor):
            raise MinkowskiError(
                f"{type(self).__name__} takes a SparseTensor; got {type(input).__name__}."
                + more("sparse-input")
            )
        if self.dimension != input.D or input.shape[1] != self.in_channels:
            raise MinkowskiError(
                f"{type(self).__name__} has dimension={self.dimension} and in_channels="
                f"{self.in_channels}; got D={input.D} and features {list(input.shape)}."
            )
        manager, generator = input.coordinate_manager, self.kernel_generator
        in_key = input.coordinate_map_key
        out_key = manager._strided_key(in_key, generator._stride)
        kernel_map = manager._kernel_map(in_key, out_key, generator._window)
        bias = None if self.bias is None else self.bias.view(-1)
        features = ops.sparse_channelwise_conv(input.F, self.kernel, kernel_map, bias)
        return SparseTensor._on(features, out_key, manager)

    def __repr__(self) -> str:
        generator = self.kernel_generator
        custom = generator.region_type == RegionType.CUSTOM
        window = f"kernel_size={generator.kernel_size}"
        if custom:
            window = f"kernel_volume={generator.kernel_volume}"
        return (
            f"{type(self).__name__}(in={self.in_channels}, region_type={generator.region_type!s}, "
            f"{window}, stride={generator.kernel_stride}, dilation={generator.kernel_dilation})"
        )


__getattr__ = module_getattr(__name__)
