"""SparseTensor: one row of features for every active site."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

from tritonspconv.arguments import check_tensor, whole_number, whole_numbers
from tritonspconv.coords import ActiveSites, Grid
from tritonspconv.coords.row_tensor import RowwiseError, bounds_of, reads_values
from tritonspconv.debug import checks_coords
from tritonspconv.graph_capture import is_traced, run_untraced
from tritonspconv.guide import more
from tritonspconv.ops.dense import from_dense, to_dense

CheckLevel = Literal["off", "full"]


class SparseTensor:
    """Features [N, C] at the active sites of a grid.

    A sparse tensor can be pickled and sent to another process; the copy builds its own index and
    kernel maps. In a worker process of a DataLoader, run layers under ``torch.no_grad()``: torch
    does not send features that have a graph, and the loader then waits forever.

    Operations return new tensors. Those that keep the rows share the ``sites``, and with them the
    index and the kernel maps made so far. The tensor has its own copy of ``coords``: you may edit
    the tensor that you passed, but do not write to the sparse tensor's ``coords``.

    Args:
        feats: [N, C], any dtype.
        coords: int32 [N, 1 + D], batch index first; or :class:`ActiveSites` to share.
        spatial_shape: Cells along each axis of a grid that starts at the origin and is a wall:
            nothing is computed outside it. None: the unbounded grid around ``coords``, which may be
            negative; finding it waits for the device once.
        batch_size: Number of samples. None: one more than the largest batch index, for which the
            host waits for the device once.
        check: ``"full"``: also check the values of ``coords``: inside the grid, no repeats. Waits
            for the device. Inside :func:`tritonspconv.debug.check_coords` every new tensor checks
            that its ``coords`` lie in the grid.

    Example:
        >>> coords = torch.tensor([[0, 1, 2, 3], [0, 2, 2, 2]], dtype=torch.int32)
        >>> x = SparseTensor(torch.ones(2, 4), coords, spatial_shape=(4, 4, 4), batch_size=1)
        >>> x
        SparseTensor(feats=[2, 4] torch.float32 on cpu, batch_size=1,
                     spatial_shape=(s0=4, s1=4, s2=4))
        >>> len(x), x.half().dtype
        (2, torch.float16)

    Raises:
        TypeError: ``feats`` or ``coords`` is no tensor, ``coords`` is not int32, or a size is no
            whole number.
        ValueError: Shapes, rows or devices disagree, or a full check fails.
    """

    __slots__ = ("__weakref__", "_feats", "_sites")

    def __init__(
        self,
        feats: Tensor,
        coords: Tensor | ActiveSites,
        *,
        spatial_shape: Sequence[int] | None = None,
        batch_size: int | None = None,
        check: CheckLevel = "off",
    ) -> None:
        if check not in get_args(CheckLevel):
            raise ValueError(
                f"SparseTensor: check must be one of {get_args(CheckLevel)}; got {check!r}."
            )
        if type(coords) is ActiveSites:
            if spatial_shape is not None or batch_size is not None:
                raise ValueError(
                    "SparseTensor: active sites bring their own grid; spatial_shape and "
                    "batch_size must be None."
                )
            sites = coords
        else:
            sites = _sites(cast("Tensor", coords), spatial_shape, batch_size)
        _check_feats(feats, sites)
        feats = sites.as_rows(feats)
        if check == "full":
            sites.validate()
        elif type(coords) is not ActiveSites and checks_coords():
            sites.validate_bounds()
        self._feats = feats
        self._sites = sites

    @classmethod
    def from_dense(cls, x: Tensor, *, channels_first: bool = True) -> SparseTensor:
        """Return the cells of a dense tensor in which any channel is not zero.

        Args:
            x: ``[batch_size, C, *shape]``, or ``[batch_size, *shape, C]``.
            channels_first: Layout of ``x``.
        """
        feats, coords = from_dense(x, channels_first=channels_first)
        shape = x.shape[2:] if channels_first else x.shape[1:-1]
        return cls(feats, coords, spatial_shape=tuple(shape), batch_size=x.shape[0])

    @property
    def feats(self) -> Tensor:
        """Features [N, C]."""
        return self._feats

    @property
    def sites(self) -> ActiveSites:
        """The active sites, one per row."""
        return self._sites

    @property
    def coords(self) -> Tensor:
        """Coordinates, int32 [N, 1 + D], batch index first. Do not write to them."""
        return self.sites.as_rows(self.sites.coords)

    @property
    def batch_index(self) -> Tensor:
        """Sample of each row, int32 [N]."""
        return self.coords[:, 0]

    @property
    def spatial_shape(self) -> tuple[int, ...]:
        """Cells along each spatial axis."""
        return self.sites.grid.shape

    @property
    def batch_size(self) -> int:
        """Number of samples."""
        return self.sites.grid.batch_size

    @property
    def ndim(self) -> int:
        """Number of spatial axes."""
        return self.sites.grid.ndim

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return self._feats.shape[0]

    @property
    def channels(self) -> int:
        """Number of channels."""
        return self.feats.shape[1]

    @property
    def device(self) -> torch.device:
        """Device of features and coordinates."""
        return self.feats.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the features."""
        return self.feats.dtype

    def _row_tensors(self) -> tuple[Tensor, Tensor]:
        """Return features and coordinates; see :class:`tritonspconv.has_rows.HasRows`."""
        return self._feats, self.coords

    def _grid_of_rows(self) -> str:
        """Return the grid, which is the same at every call of a captured function."""
        return str(self.sites.grid)

    def _with_row_tensors(self, feats: Tensor, coords: Tensor) -> SparseTensor:
        """Return other rows in the same grid, without kernel maps."""
        grid = self.sites.grid
        grid = grid if grid.bounded else _grid_of_run(coords) or grid
        return SparseTensor(feats, ActiveSites(coords, grid))

    def _rows_in_cells(self) -> tuple[Tensor, ActiveSites]:
        """Return features and sites."""
        return self._feats, self.sites

    # Coordinates count cells.
    _with_rows_in_cells = _with_row_tensors

    def replace(self, feats: Tensor) -> SparseTensor:
        """Return other features [N, C'] at the same sites."""
        _check_feats(feats, self._sites)
        made = object.__new__(SparseTensor)
        made._feats = feats
        made._sites = self._sites
        return made

    def dense(self, *, channels_first: bool = True) -> Tensor:
        """Return ``[batch_size, C, *spatial_shape]``, zero where no site is active.

        An unbounded grid begins at its lower corner, ``sites.grid.lower``.
        """
        return to_dense(self.feats, self.sites, channels_first=channels_first)

    def to(self, *args: Any, **kwargs: Any) -> SparseTensor:
        """Convert the features like :meth:`torch.Tensor.to`; coordinates follow the device.

        On another device the sites are new ones: they share no kernel maps with these.
        """
        feats = self.feats.to(*args, **kwargs)
        if feats is self.feats:
            return self
        if feats.device == self.device:
            return self.replace(feats)
        return SparseTensor(feats, ActiveSites(self.coords.to(feats.device), self.sites.grid))

    def half(self) -> SparseTensor:
        """Return the features as float16 at the same sites."""
        return self.to(torch.float16)

    def bfloat16(self) -> SparseTensor:
        """Return the features as bfloat16 at the same sites."""
        return self.to(torch.bfloat16)

    def float(self) -> SparseTensor:
        """Return the features as float32 at the same sites."""
        return self.to(torch.float32)

    def double(self) -> SparseTensor:
        """Return the features as float64 at the same sites."""
        return self.to(torch.float64)

    def cuda(self, device: int | torch.device | None = None) -> SparseTensor:
        """Return the tensor on a GPU; None: the current one."""
        if isinstance(device, int):
            device = torch.device("cuda", device)
        return self.to(torch.device("cuda") if device is None else device)

    def cpu(self) -> SparseTensor:
        """Return the tensor on the CPU."""
        return self.to("cpu")

    def detach(self) -> SparseTensor:
        """Return the features without their graph, sharing memory, at the same sites."""
        return self.replace(self.feats.detach())

    @property
    def shape(self) -> torch.Size:
        """Shape of the features: [N, C]."""
        return self.feats.shape

    def __len__(self) -> int:
        return self.num_rows

    def __add__(self, other: SparseTensor) -> SparseTensor:
        if not isinstance(other, SparseTensor):
            return NotImplemented
        if other.sites is not self.sites:
            if is_traced():
                # Equal sites are a guard of the graph, but different sites are not.
                return run_untraced(SparseTensor.__add__, self, other)
            raise ValueError(
                f"SparseTensor: + needs both operands at the same sites, made by layers from one "
                f"tensor; got {self} and {other}. For rows known to match, use "
                f"x.replace(x.feats + y.feats)." + more("same-sites")
            )
        return self.replace(self.feats + other.feats)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle features and sites; the sites leave indices and kernel maps behind."""
        return SparseTensor, (self._feats, self._sites)

    def __repr__(self) -> str:
        grid = self.sites.grid
        axes = ", ".join(f"s{axis}={extent}" for axis, extent in enumerate(grid.shape))
        bounds = "" if grid.bounded else f", lower={grid.lower}"
        return (
            f"SparseTensor(feats=[{self.num_rows}, {self.channels}] {self.dtype} on {self.device}, "
            f"batch_size={self.batch_size}, spatial_shape=({axes}){bounds})"
        )


def cat(tensors: Sequence[SparseTensor]) -> SparseTensor:
    """Return the channels of all tensors side by side, at their common sites.

    Args:
        tensors: At least one; all made by layers from one tensor, so that they share their sites.

    Returns:
        Features [N, sum of the channels].

    Raises:
        ValueError: There is no tensor, or the sites differ.

    Example:
        >>> coords = torch.tensor([[0, 1, 2, 3], [0, 2, 2, 2]], dtype=torch.int32)
        >>> x = SparseTensor(torch.ones(2, 4), coords, spatial_shape=(4, 4, 4), batch_size=1)
        >>> cat([x, x + x]).shape
        torch.Size([2, 8])
    """
    if not tensors:
        raise ValueError("cat: tensors must hold at least one SparseTensor; got none.")
    first = tensors[0]
    for number, other in enumerate(tensors):
        if other.sites is not first.sites:
            if is_traced():
                return run_untraced(cat, tensors)
            raise ValueError(
                "cat: all tensors must be at the same sites, made by layers from one tensor; got "
                f"{first} and, as number {number}, {other}. For rows known to match, use "
                "x.replace(torch.cat([x.feats, y.feats], dim=1))." + more("same-sites")
            )
    return first.replace(torch.cat([tensor.feats for tensor in tensors], dim=1))


def _check_feats(feats: Tensor, sites: ActiveSites) -> None:
    coords = sites.coords
    if not isinstance(feats, Tensor) or feats.ndim != 2 or feats.shape[0] != coords.shape[0]:
        check_tensor("SparseTensor: feats", feats)
        raise ValueError(
            f"SparseTensor: feats must have shape [{coords.shape[0]}, C], one row per coordinate; "
            f"got {list(feats.shape)}."
        )
    if feats.device != coords.device:
        raise ValueError(
            f"SparseTensor: feats and coords must share a device; got {feats.device} and "
            f"{coords.device}."
        )


def _sites(
    coords: Tensor, spatial_shape: Sequence[int] | None, batch_size: int | None
) -> ActiveSites:
    """Return the sites of a copy of ``coords`` in the grid that the arguments describe."""
    check_tensor("SparseTensor: coords", coords)
    if batch_size is not None:
        batch_size = whole_number("SparseTensor: batch_size", batch_size, least=0)
    if coords.dtype != torch.int32:
        raise TypeError(
            f"SparseTensor: coords must be int32; got {coords.dtype}. Convert with .int(), after "
            "rounding down if they are not whole." + more("int32-coords")
        )
    if coords.ndim != 2 or coords.shape[1] < 2:
        raise ValueError(
            "SparseTensor: coords must have shape [N, 1 + D], batch index first; got "
            f"{list(coords.shape)}."
        )
    coords = coords.clone(memory_format=torch.contiguous_format)
    grid = _grid_of_run(coords)
    if spatial_shape is None and grid is not None:
        return ActiveSites(coords, grid)
    if bounds_of(coords) is not None and (spatial_shape is None or batch_size is None):
        raise RowwiseError(
            "SparseTensor: a captured network needs spatial_shape and batch_size, since the box of "
            f"its coordinates must not depend on them; got {spatial_shape} and {batch_size}."
        )
    if spatial_shape is None:
        grid = Grid.around(coords)
        if batch_size is not None:
            if batch_size < grid.batch_size:
                raise ValueError(
                    f"SparseTensor: coords hold batch index {grid.batch_size - 1}, so batch_size "
                    f"must be at least {grid.batch_size}; got {batch_size}."
                )
            grid = dataclasses.replace(grid, batch_size=batch_size)
        return ActiveSites(coords, grid)
    ndim = coords.shape[1] - 1
    shape = whole_numbers("SparseTensor: spatial_shape", spatial_shape, ndim, least=0)
    if batch_size is None:
        batch_size = int(coords[:, 0].max()) + 1 if coords.shape[0] else 0
    return ActiveSites(coords, Grid((0,) * len(shape), shape, batch_size))


def _grid_of_run(coords: Tensor) -> Grid | None:
    """Return the grid that a recorded run has for tensors without one of their own, or None."""
    return None if reads_values(coords) else Grid.around(coords)
