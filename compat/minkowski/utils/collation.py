"""Collation of ``MinkowskiEngine.utils.collation``: samples to one batch.

Needs no GPU and no coordinate manager: worker processes may call it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from compat.minkowski._arrays import is_array
from compat.minkowski._errors import MinkowskiError
from compat.minkowski._int32 import to_int32

if TYPE_CHECKING:
    import numpy as np

_DTYPES = (torch.int32, torch.float32)


def batched_coordinates(
    coords: Sequence[np.ndarray | Tensor],
    dtype: torch.dtype = torch.int32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Stack coordinates and put the number of the sample in front.

    Args:
        coords: Coordinates [N_b, D] of each sample, of any real type.
        dtype: ``torch.int32``, which floors fractions, or ``torch.float32``, which keeps them.
        device: Device of the result. Default: the CPU.

    Returns:
        [sum of N_b, 1 + D].

    Raises:
        AssertionError: ``coords`` is no list or tuple, a sample has other axes, or the type is
            another.
    """
    dimension = _dimension("batched_coordinates", coords)
    if dtype not in _DTYPES:
        raise MinkowskiError(f"coordinates must be torch.int32 or torch.float32; got {dtype}.")
    n_rows = sum(len(sample) for sample in coords)
    batch = torch.empty(n_rows, 1 + dimension, dtype=dtype, device=device or "cpu")
    start = 0
    for index, sample in enumerate(coords):
        rows = batch[start : start + len(sample)]
        rows[:, 0] = index
        tensor = _tensor("coordinates", sample)
        rows[:, 1:] = to_int32(tensor) if dtype == torch.int32 else tensor
        start += len(sample)
    return batch


def sparse_collate(
    coords: Sequence[np.ndarray | Tensor],
    feats: Sequence[np.ndarray | Tensor],
    labels: Sequence[Any] | None = None,
    dtype: torch.dtype = torch.int32,
    device: torch.device | str | None = None,
) -> tuple[Any, ...]:
    """Make one batch of samples.

    Args:
        coords: Coordinates [N_b, D] of each sample.
        feats: Features [N_b, C] of each sample.
        labels: Labels of each sample; arrays and tensors are concatenated, anything else is listed.
        dtype: Type of the coordinates, ``torch.int32`` or ``torch.float32``.
        device: Device of the coordinates. Default: the CPU.

    Returns:
        Coordinates [N, 1 + D] with the number of the sample in front, features [N, C], and labels
        if there are any.

    Raises:
        AssertionError: An argument is no list or tuple, a sample is no array or tensor or has
            other axes, there are more features than coordinates or fewer, or the type is another.
    """
    arguments = {"coords": coords, "feats": feats}
    arguments |= {} if labels is None else {"labels": labels}
    for name, values in arguments.items():
        if not isinstance(values, Sequence):
            raise MinkowskiError(
                f"sparse_collate: {name} must be a list or tuple, one entry for each sample; got "
                f"{type(values).__name__}."
            )
    features = [_tensor("features", sample) for sample in feats]
    batch = batched_coordinates(coords, dtype, device)
    n_features = sum(len(sample) for sample in features)
    if len(batch) != n_features:
        raise MinkowskiError(
            f"sparse_collate: there must be as many features as coordinates; got {n_features} and "
            f"{len(batch)}."
        )
    if labels is None:
        return batch, torch.cat(features)
    tensors = [torch.from_numpy(y) if is_array(y) else y for y in labels]
    joined = torch.cat(tensors) if isinstance(tensors[0], Tensor) else tensors
    return batch, torch.cat(features), joined


def batch_sparse_collate(
    data: Sequence[tuple[Any, ...]],
    dtype: torch.dtype = torch.int32,
    device: torch.device | str | None = None,
) -> tuple[Any, ...]:
    """Make one batch of samples ``(coordinates, features)`` or with labels: a ``collate_fn``.

    Args:
        data: The samples; see :func:`sparse_collate`.
        dtype: Type of the coordinates.
        device: Device of the coordinates.
    """
    return sparse_collate(*zip(*data, strict=True), dtype=dtype, device=device)


class SparseCollation:
    """A ``collate_fn`` for samples ``(coordinates, features, labels)`` that can limit a batch.

    Args:
        limit_numpoints: Rows that a batch may have; the sample that exceeds it and those after it
            are left out, with a warning. No limit where it is not positive.
        dtype: Type of the coordinates.
        device: Device of the coordinates.
    """

    def __init__(
        self,
        limit_numpoints: int = -1,
        dtype: torch.dtype = torch.int32,
        device: torch.device | str | None = None,
    ) -> None:
        self.limit_numpoints = limit_numpoints
        self.dtype = dtype
        self.device = device

    def __call__(self, list_data: Sequence[tuple[Any, Any, Any]]) -> tuple[Any, ...]:
        """Make one batch; see :func:`sparse_collate`."""
        coords, feats, labels = zip(*list_data, strict=True)
        size = self._batch_size([len(sample) for sample in coords])
        return sparse_collate(
            coords[:size], feats[:size], labels[:size], dtype=self.dtype, device=self.device
        )

    def _batch_size(self, lengths: list[int]) -> int:
        """Return how many samples fit."""
        total = 0
        for size, length in enumerate(lengths):
            if 0 < self.limit_numpoints < total + length:
                logging.warning(
                    "SparseCollation: %d points exceed limit_numpoints=%d; keeping %d of %d "
                    "samples with %d points.",
                    sum(lengths),
                    self.limit_numpoints,
                    size,
                    len(lengths),
                    total,
                )
                return size
            total += length
        return len(lengths)


def _dimension(function: str, coords: Sequence[np.ndarray | Tensor]) -> int:
    """Return D of samples [N_b, D]."""
    if not isinstance(coords, Sequence):
        raise MinkowskiError(
            f"{function}: coordinates must be a list or tuple, one entry for each sample; got "
            f"{type(coords).__name__}."
        )
    shapes = [list(_tensor("coordinates", sample).shape) for sample in coords]
    if any(len(shape) != 2 for shape in shapes) or len({shape[1] for shape in shapes}) != 1:
        raise MinkowskiError(
            f"{function}: coordinates must be one or more samples [N, D] of the same D; got shapes "
            f"{shapes}."
        )
    return shapes[0][1]


def _tensor(what: str, sample: np.ndarray | Tensor) -> Tensor:
    if is_array(sample):
        return torch.from_numpy(sample)
    if not isinstance(sample, Tensor):
        raise MinkowskiError(
            f"{what} of a sample must be a numpy array or tensor; got {type(sample).__name__}."
        )
    return sample
