"""Samples: the batch indices that occur in coordinates."""

from __future__ import annotations

import torch
from torch import Tensor

from compat.minkowski._errors import BATCH_INDEX_FIRST, MinkowskiError
from tritonspconv.coords.site_plan import Report, SitePlan

# Ascending batch indices. A range means that no index below the largest is missing.
Samples = range | tuple[int, ...]

# A list of tensors this long takes gigabytes.
_MAX_SAMPLES = 2**24


def check_samples(batch_size: int) -> None:
    """Check that results with an entry for each sample are possible.

    Raises:
        MinkowskiError: There are more than ``2**24``: the first column is no batch index.
    """
    if batch_size > _MAX_SAMPLES:
        raise MinkowskiError(
            f"batch indices must be less than {_MAX_SAMPLES} to list or pool every sample; got "
            f"{batch_size - 1}. {BATCH_INDEX_FIRST}"
        )


def occurring(batch_index: Tensor, batch_size: int) -> Samples:
    """Return the batch indices that occur.

    Args:
        batch_index: int [N], from 0 to ``batch_size - 1``.
        batch_size: One more than the largest; 0 where there are no rows. Beyond ``2**24`` all
            indices count as occurring, since no result has an entry for each of so many.

    Waits for the device where there are two samples or more.
    """
    if not 1 < batch_size <= _MAX_SAMPLES:
        return range(batch_size)
    occurs = torch.zeros(batch_size, dtype=torch.bool, device=batch_index.device)
    occurs.index_fill_(0, batch_index.long(), True)
    if bool(occurs.all()):
        return range(batch_size)
    return tuple(occurs.nonzero().flatten().tolist())


def report_others(batch_index: Tensor, samples: Samples, plan: SitePlan) -> None:
    """Report a bounded run in which other samples occur than in the example.

    Args:
        batch_index: int [N]; -1 for padding.
        samples: The samples of the example.
        plan: The plan of the run.

    Raises:
        MinkowskiError: The example misses a batch index below its largest.
    """
    if not isinstance(samples, range):
        raise MinkowskiError(
            f"capture: the example has rows of the samples {list(samples)} alone, and a global "
            "pool has a row for each sample that occurs. Capture with an example of all samples."
        )
    size = len(samples)
    index = batch_index.long()
    # Rows of no sample count for an additional sample, behind the others.
    index = torch.where((index >= 0) & (index < size), index, size)
    occurs = torch.zeros(size + 1, dtype=torch.bool, device=index.device)
    occurs = occurs.index_fill(0, index, True)
    plan.report(Report.SAMPLES, ~occurs[:size].all())


def joined(first: Samples, second: Samples) -> Samples:
    """Return the batch indices that are in either."""
    if isinstance(first, range) and isinstance(second, range):
        return max(first, second, key=len)
    both = sorted({*first, *second})
    return range(len(both)) if both[-1] == len(both) - 1 else tuple(both)


def place_of(batch_index: Tensor, samples: Samples) -> Tensor:
    """Return the place of each batch index among the samples, int [N].

    Args:
        batch_index: int [N]; every index is one of the samples.
        samples: The samples.
    """
    if isinstance(samples, range):
        return batch_index
    # Bounded sites have the samples of the example, which are a range: see `report_others`.
    known = torch.tensor(samples, dtype=batch_index.dtype, device=batch_index.device)
    return torch.searchsorted(known, batch_index.contiguous(), out_int32=True)
