"""Quantisation of ``MinkowskiEngine.utils.quantization``: points to voxels, on any device.

Needs no GPU, no coordinate manager and no global state: worker processes may call it.
"""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from compat.minkowski._arrays import is_array
from compat.minkowski._errors import MinkowskiError
from compat.minkowski._int32 import check_int32, to_int32
from compat.minkowski._names import module_getattr
from compat.minkowski._unique import unique_coordinates
from compat.minkowski.MinkowskiCommon import renamed_arguments
from tritonspconv.guide import more

if TYPE_CHECKING:
    import numpy as np

    Array = TypeVar("Array", np.ndarray, Tensor)

_FNV_OFFSET = 14695981039346656037
_FNV_PRIME = 1099511628211


def fnv_hash_vec(arr: np.ndarray) -> np.ndarray:
    """Return the 64-bit FNV hash uint64 [N] of every row of ``arr`` [N, K], as integers."""
    import numpy as np

    columns = _matrix("fnv_hash_vec", arr).astype(np.uint64).T
    hashes, prime = np.full(arr.shape[0], np.uint64(_FNV_OFFSET)), np.uint64(_FNV_PRIME)
    for column in columns:
        hashes = (hashes * prime) ^ column
    return hashes


def ravel_hash_vec(arr: np.ndarray) -> np.ndarray:
    """Return row-major cell numbers uint64 [N] of ``arr`` [N, K] within its own bounding box."""
    import numpy as np

    cells = _matrix("ravel_hash_vec", arr)
    cells = (cells - cells.min(0)).astype(np.uint64)
    extents = cells.max(0) + np.uint64(1)
    keys = np.zeros(arr.shape[0], dtype=np.uint64)
    for column, extent in zip(cells.T, extents, strict=True):
        keys = keys * extent + column
    return keys


def quantize(coords: Array) -> tuple[Array, Array]:
    """Find the first row of every distinct coordinate.

    Args:
        coords: [N, K]; a numpy array must be int32, a tensor is rounded down to it.

    Returns:
        ``unique_map`` and ``inverse_map``, in the container of ``coords`` (int32 for numpy, int64
        for torch): ``coords[unique_map][inverse_map] == coords``.

    Raises:
        AssertionError: ``coords`` is no array or tensor, or does not fit int32.
    """
    _matrix("quantize", coords)
    if isinstance(coords, Tensor):
        return unique_coordinates(to_int32(coords))
    import numpy as np

    if coords.dtype != np.int32:
        raise MinkowskiError(
            f"quantize: a numpy array must be int32; got {coords.dtype}." + more("int32-coords")
        )
    rows, inverse = unique_coordinates(torch.from_numpy(np.ascontiguousarray(coords)))
    return rows.int().numpy(), inverse.int().numpy()


@renamed_arguments(
    coords="coordinates",
    feats="features",
    hash_type="nothing: cells are compared whole",
)
def sparse_quantize(
    coordinates: np.ndarray | Tensor,
    features: np.ndarray | Tensor | None = None,
    labels: np.ndarray | Tensor | None = None,
    ignore_label: int = -100,
    return_index: bool = False,
    return_inverse: bool = False,
    return_maps_only: bool = False,
    quantization_size: float | Sequence[float] | np.ndarray | Tensor | None = None,
    device: str | torch.device = "cpu",
) -> Any:
    """Keep the first point of every voxel.

    All columns of ``coordinates`` count: a batch index is one more column. Points keep their order.

    Args:
        coordinates: [N, K] of any real type.
        features: [N, C]; the rows kept are returned in the container given.
        labels: [N]; the labels kept are returned in the container given. The label of a voxel is
            the label of its first point.
        ignore_label: Accepted and, as in the released 0.5.4, not read.
        return_index: Return the rows kept, int64 [U].
        return_inverse: Return the voxel of every point, int64 [N]; needs ``return_index``.
        return_maps_only: Return these maps alone.
        quantization_size: Edge of a voxel, one for all columns or one each. Default: 1.
        device: Device that finds the voxels and holds the result: ``"cpu"``, ``"cuda"``,
            ``"cuda:1"``, ...

    Returns:
        Coordinates int32 [U, K], always a tensor; features, labels, index and inverse where asked
        for, in this order. A single item comes bare, several as a tuple.

    Raises:
        AssertionError: Shapes disagree, or the inverse is asked for without the index.
        ValueError: ``quantization_size`` is of no known type or not positive, the device of another
            kind, or a cell has no int32 number.
    """
    _check_sparse_quantize(coordinates, features, labels)
    if return_inverse and not return_index:
        raise MinkowskiError("sparse_quantize: return_inverse=True needs return_index=True.")
    cells = _cells(coordinates, quantization_size).to(_device(device))
    unique_map, inverse_map = unique_coordinates(cells)
    maps = [unique_map] * (return_index or return_maps_only) + [inverse_map] * return_inverse
    if return_maps_only:
        return _bare(maps)
    kept = [_take(rows, unique_map) for rows in (features, labels) if rows is not None]
    return _bare([cells[unique_map], *kept, *maps])


def unique_coordinate_map(
    coordinates: Tensor, tensor_stride: int | Sequence[int] | np.ndarray = 1
) -> tuple[Tensor, Tensor]:
    """Find the first row of every distinct coordinate.

    Args:
        coordinates: int32 [N, 1 + D].
        tensor_stride: Ignored. In the original it labels a temporary coordinate map.

    Returns:
        ``unique_map`` int64 [U] and ``inverse_map`` int64 [N], on the device of ``coordinates``:
        ``coordinates[unique_map][inverse_map] == coordinates``.

    Raises:
        AssertionError: ``coordinates`` is no matrix.
        RuntimeError: It is not int32.
    """
    _matrix("unique_coordinate_map", coordinates)
    if coordinates.dtype != torch.int32:
        raise MinkowskiError(
            f"unique_coordinate_map: coordinates must be int32; got {coordinates.dtype}. "
            "Convert with .int()." + more("int32-coords")
        )
    return unique_coordinates(coordinates)


def _matrix(function: str, array: Array) -> Array:
    if not (isinstance(array, Tensor) or is_array(array)) or array.ndim != 2:
        got = getattr(array, "shape", None)
        raise MinkowskiError(
            f"{function}: a numpy array or tensor of two axes is expected; got "
            f"{type(array).__name__}{'' if got is None else f' of shape {list(got)}'}."
        )
    return array


def _check_sparse_quantize(coordinates: Any, features: Any, labels: Any) -> None:
    _matrix("sparse_quantize", coordinates)
    if features is not None:
        _matrix("sparse_quantize", features)
    for name, rows in (("features", features), ("labels", labels)):
        if rows is not None and len(rows) != coordinates.shape[0]:
            raise MinkowskiError(
                f"sparse_quantize: {name} must have {coordinates.shape[0]} rows, one for each "
                f"coordinate; got {len(rows)}."
            )


def _device(device: str | torch.device) -> torch.device:
    device = torch.device(device) if str(device).startswith(("cpu", "cuda")) else device
    if not isinstance(device, torch.device):
        raise MinkowskiError(f"sparse_quantize: device must be cpu or cuda; got {device!r}.")
    return device


def _cells(coordinates: Any, size: Any) -> Tensor:
    """Return ``floor(coordinates / size)`` as int32 [N, K], divided in the caller's precision."""
    if _is_list(size):
        if len(size) != coordinates.shape[1]:
            raise MinkowskiError(
                f"sparse_quantize: quantization_size must have {coordinates.shape[1]} entries, one "
                f"for each column of coordinates; got {len(size)}."
            )
        edges = [float(edge) for edge in size]
        _check_edges(edges)
        if isinstance(coordinates, Tensor):
            coordinates = coordinates / torch.tensor(edges, device=coordinates.device)
        else:
            import numpy as np

            coordinates = coordinates / np.array(edges)
    elif isinstance(size, numbers.Real):
        _check_edges([float(size)])
        # A division would turn integers beyond 2**24 into floats that cannot hold them.
        coordinates = coordinates if size == 1 else coordinates / size
    elif size is not None:
        raise MinkowskiError(
            "sparse_quantize: quantization_size must be a number or one for each column; got "
            f"{size!r}."
        )
    if isinstance(coordinates, Tensor):
        return to_int32(coordinates)
    import numpy as np

    cells = np.floor(coordinates)
    if cells.size:
        check_int32(cells.min(), cells.max())
    return torch.from_numpy(cells.astype(np.int32))


def _is_list(size: Any) -> bool:
    """Return whether ``size`` holds one number for each column."""
    return (isinstance(size, (Sequence, Tensor)) or is_array(size)) and not isinstance(size, str)


def _check_edges(edges: Sequence[float]) -> None:
    if not all(edge > 0 for edge in edges):
        raise MinkowskiError(
            f"sparse_quantize: quantization_size must be positive; got {[*map(float, edges)]}."
        )


def _take(rows: np.ndarray | Tensor, unique_map: Tensor) -> np.ndarray | Tensor:
    if isinstance(rows, Tensor):
        return rows[unique_map.to(rows.device)]
    return rows[unique_map.cpu().numpy()]


def _bare(items: list[Any]) -> Any:
    return items[0] if len(items) == 1 else tuple(items)


__getattr__ = module_getattr(__name__)
