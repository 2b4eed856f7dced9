"""Tile shapes of the matrix kernels: a fixed choice by channels, dtype and rows. Nothing tunes."""

from __future__ import annotations

import functools
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


class Card(NamedTuple):
    """What tile shapes depend on.

    Attributes:
        is_amd: An AMD card, through ROCm.
        shared_bytes: Shared memory (AMD: LDS) that one program may use.
    """

    is_amd: bool
    shared_bytes: int


# Hopper's; also what the interpreter is given.
_DEFAULT_CARD = Card(is_amd=False, shared_bytes=227 * 1024)


@functools.lru_cache(maxsize=64)
def card_of(device: torch.device) -> Card:
    """Return what tiles must fit on ``device``."""
    if device.type != "cuda":
        return _DEFAULT_CARD
    properties = torch.cuda.get_device_properties(device)
    # Without the opt-in, CUDA allows 48 KiB; ROCm has no such distinction.
    most = getattr(properties, "shared_memory_per_block_optin", 0)
    return Card(bool(torch.version.hip), most or properties.shared_memory_per_block)


def _padded(channels: int, most: int) -> int:
    return min(max(next_power_of_2(channels), 16), most)


def _channel_step(c_in: int, most: int) -> int:
    """Return how many input channels a step takes: ``most``, or half if that leaves less over."""
    return most // 2 if c_in > most and c_in % most else _padded(c_in, most)


def _fitted(config: GemmConfig, bytes_per_entry: int, card: Card) -> GemmConfig:
    """Return the config with steps, then stages, that the card's shared memory holds."""
    # Rows are gathered by indices that are loaded first, so half of the stages hold rows; one less
    # where no wgmma reads them.
    spare = 0 if card.shared_bytes >= _DEFAULT_CARD.shared_bytes else 1
    block_k, stages = config.block_k, config.num_stages

    def fits() -> bool:
        bytes_per_step = (config.block_m + config.block_n) * block_k * bytes_per_entry
        return max((stages + 1) // 2 - spare, 1) * bytes_per_step + 2048 <= card.shared_bytes

    # Short steps cost less than a gather that is waited for.
    while block_k > 32 and not fits():
        block_k //= 2
    while stages > 2 and not fits():
        stages -= 1
    return config._replace(block_k=block_k, num_stages=stages)


def gather_gemm_config(
    card: Card,
    log2_rows: int,
    c_in: int,
    c_out: int,
    dtype: torch.dtype,
    parts: int = 0,
    one_row: bool = False,
) -> GemmConfig:
    """Choose the tile of :func:`gather_gemm`.

    Args:
        card: Where it runs.
        log2_rows: Bits of the number of output rows.
        c_in: Input channels.
        c_out: Output channels.
        dtype: Of the operands.
        parts: float16 parts of each operand, or 0.
        one_row: Whether a column of the table has one entry at most.
    """
    config = _gather_gemm_tile(card, log2_rows, c_in, c_out, dtype.itemsize, parts)
    if one_row and dtype.itemsize == 2 and not parts and c_in <= 2 * config.block_k:
        # Two steps at most, and nothing to run ahead of: more programs at a time instead.
        config = config._replace(num_stages=min(config.num_stages, 3))
    return _fitted(config, dtype.itemsize * max(parts, 1), card)


def _gather_gemm_tile(
    card: Card, log2_rows: int, c_in: int, c_out: int, itemsize: int, parts: int
) -> GemmConfig:
    if itemsize == 8:
        return GemmConfig(32, _padded(c_out, 32), 16, 4, 2)
    wide = itemsize > 2
    if card.is_amd:
        most = 64 if wide else 128
        return GemmConfig(most, _padded(c_out, most), _padded(c_in, 32), 4, 2)
    # The gather needs five stages in flight, since the index load before it takes one.
    if parts == 2:
        # Three accumulators and twice the operands.
        if c_out > 64:
            return GemmConfig(128, 128, _channel_step(c_in, 64 if c_in % 8 == 0 else 32), 8, 5)
        return GemmConfig(64, _padded(c_out, 64), _channel_step(c_in, 32), 4, 5)
    block_n = _padded(c_out, 64 if wide else 256)
    # 32-bit operands: half the channels per step for the same shared memory.
    block_k = _channel_step(c_in, 32 if wide else 64)
    small = (num_blocks(c_out, block_n) << log2_rows) < 264 * 128
    block_m = 64 if wide or small else 128
    if block_n < 256 or small:
        # Half a step of several needs as many bytes in flight.
        stages = 7 if block_k < 64 and c_in > 64 and not wide else 5
        return GemmConfig(block_m, min(block_n, 128), block_k, 4, stages)
    return GemmConfig(block_m, block_n, block_k, 8, 7)


def weight_grad_config(
    card: Card, c_in: int, c_out: int, dtype: torch.dtype, parts: int = 0
) -> GemmConfig:
    """Choose the tile of :func:`weight_grad`; arguments as for :func:`gather_gemm_config`."""
    config = _weight_grad_tile(card, c_in, c_out, dtype.itemsize, parts)
    return _fitted(config, dtype.itemsize * max(parts, 1), card)


def _weight_grad_tile(card: Card, c_in: int, c_out: int, itemsize: int, parts: int) -> GemmConfig:
    if itemsize == 8:
        return GemmConfig(_padded(c_in, 32), _padded(c_out, 32), 16, 4, 2)
    if card.is_amd:
        most = 64 if itemsize > 2 else 128
        return GemmConfig(_padded(c_in, most), _padded(c_out, most), 32, 4, 2)
    # Matrix units cut products off that are small beside others of their step and its sum, always
    # towards zero. In float32 that is the largest error, and shorter steps make it smaller; see
    # docs/accuracy.md.
    if itemsize > 2 and not parts:
        return GemmConfig(_padded(c_in, 64), _padded(c_out, 64), 16, 4, 8)
    # Two accumulators, three for parts: eight warps where a tile has more than 64 x 64 entries.
    warps = 8 if max(c_in, c_out) > 64 else 4
    if parts == 2:
        return GemmConfig(_padded(c_in, 128), _padded(c_out, 128), 16, warps, 8)
    block_m, block_n = _padded(c_in, 128), _padded(c_out, 256)
    # The gather of rows bounds large tiles: a tile of 256 channels reads a fourth less.
    return GemmConfig(block_m, block_n, 64 if block_n == 256 else 128, warps, 5)


def is_in_two_levels(config: GemmConfig) -> bool:
    """Return whether registers hold a second accumulator for a tile of :func:`weight_grad`."""
    return config.block_m * config.block_n <= 2**14
