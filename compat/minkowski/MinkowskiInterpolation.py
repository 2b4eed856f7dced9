"""Features at points between sites."""

from __future__ import annotations

from torch import Tensor

from compat.minkowski._errors import MinkowskiError
from compat.minkowski._fields import corners
from compat.minkowski._keys import CoordinateMapKey
from compat.minkowski._names import module_getattr
from compat.minkowski.MinkowskiCommon import MinkowskiModuleBase
from compat.minkowski.MinkowskiCoordinateManager import CoordinateManager, given_manager
from compat.minkowski.MinkowskiSparseTensor import SparseTensor
from tritonspconv import ops


class MinkowskiInterpolationFunction:
    """Interpolation of features, called as the original's autograd function is."""

    # Without instance attributes, a patched ``apply`` is an error, not ignored.
    __slots__ = ()

    @staticmethod
    def apply(
        input_features: Tensor,
        tfield: Tensor,
        in_coordinate_map_key: CoordinateMapKey,
        coordinate_manager: CoordinateManager | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return features [M, C], map rows int32 [n], samples int32 [n] and weights [n].

        Raises:
            MinkowskiError: There is no coordinate manager.
        """
        manager = given_manager("MinkowskiInterpolationFunction", coordinate_manager)
        rows, weights = corners(manager._map(in_coordinate_map_key), tfield)
        features = ops.gather_weighted(input_features, rows, weights)
        sample, corner = (rows >= 0).nonzero(as_tuple=True)
        present = rows[sample, corner].int(), sample.int(), weights[sample, corner]
        return features, *present


class MinkowskiInterpolation(MinkowskiModuleBase):
    """Linear interpolation between the sites around a point.

    Sites are the ``2^D`` corners of a point's cell on the grid of the tensor stride. Absent corners
    count as 0, and the weights of the other corners do not change.

    Args:
        return_kernel_map: Return also the map rows and the samples of all products, int32 [n] each.
        return_weights: Return also their weights [n].
    """

    def __init__(self, return_kernel_map: bool = False, return_weights: bool = False) -> None:
        super().__init__()
        self.return_kernel_map = return_kernel_map
        self.return_weights = return_weights
        self.interp = self._own_function = MinkowskiInterpolationFunction()

    def forward(self, input: SparseTensor, tfield: Tensor) -> Tensor | tuple[object, ...]:
        """Return features [M, C] at points; also map and weights where the layer returns them.

        Args:
            input: [N, C].
            tfield: Points [M, 1 + D], floating point, batch index first.

        Differentiable in the features of ``input`` alone.

        Raises:
            MinkowskiError: Types or devices do not fit.
        """
        if not isinstance(input, SparseTensor) or tfield.device != input.device:
            raise MinkowskiError(
                f"MinkowskiInterpolation takes a SparseTensor and points on its device; got "
                f"{type(input).__name__} and points on {tfield.device}."
            )
        returns_more = self.return_kernel_map or self.return_weights
        if not (returns_more or self.interp is not self._own_function):
            found = input.coordinate_manager._map(input.coordinate_map_key)
            return ops.gather_weighted(input.F, *corners(found, tfield))
        features, rows, samples, weights = self.interp.apply(
            input.F, tfield, input.coordinate_map_key, input.coordinate_manager
        )
        if not returns_more:
            return features
        returned: tuple[object, ...] = (features,)
        if self.return_kernel_map:
            returned += ((rows, samples),)
        return (*returned, weights) if self.return_weights else returned

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


__getattr__ = module_getattr(__name__)
