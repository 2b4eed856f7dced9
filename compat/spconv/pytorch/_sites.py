"""Where the rows of a SparseConvTensor lie, remembered for as long as that stays true."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from compat.spconv.pytorch._errors import SpconvError
from compat.spconv.pytorch._numbers import whole_number, whole_numbers
from compat.spconv.pytorch._repeats import RepeatedSites
from tritonspconv.coords import ActiveSites, Grid
from tritonspconv.coords.row_tensor import plain
from tritonspconv.debug import checks_coords

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from tritonspconv.geometry import ConvGeometry
    from tritonspconv.kernel_map import KernelMap


class LocatedSites:
    """An ``ActiveSites`` with the ``indices`` tensor and the box it was made from.

    Downstream code edits ``indices`` in place, and assigns ``indices``, ``spatial_shape`` and
    ``batch_size``. The engine's kernel maps then describe other sites. So :meth:`still_hold`
    compares everything before a map is used again:

    - On a CPU the engine has a copy of the coordinates, and all values are compared. NumPy, another
      process and ``.data`` can write to ``indices`` without a trace, and the comparison takes less
      than a hundredth of a layer's time.
    - On a GPU a comparison would wait for the device. The tensor must be the same object, with the
      same version: torch counts what is written through the tensor itself.
    - Inference tensors have no version. On a GPU the same object counts as unchanged. The engine
      has a copy, so that an edit never reaches another call.

    In the debug mode :func:`tritonspconv.debug.check_coords`, all devices compare values.

    Tensors that are made under ``torch.inference_mode`` cannot be saved for a backward pass. So
    sites that were located in one mode are not used in the other.

    Attributes:
        sites: The engine's coordinate set; owns the kernel maps that start from it.
        indices: int32 ``[N, 1 + ndim]``, the very tensor that users see.
        spatial_shape: Extents of the grid.
        batch_size: Number of samples.
        strided: Maps to other sites and those sites, by geometry.
        repeats: How rows share sites; None where each row has a site of its own.
    """

    def __init__(
        self, sites: ActiveSites, indices: Tensor, spatial_shape: tuple[int, ...], batch_size: int
    ) -> None:
        self.sites = sites
        self.indices = indices
        self.spatial_shape = spatial_shape
        self.batch_size = batch_size
        self.strided: dict[ConvGeometry, tuple[KernelMap, LocatedSites]] = {}
        self._version = None if indices.is_inference() else indices._version
        self._for_inference = torch.is_inference_mode_enabled()
        self._compares_values = _may_compare(indices) and indices is not sites.coords

    @classmethod
    def of(cls, indices: Tensor, spatial_shape: Sequence[int], batch_size: int) -> LocatedSites:
        """Hand ``indices`` of a user to the engine.

        Raises:
            SpconvError: The grid has too many cells, or an extent is not a whole number.
        """
        shape = whole_numbers("spatial_shape", spatial_shape)
        batch_size = whole_number("batch_size", batch_size)
        grid = _grid(shape, batch_size)
        coords = _copy(indices) if _needs_copy(indices) else indices
        located = cls(ActiveSites(coords, grid), indices, shape, batch_size)
        if checks_coords():
            located.sites.validate_bounds()
        return located

    @classmethod
    def generated(
        cls, sites: ActiveSites, spatial_shape: tuple[int, ...], batch_size: int
    ) -> LocatedSites:
        """Show the output sites of a layer to users."""
        coords = sites.coords
        indices = sites.as_rows(_copy(coords) if _needs_copy(coords) else coords)
        located = cls(sites, indices, spatial_shape, batch_size)
        located.repeats = None  # Generated sites do not repeat.
        return located

    @cached_property
    def repeats(self) -> RepeatedSites | None:
        """How rows share sites, found once; waits for the device."""
        return RepeatedSites(self.sites) if self.sites.has_repeats() else None

    def repeats_in(self, kernel_map: KernelMap) -> RepeatedSites | None:
        """How rows that take part in a map from or to these sites share them; may wait likewise."""
        known = "repeats" in vars(self)
        return self.repeats if known or kernel_map.has_repeats() else None

    def still_hold(self, indices: Tensor, spatial_shape: Sequence[int], batch_size: int) -> bool:
        """Return whether ``sites`` describe these values."""
        return (
            indices is self.indices
            and self._for_inference is torch.is_inference_mode_enabled()
            and self.batch_size == batch_size
            and self.spatial_shape == tuple(spatial_shape)
            and self._is_unchanged()
        )

    def to_share(self) -> LocatedSites | None:
        """Return these sites for another call that generates them; None where they are lost.

        A user of an earlier call may have written to ``indices``. Where the engine has a copy, the
        new call then shows a fresh one.
        """
        if self._is_unchanged() and (self._version is not None or self._compares_values):
            return self
        if self.indices is self.sites.coords:
            return None
        return self.generated(self.sites, self.spatial_shape, self.batch_size)

    def _is_unchanged(self) -> bool:
        """Return whether nobody wrote to ``indices``, as far as that can be known."""
        if self._compares_values:
            return torch.equal(plain(self.indices), self.sites.coords)
        return self._version is None or self._version == self.indices._version


def _grid(shape: tuple[int, ...], batch_size: int) -> Grid:
    try:
        return Grid((0,) * len(shape), shape, batch_size)
    except ValueError as error:
        raise SpconvError(str(error)) from error


def _may_compare(coords: Tensor) -> bool:
    """Return whether values may be compared: on a CPU, and in the debug mode."""
    return coords.device.type == "cpu" or checks_coords()


def _needs_copy(coords: Tensor) -> bool:
    """Return whether the engine has to have coordinates of its own."""
    return _may_compare(coords) or coords.is_inference()


def _copy(coords: Tensor) -> Tensor:
    return coords.clone(memory_format=torch.contiguous_format)


class IndiceDict(dict[Any, Any]):
    """An ``indice_dict`` that also remembers the sites of the tensors it was last used with.

    Downstream code rebuilds a tensor around the same ``indices`` and ``indice_dict`` at every
    feature-wise layer; without a key, the kernel maps would be lost each time.

    Attributes:
        located: Sites to try before new ones are made, or None.
    """

    __slots__ = ("located",)

    def __init__(self, entries: dict[Any, Any] | None = None) -> None:
        super().__init__(entries or ())
        self.located: LocatedSites | None = getattr(entries, "located", None)

    def __reduce__(self) -> tuple[Any, ...]:
        return IndiceDict, (dict(self),)
