"""ActiveSites: one set of coordinates, its index, and the cache of maps that start from it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tritonspconv.arguments import check_tensor
from tritonspconv.coords.grid import Grid
from tritonspconv.coords.row_tensor import RowBounds, as_rows, bounds_of, plain
from tritonspconv.coords.site_plan import Report
from tritonspconv.graph_capture import refuse_capture
from tritonspconv.guide import more
from tritonspconv.kernels.index import SiteIndex
from tritonspconv.kernels.sites import build_index, find_rows, sorted_index
from tritonspconv.opaque_types import OpaqueMeta, register_opaque
from tritonspconv.waits import wait_for_flag, wait_for_indices, wait_for_number, wait_for_values

if TYPE_CHECKING:
    from jaxtyping import Int, Int64, Shaped

_MAX_ROWS = 2**31 - 1
# A larger index on a GPU is made again for each map, in some 0.05 ms. If it were kept, a network
# would hold its memory until the last layer.
_MAX_KEPT_BYTES = 2**24


@register_opaque
class ActiveSites(metaclass=OpaqueMeta):
    """Coordinates in a grid, one row per active site.

    Args:
        coords: int32 [N, 1 + D], batch index first; kept by reference, so do not write to them.
        grid: The box the coordinates live in.
        index: A lookup index of ``coords``, if there is one already. A large one is not kept.
        bounds: The number of real rows, if ``coords`` are padded to a capacity; None: that of
            ``coords`` if they are a row tensor, else all.

    Attributes:
        coords: int32 [N, 1 + D], contiguous.
        grid, bounds: The arguments.
        count: Number of real rows, int64 [] on the device; None: all rows are real.
        device: Device of the coordinates.
        map_cache: The kernel maps that start from these sites; see
            :func:`tritonspconv.kernel_map.kernel_map`.
        walks: The sites to which paths of layers lead from here, by the name of the path: all sites
            on the way, with the version of their coordinates. Compiled graphs name sites so. None:
            nobody asked yet.

    Raises:
        TypeError: ``coords`` is not an int32 tensor.
        ValueError: Its shape does not match the grid, or it has more than 2**31 - 1 rows.
    """

    __slots__ = (
        "__weakref__", "_index", "_repeats", "_sorted_index", "bounds", "coords", "count", "device",
        "grid", "map_cache", "walks",
    )  # fmt: skip

    def __init__(
        self,
        coords: Tensor,
        grid: Grid,
        index: SiteIndex | None = None,
        bounds: RowBounds | None = None,
    ) -> None:
        refuse_capture("ActiveSites")
        check_tensor("ActiveSites: coords", coords)
        if coords.dtype != torch.int32:
            raise TypeError(
                f"coords must be int32; got {coords.dtype}. Convert with .int()."
                + more("int32-coords")
            )
        if coords.ndim != 2 or coords.shape[1] != 1 + grid.ndim:
            raise ValueError(
                f"coords must have shape [N, {1 + grid.ndim}] (batch index, then "
                f"{grid.ndim} spatial axes); got {list(coords.shape)}."
            )
        if coords.shape[0] > _MAX_ROWS:
            raise ValueError(f"at most 2**31 - 1 rows are supported; got {coords.shape[0]}.")
        self.bounds = bounds_of(coords) if bounds is None else bounds
        self.coords = plain(coords).contiguous()
        self.count = None if self.bounds is None else self.bounds.count
        self.device = coords.device
        self.grid = grid
        self._index = index if index is not None and _is_kept(index) else None
        # The answer of `has_repeats`: a bool, a flag on the device that was not read yet, or None.
        self._repeats: Tensor | bool | None = None
        if index is not None and index.kind == "bitmap":
            self._repeats = False
        self._sorted_index: SiteIndex | None = None
        self.map_cache: dict[Any, Any] = {}
        self.walks: dict[str, tuple[tuple[ActiveSites, int | None], ...]] | None = None

    def as_rows(self, values: Shaped[Tensor, "N ..."]) -> Shaped[Tensor, "N ..."]:
        """Return ``values`` [N, ...], a row for each site; as a row tensor if sites are bounded."""
        return values if self.bounds is None else as_rows(values, self.bounds)

    @property
    def num_rows(self) -> int:
        """Number of rows, padding included."""
        return self.coords.shape[0]

    @property
    def ndim(self) -> int:
        """Number of spatial axes."""
        return self.grid.ndim

    @property
    def version(self) -> int | None:
        """Number of writes to ``coords``; None for inference tensors, which count none."""
        return None if self.coords.is_inference() else self.coords._version

    @property
    def index(self) -> SiteIndex:
        """The lookup index; built on first use, and kept unless it is large."""
        index = self._take_index()
        if _is_kept(index):
            self._index = index
        elif self._repeats is None:
            # The index is dropped; keep only its repeat flag.
            self._repeats = index.table[-1].clone()
        return index

    @property
    def may_repeat(self) -> bool:
        """True if a map has to search for repeated rows. Does not wait.

        False for generated sites, and after :meth:`has_repeats` found no repeated row. Always True
        for an index of sorted keys, where the search costs nothing.
        """
        held = self._index
        return self._repeats is not False or (held is not None and held.kind == "sorted")

    @property
    def unread_repeats(self) -> Tensor | None:
        """The repeat flag on the device, int64 []; None if it was read, or does not exist yet.

        If you read this flag during another synchronisation, pass it to :meth:`note_repeats`.
        """
        held = self._index
        if self.count is not None:
            return None
        if self._repeats is None and held is not None and held.kind == "pages":
            return held.table[-1]
        return self._repeats if isinstance(self._repeats, Tensor) else None

    def note_repeats(self, repeats: bool) -> None:
        """Keep the value that was read from :attr:`unread_repeats`."""
        self._repeats = repeats

    def report_repeats(self, flag: Tensor) -> None:
        """Let the plan of bounded sites report the run if ``flag``, on the device, is not zero."""
        assert self.bounds is not None, "only bounded sites have a plan"
        self.bounds.plan.report(Report.REPEATS, flag)

    def has_repeats(self) -> bool:
        """Return whether two rows lie in one cell of the grid. Waits for the device, once.

        Bounded sites do not wait: they answer that no row repeats, and leave it to the plan to
        report the run if that was wrong.
        """
        if self.bounds is not None and self.bounds.plan.builder is not None:
            self.bounds.plan.builder.inspect(self)
            return False
        if self._repeats is None:
            # Keep the index for the next map, even a large one.
            index = self._index = self._take_index()
            if index.kind == "sorted":
                keys = index.table
                # Rows outside the grid share one key, which lies behind those of all cells.
                self._repeats = ((keys[1:] == keys[:-1]) & (keys[1:] < self.grid.num_cells)).any()
            else:
                self._repeats = index.table[-1]
        if self.count is not None and isinstance(self._repeats, Tensor):
            self.report_repeats(self._repeats)
            self._repeats = False
        self._repeats = wait_for_flag(self._repeats)
        return self._repeats

    def _take_index(self) -> SiteIndex:
        index, self._index = self._index, None
        if index is None:
            index = build_index(self.coords, self.grid)
        return index

    def rows_of(self, coords: Int[Tensor, "M axes"]) -> Int64[Tensor, "M"]:
        """Return the row of each of ``coords`` int [M, 1 + D], int64 [M]; -1 where it is no site.

        If several rows repeat a site, the result is the lowest. This is a binary search on every
        device; the keys are sorted on first use and kept.
        """
        index = self._sorted_index or self._index
        if index is None or index.kind != "sorted":
            index = sorted_index(self.coords, self.grid)
        self._sorted_index = index
        return find_rows(index, self.grid.keys(coords))

    def validate_bounds(self) -> Int64[Tensor, "N"]:
        """Check that every real row is inside the grid, and return its key, int64 [N].

        Waits for the device.

        Raises:
            ValueError: Names the first row outside.
        """
        keys = self.grid.keys(self.coords)
        if self.count is not None:
            keys = keys[: wait_for_number(self.count)]
        (outside,) = wait_for_indices(keys < 0)
        if outside.numel():
            row = wait_for_number(outside[0])
            raise ValueError(
                f"{outside.numel()} of {self.num_rows} coordinates lie outside the grid "
                f"(batch size {self.grid.batch_size}, lower {self.grid.lower}, shape "
                f"{self.grid.shape}); the first is row {row}: "
                f"{wait_for_values(self.coords[row])}. "
                "Is the axis order that of spatial_shape?" + more("outside-grid")
            )
        return keys

    def validate(self) -> None:
        """Check that every row is inside the grid and that no coordinate repeats.

        Waits for the device. Kernels are safe without this check: such rows take part in no map.

        Raises:
            ValueError: Names the first offending rows.
        """
        keys = self.validate_bounds()
        ordered, rows = torch.sort(keys, stable=True)
        (repeated,) = wait_for_indices(ordered[1:] == ordered[:-1])
        if repeated.numel():
            first, second = wait_for_values(rows[repeated[0] + torch.arange(2, device=rows.device)])
            raise ValueError(
                f"{repeated.numel()} of {self.num_rows} coordinates repeat an earlier row; rows "
                f"{first} and {second} are both {wait_for_values(self.coords[first])}. Merge them "
                "first, e.g. with voxelize()." + more("repeated-coords")
            )

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle coordinates and grid; a copy makes its index and its kernel maps again."""
        return ActiveSites, (self.coords, self.grid)

    def __repr__(self) -> str:
        """Return rows, dimension and grid."""
        return f"ActiveSites({self.num_rows} rows, {self.grid}, device={self.device})"


def _is_kept(index: SiteIndex) -> bool:
    return index.kind == "sorted" or index.num_bytes <= _MAX_KEPT_BYTES
