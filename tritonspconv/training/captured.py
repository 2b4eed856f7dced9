"""Networks in training as CUDA graphs, which the first step makes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tritonspconv.capture import Captured, capture


class CapturedTraining:
    """Runs a network; in training through `tritonspconv.capture`, made at the first call.

    The room for voxels is twice the number of voxels in the first batch, rounded up to a power of
    two. Batches that do not fit, calls with other settings, and validation run eagerly. On a CPU
    the network runs on padded rows, with equal results.

    Args:
        run: Takes the network, features ``[N, C]``, coordinates ``[N, 4]`` and the settings, and
            returns a tensor.
    """

    def __init__(self, run: Callable[..., Tensor]) -> None:
        self.run = run
        self._settings: dict[str, Any] = {}
        self._fast: Captured | None = None

    def __call__(
        self, network: nn.Module, feats: Tensor, coords: Tensor, **settings: Any
    ) -> Tensor:
        """Return the result of ``run``."""
        if not (network.training and torch.is_grad_enabled()):
            return self.run(network, feats, coords, **settings)
        if self._fast is None:
            self._settings = settings
            room = 1 << (2 * len(feats) - 1).bit_length()

            def of_this_network(feats: Tensor, indices: Tensor) -> Tensor:
                return self.run(network, feats, indices, **settings)

            self._fast = capture(
                of_this_network, feats=feats, indices=coords, coords="indices", capacities=[room],
                modules=[network],
            )  # fmt: skip
        if settings != self._settings:
            return self.run(network, feats, coords, **settings)
        return self._fast(feats=feats, indices=coords)
