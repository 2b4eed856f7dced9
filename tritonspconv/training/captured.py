"""Networks as CUDA graphs, which the first step of training and of validation make."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tritonspconv.capture import Captured, capture

# Each process that compiles kernels takes some 400 MB and a second to start.
_MOST_COMPILERS = 8


class CapturedNetwork:
    """Runs a network through `tritonspconv.capture`; the first calls make the graphs.

    There is one graph for training and one for validation. The room for voxels of each is twice the
    number of voxels in its first batch, rounded up to a power of two. Batches that do not fit, and
    calls with other settings, run eagerly. On a CPU the network runs on padded rows, with equal
    results.

    Args:
        run: Takes the network, features ``[N, C]``, coordinates ``[N, 4]`` and the settings, and
            returns a tensor.
    """

    def __init__(self, run: Callable[..., Tensor]) -> None:
        self.run = run
        self._of_mode: dict[bool, _OfMode] = {}

    def __call__(
        self, network: nn.Module, feats: Tensor, coords: Tensor, **settings: Any
    ) -> Tensor:
        """Return the result of ``run``."""
        trains = network.training
        if trains != torch.is_grad_enabled():
            return self.run(network, feats, coords, **settings)
        found = self._of_mode.get(trains)
        if found is None:
            found = _OfMode(settings, self._capture(network, feats, coords, settings))
            self._of_mode[trains] = found
        if settings != found.settings:
            return self.run(network, feats, coords, **settings)
        return found.fast(feats=feats, indices=coords)

    def _capture(
        self, network: nn.Module, feats: Tensor, coords: Tensor, settings: dict[str, Any]
    ) -> Captured:
        def of_this_network(feats: Tensor, indices: Tensor) -> Tensor:
            return self.run(network, feats, indices, **settings)

        room = 1 << (2 * len(feats) - 1).bit_length()
        return capture(
            of_this_network, feats=feats, indices=coords, coords="indices", capacities=[room],
            modules=[network], compile_processes=min(_MOST_COMPILERS, os.cpu_count() or 1),
        )  # fmt: skip


class _OfMode(NamedTuple):
    """The captured network of training or of validation, and the settings it was captured with."""

    settings: dict[str, Any]
    fast: Captured
