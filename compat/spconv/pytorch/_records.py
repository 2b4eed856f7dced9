"""Entries of ``indice_dict``: a kernel map with the fields that spconv's entries show."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, NoReturn

import torch
from torch import Tensor

from compat.spconv.core import ConvAlgo
from compat.spconv.pytorch._pairs import pair_tables
from tritonspconv.kernel_map import KernelMap

if TYPE_CHECKING:
    from compat.spconv.pytorch._sites import LocatedSites


def pair_lists(kernel_map: KernelMap) -> tuple[Tensor, Tensor]:
    """Return a map as spconv's pair lists.

    Args:
        kernel_map: Any map.

    Returns:
        Pairs, int32 ``[2, V, n_in]``: input and output rows by tap, filled up with -1; and the
        number of pairs of each tap, int32 ``[V]``. A submanifold's central tap and both halves of
        its window are listed in full, where spconv leaves out what symmetry implies.
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
    """One kernel map under an ``indice_key``.

    Attributes:
        kernel_map: The engine's map from ``indices`` to ``out_indices``.
        indices, out_indices: The tensors of both sides as users see them.
        spatial_shape, out_spatial_shape: Lists of int.
        is_subm, algo, ksize, stride, padding, dilation: Those of the layer that made the entry.
        voxel_num: Always None, as for every ordinary network in spconv.
        located, out_located: The sites of both sides.
    """

    def __init__(
        self,
        kernel_map: KernelMap,
        located: LocatedSites,
        out_located: LocatedSites,
        *,
        is_subm: bool,
        algo: ConvAlgo,
        ksize: list[int],
        stride: list[int],
        dilation: list[int],
        padding: list[int],
    ) -> None:
        self.kernel_map = kernel_map
        self.located = located
        self.out_located = out_located
        self.indices = located.indices
        self.out_indices = out_located.indices
        self.spatial_shape = list(located.spatial_shape)
        self.out_spatial_shape = list(out_located.spatial_shape)
        self.is_subm = is_subm
        self.algo = algo
        self.ksize = ksize
        self.stride = stride
        self.dilation = dilation
        self.padding = padding
        self.voxel_num = None

    @cached_property
    def inverse_map(self) -> KernelMap:
        """The same pairs read from the outputs to the inputs."""
        return self.kernel_map.inverse()

    @cached_property
    def _pair_lists(self) -> tuple[Tensor, Tensor]:
        return pair_lists(self.kernel_map)

    @property
    def indice_pairs(self) -> Tensor:
        """Input and output rows by tap, int32 ``[2, V, n_in]``, -1 behind the last; built once."""
        return self._pair_lists[0]

    @property
    def indice_pair_num(self) -> Tensor:
        """Number of pairs of each tap, int32 ``[V]``."""
        return self._pair_lists[1]


class IndiceData(_Record):
    """Entry of layers whose ``algo`` is ``ConvAlgo.Native``."""


class ImplicitGemmIndiceData(_Record):
    """Entry of layers whose ``algo`` is an implicit GEMM; also lists pairs, like the other kind."""

    in_voxel_num = None
    out_voxel_num = None

    @cached_property
    def _pair_tables(self) -> tuple[Tensor, Tensor]:
        return pair_tables(self.kernel_map)

    @property
    def pair_fwd(self) -> Tensor:
        """Input row of each tap and output row, int32 ``[V, n_out]``, -1 where there is none."""
        return self._pair_tables[0]

    @property
    def pair_bwd(self) -> Tensor:
        """Output row of each tap and input row, int32 ``[V, n_in]``, -1 where there is none."""
        return self._pair_tables[1]

    def __getattr__(self, name: str) -> NoReturn:
        hint = ""
        if name.startswith(("mask", "pair_mask")):
            hint = ": masks belong to spconv's kernels; use .kernel_map, .pair_fwd or .indice_pairs"
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}{hint}")


def record_type(algo: ConvAlgo) -> type[IndiceData] | type[ImplicitGemmIndiceData]:
    """Return the class of entry that a layer with ``algo`` makes."""
    return IndiceData if algo is ConvAlgo.Native else ImplicitGemmIndiceData
