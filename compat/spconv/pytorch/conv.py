"""Sparse convolutions under spconv's names."""

from __future__ import annotations

from typing import ClassVar

from compat.spconv._names import module_getattr
from compat.spconv.core import ConvAlgo
from compat.spconv.pytorch._convolution import SparseConvolution
from compat.spconv.pytorch._convolution_base import IntOrInts, SparseConvolutionBase
from compat.spconv.pytorch._module import SparseModule
from compat.spconv.pytorch._pair_ops import apply_act as _apply_act
from compat.spconv.pytorch._voxel_count import (
    MAX_NUM_VOXELS_DURING_TRAINING as _MAX_NUM_VOXELS_DURING_TRAINING,
)
from compat.spconv.pytorch.core import expand_nd

__all__ = [
    "DEFAULT_SPARSE_CONV_TYPES",
    "FILTER_HWIO",
    "ConvAlgo",
    "SparseConv1d",
    "SparseConv2d",
    "SparseConv3d",
    "SparseConv4d",
    "SparseConvTranspose1d",
    "SparseConvTranspose2d",
    "SparseConvTranspose3d",
    "SparseConvTranspose4d",
    "SparseConvolution",
    "SparseConvolutionBase",
    "SparseInverseConv1d",
    "SparseInverseConv2d",
    "SparseInverseConv3d",
    "SparseInverseConv4d",
    "SparseModule",
    "SubMConv1d",
    "SubMConv2d",
    "SubMConv3d",
    "SubMConv4d",
    "expand_nd",
]

# Downstream code reads these names of spconv's module, also those with an underscore.
_SHOWN = _MAX_NUM_VOXELS_DURING_TRAINING, _apply_act
FILTER_HWIO = False

__getattr__ = module_getattr(
    __name__,
    modules={
        "Fsp": "compat.spconv.pytorch.functional",
        "ops": "compat.spconv.pytorch.ops",
        "spconv": "compat.spconv.pytorch",
        "tv": "compat.cumm.tensorview",
    },
    elsewhere={
        "compat.spconv": "SPCONV_VERSION_NUMBERS",
        "compat.spconv.constants": "ALL_WEIGHT_IS_KRSC SAVED_WEIGHT_LAYOUT SPCONV_DEBUG_WEIGHT",
        "compat.spconv.cppconstants": "CPU_ONLY_BUILD",
        "compat.spconv.debug_utils": "spconv_save_debug_data",
        "compat.spconv.pytorch.core": "ImplicitGemmIndiceData IndiceData SparseConvTensor",
        "compat.spconv.utils": "nullcontext",
    },
)


class _SparseConv(SparseConvolution):
    _ndim: ClassVar[int]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: IntOrInts,
        stride: IntOrInts = 1,
        padding: IntOrInts = 0,
        dilation: IntOrInts = 1,
        groups: int = 1,
        bias: bool = True,
        indice_key: str | None = None,
        algo: ConvAlgo | None = None,
        fp32_accum: bool | None = None,
        record_voxel_count: bool = False,
        large_kernel_fast_algo: bool = False,
        name: str | None = None,
    ) -> None:
        super().__init__(
            self._ndim,
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            transposed=self._transposed,
            indice_key=indice_key,
            algo=algo,
            fp32_accum=fp32_accum,
            record_voxel_count=record_voxel_count,
            large_kernel_fast_algo=large_kernel_fast_algo,
            name=name,
        )

    _transposed: ClassVar[bool] = False


class _SparseConvTranspose(_SparseConv):
    _transposed = True


class _SubMConv(SparseConvolution):
    _ndim: ClassVar[int]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: IntOrInts,
        stride: IntOrInts = 1,
        padding: IntOrInts = 0,
        dilation: IntOrInts = 1,
        groups: int = 1,
        bias: bool = True,
        indice_key: str | None = None,
        algo: ConvAlgo | None = None,
        fp32_accum: bool | None = None,
        large_kernel_fast_algo: bool = False,
        name: str | None = None,
    ) -> None:
        super().__init__(
            self._ndim,
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            subm=True,
            indice_key=indice_key,
            algo=algo,
            fp32_accum=fp32_accum,
            large_kernel_fast_algo=large_kernel_fast_algo,
            name=name,
        )


class _SparseInverseConv(SparseConvolution):
    _ndim: ClassVar[int]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: IntOrInts,
        indice_key: str | None,
        bias: bool = True,
        algo: ConvAlgo | None = None,
        fp32_accum: bool | None = None,
        large_kernel_fast_algo: bool = False,
        name: str | None = None,
    ) -> None:
        super().__init__(
            self._ndim,
            in_channels,
            out_channels,
            kernel_size,
            bias=bias,
            inverse=True,
            indice_key=indice_key,
            algo=algo,
            fp32_accum=fp32_accum,
            large_kernel_fast_algo=large_kernel_fast_algo,
            name=name,
        )


class SparseConv1d(_SparseConv):
    """1-D convolution at every site that an input reaches."""

    _ndim = 1


class SparseConv2d(_SparseConv):
    """2-D convolution at every site that an input reaches."""

    _ndim = 2


class SparseConv3d(_SparseConv):
    """3-D convolution at every site that an input reaches."""

    _ndim = 3


class SparseConv4d(_SparseConv):
    """4-D convolution at every site that an input reaches."""

    _ndim = 4


class SparseConvTranspose1d(_SparseConvTranspose):
    """1-D transposed convolution to every site that an input reaches."""

    _ndim = 1


class SparseConvTranspose2d(_SparseConvTranspose):
    """2-D transposed convolution to every site that an input reaches."""

    _ndim = 2


class SparseConvTranspose3d(_SparseConvTranspose):
    """3-D transposed convolution to every site that an input reaches."""

    _ndim = 3


class SparseConvTranspose4d(_SparseConvTranspose):
    """4-D transposed convolution to every site that an input reaches."""

    _ndim = 4


class SubMConv1d(_SubMConv):
    """1-D submanifold convolution: outputs at the input sites."""

    _ndim = 1


class SubMConv2d(_SubMConv):
    """2-D submanifold convolution: outputs at the input sites."""

    _ndim = 2


class SubMConv3d(_SubMConv):
    """3-D submanifold convolution: outputs at the input sites."""

    _ndim = 3


class SubMConv4d(_SubMConv):
    """4-D submanifold convolution: outputs at the input sites."""

    _ndim = 4


class SparseInverseConv1d(_SparseInverseConv):
    """1-D inverse of the layer that recorded ``indice_key``: back to its input sites."""

    _ndim = 1


class SparseInverseConv2d(_SparseInverseConv):
    """2-D inverse of the layer that recorded ``indice_key``: back to its input sites."""

    _ndim = 2


class SparseInverseConv3d(_SparseInverseConv):
    """3-D inverse of the layer that recorded ``indice_key``: back to its input sites."""

    _ndim = 3


class SparseInverseConv4d(_SparseInverseConv):
    """4-D inverse of the layer that recorded ``indice_key``: back to its input sites."""

    _ndim = 4


DEFAULT_SPARSE_CONV_TYPES = {
    SparseConv1d,
    SparseConv2d,
    SparseConv3d,
    SparseConv4d,
    SparseConvTranspose1d,
    SparseConvTranspose2d,
    SparseConvTranspose3d,
    SparseConvTranspose4d,
    SubMConv1d,
    SubMConv2d,
    SubMConv3d,
    SubMConv4d,
    SparseInverseConv1d,
    SparseInverseConv2d,
    SparseInverseConv3d,
    SparseInverseConv4d,
}
