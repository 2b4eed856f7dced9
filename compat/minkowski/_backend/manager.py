"""``CoordinateManager._manager``: the names of the original's compiled manager."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from compat.minkowski._keys import CoordinateMapKey
from compat.minkowski.enums import RegionType

if TYPE_CHECKING:
    from compat.minkowski.MinkowskiCoordinateManager import CoordinateManager

# These methods take the same arguments, in the same order, as the coordinate manager's methods.
_SAME = frozenset({
    "exists_field_to_sparse", "field_to_sparse_insert_and_map", "field_to_sparse_keys",
    "field_to_sparse_map", "get_coordinate_field", "get_coordinates", "get_field_to_sparse_map",
    "insert_and_map", "insert_field", "origin", "origin_field", "origin_field_map", "origin_map",
    "size", "stride", "stride_map", "union_map",
})  # fmt: skip


class CoordinateMapManager:
    """Methods of a coordinate manager in the signatures of the original's compiled manager.

    Downstream code calls them as ``coordinate_manager._manager.size(key)``.

    Args:
        manager: The coordinate manager.
    """

    def __init__(self, manager: CoordinateManager) -> None:
        self._own = manager

    def __getattr__(self, name: str) -> Any:
        if name in _SAME:
            return getattr(self._own, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}.")

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *_SAME]

    def get_coordinate_map_keys(self, tensor_stride: Sequence[int]) -> list[CoordinateMapKey]:
        """Return the keys of the maps of a tensor stride."""
        steps = tuple(tensor_stride)
        return [CoordinateMapKey.of(value) for value in self._own._maps if value[0] == steps]

    def get_random_string_id(
        self, tensor_stride: Sequence[int], string_id: str
    ) -> tuple[list[int], str]:
        """Return a tensor stride and an unused id; ``string_id`` is not read."""
        return self._own.get_unique_coordinate_map_key(tensor_stride).get_key()

    def interpolation_map_weight(
        self, samples: Tensor, key: CoordinateMapKey
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return map rows, samples and weights; arguments in the compiled manager's order."""
        return self._own.interpolation_map_weight(key, samples)

    def kernel_map(
        self,
        in_key: CoordinateMapKey,
        out_key: CoordinateMapKey,
        kernel_size: Sequence[int],
        kernel_stride: Sequence[int],
        kernel_dilation: Sequence[int],
        region_type: RegionType,
        offset: Tensor,
        is_transpose: bool,
        is_pool: bool,
    ) -> dict[int, Tensor]:
        """Return a kernel map by tap; arguments in the compiled manager's order."""
        return self._own.kernel_map(
            in_key, out_key, kernel_stride, kernel_size, kernel_dilation, region_type,
            offset if offset.numel() else None, is_transpose, is_pool,
        )  # fmt: skip

    def origin_map_size(self) -> int:
        """Return the number of samples."""
        return self._own.number_of_unique_batch_indices()

    def print_coordinate_map(self, key: CoordinateMapKey) -> str:
        """Return the key and the number of its rows as text."""
        return f"{key}: {self._own.size(key)}x{1 + self._own.D}"

    def __repr__(self) -> str:
        return repr(self._own)
