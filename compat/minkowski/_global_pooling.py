"""Global pooling: all rows of each sample to one."""

from __future__ import annotations

from torch import Tensor

from compat.minkowski._errors import MinkowskiError
from compat.minkowski._keys import CoordinateMapKey
from compat.minkowski.enums import PoolingMode
from compat.minkowski.MinkowskiCommon import (
    KNOWN_DIMENSION,
    MinkowskiModuleBase,
    renamed_arguments,
)
from compat.minkowski.MinkowskiCoordinateManager import CoordinateManager
from compat.minkowski.MinkowskiSparseTensor import (
    Coordinates,
    SparseTensor,
    _get_coordinate_map_key,
)
from compat.minkowski.MinkowskiTensorField import TensorField
from tritonspconv import ops
from tritonspconv.ops.pool import PoolMode


def _global_mode(mode: PoolingMode) -> PoolMode:
    """Return the reduction of a global pooling mode; how it is computed changes nothing."""
    modes: tuple[PoolMode, ...] = ("sum", "avg", "max")
    for reduction in modes:
        if mode.name.startswith(f"GLOBAL_{reduction.upper()}"):
            return reduction
    raise MinkowskiError(f"a global pool needs a GLOBAL mode; got {mode!s}.")


def _pool_samples(
    features: Tensor, mode: PoolMode, key: CoordinateMapKey, manager: CoordinateManager
) -> Tensor:
    """Return one row for each site of the origin."""
    found, n_samples = manager._map(key), manager.size(manager.origin())
    return ops.global_pool(
        features, found.batch_index, n_samples, mode, is_sorted=found.batch_ascends
    )


_renamed = renamed_arguments(
    dimension=KNOWN_DIMENSION,
    D=KNOWN_DIMENSION,
    average="MinkowskiGlobalAvgPooling or MinkowskiGlobalSumPooling",
)


@_renamed
class MinkowskiGlobalPooling(MinkowskiModuleBase):
    """Reduce all rows of each sample to one row at the origin, of tensor stride 0.

    Row ``b`` of the output is sample ``b``; a sample without rows gives 0.

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

    def forward(
        self, input: SparseTensor | TensorField, coordinates: Coordinates | None = None
    ) -> SparseTensor:
        """Pool; ``coordinates`` may name the map of the output, one site per sample."""
        if not isinstance(input, (SparseTensor, TensorField)):
            raise MinkowskiError(
                f"{type(self).__name__} takes a SparseTensor or TensorField; got "
                f"{type(input).__name__}."
            )
        manager = input.coordinate_manager
        if isinstance(input, TensorField):
            key = manager.origin_field()
            batch = manager._field(input.coordinate_key).batch_index
            features = ops.global_pool(input.F, batch, manager.size(key), self._reduction)
        else:
            key = manager.origin()
            features = _pool_samples(input.F, self._reduction, input.coordinate_key, manager)
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

    @staticmethod
    def apply(
        input_features: Tensor,
        pooling_mode: PoolingMode,
        in_coordinate_map_key: CoordinateMapKey,
        out_coordinate_map_key: CoordinateMapKey | None,
        coordinate_manager: CoordinateManager,
    ) -> Tensor:
        """Pool; an output key that is not set becomes the origin's."""
        key = coordinate_manager.origin()
        features = _pool_samples(
            input_features, _global_mode(pooling_mode), in_coordinate_map_key, coordinate_manager
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
