"""Local and transposed pooling; global pooling is in ``_global_pooling`` and named here."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from compat.minkowski._errors import BATCH_INDEX_FIRST, MinkowskiError
from compat.minkowski._global_pooling import (
    MinkowskiDirectMaxPoolingFunction,
    MinkowskiGlobalAvgPooling,
    MinkowskiGlobalMaxPooling,
    MinkowskiGlobalPooling,
    MinkowskiGlobalPoolingFunction,
    MinkowskiGlobalSumPooling,
)
from compat.minkowski._keys import CoordinateMapKey
from compat.minkowski._names import module_getattr
from compat.minkowski.enums import PoolingMode
from compat.minkowski.MinkowskiCommon import MinkowskiModuleBase, StrideType
from compat.minkowski.MinkowskiCoordinateManager import CoordinateManager, given_manager
from compat.minkowski.MinkowskiKernelGenerator import KernelGenerator
from compat.minkowski.MinkowskiSparseTensor import (
    Coordinates,
    SparseTensor,
    _get_coordinate_map_key,
)
from tritonspconv import ops
from tritonspconv.guide import more
from tritonspconv.ops.pool import PoolMode

__all__ = [
    "MinkowskiAvgPooling",
    "MinkowskiDirectMaxPoolingFunction",
    "MinkowskiGlobalAvgPooling",
    "MinkowskiGlobalMaxPooling",
    "MinkowskiGlobalPooling",
    "MinkowskiGlobalPoolingFunction",
    "MinkowskiGlobalSumPooling",
    "MinkowskiLocalPoolingFunction",
    "MinkowskiLocalPoolingTransposeFunction",
    "MinkowskiMaxPooling",
    "MinkowskiPoolingBase",
    "MinkowskiPoolingTranspose",
    "MinkowskiSumPooling",
]


class MinkowskiPoolingBase(MinkowskiModuleBase):
    """The arguments and the call of all local pools; see :class:`MinkowskiAvgPooling`."""

    def __init__(
        self,
        kernel_size: StrideType,
        stride: StrideType = 1,
        dilation: StrideType = 1,
        kernel_generator: KernelGenerator | None = None,
        is_transpose: bool = False,
        pooling_mode: PoolingMode = PoolingMode.LOCAL_AVG_POOLING,
        dimension: int | None = -1,
    ) -> None:
        super().__init__()
        if dimension is None or dimension < 1:
            raise MinkowskiError(
                f"{type(self).__name__}: dimension, the number of spatial axes, must be given; got "
                f"{dimension}."
            )
        if kernel_generator is None:
            kernel_generator = KernelGenerator(kernel_size, stride, dilation, dimension=dimension)
        self.is_transpose = is_transpose
        self.kernel_generator = kernel_generator
        self.pooling_mode = pooling_mode
        self.dimension = dimension
        self.pooling = self._own_function = _function(is_transpose)()

    def forward(self, input: SparseTensor, coordinates: Coordinates | None = None) -> SparseTensor:
        """Pool.

        Args:
            input: Features [N, C], floating point.
            coordinates: The sites of the outputs: a tensor, a key, or integer coordinates
                [M, 1 + D], which get tensor stride 1. None: the rule of the layer makes the sites.

        Returns:
            [M, C]; a row without inputs is 0.

        Raises:
            MinkowskiError: The input is no sparse tensor of this layer's dimension.
        """
        if not isinstance(input, SparseTensor) or self.dimension != input._D:
            got = f"{type(input).__name__}." + more("sparse-input")
            if isinstance(input, SparseTensor):
                got = f"D={input.D}. {BATCH_INDEX_FIRST}"
            raise MinkowskiError(
                f"{type(self).__name__} takes a SparseTensor with D={self.dimension}; got {got}"
            )
        generator, manager = self.kernel_generator, input._manager
        in_key = input.coordinate_map_key
        if self.pooling is not self._own_function:
            out_key = _get_coordinate_map_key(input, coordinates)
            features = self.pooling.apply(
                input.F, self.pooling_mode, generator, in_key, out_key, manager
            )
            return SparseTensor._on(features, out_key, manager)
        if coordinates is not None:
            out_key = _get_coordinate_map_key(input, coordinates)
        elif self.is_transpose:
            out_key = manager._convolution_key(in_key, generator, True, _in_cells(generator))
        else:
            out_key = manager._strided_key(in_key, generator._stride)
        features = _pool(
            input.F, self.pooling_mode, generator, in_key, out_key, manager, self.is_transpose
        )
        return SparseTensor._on(features, out_key, manager)

    def __repr__(self) -> str:
        generator = self.kernel_generator
        return (
            f"{type(self).__name__}(kernel_size={generator.kernel_size}, "
            f"stride={generator.kernel_stride}, dilation={generator.kernel_dilation})"
        )


# With more fine sites in a cell than this, a table of taps is mostly empty.
_MAX_CELL_TAPS = 64

_LOCAL_MODES: dict[PoolingMode, PoolMode] = {
    PoolingMode.LOCAL_SUM_POOLING: "sum",
    PoolingMode.LOCAL_AVG_POOLING: "avg",
    PoolingMode.LOCAL_MAX_POOLING: "max",
}


def _in_cells(generator: KernelGenerator) -> bool:
    """Return whether every fine site belongs to one cell: the window is as large as the stride."""
    return generator.kernel_size == generator.kernel_stride


def _pool(
    features: Tensor,
    mode: PoolingMode,
    generator: KernelGenerator,
    in_key: CoordinateMapKey,
    out_key: CoordinateMapKey,
    manager: CoordinateManager,
    is_transpose: bool = False,
) -> Tensor:
    """Pool along the window, or over whole cells; large cells need no table of taps."""
    if _in_cells(generator) and generator.kernel_volume > _MAX_CELL_TAPS:
        if is_transpose:
            return ops.global_broadcast(features, manager._cell_rows(out_key, in_key))
        rows = manager._cell_rows(in_key, out_key)
        return ops.global_pool(features, rows, manager.size(out_key), _LOCAL_MODES[mode])
    kernel_map = manager._kernel_map(
        in_key, out_key, generator._window, is_transpose, _in_cells(generator)
    )
    return ops.sparse_pool(features, kernel_map, _LOCAL_MODES[mode])


class _LocalPooling(MinkowskiPoolingBase):
    mode: ClassVar[PoolingMode]

    def __init__(
        self,
        kernel_size: StrideType,
        stride: StrideType = 1,
        dilation: StrideType = 1,
        kernel_generator: KernelGenerator | None = None,
        dimension: int | None = None,
    ) -> None:
        super().__init__(
            kernel_size,
            stride,
            dilation,
            kernel_generator,
            is_transpose=False,
            pooling_mode=self.mode,
            dimension=dimension,
        )


class MinkowskiAvgPooling(_LocalPooling):
    """Mean over the inputs that are present in each window.

    Outputs are the occupied cells of ``stride`` times the input's tensor stride. If
    ``kernel_size == stride``, every input belongs to its own cell alone, and dilation and region
    type change nothing. Otherwise the windows lie like the windows of a convolution.

    Args:
        kernel_size: Extent of the window; int or one per axis.
        stride: Step of the window; int or one per axis.
        dilation: Step between taps; int or one per axis.
        kernel_generator: Window, stride and dilation in place of the three arguments.
        dimension: Number of spatial axes D; required.
    """

    mode = PoolingMode.LOCAL_AVG_POOLING

    def __init__(
        self,
        kernel_size: StrideType = -1,
        stride: StrideType = 1,
        dilation: StrideType = 1,
        kernel_generator: KernelGenerator | None = None,
        dimension: int | None = None,
    ) -> None:
        super().__init__(kernel_size, stride, dilation, kernel_generator, dimension)


class MinkowskiSumPooling(_LocalPooling):
    """Sum over the inputs in each window; arguments as :class:`MinkowskiAvgPooling`."""

    mode = PoolingMode.LOCAL_SUM_POOLING


class MinkowskiMaxPooling(_LocalPooling):
    """Maximum over the inputs in each window; arguments as :class:`MinkowskiAvgPooling`."""

    mode = PoolingMode.LOCAL_MAX_POOLING


class MinkowskiPoolingTranspose(MinkowskiPoolingBase):
    """Sum of the coarse features that reach each fine site; outputs as in a transposed convolution.

    Args:
        kernel_size: Extent of the window; int or one per axis.
        stride: Factor of upsampling; int or one per axis.
        dilation: Step between taps; int or one per axis.
        kernel_generator: Window, stride and dilation in place of the three arguments.
        expand_coordinates: Outputs at all sites that an input reaches, on a map of their own.
        dimension: Number of spatial axes D; required.
    """

    def __init__(
        self,
        kernel_size: StrideType,
        stride: StrideType,
        dilation: StrideType = 1,
        kernel_generator: KernelGenerator | None = None,
        expand_coordinates: bool = False,
        dimension: int | None = None,
    ) -> None:
        if kernel_generator is None and dimension is not None:
            kernel_generator = KernelGenerator(
                kernel_size,
                stride,
                dilation,
                expand_coordinates=expand_coordinates,
                dimension=dimension,
            )
        super().__init__(
            kernel_size,
            stride,
            dilation,
            kernel_generator,
            is_transpose=True,
            pooling_mode=PoolingMode.LOCAL_SUM_POOLING,
            dimension=dimension,
        )


class MinkowskiLocalPoolingFunction:
    """Local pooling of features, called as the original's autograd function is."""

    # Without instance attributes, a patched ``apply`` is an error, not ignored.
    __slots__ = ()

    @staticmethod
    def apply(
        input_features: Tensor,
        pooling_mode: PoolingMode,
        kernel_generator: KernelGenerator,
        in_coordinate_map_key: CoordinateMapKey,
        out_coordinate_map_key: CoordinateMapKey | None = None,
        coordinate_manager: CoordinateManager | None = None,
    ) -> Tensor:
        """Pool; an output key that is not set becomes the strided one.

        Raises:
            MinkowskiError: There is no coordinate manager.
        """
        manager = given_manager("MinkowskiLocalPoolingFunction", coordinate_manager)
        if out_coordinate_map_key is None or not out_coordinate_map_key.is_key_set():
            key = manager.stride(in_coordinate_map_key, kernel_generator.kernel_stride)
            out_coordinate_map_key = key.given_to(out_coordinate_map_key)
        return _pool(
            input_features,
            pooling_mode,
            kernel_generator,
            in_coordinate_map_key,
            out_coordinate_map_key,
            manager,
        )


class MinkowskiLocalPoolingTransposeFunction:
    """Transposed pooling of features, called as the original's autograd function is."""

    # Without instance attributes, a patched ``apply`` is an error, not ignored.
    __slots__ = ()

    @staticmethod
    def apply(
        input_features: Tensor,
        pooling_mode: PoolingMode,
        kernel_generator: KernelGenerator,
        in_coordinate_map_key: CoordinateMapKey,
        out_coordinate_map_key: CoordinateMapKey | None = None,
        coordinate_manager: CoordinateManager | None = None,
    ) -> Tensor:
        """Pool; an output key that is not set becomes the transposed layer's.

        Raises:
            MinkowskiError: There is no coordinate manager.
        """
        manager = given_manager("MinkowskiLocalPoolingTransposeFunction", coordinate_manager)
        if out_coordinate_map_key is None or not out_coordinate_map_key.is_key_set():
            key = manager._convolution_key(
                in_coordinate_map_key, kernel_generator, True, _in_cells(kernel_generator)
            )
            out_coordinate_map_key = key.given_to(out_coordinate_map_key)
        return _pool(
            input_features,
            PoolingMode.LOCAL_SUM_POOLING,
            kernel_generator,
            in_coordinate_map_key,
            out_coordinate_map_key,
            manager,
            is_transpose=True,
        )


_LocalFunction = type[MinkowskiLocalPoolingFunction] | type[MinkowskiLocalPoolingTransposeFunction]


def _function(is_transpose: bool) -> _LocalFunction:
    if is_transpose:
        return MinkowskiLocalPoolingTransposeFunction
    return MinkowskiLocalPoolingFunction


__getattr__ = module_getattr(__name__)
