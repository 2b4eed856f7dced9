"""Convolution, transposed and generative convolution; ``kernel`` is [V, in, out], bias [1, out]."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from compat.minkowski._errors import BATCH_INDEX_FIRST, MinkowskiError
from compat.minkowski._keys import CoordinateMapKey
from compat.minkowski._layer_family import LAYER_FAMILY
from compat.minkowski._names import module_getattr
from compat.minkowski._traced import trace_convolution
from compat.minkowski.enums import ConvolutionMode, RegionType
from compat.minkowski.MinkowskiCommon import (
    MinkowskiModuleBase,
    StrideType,
    renamed_arguments,
)
from compat.minkowski.MinkowskiCoordinateManager import CoordinateManager, given_manager
from compat.minkowski.MinkowskiKernelGenerator import KernelGenerator, check_taps
from compat.minkowski.MinkowskiSparseTensor import (
    Coordinates,
    SparseTensor,
    _get_coordinate_map_key,
)
from tritonspconv import ops
from tritonspconv.graph_capture import is_traced, run_untraced
from tritonspconv.guide import more
from tritonspconv.nn.chain import convolve, normalise
from tritonspconv.nn.fusable import LayerFamily, Norm


class MinkowskiConvolutionBase(MinkowskiModuleBase):
    """The parameters and the call of all convolutions; see :class:`MinkowskiConvolution`."""

    bias: nn.Parameter | None
    # Set by tritonspconv.fuse: the layer clamps its output at zero.
    _relu = False

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: StrideType = -1,
        stride: StrideType = 1,
        dilation: StrideType = 1,
        bias: bool = False,
        kernel_generator: KernelGenerator | None = None,
        is_transpose: bool = False,
        expand_coordinates: bool = False,
        convolution_mode: ConvolutionMode = ConvolutionMode.DEFAULT,
        dimension: int | None = -1,
    ) -> None:
        super().__init__()
        if dimension is None or dimension < 1:
            raise MinkowskiError(
                f"{type(self).__name__}: dimension, the number of spatial axes, must be given; got "
                f"{dimension}."
            )
        if kernel_generator is None:
            kernel_generator = KernelGenerator(
                kernel_size=kernel_size,
                stride=stride,
                dilation=dilation,
                expand_coordinates=expand_coordinates,
                dimension=dimension,
            )
        else:
            kernel_generator.expand_coordinates = expand_coordinates
        self.is_transpose = is_transpose
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_generator = kernel_generator
        self.dimension = dimension
        self.convolution_mode = convolution_mode
        volume = kernel_generator.kernel_volume
        check_taps(volume, kernel_generator.kernel_size)
        self.use_mm = (
            volume == 1
            and kernel_generator.requires_strided_coordinates
            and kernel_generator.region_type != RegionType.CUSTOM
        )
        shape = (in_channels, out_channels) if self.use_mm else (volume, in_channels, out_channels)
        self.kernel = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.empty(1, out_channels)) if bias else None
        self.conv = self._own_function = _function(is_transpose)()
        self.reset_parameters(is_transpose)

    def reset_parameters(self, is_transpose: bool = False) -> None:
        """Draw kernel and bias uniformly from ``+-1 / sqrt(channels * kernel volume)``.

        ``channels`` counts the output channels of a transposed layer, and else the input channels.
        """
        channels = self.out_channels if is_transpose else self.in_channels
        bound = 1 / math.sqrt(max(channels * self.kernel_generator.kernel_volume, 1))
        nn.init.uniform_(self.kernel, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, input: SparseTensor, coordinates: Coordinates | None = None) -> SparseTensor:
        """Convolve.

        Args:
            input: Features [N, in_channels].
            coordinates: The sites of the outputs: a tensor, a key, or integer coordinates
                [M, 1 + D], which get the tensor stride of this layer's output. None: the rule of
                the layer makes the sites. A layer with ``use_mm`` works row by row and ignores
                them.

        Returns:
            [M, out_channels]; a row without inputs is the bias.

        Raises:
            MinkowskiError: The input is no sparse tensor of this layer's dimension and channels.
        """
        if is_traced():
            out = None
            if coordinates is None:
                out = trace_convolution(self, input, SparseTensor)
            return run_untraced(self.forward, input, coordinates) if out is None else out
        return self._run(input, coordinates)

    def _run(
        self,
        input: SparseTensor,
        coordinates: Coordinates | None,
        norm: Norm | None = None,
        relu: bool = False,
        residual: Tensor | None = None,
    ) -> SparseTensor:
        """Convolve, normalise, add, clamp."""
        self._check(input)
        relu = relu or self._relu
        if self.use_mm:
            features = normalise(self._multiply(input.F), norm, relu, residual)
            return SparseTensor._on(features, input.coordinate_map_key, input._manager)
        generator, manager = self.kernel_generator, input._manager
        in_key = input.coordinate_map_key
        if self.conv is not self._own_function:
            out_key = _get_coordinate_map_key(input, coordinates, self._out_stride(input))
            features = self.conv.apply(
                input.F, self.kernel, generator, self.convolution_mode, in_key, out_key, manager
            )
            features = features if self.bias is None else features + self.bias
            features = normalise(features, norm, relu, residual)
            return SparseTensor._on(features, out_key, manager)
        if coordinates is None:
            out_key = manager._convolution_key(in_key, generator, self.is_transpose)
        else:
            out_key = _get_coordinate_map_key(input, coordinates, self._out_stride(input))
        kernel_map = manager._kernel_map(in_key, out_key, generator._window, self.is_transpose)
        bias = None if self.bias is None else self.bias.view(-1)
        features = convolve(
            input.F, self.kernel, kernel_map, bias, "ieee", norm, relu, residual=residual
        )
        return SparseTensor._on(features, out_key, manager)

    def layer_family(self) -> LayerFamily:
        """Return the layers that this convolution may be fused with."""
        return LAYER_FAMILY

    def forward_fused(
        self, input: SparseTensor, norm: Norm | None, relu: bool, residual: Tensor | None = None
    ) -> SparseTensor:
        """Convolve, normalise, add ``residual`` [M, out_channels] and clamp, in that order."""
        return self._run(input, None, norm, relu, residual)

    def residual_of(self, input: SparseTensor, other: Any) -> Tensor | None:
        """Return the features of ``other`` if it has the coordinates of the output.

        Layers that keep the coordinates of ``input`` know the coordinates of the output beforehand.
        """
        if type(other) is not SparseTensor or other._manager is not input._manager:
            return None
        generator = self.kernel_generator
        keeps = self.use_mm or not (
            self.is_transpose or generator.expand_coordinates or max(generator.kernel_stride) > 1
        )
        same = keeps and other.coordinate_map_key == input.coordinate_map_key
        return other.F if same else None

    @property
    def is_linear(self) -> bool:
        """True unless :meth:`fold_relu` was called, or users replaced the function ``conv``."""
        return not self._relu and (self.use_mm or self.conv is self._own_function)

    def fold_scale_shift(self, scale: Tensor, shift: Tensor) -> None:
        """Make the output ``scale * output + shift``; see :func:`tritonspconv.fuse`."""
        kernel = self.kernel.detach()
        bias = 0 if self.bias is None else self.bias.detach().view(-1) * scale
        self.kernel = nn.Parameter((kernel * scale).to(kernel.dtype))
        self.bias = nn.Parameter((bias + shift).to(kernel.dtype).view(1, -1))

    def fold_relu(self) -> None:
        """Make the output ``relu(output)``; see :func:`tritonspconv.fuse`."""
        self._relu = True

    def _check(self, input: SparseTensor) -> None:
        name = type(self).__name__
        if not isinstance(input, SparseTensor):
            raise MinkowskiError(
                f"{name} takes a SparseTensor; got {type(input).__name__}." + more("sparse-input")
            )
        if self.dimension != input._D:
            raise MinkowskiError(
                f"{name} has dimension={self.dimension}; got a tensor with D={input._D}. "
                f"{BATCH_INDEX_FIRST}"
            )
        if input.F.shape[1] != self.in_channels:
            raise MinkowskiError(
                f"{name} has in_channels={self.in_channels}; got features {list(input.shape)}."
            )

    def _multiply(self, features: Tensor) -> Tensor:
        """Convolve row by row."""
        kernel, bias = self.kernel, self.bias
        if torch.is_autocast_enabled(features.device.type):
            bias = None if bias is None else bias.view(-1)
            return ops.pointwise_conv(features, kernel, bias)
        if features.dtype != kernel.dtype:
            dtype = torch.promote_types(features.dtype, kernel.dtype)
            features, kernel = features.to(dtype), kernel.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        return features.mm(kernel) if bias is None else torch.addmm(bias, features, kernel)

    def _out_stride(self, input: SparseTensor) -> list[int]:
        axes = zip(input.tensor_stride, self.kernel_generator.kernel_stride, strict=True)
        return [ts // step if self.is_transpose else ts * step for ts, step in axes]

    def __repr__(self) -> str:
        generator = self.kernel_generator
        if generator.region_type == RegionType.CUSTOM:
            window = f"region_type={generator.region_type!s}, kernel_volume="
            window += f"{generator.kernel_volume}"
        else:
            window = f"kernel_size={generator.kernel_size}"
        return (
            f"{type(self).__name__}(in={self.in_channels}, out={self.out_channels}, {window}, "
            f"stride={generator.kernel_stride}, dilation={generator.kernel_dilation}"
            f"{', relu=True' if self._relu else ''})"
        )


@renamed_arguments(has_bias="bias")
class MinkowskiConvolution(MinkowskiConvolutionBase):
    """Convolution: ``out[u] = sum over taps of kernel[tap]^T in[u + offset]``.

    ``offset`` is ``dilation * tensor_stride * tap``: odd windows are centred, even ones begin at
    the output's own coordinate, and the first axis runs fastest in the kernel.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Extent of the window; int or one per axis.
        stride: Step of the window; int or one per axis. Outputs are the occupied cells of
            ``stride`` times the input's tensor stride.
        dilation: Step between taps; int or one per axis.
        bias: True: the layer learns a bias.
        kernel_generator: Window, stride and dilation in place of the three arguments.
        expand_coordinates: Outputs at every ``u + offset`` on the output's stride.
        convolution_mode: Kept as a label.
        dimension: Number of spatial axes D; required.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: StrideType = -1,
        stride: StrideType = 1,
        dilation: StrideType = 1,
        bias: bool = False,
        kernel_generator: KernelGenerator | None = None,
        expand_coordinates: bool = False,
        convolution_mode: ConvolutionMode = ConvolutionMode.DEFAULT,
        dimension: int | None = None,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            dilation,
            bias,
            kernel_generator,
            is_transpose=False,
            expand_coordinates=expand_coordinates,
            convolution_mode=convolution_mode,
            dimension=dimension,
        )


@renamed_arguments(has_bias="bias", generate_new_coords="expand_coordinates")
class MinkowskiConvolutionTranspose(MinkowskiConvolutionBase):
    """Transposed convolution: every input adds ``kernel[tap]^T in[u]`` at ``u + offset``.

    Outputs have the tensor stride ``tensor_stride / stride``. If the manager has a map of that
    stride with the empty id, the outputs are its sites. Otherwise they are all sites that an input
    reaches.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Extent of the window; int or one per axis.
        stride: Factor of upsampling; int or one per axis.
        dilation: Step between taps; int or one per axis.
        bias: True: the layer learns a bias.
        kernel_generator: Window, stride and dilation in place of the three arguments.
        expand_coordinates: Outputs at all sites that an input reaches, on a map of their own.
        convolution_mode: Kept as a label.
        dimension: Number of spatial axes D; required.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: StrideType = -1,
        stride: StrideType = 1,
        dilation: StrideType = 1,
        bias: bool = False,
        kernel_generator: KernelGenerator | None = None,
        expand_coordinates: bool = False,
        convolution_mode: ConvolutionMode = ConvolutionMode.DEFAULT,
        dimension: int | None = None,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            dilation,
            bias,
            kernel_generator,
            is_transpose=True,
            expand_coordinates=expand_coordinates,
            convolution_mode=convolution_mode,
            dimension=dimension,
        )


@renamed_arguments(has_bias="bias")
class MinkowskiGenerativeConvolutionTranspose(MinkowskiConvolutionBase):
    """Transposed convolution to all sites that an input reaches, on a map of their own.

    The arguments are the same as for :class:`MinkowskiConvolutionTranspose`, without
    ``expand_coordinates``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: StrideType = -1,
        stride: StrideType = 1,
        dilation: StrideType = 1,
        bias: bool = False,
        kernel_generator: KernelGenerator | None = None,
        convolution_mode: ConvolutionMode = ConvolutionMode.DEFAULT,
        dimension: int | None = None,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            dilation,
            bias,
            kernel_generator,
            is_transpose=True,
            expand_coordinates=True,
            convolution_mode=convolution_mode,
            dimension=dimension,
        )


class MinkowskiConvolutionFunction:
    """Convolution of features, called as the original's autograd function is."""

    # Without instance attributes, a patched ``apply`` is an error, not ignored.
    __slots__ = ()

    _is_transpose = False

    @classmethod
    def apply(
        cls,
        input_features: Tensor,
        kernel_weights: Tensor,
        kernel_generator: KernelGenerator,
        convolution_mode: ConvolutionMode,
        in_coordinate_map_key: CoordinateMapKey,
        out_coordinate_map_key: CoordinateMapKey | None = None,
        coordinate_manager: CoordinateManager | None = None,
    ) -> Tensor:
        """Convolve; an output key that is not set becomes the layer's.

        Raises:
            MinkowskiError: There is no coordinate manager.
        """
        manager = given_manager(cls.__name__, coordinate_manager)
        if out_coordinate_map_key is None or not out_coordinate_map_key.is_key_set():
            key = manager._convolution_key(
                in_coordinate_map_key, kernel_generator, cls._is_transpose
            )
            out_coordinate_map_key = key.given_to(out_coordinate_map_key)
        kernel_map = manager._kernel_map(
            in_coordinate_map_key,
            out_coordinate_map_key,
            kernel_generator._window,
            cls._is_transpose,
        )
        return ops.sparse_conv(input_features, kernel_weights, kernel_map)


class MinkowskiConvolutionTransposeFunction(MinkowskiConvolutionFunction):
    """Transposed convolution of features, called as the original's autograd function is."""

    # Without instance attributes, a patched ``apply`` is an error, not ignored.
    __slots__ = ()

    _is_transpose = True


def _function(is_transpose: bool) -> type[MinkowskiConvolutionFunction]:
    return MinkowskiConvolutionTransposeFunction if is_transpose else MinkowskiConvolutionFunction


__getattr__ = module_getattr(__name__)
