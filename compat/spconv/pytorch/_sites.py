"""Where the rows of a SparseConvTensor lie, remembered for as long as that stays true."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

from compat.spconv.pytorch._repeats import RepeatedSites
from tritonspconv.coords import ActiveSites, Grid

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from tritonspconv.geometry import ConvGeometry
    from tritonspconv.kernel_map import KernelMap


class LocatedSites:
    """An ``ActiveSites`` with the ``indices`` tensor, its version and the box it was made from.

    Downstream code edits ``indices`` in place and reassigns it, ``spatial_shape`` and
    ``batch_size``. What the engine cached then describes other sites, so everything is compared
    before it is used again.

    Attributes:
        sites: The engine's coordinate set; owns the kernel maps that start from it.
        indices: int32 ``[N, 1 + ndim]``, the very tensor that users see.
        version: ``indices._version`` at the time; None for inference tensors, which have none.
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
        self.version = None if indices.is_inference() else indices._version
        self.spatial_shape = spatial_shape
        self.batch_size = batch_size
        self.strided: dict[ConvGeometry, tuple[KernelMap, LocatedSites]] = {}

    @classmethod
    def of(cls, indices: Tensor, spatial_shape: Sequence[int], batch_size: int) -> LocatedSites:
        """Hand ``indices`` to the engine."""
        shape = tuple(spatial_shape)
        grid = Grid((0,) * len(shape), shape, batch_size)
        return cls(ActiveSites(indices, grid), indices, shape, batch_size)

    @cached_property
    def repeats(self) -> RepeatedSites | None:
        """How rows share sites, found once; waits for the device."""
        return RepeatedSites(self.sites) if self.sites.has_repeats() else None

    def repeats_in(self, kernel_map: KernelMap) -> RepeatedSites | None:
        """How rows that take part in a map from or to these sites share them; may wait likewise."""
        known = "repeats" in vars(self)
        return self.repeats if known or kernel_map.has_repeats() else None

    def still_hold(self, indices: Tensor, spatial_shape: Sequence[int], batch_size: int) -> bool:
        """Return whether ``sites`` describe these values; never for inference tensors."""
        return (
            indices is self.indices
            and self.version is not None
            and self.version == indices._version
            and self.batch_size == batch_size
            and self.spatial_shape == tuple(spatial_shape)
        )

    @property
    def unchanged(self) -> bool:
        """Whether nobody wrote into ``indices`` since; False where that cannot be known."""
        return self.version is not None and self.version == self.indices._version


class IndiceDict(dict[Any, Any]):
    """An ``indice_dict`` that also remembers the sites of the tensors it was last used with.

    Downstream code rebuilds a tensor around the same ``indices`` and ``indice_dict`` at every
    feature-wise layer; without a key, the kernel maps would be lost each time.

    Attributes:
        located: Sites to try before making new ones, or None.
    """

    __slots__ = ("located",)

    def __init__(self, entries: dict[Any, Any] | None = None) -> None:
        super().__init__(entries or ())
        self.located: LocatedSites | None = getattr(entries, "located", None)

    def __reduce__(self) -> tuple[Any, ...]:
        return IndiceDict, (dict(self),)
