"""Entries of ``indice_dict``: a kernel map with the fields that spconv's entries show."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from compat.spconv.core import ConvAlgo
from compat.spconv.pytorch._pairs import map_of_pairs, map_of_table, pair_tables
from compat.spconv.pytorch._paths import map_along, map_at, split
from compat.spconv.pytorch._sites import LocatedSites
from tritonspconv.kernel_map import KernelMap

if TYPE_CHECKING:
    from typing_extensions import Self


def pair_lists(kernel_map: KernelMap) -> tuple[Tensor, Tensor]:
    """Return a map as spconv's pair lists.

    Args:
        kernel_map: Any map.

    Returns:
        Pairs, int32 ``[2, V, n_in]``: input and output rows by tap, filled up with -1; and the
        number of pairs of each tap, int32 ``[V]``. The central tap and both halves of a submanifold
        window are listed in full; spconv leaves out pairs that follow by symmetry.
    """
    in_rows, out_rows, tap_ptr = kernel_map.pairs()
    counts = tap_ptr.diff()
    taps = torch.repeat_interleave(counts, output_size=in_rows.shape[0])
    places = torch.arange(in_rows.shape[0], device=in_rows.device) - tap_ptr[taps]
    pairs = in_rows.new_full((2, kernel_map.kernel_volume, kernel_map.n_in), -1)
    pairs[0, taps, places] = in_rows
    pairs[1, taps, places] = out_rows
    return pairs, counts.int()


class _Record:
    """A kernel map under an ``indice_key``. An adapter's layer or a user's layer recorded it.

    Attributes:
        out_indices, indices: The tensors of both sides as users see them.
        spatial_shape, out_spatial_shape: Lists of int.
        is_subm, algo, ksize, stride, padding, dilation: Settings of the layer that made the entry.
        kernel_map: The engine's map from ``indices`` to ``out_indices``.
        located, out_located: The sites of both sides; None in an entry that users made.
        route: The path from the root of ``located`` through the layer, if the layer made the entry
            without a map, as it does under ``torch.compile``; None: the entry has a map.
    """

    located: LocatedSites | None = None
    out_located: LocatedSites | None = None
    route: str | None = None

    def __init__(
        self,
        out_indices: Tensor,
        indices: Tensor,
        spatial_shape: Sequence[int],
        out_spatial_shape: Sequence[int],
        is_subm: bool,
        algo: ConvAlgo,
        ksize: Sequence[int],
        stride: Sequence[int],
        dilation: Sequence[int],
        padding: Sequence[int],
    ) -> None:
        self.out_indices = out_indices
        self.indices = indices
        self.spatial_shape = list(spatial_shape)
        self.out_spatial_shape = list(out_spatial_shape)
        self.is_subm = is_subm
        self.algo = algo
        self.ksize = list(ksize)
        self.stride = list(stride)
        self.dilation = list(dilation)
        self.padding = list(padding)

    @classmethod
    def of_map(
        cls,
        kernel_map: KernelMap | None,
        located: LocatedSites,
        out_located: LocatedSites,
        *,
        is_subm: bool,
        algo: ConvAlgo,
        ksize: list[int],
        stride: list[int],
        dilation: list[int],
        padding: list[int],
        route: str | None = None,
    ) -> Self:
        """Return the entry of a layer; its pairs are listed on first access.

        Without ``kernel_map``, the entry finds its map along ``route`` on first access, too.
        """
        record = cls.__new__(cls)
        _Record.__init__(
            record, out_located.indices, located.indices, located.spatial_shape,
            out_located.spatial_shape, is_subm, algo, ksize, stride, dilation, padding,
        )  # fmt: skip
        if kernel_map is None:
            record.route = route
        else:
            record.kernel_map = kernel_map
        record.located = located
        record.out_located = out_located
        return record

    def _layer(self) -> tuple[Any, ...]:
        return (
            self.spatial_shape, self.out_spatial_shape, self.is_subm, self.algo, self.ksize,
            self.stride, self.dilation, self.padding,
        )  # fmt: skip

    @cached_property
    def kernel_map(self) -> KernelMap:
        raise NotImplementedError

    def _routed_map(self) -> KernelMap:
        """Return the map of the layer that made the entry."""
        assert self.located is not None
        assert self.route is not None
        if not self.is_subm:
            return map_along(self.located.root, self.route)
        if not self.located.still_describe(self.indices):
            self.located = LocatedSites.of(
                self.indices, self.spatial_shape, self.located.batch_size
            )
        return map_at(self.located.sites, split(self.route)[1])

    @cached_property
    def inverse_map(self) -> KernelMap:
        """The same pairs read from the outputs to the inputs."""
        return self.kernel_map.inverse()

    def locate_inputs(self, batch_size: int) -> LocatedSites:
        """Return the sites of ``indices``."""
        if self.located is None:
            self.located = LocatedSites.of(self.indices, self.spatial_shape, batch_size)
        return self.located

    @cached_property
    def _pair_lists(self) -> tuple[Tensor, Tensor]:
        return pair_lists(self.kernel_map)

    @cached_property
    def indice_pairs(self) -> Tensor:
        """Input and output rows by tap, int32 ``[2, V, n_in]``, -1 behind the last."""
        return self._pair_lists[0]

    @cached_property
    def indice_pair_num(self) -> Tensor:
        """Number of pairs of each tap, int32 ``[V]``."""
        return self._pair_lists[1]


class IndiceData(_Record):
    """Entry of layers whose ``algo`` is ``ConvAlgo.Native``; arguments as in spconv.

    Layers that users write make an entry from the results of ``ops.get_indice_pairs``.
    """

    def __init__(
        self,
        out_indices: Tensor,
        indices: Tensor,
        indice_pairs: Tensor,
        indice_pair_num: Tensor,
        spatial_shape: Sequence[int],
        out_spatial_shape: Sequence[int],
        is_subm: bool,
        algo: ConvAlgo,
        ksize: Sequence[int],
        stride: Sequence[int],
        dilation: Sequence[int],
        padding: Sequence[int],
        voxel_num: Any = None,
    ) -> None:
        super().__init__(
            out_indices, indices, spatial_shape, out_spatial_shape, is_subm, algo, ksize, stride,
            dilation, padding,
        )  # fmt: skip
        self.indice_pairs = indice_pairs
        self.indice_pair_num = indice_pair_num
        self.voxel_num = voxel_num

    voxel_num = None

    def __reduce__(self) -> tuple[Any, ...]:
        pairs = self.indice_pairs, self.indice_pair_num
        sites = self.out_indices, self.indices
        return IndiceData, (*sites, *pairs, *self._layer(), self.voxel_num)

    @cached_property
    def kernel_map(self) -> KernelMap:
        """The map that the pairs list, or the map of the layer's window."""
        if self.route is not None:
            return self._routed_map()
        n_in, n_out = self.indices.shape[0], self.out_indices.shape[0]
        return map_of_pairs(self.indice_pairs, self.indice_pair_num, n_in, n_out, self.is_subm)


class ImplicitGemmIndiceData(_Record):
    """Entry of layers whose ``algo`` is an implicit GEMM; arguments as in spconv.

    Layers that users write make an entry from the results of
    ``ops.get_indice_pairs_implicit_gemm``. The entry also lists pairs, like ``IndiceData``. The
    masks, which belong to spconv's kernels, are empty.
    """

    def __init__(
        self,
        out_indices: Tensor,
        indices: Tensor,
        pair_fwd: Tensor,
        pair_bwd: Tensor,
        pair_mask_fwd_splits: Sequence[Tensor],
        pair_mask_bwd_splits: Sequence[Tensor],
        mask_argsort_fwd_splits: Sequence[Tensor],
        mask_argsort_bwd_splits: Sequence[Tensor],
        masks: Sequence[Any],
        spatial_shape: Sequence[int],
        out_spatial_shape: Sequence[int],
        is_subm: bool,
        algo: ConvAlgo,
        ksize: Sequence[int],
        stride: Sequence[int],
        dilation: Sequence[int],
        padding: Sequence[int],
        in_voxel_num: Any = None,
        out_voxel_num: Any = None,
    ) -> None:
        super().__init__(
            out_indices, indices, spatial_shape, out_spatial_shape, is_subm, algo, ksize, stride,
            dilation, padding,
        )  # fmt: skip
        self.pair_fwd = pair_fwd
        self.pair_bwd = pair_bwd
        self.pair_mask_fwd_splits = pair_mask_fwd_splits
        self.pair_mask_bwd_splits = pair_mask_bwd_splits
        self.mask_argsort_fwd_splits = mask_argsort_fwd_splits
        self.mask_argsort_bwd_splits = mask_argsort_bwd_splits
        self.masks = masks
        self.in_voxel_num = in_voxel_num
        self.out_voxel_num = out_voxel_num

    pair_mask_fwd_splits: Sequence[Tensor] = ()
    pair_mask_bwd_splits: Sequence[Tensor] = ()
    mask_argsort_fwd_splits: Sequence[Tensor] = ()
    mask_argsort_bwd_splits: Sequence[Tensor] = ()
    masks: Sequence[Any] = ()
    in_voxel_num = None
    out_voxel_num = None

    def __reduce__(self) -> tuple[Any, ...]:
        return ImplicitGemmIndiceData, (
            self.out_indices, self.indices, self.pair_fwd, self.pair_bwd,
            self.pair_mask_fwd_splits, self.pair_mask_bwd_splits, self.mask_argsort_fwd_splits,
            self.mask_argsort_bwd_splits, self.masks, *self._layer(), self.in_voxel_num,
            self.out_voxel_num,
        )  # fmt: skip

    @cached_property
    def kernel_map(self) -> KernelMap:
        """The map of the pair table, or the map of the layer's window."""
        if self.route is not None:
            return self._routed_map()
        return map_of_table(self.pair_fwd, self.indices.shape[0], self.out_indices.shape[0])

    @cached_property
    def _pair_tables(self) -> tuple[Tensor, Tensor]:
        return pair_tables(self.kernel_map)

    @cached_property
    def pair_fwd(self) -> Tensor:
        """Input row of each tap and output row, int32 ``[V, n_out]``, -1 where there is none."""
        return self._pair_tables[0]

    @cached_property
    def pair_bwd(self) -> Tensor:
        """Output row of each tap and input row, int32 ``[V, n_in]``, -1 where there is none."""
        return self._pair_tables[1]


Record = IndiceData | ImplicitGemmIndiceData


def record_type(algo: ConvAlgo) -> type[IndiceData] | type[ImplicitGemmIndiceData]:
    """Return the class of entry that a layer with ``algo`` makes."""
    return IndiceData if algo is ConvAlgo.Native else ImplicitGemmIndiceData
