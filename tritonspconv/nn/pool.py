"""Local and global pooling layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from tritonspconv.geometry import ConvGeometry, SiteRule, to_ntuple
from tritonspconv.kernel_map import kernel_map
from tritonspconv.nn._module import SparseModule
from tritonspconv.ops.global_pool import global_pool
from tritonspconv.ops.pool import PoolMode, TieRule, sparse_pool
from tritonspconv.sparse_tensor import SparseTensor


class _Pool(SparseModule):
    """Pool windows of ``ndim`` axes; see the public classes."""

    ndim: ClassVar[int]
    mode: ClassVar[PoolMode]

    def __init__(
        self,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] | None = None,
        padding: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        *,
        sites: SiteRule = "reached",
    ) -> None:
        super().__init__()
        self.geometry = ConvGeometry(
            kernel_size=to_ntuple(kernel_size, self.ndim, "kernel_size"),
            stride=to_ntuple(kernel_size if stride is None else stride, self.ndim, "stride"),
            padding=to_ntuple(padding, self.ndim, "padding", least=0),
            dilation=to_ntuple(dilation, self.ndim, "dilation"),
            sites=sites,
        )

    def forward(self, x: SparseTensor) -> SparseTensor:
        """Pool ``x`` to the output sites of the geometry."""
        kmap = kernel_map(x.sites, self.geometry)
        return SparseTensor(sparse_pool(x.feats, kmap, self.mode), kmap.out_sites)

    def extra_repr(self) -> str:
        """Return the geometry."""
        g = self.geometry
        text = f"kernel_size={g.kernel_size}, stride={g.stride}"
        if any(g.padding):
            text += f", padding={g.padding}"
        if max(g.dilation) > 1:
            text += f", dilation={g.dilation}"
        return text if g.sites == "reached" else f"{text}, sites={g.sites!r}"


class MaxPoolNd(_Pool):
    """Maximum of the active inputs in each window.

    Args:
        kernel_size: Window extent.
        stride: Step of the window. Default: ``kernel_size``.
        padding: Shift of the window.
        dilation: Step between taps.
        ties: The taps that get the gradient if several hold the maximum: the ``"first"`` or
            ``"all"``.
        floor: A lower bound of the result; None: none.
        sites: Output sites: ``"reached"`` by an input, or occupied ``"cells"``.
    """

    mode = "max"

    def __init__(
        self,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] | None = None,
        padding: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        *,
        ties: TieRule = "first",
        floor: float | None = None,
        sites: SiteRule = "reached",
    ) -> None:
        super().__init__(kernel_size, stride, padding, dilation, sites=sites)
        self.ties: TieRule = ties
        self.floor = floor

    def forward(self, x: SparseTensor) -> SparseTensor:
        """Pool ``x`` to the output sites of the geometry."""
        kmap = kernel_map(x.sites, self.geometry)
        feats = sparse_pool(x.feats, kmap, "max", ties=self.ties, floor=self.floor)
        return SparseTensor(feats, kmap.out_sites)

    def extra_repr(self) -> str:
        """Return the geometry and the options of the maximum."""
        text = super().extra_repr()
        if self.ties != "first":
            text += f", ties={self.ties!r}"
        return text if self.floor is None else f"{text}, floor={self.floor}"


class AvgPoolNd(_Pool):
    """Mean of the active inputs in each window, over their number.

    Args:
        kernel_size: Window extent.
        stride: Step of the window. Default: ``kernel_size``.
        padding: Shift of the window.
        dilation: Step between taps.
        sites: Output sites: ``"reached"`` by an input, or occupied ``"cells"``.
    """

    mode = "avg"


class SumPoolNd(_Pool):
    """Sum of the active inputs in each window.

    Args:
        kernel_size: Window extent.
        stride: Step of the window. Default: ``kernel_size``.
        padding: Shift of the window.
        dilation: Step between taps.
        sites: Output sites: ``"reached"`` by an input, or occupied ``"cells"``.
    """

    mode = "sum"


class _GlobalPool(SparseModule):
    """Reduce all rows of each sample to [batch_size, C]; 0 for a sample without rows."""

    mode: ClassVar[PoolMode]

    def forward(self, x: SparseTensor) -> Tensor:
        """Return [batch_size, C]."""
        return global_pool(x.feats, x.batch_index, x.batch_size, self.mode)


class GlobalMaxPool(_GlobalPool):
    """Maximum over all rows of each sample: [batch_size, C]; 0 for a sample without rows."""

    mode = "max"


class GlobalAvgPool(_GlobalPool):
    """Mean over all rows of each sample: [batch_size, C]; 0 for a sample without rows.

    Example:
        >>> x = ts.SparseTensor.from_dense(torch.tensor([[[1.0, 0.0, 3.0]], [[0.0, 5.0, 0.0]]]))
        >>> ts.nn.GlobalAvgPool()(x)  # cells that are zero have no row
        tensor([[2.],
                [5.]])
    """

    mode = "avg"


class GlobalSumPool(_GlobalPool):
    """Sum over all rows of each sample: [batch_size, C]; 0 for a sample without rows."""

    mode = "sum"


class MaxPool1d(MaxPoolNd):
    """Max pooling over one axis; see :class:`MaxPoolNd`."""

    ndim = 1


class MaxPool2d(MaxPoolNd):
    """Max pooling over two axes; see :class:`MaxPoolNd`."""

    ndim = 2


class MaxPool3d(MaxPoolNd):
    """Max pooling over three axes; see :class:`MaxPoolNd`.

    Example:
        >>> x = ts.SparseTensor.from_dense(torch.arange(1.0, 9).view(1, 1, 2, 2, 2))
        >>> ts.nn.MaxPool3d(2)(x).feats
        tensor([[8.]])
    """

    ndim = 3


class MaxPool4d(MaxPoolNd):
    """Max pooling over four axes; see :class:`MaxPoolNd`."""

    ndim = 4


class AvgPool1d(AvgPoolNd):
    """Average pooling over one axis; see :class:`AvgPoolNd`."""

    ndim = 1


class AvgPool2d(AvgPoolNd):
    """Average pooling over two axes; see :class:`AvgPoolNd`."""

    ndim = 2


class AvgPool3d(AvgPoolNd):
    """Average pooling over three axes; see :class:`AvgPoolNd`."""

    ndim = 3


class AvgPool4d(AvgPoolNd):
    """Average pooling over four axes; see :class:`AvgPoolNd`."""

    ndim = 4


class SumPool1d(SumPoolNd):
    """Sum pooling over one axis; see :class:`SumPoolNd`."""

    ndim = 1


class SumPool2d(SumPoolNd):
    """Sum pooling over two axes; see :class:`SumPoolNd`."""

    ndim = 2


class SumPool3d(SumPoolNd):
    """Sum pooling over three axes; see :class:`SumPoolNd`."""

    ndim = 3


class SumPool4d(SumPoolNd):
    """Sum pooling over four axes; see :class:`SumPoolNd`."""

    ndim = 4
