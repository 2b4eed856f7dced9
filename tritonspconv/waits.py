"""Reads of the device by the host.

Each function waits until the device has computed the value. ``coords`` and ``kernel_map`` wait in
two other places: ``site_sets.py`` calls ``torch.unique``, and ``kernels/sites.py`` reads the number
of output sites.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def wait_for_number(value: Tensor) -> int:
    """Return an integer tensor of one entry as an int."""
    return int(value)


def wait_for_flag(flag: Tensor | bool) -> bool:
    """Return whether ``flag``, a tensor of one entry, is not zero; a bool needs no wait."""
    return bool(flag)


def wait_for_values(values: Tensor) -> list[Any]:
    """Return the entries of a tensor as nested lists."""
    return values.tolist()


def wait_for_indices(mask: Tensor) -> tuple[Tensor, ...]:
    """Return where a bool tensor is True: for each of its axes int64 [M], with M read first."""
    return torch.nonzero(mask, as_tuple=True)
