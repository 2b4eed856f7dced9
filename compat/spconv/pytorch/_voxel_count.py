"""The ``record_voxel_count`` option that convolutions and poolings share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compat.spconv.pytorch.modules import SparseModule

_BUFFER = "max_num_voxels_during_training"


class CountsVoxels(SparseModule):
    """A layer that can keep its largest number of output sites in a buffer.

    Attributes:
        record_voxel_count: Whether the buffer ``max_num_voxels_during_training``, int32 ``[1]``,
            exists and follows training steps.
    """

    record_voxel_count: bool

    def _init_voxel_count(self, device: torch.device | str | None = None) -> None:
        if self.record_voxel_count:
            self.register_buffer(_BUFFER, torch.zeros(1, dtype=torch.int32, device=device))

    def get_max_num_voxels(self) -> Tensor | None:
        """Return the buffer of ``record_voxel_count``, or None."""
        return getattr(self, _BUFFER, None)

    def _count_voxels(self, feats: Tensor) -> None:
        if self.training:
            getattr(self, _BUFFER).clamp_(min=feats.shape[0])

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Load; a count that the checkpoint lacks is kept."""
        if self.record_voxel_count:
            state_dict.setdefault(prefix + _BUFFER, self.get_max_num_voxels())
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
