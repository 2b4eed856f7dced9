"""Sparse convolution layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tritonspconv.geometry import ConvGeometry, SiteRule, to_ntuple
from tritonspconv.graph_capture import is_traced, run_untraced
from tritonspconv.kernel_map import KernelMap, inverse_maps, kernel_map
from tritonspconv.nn import traced
from tritonspconv.nn._conv import Conv
from tritonspconv.nn.fusable import Norm
from tritonspconv.ops.conv import Precision
from tritonspconv.sparse_tensor import SparseTensor


class SubMConvNd(Conv):
    """Submanifold convolution: outputs at the input sites, each window centred on its site.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Window extent.
        dilation: Step between taps.
        bias: Add a learnt number to each channel.
        precision: ``"ieee"`` or ``"tf32"`` products for float32.
        device: Device of the parameters.
        dtype: Data type of the parameters.

    Submanifold convolution: arXiv:1711.10275.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        dilation: int | Sequence[int] = 1,
        bias: bool = True,
        *,
        precision: Precision = "ieee",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        size = to_ntuple(kernel_size, self.ndim, "kernel_size", least=1)
        super().__init__(in_channels, out_channels, size, bias, precision, device, dtype)
        self.geometry = ConvGeometry.submanifold(size, to_ntuple(dilation, self.ndim, "dilation"))

    def forward(self, x: SparseTensor) -> SparseTensor:
        """Convolve ``x``; the output has the sites of ``x``."""
        return self.trace_fused(x, None, False) if is_traced() else self._convolve(x)

    def trace_fused(self, input: SparseTensor, norm: Norm | None, relu: bool) -> SparseTensor:
        """Convolve, normalise and clamp, in operations that ``torch.compile`` traces."""
        if not self._takes(input):
            return run_untraced(self._convolve, input, None, norm, relu)
        feats = traced.convolve_between(
            input.feats, self.weight, self.bias, input.sites, input.sites, self.geometry,
            self.precision, norm, relu or self.relu,
        )  # fmt: skip
        return input.replace(feats)

    def _map(self, x: SparseTensor, like: SparseTensor | None = None) -> KernelMap:
        return kernel_map(x.sites, self.geometry)

    def residual_of(self, input: SparseTensor, other: object) -> Tensor | None:
        """Return the features of ``other`` if it has the sites of ``input``."""
        if not isinstance(other, SparseTensor) or other.sites is not input.sites:
            return None
        return other.feats


class SparseConvNd(Conv):
    """Sparse convolution: it has an output for every window that holds an active input.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Window extent.
        stride: Step of the window.
        padding: Shift of the window.
        dilation: Step between taps.
        bias: Add a learnt number to each channel.
        sites: Output sites: ``"reached"`` by an input, or occupied ``"cells"`` of ``stride``.
        precision: ``"ieee"`` or ``"tf32"`` products for float32.
        device: Device of the parameters.
        dtype: Data type of the parameters.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        bias: bool = True,
        *,
        sites: SiteRule = "reached",
        precision: Precision = "ieee",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        size = to_ntuple(kernel_size, self.ndim, "kernel_size", least=1)
        super().__init__(in_channels, out_channels, size, bias, precision, device, dtype)
        self.geometry = ConvGeometry(
            kernel_size=size,
            stride=to_ntuple(stride, self.ndim, "stride"),
            padding=to_ntuple(padding, self.ndim, "padding", least=0),
            dilation=to_ntuple(dilation, self.ndim, "dilation"),
            sites=sites,
        )

    def forward(self, x: SparseTensor, like: SparseTensor | None = None) -> SparseTensor:
        """Convolve.

        Args:
            x: The input.
            like: Give outputs at the sites of this tensor instead of the sites that the rule
                generates.
        """
        return self._convolve(x, like)

    def _map(self, x: SparseTensor, like: SparseTensor | None = None) -> KernelMap:
        out_sites = None if like is None else like.sites
        return kernel_map(x.sites, self.geometry, out_sites=out_sites)


class SparseConvTransposeNd(Conv):
    """Transposed sparse convolution: outputs at every site that an active input reaches.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Window extent.
        stride: Step between the windows of neighbouring inputs.
        padding: Shift of the window.
        output_padding: Further cells at the upper end of the output.
        dilation: Step between taps.
        bias: Add a learnt number to each channel.
        precision: ``"ieee"`` or ``"tf32"`` products for float32.
        device: Device of the parameters.
        dtype: Data type of the parameters.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        output_padding: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        bias: bool = True,
        *,
        precision: Precision = "ieee",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        size = to_ntuple(kernel_size, self.ndim, "kernel_size", least=1)
        super().__init__(in_channels, out_channels, size, bias, precision, device, dtype)
        self.geometry = ConvGeometry(
            kernel_size=size,
            stride=to_ntuple(stride, self.ndim, "stride"),
            padding=to_ntuple(padding, self.ndim, "padding", least=0),
            dilation=to_ntuple(dilation, self.ndim, "dilation"),
            transposed=True,
            output_padding=to_ntuple(output_padding, self.ndim, "output_padding"),
        )

    def forward(self, x: SparseTensor, like: SparseTensor | None = None) -> SparseTensor:
        """Convolve.

        Args:
            x: The input.
            like: Give outputs at the sites of this tensor instead of every site reached.
        """
        return self._convolve(x, like)

    def _map(self, x: SparseTensor, like: SparseTensor | None = None) -> KernelMap:
        out_sites = None if like is None else like.sites
        return kernel_map(x.sites, self.geometry, out_sites=out_sites)


class SparseInverseConvNd(Conv):
    """Undo the change of sites of an earlier convolution or pooling, by its kernel map backwards.

    The outputs are at the sites that the earlier layer read, and at no others.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Window extent of the earlier layer.
        bias: Add a learnt number to each channel.
        precision: ``"ieee"`` or ``"tf32"`` products for float32.
        device: Device of the parameters.
        dtype: Data type of the parameters.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        bias: bool = True,
        *,
        precision: Precision = "ieee",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        size = to_ntuple(kernel_size, self.ndim, "kernel_size", least=1)
        super().__init__(in_channels, out_channels, size, bias, precision, device, dtype)

    def forward(self, x: SparseTensor, like: SparseTensor) -> SparseTensor:
        """Convolve.

        Args:
            x: The input, at the sites that the earlier layer wrote.
            like: A tensor at the sites that the earlier layer read: its input.

        Raises:
            ValueError: No earlier layer with this window led from ``like`` to ``x``, or several.
        """
        if not is_traced():
            return self._convolve(x, like)
        if not self._takes(x) or not isinstance(like, SparseTensor) or like.sites.bounds:
            return run_untraced(self._convolve, x, like)
        feats = traced.convolve_inverse(
            x.feats, self.weight, self.bias, x.sites, like.sites, self.kernel_size, self.precision,
            self.relu,
        )  # fmt: skip
        return like.replace(feats)

    def _map(self, x: SparseTensor, like: SparseTensor | None = None) -> KernelMap:
        assert like is not None
        found = inverse_maps(x.sites, like.sites, self.kernel_size)
        if len(found) != 1:
            problem = "no layer" if not found else f"{len(found)} layers of different geometry"
            raise ValueError(
                f"{type(self).__name__}: {problem} with kernel_size={self.kernel_size} led from "
                f"like={like} to x={x}. Pass as like the very input of the layer to undo; x must "
                "be at that layer's output sites."
            )
        return found[0]


class SubMConv1d(SubMConvNd):
    """Submanifold convolution over one axis; see :class:`SubMConvNd`."""

    ndim = 1


class SubMConv2d(SubMConvNd):
    """Submanifold convolution over two axes; see :class:`SubMConvNd`."""

    ndim = 2


class SubMConv3d(SubMConvNd):
    """Submanifold convolution over three axes; see :class:`SubMConvNd`.

    Example:
        >>> x = ts.SparseTensor.from_dense(torch.ones(1, 4, 2, 2, 2))
        >>> ts.nn.SubMConv3d(4, 8, kernel_size=3)(x).shape  # eight sites
        torch.Size([8, 8])
    """

    ndim = 3


class SubMConv4d(SubMConvNd):
    """Submanifold convolution over four axes; see :class:`SubMConvNd`."""

    ndim = 4


class SparseConv1d(SparseConvNd):
    """Sparse convolution over one axis; see :class:`SparseConvNd`."""

    ndim = 1


class SparseConv2d(SparseConvNd):
    """Sparse convolution over two axes; see :class:`SparseConvNd`."""

    ndim = 2


class SparseConv3d(SparseConvNd):
    """Sparse convolution over three axes; see :class:`SparseConvNd`.

    Example:
        >>> x = ts.SparseTensor.from_dense(torch.ones(1, 4, 2, 2, 2))
        >>> y = ts.nn.SparseConv3d(4, 8, kernel_size=2, stride=2)(x)
        >>> len(y), y.spatial_shape
        (1, (1, 1, 1))
    """

    ndim = 3


class SparseConv4d(SparseConvNd):
    """Sparse convolution over four axes; see :class:`SparseConvNd`."""

    ndim = 4


class SparseConvTranspose1d(SparseConvTransposeNd):
    """Transposed sparse convolution over one axis; see :class:`SparseConvTransposeNd`."""

    ndim = 1


class SparseConvTranspose2d(SparseConvTransposeNd):
    """Transposed sparse convolution over two axes; see :class:`SparseConvTransposeNd`."""

    ndim = 2


class SparseConvTranspose3d(SparseConvTransposeNd):
    """Transposed sparse convolution over three axes; see :class:`SparseConvTransposeNd`.

    Example:
        >>> x = ts.SparseTensor.from_dense(torch.ones(1, 4, 2, 2, 2))
        >>> y = ts.nn.SparseConvTranspose3d(4, 8, kernel_size=2, stride=2)(x)
        >>> len(y), y.spatial_shape
        (64, (4, 4, 4))
    """

    ndim = 3


class SparseConvTranspose4d(SparseConvTransposeNd):
    """Transposed sparse convolution over four axes; see :class:`SparseConvTransposeNd`."""

    ndim = 4


class SparseInverseConv1d(SparseInverseConvNd):
    """Inverse sparse convolution over one axis; see :class:`SparseInverseConvNd`."""

    ndim = 1


class SparseInverseConv2d(SparseInverseConvNd):
    """Inverse sparse convolution over two axes; see :class:`SparseInverseConvNd`."""

    ndim = 2


class SparseInverseConv3d(SparseInverseConvNd):
    """Inverse sparse convolution over three axes; see :class:`SparseInverseConvNd`.

    Example:
        >>> x = ts.SparseTensor.from_dense(torch.ones(1, 4, 2, 2, 2))
        >>> y = ts.nn.SparseConv3d(4, 8, kernel_size=2, stride=2)(x)
        >>> ts.nn.SparseInverseConv3d(8, 4, kernel_size=2)(y, like=x).sites is x.sites
        True
    """

    ndim = 3


class SparseInverseConv4d(SparseInverseConvNd):
    """Inverse sparse convolution over four axes; see :class:`SparseInverseConvNd`."""

    ndim = 4
