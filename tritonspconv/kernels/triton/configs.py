"""Tile shapes of the matrix kernels: a fixed choice by channels, dtype and number of rows."""

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
    """The properties of a card that tile shapes depend on.

    Attributes:
        is_amd: An AMD card, through ROCm.
        shared_bytes: Shared memory (AMD: LDS) that one program may use.
        warp_size: Threads of a warp (AMD: wave): 64 on CDNA, else 32.
    """

    is_amd: bool
    shared_bytes: int
    warp_size: int = 32


# A Hopper card; the interpreter gets it too.
_DEFAULT_CARD = Card(is_amd=False, shared_bytes=227 * 1024)


@functools.lru_cache(maxsize=64)
def card_of(device: torch.device) -> Card:
    """Return the properties of ``device`` that tiles must fit."""
    if device.type != "cuda":
        return _DEFAULT_CARD
    properties = torch.cuda.get_device_properties(device)
    # CUDA allows 48 KiB without the opt-in value; ROCm has one value only.
    most = getattr(properties, "shared_memory_per_block_optin", 0)
    shared_bytes = most or properties.shared_memory_per_block
    return Card(bool(torch.version.hip), shared_bytes, properties.warp_size)


def _padded(channels: int, most: int) -> int:
    return min(max(next_power_of_2(channels), 16), most)


def _channel_step(c_in: int, most: int) -> int:
    """Return a step's input channels: ``most``, or half if the last step would be short."""
    return most // 2 if c_in > most and c_in % most else _padded(c_in, most)


def _fitted(config: GemmConfig, bytes_per_entry: int, card: Card) -> GemmConfig:
    """Shorten the steps, then drop stages, until the tile fits the card's shared memory."""
    # Indices are loaded a stage before the rows that they name, so half of the stages hold rows;
    # one stage less on cards without wgmma.
    spare = 0 if card.shared_bytes >= _DEFAULT_CARD.shared_bytes else 1
    block_k, stages = config.block_k, config.num_stages

    def fits() -> bool:
        bytes_per_step = (config.block_m + config.block_n) * block_k * bytes_per_entry
        return max((stages + 1) // 2 - spare, 1) * bytes_per_step + 2048 <= card.shared_bytes

    # A short step costs less than a wait for a gather.
    while block_k > 32 and not fits():
        block_k //= 2
    while stages > 2 and not fits():
        stages -= 1
    return _in_registers(config._replace(block_k=block_k, num_stages=stages), card)


def _in_registers(config: GemmConfig, card: Card) -> GemmConfig:
    """Return the config with as many warps as hold the accumulators of its tile.

    The tiles were made for warpgroup products of Hopper and for waves of 64 threads. Cards with 32
    threads a warp and other products keep operands in registers too.
    """
    if card.warp_size == 32 and (card.is_amd or card.shared_bytes < 128 * 1024):
        entries = config.block_m * config.block_n
        if entries >= (2**12 if card.is_amd else 2**14):
            return config._replace(num_warps=8)
    return config


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
        card: The card that it runs on.
        log2_rows: Bits of the number of output rows.
        c_in: Input channels.
        c_out: Output channels.
        dtype: The dtype of the operands.
        parts: float16 parts of each operand, or 0.
        one_row: True: a column of the table has one entry at most.
    """
    config = _gather_gemm_tile(card, log2_rows, c_in, c_out, dtype.itemsize, parts)
    if one_row and dtype.itemsize == 2 and not parts and c_in <= 2 * config.block_k:
        # A tile has two steps at most: fewer stages leave room for more programs at a time.
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
    # The gather needs five stages in flight, because the load of the indices takes one.
    if parts == 2:
        # Two parts take three accumulators and twice the operands.
        if c_out > 64:
            return GemmConfig(128, 128, _channel_step(c_in, 64 if c_in % 8 == 0 else 32), 8, 5)
        return GemmConfig(64, _padded(c_out, 64), _channel_step(c_in, 32), 4, 5)
    block_n = _padded(c_out, 64 if wide else 256)
    # A step of 32-bit operands has half the channels, for the same shared memory.
    block_k = _channel_step(c_in, 32 if wide else 64)
    small = (num_blocks(c_out, block_n) << log2_rows) < 264 * 128
    block_m = 64 if wide or small else 128
    if block_n < 256 or small:
        # Short steps need more stages, to keep as many bytes in flight.
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
    is_rdna = card.is_amd and card.warp_size == 32
    if itemsize == 8:
        return GemmConfig(_padded(c_in, 32), _padded(c_out, 32), 16, 8 if is_rdna else 4, 2)
    if card.is_amd:
        most = 64 if itemsize > 2 else 128
        # RDNA has no matrix unit for float32: a step's operands are in registers.
        block_k = 16 if is_rdna and itemsize > 2 else 32
        return GemmConfig(_padded(c_in, most), _padded(c_out, most), block_k, 4, 2)
    # Matrix units truncate: within a step, they cut off bits of products that are small beside the
    # sum. This is the largest error in float32, and shorter steps make it smaller; see
    # docs/accuracy.md.
    if itemsize > 2 and not parts:
        return GemmConfig(_padded(c_in, 64), _padded(c_out, 64), 16, 4, 8)
    # A tile has two accumulators, or three for parts: more than 64 x 64 entries take eight warps.
    warps = 8 if max(c_in, c_out) > 64 else 4
    if parts == 2:
        return GemmConfig(_padded(c_in, 128), _padded(c_out, 128), 16, warps, 8)
    block_m, block_n = _padded(c_in, 128), _padded(c_out, 256)
    # The gather of rows bounds large tiles, and a tile of 256 channels reads a fourth less.
    return GemmConfig(block_m, block_n, 64 if block_n == 256 else 128, warps, 5)


def is_in_two_levels(config: GemmConfig) -> bool:
    """Return whether registers hold a second accumulator for a tile of :func:`weight_grad`."""
    return config.block_m * config.block_n <= 2**14
