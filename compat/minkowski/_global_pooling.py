"""Global pooling: all rows of each sample to one."""

from __future__ import annotations

from torch import Tensor

from compat.minkowski._errors import MinkowskiError
from compat.minkowski._keys import CoordinateMapKey
from compat.minkowski._samples import place_of
from compat.minkowski.enums import PoolingMode
from compat.minkowski.MinkowskiCommon import (
    KNOWN_DIMENSION,
    MinkowskiModuleBase,
    renamed_arguments,
)
from compat.minkowski.MinkowskiCoordinateManager import CoordinateManager, given_manager
from compat.minkowski.MinkowskiSparseTensor import (
    Coordinates,
    SparseTensor,
    _get_coordinate_map_key,
)
from compat.minkowski.MinkowskiTensorField import TensorField
from tritonspconv import ops
from tritonspconv.guide import more
from tritonspconv.ops.pool import PoolMode


def _global_mode(mode: PoolingMode) -> PoolMode:
    """Return the reduction of a global pooling mode; the mode's algorithm has no effect."""
    modes: tuple[PoolMode, ...] = ("sum", "avg", "max")
    for reduction in modes:
        if mode.name.startswith(f"GLOBAL_{reduction.upper()}"):
            return reduction
    raise MinkowskiError(f"a global pool needs a GLOBAL mode; got {mode!s}.")


def _pool_samples(
    features: Tensor,
    mode: PoolMode,
    key: CoordinateMapKey,
    manager: CoordinateManager,
    origin: CoordinateMapKey,
    is_field: bool,
) -> Tensor:
    """Return one row for each site of an origin; ``key`` is the key of a map or of a field."""
    samples = manager._samples_at(origin)
    assert samples is not None
    if is_field:
        batch_index, is_sorted = manager._field(key).batch_index, False
    else:
        found = manager._map(key)
        batch_index, is_sorted = found.batch_index, found.batch_ascends
    places = place_of(batch_index, samples)
    return ops.global_pool(features, places, len(samples), mode, is_sorted=is_sorted)


_renamed = renamed_arguments(
    dimension=KNOWN_DIMENSION,
    D=KNOWN_DIMENSION,
    average="MinkowskiGlobalAvgPooling or MinkowskiGlobalSumPooling",
)


@_renamed
class MinkowskiGlobalPooling(MinkowskiModuleBase):
    """Reduce all rows of each sample to one row at the origin, of tensor stride 0.

    There is a row for each batch index that occurs in the coordinates of the manager, ascending;
    where none is missing, row ``b`` is sample ``b``. A sample that lost its rows, as by pruning,
    gives 0.

    Args:
        mode: One of ``PoolingMode.GLOBAL_*``.

    Raises:
        MinkowskiError: The mode is another.
    """

    def __init__(self, mode: PoolingMode = PoolingMode.GLOBAL_AVG_POOLING_PYTORCH_INDEX) -> None:
        super().__init__()
        if not isinstance(mode, PoolingMode):
            raise MinkowskiError(f"mode must be a PoolingMode; got {mode!r}.")
        self.pooling_mode = mode
        self._reduction: PoolMode = _global_mode(mode)
        self.pooling = self._own_function = MinkowskiGlobalPoolingFunction()

    def forward(
        self, input: SparseTensor | TensorField, coordinates: Coordinates | None = None
    ) -> SparseTensor:
        """Pool; ``coordinates`` may name the map of the output, one site per sample."""
        if not isinstance(input, (SparseTensor, TensorField)):
            raise MinkowskiError(
                f"{type(self).__name__} takes a SparseTensor or TensorField; got "
                f"{type(input).__name__}." + more("sparse-input")
            )
        manager = input.coordinate_manager
        is_field = isinstance(input, TensorField)
        key = manager.origin_field() if is_field else manager.origin()
        if self.pooling is not self._own_function:
            features = self.pooling.apply(
                input.F, self.pooling_mode, input.coordinate_key, key, manager
            )
        else:
            features = _pool_samples(
                input.F, self._reduction, input.coordinate_key, manager, key, is_field
            )
        if coordinates is not None and isinstance(input, SparseTensor):
            key = _get_coordinate_map_key(input, coordinates)
            if manager.size(key) != len(features):
                raise MinkowskiError(
                    f"{type(self).__name__}: coordinates must hold one site for each of "
                    f"{len(features)} samples; got {manager.size(key)}."
                )
        return SparseTensor._on(features, key, manager)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(mode={self.pooling_mode!s})"


@_renamed
class MinkowskiGlobalSumPooling(MinkowskiGlobalPooling):
    """Sum over all rows of each sample; see :class:`MinkowskiGlobalPooling`."""

    def __init__(self, mode: PoolingMode = PoolingMode.GLOBAL_SUM_POOLING_PYTORCH_INDEX) -> None:
        super().__init__(mode)


@_renamed
class MinkowskiGlobalAvgPooling(MinkowskiGlobalPooling):
    """Mean over all rows of each sample; see :class:`MinkowskiGlobalPooling`."""

    def __init__(self, mode: PoolingMode = PoolingMode.GLOBAL_AVG_POOLING_PYTORCH_INDEX) -> None:
        super().__init__(mode)


@_renamed
class MinkowskiGlobalMaxPooling(MinkowskiGlobalPooling):
    """Maximum over all rows of each sample; see :class:`MinkowskiGlobalPooling`."""

    def __init__(self, mode: PoolingMode = PoolingMode.GLOBAL_MAX_POOLING_PYTORCH_INDEX) -> None:
        super().__init__(mode)


class MinkowskiGlobalPoolingFunction:
    """Global pooling of features, called as the original's autograd function is."""

    # Without instance attributes, a patched ``apply`` is an error, not ignored.
    __slots__ = ()

    @staticmethod
    def apply(
        input_features: Tensor,
        pooling_mode: PoolingMode,
        in_coordinate_map_key: CoordinateMapKey,
        out_coordinate_map_key: CoordinateMapKey | None = None,
        coordinate_manager: CoordinateManager | None = None,
    ) -> Tensor:
        """Pool features of a map or of a field; an unset output key becomes the origin's.

        Where a map and a field have one key, ``input_features`` belong to the one with as many
        rows, and to the map where both have.
        """
        manager = given_manager("MinkowskiGlobalPoolingFunction", coordinate_manager)
        is_field = manager._is_field(in_coordinate_map_key, len(input_features))
        key = manager.origin_field() if is_field else manager.origin()
        features = _pool_samples(
            input_features,
            _global_mode(pooling_mode),
            in_coordinate_map_key,
            manager,
            key,
            is_field,
        )
        if out_coordinate_map_key is not None and not out_coordinate_map_key.is_key_set():
            out_coordinate_map_key.set_key(*key.get_key())
        return features


class MinkowskiDirectMaxPoolingFunction:
    """Maximum over listed pairs, called as the original's autograd function is."""

    @staticmethod
    def apply(
        in_map: Tensor, out_map: Tensor, in_feat: Tensor, out_nrows: int, is_sorted: bool = False
    ) -> Tensor:
        """Return ``out[o] = max of in_feat[i]`` over pairs ``(i, o)``, [out_nrows, C]."""
        taken = in_feat[in_map.long()]
        return ops.global_pool(taken, out_map.long(), out_nrows, "max", is_sorted=is_sorted)
