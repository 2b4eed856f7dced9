"""Products with sparse matrices given by their entries: ``spmm`` and ``spmm_average``.

Deterministic, on every device; the host never waits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from compat.minkowski._errors import MinkowskiError
from compat.minkowski._names import module_getattr
from tritonspconv.ops.global_pool import global_pool


def spmm(
    rows: Tensor,
    cols: Tensor,
    vals: Tensor,
    size: Sequence[int],
    mat: Tensor,
    is_sorted: bool = False,
    cuda_spmm_alg: int = 1,
) -> Tensor:
    """Multiply a sparse matrix by a dense one. Differentiable in ``vals`` and ``mat``.

    Args:
        rows: Row of each entry [P], whole numbers of any type.
        cols: Column of each entry [P], whole numbers of any type.
        vals: Value of each entry [P] or [P, 1], of the type of ``mat``.
        size: Rows and columns of the sparse matrix.
        mat: Dense matrix [size[1], C].
        is_sorted: ``rows`` ascend.
        cuda_spmm_alg: Not read.

    Returns:
        [size[0], C].

    Raises:
        AssertionError: Lengths, types or devices disagree.
    """
    n_entries = len(rows)
    if len(cols) != n_entries or vals.shape not in ((n_entries,), (n_entries, 1)):
        raise MinkowskiError(
            "spmm: rows, cols and vals must have one entry each; got shapes "
            f"{list(rows.shape)}, {list(cols.shape)} and {list(vals.shape)}."
        )
    if vals.dtype != mat.dtype or vals.device != mat.device:
        raise MinkowskiError(
            f"spmm: vals and mat must share type and device; got {vals.dtype} on {vals.device} and "
            f"{mat.dtype} on {mat.device}."
        )
    products = mat[cols.long()] * vals.view(-1, 1)
    return global_pool(products, rows.long(), size[0], "sum", is_sorted=is_sorted)


def spmm_average(
    rows: Tensor, cols: Tensor, size: Sequence[int], mat: Tensor, cuda_spmm_alg: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Average the rows of ``mat`` that each row of a sparse matrix names. See :func:`spmm`.

    Returns:
        The averages [size[0], C]; the entries int64 [2, P], sorted by row; the weight of each [P].
    """
    ordered, perm = torch.sort(rows.long(), stable=True)
    columns = cols[perm].long()
    averages = global_pool(mat[columns], ordered, size[0], "avg", is_sorted=True)
    counts = torch.bincount(ordered, minlength=size[0])
    entries = torch.stack([ordered, columns])
    return averages, entries, counts[entries[0]].reciprocal().to(mat.dtype)


class MinkowskiSPMMFunction:
    """:func:`spmm`, called as the original's autograd function is."""

    @staticmethod
    def apply(
        rows: Tensor,
        cols: Tensor,
        vals: Tensor,
        size: Sequence[int],
        mat: Tensor,
        cuda_spmm_alg: int = 1,
    ) -> Tensor:
        """Multiply."""
        return spmm(rows, cols, vals, size, mat)


class MinkowskiSPMMAverageFunction:
    """:func:`spmm_average`, called as the original's autograd function is."""

    @staticmethod
    def apply(
        rows: Tensor, cols: Tensor, size: Sequence[int], mat: Tensor, cuda_spmm_alg: int = 1
    ) -> Tensor:
        """Return the averages."""
        return spmm_average(rows, cols, size, mat)[0]


__getattr__ = module_getattr(__name__)
