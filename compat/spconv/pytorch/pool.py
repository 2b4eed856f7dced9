"""Sparse poolings under spconv's names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from compat.spconv._names import module_getattr
from compat.spconv.core import ConvAlgo
from compat.spconv.pytorch._errors import rows_differ
from compat.spconv.pytorch._maps import map_for
from compat.spconv.pytorch._module import SparseModule
from compat.spconv.pytorch._numbers import per_axis
from compat.spconv.pytorch._reuse import check_submanifold_reuse
from compat.spconv.pytorch._voxel_count import CountsVoxels, count_voxels
from compat.spconv.pytorch.core import SparseConvTensor
from tritonspconv import ops as _ops
from tritonspconv.kernel_map import KernelMap

IntOrInts = int | Sequence[int]


class _SparsePool(CountsVoxels):
    """Pooling over the active sites of a window; outputs as in a convolution.

    Args:
        ndim: Number of spatial axes.
        kernel_size, stride, padding, dilation: An int, or one int per axis. ``stride=None``: the
            kernel size.
        indice_key: Name under which the kernel map travels downstream, for inverse convolutions.
        subm: Outputs at the input sites; odd kernel sizes only.
        algo: Label that layers of one key must share. Default: spconv's.
        record_voxel_count: Keep the largest number of output sites in the buffer
            ``max_num_voxels_during_training``; not of submanifold pools.
        name: Kept as an attribute.
    """

    transposed = inverse = False

    def __init__(
        self,
        ndim: int,
        kernel_size: IntOrInts = 3,
        stride: IntOrInts | None = 1,
        padding: IntOrInts = 0,
        dilation: IntOrInts = 1,
        indice_key: str | None = None,
        subm: bool = False,
        algo: ConvAlgo | None = None,
        record_voxel_count: bool = False,
        name: str | None = None,
    ) -> None:
        super().__init__(name=name)
        self.ndim = ndim
        self.kernel_size = per_axis("kernel_size", ndim, kernel_size)
        self.stride = list(self.kernel_size) if stride is None else per_axis("stride", ndim, stride)
        self.padding = per_axis("padding", ndim, padding)
        self.dilation = per_axis("dilation", ndim, dilation)
        self.output_padding = [0] * ndim
        self.subm = subm
        self.indice_key = indice_key
        self.record_voxel_count = record_voxel_count
        if algo is None:
            volume = torch.Size(self.kernel_size).numel()
            algo = ConvAlgo.MaskImplicitGemm if volume <= 128 else ConvAlgo.Native
        self.algo = algo
        if not subm:
            self._init_voxel_count()

    def extra_repr(self) -> str:
        """Return the arguments as spconv prints them."""
        return (
            f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}, "
            f"dilation={self.dilation}, algo={self.algo}"
        )

    def is_inverseable(self) -> bool:
        """Return whether an inverse convolution can undo this layer."""
        return self.indice_key is not None and not self.subm

    def forward(self, input: SparseConvTensor) -> SparseConvTensor:
        """Pool ``input``."""
        found, features = map_for(self, input), input.features
        if features.shape[0] != input.indices.shape[0]:
            name = type(self).__name__
            raise rows_differ(name, features.shape[0], input.indices.shape[0])
        feats = self._reduce(features, found.kernel_map)
        if self.record_voxel_count and not self.subm:
            count_voxels(self, feats.shape[0])
        return input._successor(feats, found.indice_dict, found.located)

    def _check_subm_reuse_valid(
        self, inp: SparseConvTensor, spatial_shape: list[int], datas: Any
    ) -> None:
        check_submanifold_reuse(self, inp, datas)

    def _check_inverse_reuse_valid(
        self, inp: SparseConvTensor, spatial_shape: list[int], datas: Any
    ) -> None:
        raise NotImplementedError("a pool is never an inverse layer.")

    def _reduce(self, features: Tensor, kernel_map: KernelMap) -> Tensor:
        raise NotImplementedError


class SparseMaxPool(_SparsePool):
    """Max pooling with a floor of zero, as spconv computes it: ``max(0, max over active inputs)``.

    Every input equal to the output gets the output's full gradient. The arguments are the same for
    all poolings: ``(ndim, kernel_size=3, stride=1, padding=0, dilation=1, indice_key=None,
    subm=False, algo=None, record_voxel_count=False, name=None)``.
    """

    def _reduce(self, features: Tensor, kernel_map: KernelMap) -> Tensor:
        return _ops.sparse_pool(features, kernel_map, mode="max", ties="all", floor=0.0)


class SparseAvgPool(_SparsePool):
    """Mean over the active inputs of each window; arguments as :class:`SparseMaxPool`."""

    def _reduce(self, features: Tensor, kernel_map: KernelMap) -> Tensor:
        return _ops.sparse_pool(features, kernel_map, mode="avg")


class _FixedNdim(_SparsePool):
    _ndim: ClassVar[int]

    def __init__(
        self,
        kernel_size: IntOrInts,
        stride: IntOrInts | None = None,
        padding: IntOrInts = 0,
        dilation: IntOrInts = 1,
        indice_key: str | None = None,
        algo: ConvAlgo | None = None,
        record_voxel_count: bool = False,
        name: str | None = None,
    ) -> None:
        super().__init__(
            self._ndim,
            kernel_size,
            stride,
            padding,
            dilation,
            indice_key,
            algo=algo,
            record_voxel_count=record_voxel_count,
            name=name,
        )


class SparseMaxPool1d(_FixedNdim, SparseMaxPool):
    """1-D max pooling; see :class:`SparseMaxPool`."""

    _ndim = 1


class SparseMaxPool2d(_FixedNdim, SparseMaxPool):
    """2-D max pooling; see :class:`SparseMaxPool`."""

    _ndim = 2


class SparseMaxPool3d(_FixedNdim, SparseMaxPool):
    """3-D max pooling; see :class:`SparseMaxPool`."""

    _ndim = 3


class SparseMaxPool4d(_FixedNdim, SparseMaxPool):
    """4-D max pooling; see :class:`SparseMaxPool`."""

    _ndim = 4


class SparseAvgPool1d(_FixedNdim, SparseAvgPool):
    """1-D average pooling; see :class:`SparseAvgPool`."""

    _ndim = 1


class SparseAvgPool2d(_FixedNdim, SparseAvgPool):
    """2-D average pooling; see :class:`SparseAvgPool`."""

    _ndim = 2


class SparseAvgPool3d(_FixedNdim, SparseAvgPool):
    """3-D average pooling; see :class:`SparseAvgPool`."""

    _ndim = 3


class SparseGlobalMaxOrAvgPool(SparseModule):
    """Maximum or mean over the active sites of each sample, all channels.

    Args:
        is_mean: The mean instead of the maximum.
        name: Kept as an attribute.
    """

    def __init__(self, is_mean: bool, name: str | None = None) -> None:
        super().__init__(name=name)
        self.is_mean = is_mean

    def forward(self, input: SparseConvTensor) -> Tensor:
        """Return ``[batch_size, C]``; zeros for a sample without active sites."""
        mode = "avg" if self.is_mean else "max"
        samples = input.indices[:, 0]
        if input.features.shape[0] != samples.shape[0]:
            name = type(self).__name__
            raise rows_differ(name, input.features.shape[0], samples.shape[0])
        return _ops.global_pool(input.features, samples, int(input.batch_size), mode=mode)


class SparseGlobalMaxPool(SparseGlobalMaxOrAvgPool):
    """Maximum over the active sites of each sample."""

    def __init__(self, name: str | None = None) -> None:
        super().__init__(is_mean=False, name=name)


class SparseGlobalAvgPool(SparseGlobalMaxOrAvgPool):
    """Mean over the active sites of each sample, all channels."""

    def __init__(self, name: str | None = None) -> None:
        super().__init__(is_mean=True, name=name)


ALL_POOL_LAYERS = {
    SparseAvgPool,
    SparseAvgPool1d,
    SparseAvgPool2d,
    SparseAvgPool3d,
    SparseMaxPool,
    SparseMaxPool1d,
    SparseMaxPool2d,
    SparseMaxPool3d,
    SparseMaxPool4d,
}

__getattr__ = module_getattr(
    __name__,
    modules={
        "Fsp": "compat.spconv.pytorch.functional",
        "ops": "compat.spconv.pytorch.ops",
        "spconv": "compat.spconv.pytorch",
    },
    elsewhere={
        "compat.spconv.cppconstants": "CPU_ONLY_BUILD",
        "compat.spconv.pytorch.conv": "_MAX_NUM_VOXELS_DURING_TRAINING",
        "compat.spconv.pytorch.core": "ImplicitGemmIndiceData IndiceData expand_nd",
        "compat.spconv.utils": "nullcontext",
    },
)
