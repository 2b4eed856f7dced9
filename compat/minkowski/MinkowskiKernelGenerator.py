"""KernelGenerator: window, stride and region of a layer."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compat.minkowski._errors import MinkowskiError
from compat.minkowski._names import module_getattr
from compat.minkowski.enums import RegionType
from compat.minkowski.MinkowskiCommon import StrideType, convert_to_int_list
from tritonspconv.geometry import MAX_TAPS

IntTuple = tuple[int, ...]

# This limit catches mistakes: the time to make a layer grows with the dimension.
_MAX_DIMENSION = 1024


class Window(NamedTuple):
    """The part of a kernel generator that decides a kernel map, without the stride; hashable.

    Attributes:
        kernel_size: Extent, per axis.
        dilation: Step between taps in units of the fine tensor stride, per axis.
        region_type: Shape of the window.
        region_offsets: Taps of a CUSTOM region, else empty.
    """

    kernel_size: IntTuple
    dilation: IntTuple
    region_type: RegionType = RegionType.HYPER_CUBE
    region_offsets: tuple[IntTuple, ...] = ()

    def cells(self) -> Window:
        """Return the window of the same extent that begins at its own coordinate on every axis."""
        check_taps(math.prod(self.kernel_size), self.kernel_size)
        taps = itertools.product(*(range(size) for size in self.kernel_size[::-1]))
        first_axis_fastest = tuple(tap[::-1] for tap in taps)
        ones = (1,) * len(self.kernel_size)
        return Window(self.kernel_size, ones, RegionType.CUSTOM, first_axis_fastest)

    def taps(self) -> tuple[IntTuple, ...]:
        """Return the offset of every tap from the window's centre, in the order of the kernel.

        HYPER_CUBE: the first axis runs fastest; odd extents are centred, even ones run from 0.
        HYPER_CROSS: the centre, then along each axis +1 .. +r and -r .. -1.
        """
        if self.region_type == RegionType.CUSTOM:
            return self.region_offsets
        if self.region_type == RegionType.HYPER_CROSS:
            return _cross(self.kernel_size)
        check_taps(math.prod(self.kernel_size), self.kernel_size)
        axes = [_centred(size) for size in self.kernel_size]
        return tuple(tap[::-1] for tap in itertools.product(*axes[::-1]))


def check_taps(volume: int, kernel_size: Sequence[int]) -> None:
    """Refuse a window that has too many taps to list, or to make a weight for each."""
    if volume > MAX_TAPS:
        raise MinkowskiError(
            f"a window must have less than 2**31 taps; got kernel_size={sorted(set(kernel_size))} "
            f"in {len(kernel_size)} dimensions. Take a smaller kernel_size or dimension."
        )


def _centred(size: int) -> range:
    first = -(size // 2) if size % 2 else 0
    return range(first, first + size)


def _cross(kernel_size: IntTuple) -> tuple[IntTuple, ...]:
    ndim = len(kernel_size)
    taps = [(0,) * ndim]
    for axis, size in enumerate(kernel_size):
        radius = size // 2
        for step in (*range(1, radius + 1), *range(-radius, 0)):
            taps.append((0,) * axis + (step,) + (0,) * (ndim - axis - 1))
    return tuple(taps)


def get_kernel_volume(
    region_type: RegionType,
    kernel_size: Sequence[int],
    region_offset: Tensor | None,
    axis_types: Any,
    dimension: int,
) -> int:
    """Return the number of taps.

    Args:
        region_type: Shape of the window.
        kernel_size: Extent per axis; a CUSTOM region does not read it.
        region_offset: Taps of a CUSTOM region, int [V, D].
        axis_types: Must be None.
        dimension: D.

    Raises:
        MinkowskiError: The arguments do not describe a window.
    """
    if axis_types is not None:
        raise MinkowskiError(
            f"axis_types must be None, one region type for all axes; got {axis_types}. Pass "
            "region_type=RegionType.CUSTOM with region_offsets for a mixed window."
        )
    custom = region_type == RegionType.CUSTOM
    given = region_offset is not None and region_offset.numel() > 0
    if custom != given:
        raise MinkowskiError(
            f"region_offsets must be given with RegionType.CUSTOM and only then; got "
            f"{region_type} and region_offsets={region_offset}."
        )
    if custom:
        assert region_offset is not None
        if region_offset.ndim != 2 or region_offset.shape[1] != dimension:
            raise MinkowskiError(
                f"region_offsets must have shape [V, {dimension}], one offset a row; got "
                f"{list(region_offset.shape)}."
            )
        return region_offset.shape[0]
    if min(kernel_size) < 1:
        raise MinkowskiError(f"kernel_size must be at least 1 on every axis; got {kernel_size}.")
    if region_type == RegionType.HYPER_CROSS:
        if not all(size % 2 for size in kernel_size):
            raise MinkowskiError(f"a HYPER_CROSS needs odd kernel sizes; got {kernel_size}.")
        return 1 + sum(size - 1 for size in kernel_size)
    return math.prod(kernel_size)


class KernelGenerator:
    """Window, stride and region of a convolution or pooling.

    Args:
        kernel_size: Extent of the window; int or one per axis.
        stride: Step of the window; int or one per axis.
        dilation: Step between taps; int or one per axis.
        is_transpose: Accepted; the layer decides.
        region_type: HYPER_CUBE, HYPER_CROSS (odd sizes) or CUSTOM.
        region_offsets: Taps of a CUSTOM region, int [V, D], in units of the tensor stride.
        expand_coordinates: True: outputs at all sites that a window reaches. A layer overwrites it.
        axis_types: Must be None.
        dimension: Number of spatial axes D.

    Raises:
        MinkowskiError: The arguments do not describe a window.
    """

    __slots__ = (
        "_stride",
        "_text",
        "_window",
        "axis_types",
        "cache",
        "dimension",
        "expand_coordinates",
        "kernel_dilation",
        "kernel_size",
        "kernel_stride",
        "kernel_volume",
        "region_offsets",
        "region_type",
        "requires_strided_coordinates",
    )

    def __init__(
        self,
        kernel_size: StrideType = -1,
        stride: StrideType = 1,
        dilation: StrideType = 1,
        is_transpose: bool = False,
        region_type: RegionType = RegionType.HYPER_CUBE,
        region_offsets: Tensor | None = None,
        expand_coordinates: bool = False,
        axis_types: Any = None,
        dimension: int = -1,
    ) -> None:
        if not 1 <= dimension <= _MAX_DIMENSION:
            raise MinkowskiError(
                f"dimension must be at least 1 and at most {_MAX_DIMENSION}; got {dimension}."
            )
        if not isinstance(region_type, RegionType):
            raise MinkowskiError(f"region_type must be a RegionType; got {region_type!r}.")
        self.kernel_size = convert_to_int_list(kernel_size, dimension)
        self.kernel_stride = convert_to_int_list(stride, dimension)
        self.kernel_dilation = convert_to_int_list(dilation, dimension)
        for name, values in (("stride", self.kernel_stride), ("dilation", self.kernel_dilation)):
            if min(values) < 1:
                raise MinkowskiError(f"{name} must be at least 1 on every axis; got {values}.")
        self.kernel_volume = get_kernel_volume(
            region_type, self.kernel_size, region_offsets, axis_types, dimension
        )
        self.region_type = region_type
        if region_offsets is None:
            region_offsets = torch.empty(0, dtype=torch.int32, device="cpu")
        if region_offsets.is_meta:
            raise MinkowskiError(
                "region_offsets must hold numbers, since they are the window; got a tensor on the "
                'meta device. Make it with device="cpu".'
            )
        self.region_offsets = region_offsets
        self.axis_types = axis_types
        self.dimension = dimension
        self.requires_strided_coordinates = max(self.kernel_stride) == 1
        self.expand_coordinates = expand_coordinates
        self.cache: dict[IntTuple, tuple[RegionType, Tensor, int]] = {}
        self._stride = tuple(self.kernel_stride)
        self._window = Window(
            tuple(self.kernel_size),
            tuple(self.kernel_dilation),
            region_type,
            tuple(tuple(offset) for offset in region_offsets.tolist()),
        )
        # Window and stride for compiled graphs, which take text as a constant.
        numbers = [*self.kernel_size, *self.kernel_stride, *self.kernel_dilation]
        self._text = f"{region_type.name} {' '.join(map(str, numbers))}"

    def get_kernel(
        self, tensor_stride: Sequence[int], is_transpose: bool
    ) -> tuple[RegionType, Tensor, int]:
        """Return region type, offsets of a CUSTOM region, and kernel volume."""
        if len(tensor_stride) != self.dimension:
            raise MinkowskiError(
                f"tensor_stride must have {self.dimension} entries; got {list(tensor_stride)}."
            )
        return self.cache.setdefault(
            tuple(tensor_stride), (self.region_type, self.region_offsets, self.kernel_volume)
        )

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(kernel_size={self.kernel_size}, "
            f"kernel_stride={self.kernel_stride}, kernel_dilation={self.kernel_dilation}, "
            f"region_type={self.region_type!s}, expand_coordinates={self.expand_coordinates}, "
            f"dimension={self.dimension})"
        )


class KernelRegion(NamedTuple):
    """A window as one value."""

    kernel_size: list[int]
    kernel_stride: list[int]
    kernel_dilation: list[int]
    region_type: RegionType
    offset: Tensor
    D: int


def convert_region_type(
    region_type: RegionType,
    tensor_stride: Sequence[int],
    kernel_size: Sequence[int],
    up_stride: Sequence[int],
    dilation: Sequence[int],
    region_offset: Tensor | None,
    axis_types: Any,
    dimension: int,
    center: bool = True,
) -> tuple[RegionType, Tensor, int]:
    """Return region type, offsets and kernel volume; see :func:`get_kernel_volume`.

    ``tensor_stride``, ``up_stride``, ``dilation`` and ``center`` have no effect for the existing
    region types.
    """
    volume = get_kernel_volume(region_type, kernel_size, region_offset, axis_types, dimension)
    if region_offset is None:
        region_offset = torch.empty(0, dtype=torch.int32, device="cpu")
    return region_type, region_offset, volume


__getattr__ = module_getattr(__name__)
