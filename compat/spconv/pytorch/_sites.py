"""Sites of SparseConvTensors, which are kept as long as they describe their tensors."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import torch

from compat.spconv.pytorch._errors import SpconvError
from compat.spconv.pytorch._numbers import whole_number, whole_numbers
from compat.spconv.pytorch._paths import sites_along
from compat.spconv.pytorch._repeats import RepeatedSites
from tritonspconv.coords import ActiveSites, Grid
from tritonspconv.coords.row_tensor import plain, reads_values
from tritonspconv.debug import checks_coords

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from tritonspconv.kernel_map import KernelMap


class LocatedSites:
    """An ``ActiveSites`` with the ``indices`` tensor and the box it was made from.

    Downstream code edits ``indices`` in place, and assigns ``indices``, ``spatial_shape`` and
    ``batch_size``. The engine's kernel maps then describe other sites. For this reason
    :meth:`still_hold` compares everything before a map is used again:

    - On a CPU the engine has a copy of the coordinates, and all values are compared. NumPy, another
      process and ``.data`` can write to ``indices`` without a trace, and the comparison takes less
      than a hundredth of a layer's time.
    - On a GPU a comparison would wait for the device. The tensor must be the same object, with the
      same version: torch counts the writes that go through the tensor itself.
    - Inference tensors have no version. On a GPU the same object counts as unchanged. The engine
      has a copy, so that an edit never reaches another call.

    In the debug mode :func:`tritonspconv.debug.check_coords`, all devices compare values.

    Tensors that are made under ``torch.inference_mode`` cannot be saved for a backward pass. So
    sites that were located in one mode are not used in the other.

    A layer that ``torch.compile`` traced returns the coordinates alone. ``path`` then leads to the
    sites, which are found when somebody asks for them.

    Args:
        root: The sites from which the path starts; they own the kernel maps along it.
        indices: int32 ``[N, 1 + ndim]``, the very tensor that users see.
        spatial_shape: Extents of the grid.
        batch_size: Number of samples.
        version: Number of writes to ``indices`` when it described the sites; None: unknown.
        path: The strided layers from ``root`` to these sites, if a traced layer made them; see
            ``_paths.py``.

    Attributes:
        root, indices, spatial_shape, batch_size, version, path: The arguments.
        sites: The engine's coordinate set.
        repeats: The rows that share sites; None if each row has a site of its own.
    """

    def __init__(
        self,
        root: ActiveSites,
        indices: Tensor,
        spatial_shape: tuple[int, ...],
        batch_size: int,
        version: int | None,
        path: str = "",
    ) -> None:
        self.root = root
        self.indices = indices
        self.spatial_shape = spatial_shape
        self.batch_size = batch_size
        self.version = version
        self.path = path

    @classmethod
    def of(cls, indices: Tensor, spatial_shape: Sequence[int], batch_size: int) -> LocatedSites:
        """Hand ``indices`` of a user to the engine.

        Raises:
            SpconvError: The grid has too many cells, or an extent is not a whole number.
        """
        shape = whole_numbers("spatial_shape", spatial_shape)
        batch_size = whole_number("batch_size", batch_size)
        grid = _grid(shape, batch_size)
        may_compare = _may_compare(indices)
        # The engine needs coordinates of its own, if values are compared with them.
        coords = _copy(indices) if may_compare or indices.is_inference() else indices
        located = cls._at(ActiveSites(coords, grid), indices, may_compare)
        if checks_coords():
            located.sites.validate_bounds()
        return located

    @classmethod
    def generated(cls, sites: ActiveSites) -> LocatedSites:
        """Show the output sites of a layer to users.

        On a CPU every call shows another copy of the coordinates, so an edit reaches no other call.
        """
        indices = sites.as_rows(sites.coords)
        may_compare = _may_compare(indices)
        if may_compare or indices.is_inference():
            indices = _copy(indices)
        located = cls._at(sites, indices, may_compare)
        located.repeats = None  # Generated sites do not repeat.
        return located

    @classmethod
    def traced(
        cls,
        root: ActiveSites,
        path: str,
        indices: Tensor,
        spatial_shape: tuple[int, ...],
        batch_size: int,
    ) -> LocatedSites:
        """Return the sites that a strided layer makes while ``torch.compile`` traces it.

        Args:
            root: The sites from which the path starts.
            path: The strided layers from there, this layer included.
            indices: Coordinates of the sites, int32 ``[N, 1 + ndim]``.
            spatial_shape: Extents of the grid.
            batch_size: Number of samples.
        """
        located = cls(root, indices, spatial_shape, batch_size, 0, path)
        located.repeats = None  # Generated sites do not repeat.
        return located

    @classmethod
    def _at(cls, sites: ActiveSites, indices: Tensor, may_compare: bool) -> LocatedSites:
        """Return sites that are there now; for ``may_compare`` see :func:`_may_compare`."""
        grid, version = sites.grid, None if indices.is_inference() else indices._version
        located = cls(sites, indices, grid.shape, grid.batch_size, version)
        located.sites = sites
        located._for_inference = torch.is_inference_mode_enabled()
        located._compares_values = may_compare and indices is not sites.coords
        return located

    @cached_property
    def sites(self) -> ActiveSites:
        """The engine's coordinate set, found along the path."""
        return sites_along(self.root, self.path)

    @cached_property
    def _for_inference(self) -> bool:
        """True if the sites were located under ``torch.inference_mode``."""
        return self.indices.is_inference()

    @cached_property
    def _compares_values(self) -> bool:
        """True if the values of ``indices`` are compared with those of the sites."""
        return _may_compare(self.indices)

    @cached_property
    def repeats(self) -> RepeatedSites | None:
        """The rows that share sites, found once; waits for the device."""
        return RepeatedSites(self.sites) if self.sites.has_repeats() else None

    def repeats_in(self, kernel_map: KernelMap) -> RepeatedSites | None:
        """Return how rows that take part in a map share these sites; may wait for the device."""
        known = "repeats" in vars(self)
        return self.repeats if known or kernel_map.has_repeats() else None

    @property
    def are_distinct(self) -> bool:
        """True if no two rows share a site, and this is known already."""
        return "repeats" in self.__dict__ and self.__dict__["repeats"] is None

    def still_hold(self, indices: Tensor, spatial_shape: Sequence[int], batch_size: int) -> bool:
        """Return whether ``sites`` describe these values."""
        return (
            indices is self.indices
            and self._for_inference is torch.is_inference_mode_enabled()
            and self.batch_size == batch_size
            and self.spatial_shape == tuple(spatial_shape)
            and self._is_unchanged()
        )

    def still_describe(self, indices: Tensor) -> bool:
        """Return whether ``sites`` have the values of ``indices``; compares them."""
        return torch.equal(plain(indices), self.sites.coords)

    def _is_unchanged(self) -> bool:
        """Return whether ``indices`` is unchanged, as far as that can be known."""
        if self._compares_values:
            return torch.equal(plain(self.indices), self.sites.coords)
        return self.indices.is_inference() or self.version == self.indices._version


def _grid(shape: tuple[int, ...], batch_size: int) -> Grid:
    try:
        return Grid((0,) * len(shape), shape, batch_size)
    except ValueError as error:
        raise SpconvError(str(error)) from error


def _may_compare(coords: Tensor) -> bool:
    """Return whether values may be compared: on a CPU, and in the debug mode."""
    return (coords.device.type == "cpu" or checks_coords()) and reads_values(coords)


def _copy(coords: Tensor) -> Tensor:
    return coords.clone(memory_format=torch.contiguous_format)


class HasSites(Protocol):
    """The attributes of a recorded kernel map that an ``indice_dict`` reads."""

    located: LocatedSites | None
    out_located: LocatedSites | None


class IndiceDict(dict[Any, Any]):
    """An ``indice_dict``: recorded kernel maps by ``indice_key``, and the sites of its tensor.

    This is the one keeper of sites. Each layer hands its output a dict of its own, and downstream
    code that rebuilds a tensor around the same ``indices`` passes the dict on. So the kernel maps
    that start from the sites live as long as the dict. Any other dict that users assign serves as
    well, and keeps no sites: a layer then builds its map again at every call.

    Attributes:
        located: The sites that were located last, or None.
    """

    __slots__ = ("located",)

    def __init__(self, entries: dict[Any, HasSites] | None = None) -> None:
        super().__init__(entries or ())
        self.located: LocatedSites | None = getattr(entries, "located", None)

    def locate(
        self, indices: Tensor, spatial_shape: Sequence[int], batch_size: int
    ) -> LocatedSites:
        """Return the sites of ``indices``: known ones if they still describe it, or new ones."""
        located = self.located
        if located is None or not located.still_hold(indices, spatial_shape, batch_size):
            for located in self._recorded():
                if located.still_hold(indices, spatial_shape, batch_size):
                    break
            else:
                located = LocatedSites.of(indices, spatial_shape, batch_size)
            self.located = located
        return located

    def _recorded(self) -> Iterator[LocatedSites]:
        """Yield the sites at both ends of every recorded map."""
        for record in self.values():
            for located in (record.located, record.out_located):
                if located is not None:
                    yield located

    def copy(self) -> IndiceDict:
        """Return a dict of the same records and sites."""
        return IndiceDict(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return IndiceDict, (dict(self),)
