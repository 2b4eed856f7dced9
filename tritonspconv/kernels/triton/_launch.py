"""The one place that launches Triton kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def launch(
    kernel: Any, grid: tuple[int, ...], device: torch.device, *args: Tensor | Any, **meta: Any
) -> None:
    """Run a jitted kernel on ``device``.

    Args:
        kernel: The jitted function.
        grid: Programs per axis.
        device: Where the tensors are; made current for the launch when it is not.
        args: The kernel's run-time arguments, in order.
        meta: Its constexpr arguments and Triton's options.
    """
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](*args, enable_fp_fusion=True, **meta)
    else:
        kernel[grid](*args, enable_fp_fusion=True, **meta)
