"""Precision of products, by Triton's names."""

from __future__ import annotations

import torch

from tritonspconv.kernels.triton.configs import Card


def dot_precision(precision: str, device_type: str, dtype: torch.dtype, card: Card) -> str:
    """Return Triton's ``input_precision`` for ``precision`` on this card.

    NVIDIA has no fast IEEE float32 product; the sum of three tf32 products keeps its accuracy.
    AMD and the interpreter multiply float32 exactly.
    """
    if dtype != torch.float32 or card.is_amd:
        return "ieee"
    if precision == "ieee" and device_type == "cuda":
        return "tf32x3"
    return precision
