"""The ``record_voxel_count`` option that convolutions and poolings share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compat.spconv.pytorch._module import SparseModule

MAX_NUM_VOXELS_DURING_TRAINING = "max_num_voxels_during_training"


class CountsVoxels(SparseModule):
    """A layer that can keep its largest number of output sites in a buffer.

    Attributes:
        record_voxel_count: True: the buffer ``max_num_voxels_during_training``, int32 ``[1]``,
            exists. Every call counts, in training and in evaluation, as in spconv.
    """

    record_voxel_count: bool

    def _init_voxel_count(self, device: torch.device | str | None = None) -> None:
        if self.record_voxel_count:
            self.register_buffer(
                MAX_NUM_VOXELS_DURING_TRAINING, torch.zeros(1, dtype=torch.int32, device=device)
            )

    def get_max_num_voxels(self) -> Tensor | None:
        """Return the buffer of ``record_voxel_count``, or None."""
        return getattr(self, MAX_NUM_VOXELS_DURING_TRAINING, None)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Load; a count that the checkpoint lacks is kept."""
        if self.record_voxel_count:
            name = prefix + MAX_NUM_VOXELS_DURING_TRAINING
            state_dict.setdefault(name, self.get_max_num_voxels())
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def count_voxels(layer: Any, rows: int) -> None:
    """Raise the count of a layer to ``rows``, if it counts."""
    count = getattr(layer, MAX_NUM_VOXELS_DURING_TRAINING, None)
    if count is not None:
        count.clamp_(min=rows)
