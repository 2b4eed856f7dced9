"""``spconv.test_utils``: helpers that tests of downstream projects import."""

from __future__ import annotations

import itertools
import unittest
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

__all__ = ["TestCase", "generate_sparse_data", "params_grid"]


class TestCase(unittest.TestCase):
    """``unittest.TestCase`` with comparisons of arrays."""

    # pytest collects classes of this name.
    __test__ = False

    def assertAllEqual(self, a: Any, b: Any) -> None:
        """Fail unless two arrays have one shape and the same values; NaN equals NaN."""
        import numpy as np

        np.testing.assert_equal(np.shape(a), np.shape(b))
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))

    def assertAllClose(
        self, a: Any, b: Any, rtol: float = 1e-6, atol: float = 1e-6, msg: str = ""
    ) -> None:
        """Fail unless ``|a - b| <= atol + rtol * |b|``, for arrays or for the values of dicts."""
        import numpy as np

        if isinstance(a, Mapping) != isinstance(b, Mapping):
            raise ValueError(f"expected two dicts or none; got {type(a)} and {type(b)}. {msg}")
        if isinstance(a, Mapping):
            np.testing.assert_equal(sorted(a), sorted(b), err_msg=msg)
            for key in a:
                self.assertAllClose(a[key], b[key], rtol, atol, f"{key}: {msg}")
            return
        np.testing.assert_equal(np.shape(a), np.shape(b), err_msg=msg)
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol, atol, err_msg=msg)


def params_grid(*params: Sequence[Any]) -> list[list[Any]]:
    """Return every combination of one entry of each sequence; the last one runs fastest."""
    return [list(combination) for combination in itertools.product(*params)]


def generate_sparse_data(
    shape: Sequence[int],
    num_points: Sequence[int],
    num_channels: int,
    integer: bool = False,
    data_range: tuple[float, float] = (-1, 1),
    with_dense: bool = True,
    dtype: Any = "float32",
    shape_scale: int = 1,
) -> dict[str, np.ndarray]:
    """Return random features at distinct cells, drawn by ``numpy.random``.

    Args:
        shape: Extents of the grid.
        num_points: Number of cells of each sample.
        num_channels: Channels.
        integer: Draw whole numbers.
        data_range: Smallest and largest value.
        with_dense: Also return the dense grid.
        dtype: Data type of the features.
        shape_scale: Use multiples of this number as coordinates only.

    Returns:
        ``features [N, C]``; ``indices`` int32 ``[N, D + 1]``, the coordinates and then the sample;
        and ``features_dense [B, C, *shape]``.
    """
    import numpy as np

    cells = np.stack(
        np.meshgrid(*[np.arange(n // shape_scale) for n in shape], indexing="ij"), axis=-1
    ).reshape(-1, len(shape))
    indices = []
    for sample, number in enumerate(num_points):
        # The state that np.random.seed sets, as in spconv.
        chosen = np.random.permutation(cells)[:number] * shape_scale  # noqa: NPY002
        indices.append(np.pad(chosen, ((0, 0), (0, 1)), constant_values=sample))
    where = np.concatenate(indices).astype(np.int32)
    draw: Any = np.random.randint if integer else np.random.uniform
    features = draw(*data_range, size=(len(where), num_channels)).astype(dtype)
    data = {"features": features, "indices": where}
    if with_dense:
        dense = np.zeros((len(num_points), num_channels, *shape), dtype=dtype)
        dense[(where[:, -1], slice(None), *where[:, :-1].T)] = features
        data["features_dense"] = dense
    return data
