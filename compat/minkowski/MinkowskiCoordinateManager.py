"""CoordinateManager: coordinate maps by key, and the kernel maps between them."""

from __future__ import annotations

import warnings
from typing import Any, NoReturn

import torch
from torch import Tensor

from compat.minkowski import _relations
from compat.minkowski._backend.manager import CoordinateMapManager
from compat.minkowski._errors import MinkowskiError
from compat.minkowski._field_maps import FieldMaps
from compat.minkowski._keys import CoordinateMapKey
from compat.minkowski._names import module_getattr
from compat.minkowski.enums import (
    CoordinateMapType,
    GPUMemoryAllocatorType,
    MinkowskiAlgorithm,
    RegionType,
)
from compat.minkowski.MinkowskiCommon import StrideType
from compat.minkowski.MinkowskiKernelGenerator import KernelGenerator, Window
from tritonspconv.kernel_map import KernelMap
from tritonspconv.opaque_types import register_opaque

_allocator_type = GPUMemoryAllocatorType.PYTORCH
_coordinate_map_type: CoordinateMapType | None = None


def set_coordinate_map_type(coordinate_map_type: CoordinateMapType) -> None:
    """Set the label that new managers get; maps live where their coordinates are."""
    global _coordinate_map_type
    _coordinate_map_type = coordinate_map_type


def set_gpu_allocator(backend: GPUMemoryAllocatorType) -> None:
    """Set the label that new managers get; torch allocates all memory."""
    global _allocator_type
    if not isinstance(backend, GPUMemoryAllocatorType):
        raise MinkowskiError(f"expected a GPUMemoryAllocatorType; got {backend!r}.")
    _allocator_type = backend


def set_memory_manager_backend(backend: GPUMemoryAllocatorType) -> None:
    """Call :func:`set_gpu_allocator`, the function's name since 0.5."""
    warnings.warn("set_memory_manager_backend is now set_gpu_allocator.", stacklevel=2)
    set_gpu_allocator(backend)


class CoordsManager:
    """The name of :class:`CoordinateManager` in MinkowskiEngine 0.4; raises."""

    def __init__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise DeprecationWarning("CoordsManager is MinkowskiEngine 0.4; use CoordinateManager.")


@register_opaque
class CoordinateManager(FieldMaps):
    """Coordinate maps by key, and the maps between them; shared by the tensors made from one.

    Args:
        D: Number of spatial axes.
        num_threads: Accepted; torch's setting holds.
        coordinate_map_type, allocator_type, minkowski_algorithm: Kept as labels.

    Raises:
        MinkowskiError: ``D`` is less than 1.
    """

    def __init__(
        self,
        D: int = 0,
        num_threads: int = -1,
        coordinate_map_type: CoordinateMapType | None = None,
        allocator_type: GPUMemoryAllocatorType | None = None,
        minkowski_algorithm: MinkowskiAlgorithm | None = None,
    ) -> None:
        super().__init__(D)
        self.coordinate_map_type = (
            _coordinate_map_type if coordinate_map_type is None else coordinate_map_type
        )
        self.allocator_type = _allocator_type if allocator_type is None else allocator_type
        self.minkowski_algorithm = minkowski_algorithm or MinkowskiAlgorithm.DEFAULT
        self._kernel_maps: dict[Any, KernelMap] = {}

    @property
    def _manager(self) -> CoordinateMapManager:
        """This manager by the names and signatures of the original's compiled one."""
        return CoordinateMapManager(self)

    _CoordinateManagerClass = CoordinateMapManager

    def _convolution_key(
        self,
        in_key: CoordinateMapKey,
        generator: KernelGenerator,
        is_transpose: bool,
        in_cells: bool = False,
    ) -> CoordinateMapKey:
        """Return the output key of a convolution; make the output sites if there are none yet."""
        if not is_transpose and not generator.expand_coordinates:
            return self._strided_key(in_key, generator._stride)
        tensor_stride, _ = in_key.value
        axes = list(zip(tensor_stride, generator.kernel_stride, strict=True))
        if not is_transpose:
            coarser = tuple(ts * step for ts, step in axes)
            made = _relations.expanded_sites(self._map(in_key), coarser, generator._window)
            return self._add(made, "")
        finer = tuple(ts // step for ts, step in axes)
        if any(ts % step or not ts for ts, step in axes):
            raise MinkowskiError(
                f"a transposed layer needs a tensor stride that its stride divides; got tensor "
                f"stride {list(tensor_stride)} and stride {generator.kernel_stride}."
            )
        if not generator.expand_coordinates and (finer, "") in self._maps:
            return CoordinateMapKey.of((finer, ""))
        window = generator._window.cells() if in_cells else generator._window
        made = _relations.generated_sites(self._map(in_key), finer, window)
        return self._add(made, "")

    def _kernel_map(
        self,
        in_key: CoordinateMapKey,
        out_key: CoordinateMapKey,
        window: Window,
        is_transpose: bool = False,
        in_cells: bool = False,
    ) -> KernelMap:
        """Return the kernel map of a window, or of the cells of the coarser side."""
        values = (in_key.value, out_key.value)
        cache_key = (*values, window, is_transpose, in_cells)
        found = self._kernel_maps.get(cache_key)
        if found is not None:
            return found
        ends = self._map(in_key), self._map(out_key)
        if not is_transpose:
            found = (
                _relations.cell_map_between(*ends)
                if in_cells
                else _relations.map_between(*ends, window)
            )
        else:
            downwards = self._kernel_maps.get((*values[::-1], window, False, in_cells))
            if downwards is not None:
                found = downwards.inverse()
            elif in_cells:
                found = _relations.cell_map_between(*ends[::-1]).inverse()
            else:
                found = _relations.transposed_map_between(*ends, window)
        self._kernel_maps[cache_key] = found
        return found

    def kernel_map(
        self,
        in_key: Any,
        out_key: Any,
        stride: StrideType = 1,
        kernel_size: StrideType = 3,
        dilation: StrideType = 1,
        region_type: RegionType | int = RegionType.HYPER_CUBE,
        region_offset: Tensor | None = None,
        is_transpose: bool = False,
        is_pool: bool = False,
    ) -> dict[int, Tensor]:
        """Return int32 [2, n] of (input rows, output rows) by tap; taps without pairs are absent.

        Args:
            in_key: Key of the input, or its tensor stride.
            out_key: Key of the output, or its tensor stride.
            stride: With ``is_pool``, a stride equal to the kernel size means cells: one entry, 0,
                in the order of the rows of the finer side.
            kernel_size: Extent of the window; int or one per axis.
            dilation: Step between taps; int or one per axis.
            region_type: Shape of the window, or its integer.
            region_offset: Taps of a CUSTOM region.
            is_transpose: True: the output is the finer side.
            is_pool: True: the map belongs to a pool.

        This call waits for the device.
        """
        try:
            region_type = RegionType(region_type)
        except ValueError as error:
            raise MinkowskiError(
                f"kernel_map: region_type must be a RegionType or its integer; got {region_type!r}."
            ) from error
        generator = KernelGenerator(
            kernel_size, stride, dilation, False, region_type, region_offset, dimension=self.D
        )
        keys = self._get_coordinate_map_key(in_key), self._get_coordinate_map_key(out_key)
        if is_pool and generator.kernel_size == generator.kernel_stride:
            fine, cells = self.stride_map(*(keys[::-1] if is_transpose else keys))
            pairs = torch.stack([cells, fine] if is_transpose else [fine, cells]).int()
            return {0: pairs} if pairs.shape[1] else {}
        found = self._kernel_map(*keys, generator._window, is_transpose)
        in_rows, out_rows, tap_ptr = found.pairs()
        pairs = torch.stack([in_rows.int(), out_rows.int()])
        by_tap = enumerate(pairs.split(tap_ptr.diff().tolist(), dim=1))
        return {tap: part.contiguous() for tap, part in by_tap if part.shape[1]}

    def get_kernel_map(self, *args: Any, **kwargs: Any) -> dict[int, Tensor]:
        """Call :meth:`kernel_map`, the method's name since 0.5."""
        warnings.warn("get_kernel_map is now kernel_map.", stacklevel=2)
        return self.kernel_map(*args, **kwargs)


def given_manager(function: str, manager: CoordinateManager | None) -> CoordinateManager:
    """Return a manager that the signature of a ``*Function`` lets callers leave out.

    Raises:
        MinkowskiError: It was left out.
    """
    if not isinstance(manager, CoordinateManager):
        raise MinkowskiError(
            f"{function}.apply: coordinate_manager must be a CoordinateManager; got {manager!r}. "
            "Pass the coordinate_manager of the input tensor."
        )
    return manager


__getattr__ = module_getattr(__name__)
