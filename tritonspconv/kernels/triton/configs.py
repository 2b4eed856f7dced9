"""Tile shapes of the matrix kernels: a fixed choice by channels, dtype and rows. Nothing tunes."""

from __future__ import annotations

from typing import NamedTuple

import torch

from tritonspconv.kernels.triton._blocks import next_power_of_2, num_blocks


class GemmConfig(NamedTuple):
    """Tile of one program and its launch options.

    ``block_m``: output rows (fwd, dgrad) or input channels (wgrad). ``block_n``: output channels.
    ``block_k``: input channels (fwd, dgrad) or pairs (wgrad) per step.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


def on_amd() -> bool:
    """Return whether torch drives AMD GPUs, which have 64 KiB of shared memory per block."""
    return bool(torch.version.hip)


def _padded(channels: int, most: int) -> int:
    return min(max(next_power_of_2(channels), 16), most)


def gather_gemm_config(n_out: int, c_in: int, c_out: int, dtype: torch.dtype) -> GemmConfig:
    """Choose the tile of :func:`gather_gemm`.

    NVIDIA, 16-bit: the gather needs five stages in flight, since the index load before it takes
    one. 32-bit: half the channels per step for the same shared memory.
    """
    if dtype.itemsize == 8:
        return GemmConfig(32, _padded(c_out, 32), 16, 4, 2)
    wide = dtype.itemsize > 2
    if on_amd():
        return GemmConfig(
            64 if wide else 128, _padded(c_out, 64 if wide else 128), _padded(c_in, 32), 4, 2
        )
    block_n = _padded(c_out, 64 if wide else 256)
    block_k = _padded(c_in, 32 if wide else 64)
    small = num_blocks(n_out, 128) * num_blocks(c_out, block_n) < 264
    block_m = 64 if wide or small else 128
    if block_n == 256:
        return GemmConfig(block_m, 128 if small else 256, block_k, 4 if small else 8, 5)
    return GemmConfig(block_m, block_n, block_k, 4, 5)


def weight_grad_config(c_in: int, c_out: int, dtype: torch.dtype) -> GemmConfig:
    """Choose the tile of :func:`weight_grad`."""
    if dtype.itemsize == 8:
        return GemmConfig(_padded(c_in, 32), _padded(c_out, 32), 16, 4, 2)
    most = 64 if dtype.itemsize > 2 else 128
    block_k = 32 if dtype.itemsize > 2 or on_amd() else 64
    return GemmConfig(_padded(c_in, most), _padded(c_out, most), block_k, 4, 2 if on_amd() else 5)
