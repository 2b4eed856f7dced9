"""Batch norm of training over the rows of a matrix, with residual and ReLU behind it (Triton).

Forward and backward take two launches each. The first launch cuts the rows into strips and sums
each strip. Every program of the second launch adds up all strips, in one order, and then changes
its rows. Backward needs to know where the ReLU passed, and computes the norm again for that. After
a residual, backward reads the output instead. In that case the first launch writes the gradient in
front of the ReLU, which is the residual's gradient and the input of the second launch.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritonspconv.kernels.channel_norm import TrainingNorm
from tritonspconv.kernels.triton._blocks import next_power_of_2, num_blocks
from tritonspconv.kernels.triton._bounds import real_rows
from tritonspconv.kernels.triton._launch import BoundKernel, bind

# Elements of a tile, and its most rows and channels.
_TILE, _MAX_ROWS, _MAX_CHANNELS = 4096, 256, 32
_NUM_WARPS = 8
# The most strips of rows: a program holds the sums of all strips at once.
_STRIPS: tl.constexpr = tl.constexpr(256)
# The most programs that change rows, over all channels: four for each multiprocessor of an H200.
_WRITERS = 528


@triton.jit
def _tile(number, n, c, offs_c, mask_c, BLOCK_N: tl.constexpr):
    """Return where a tile of rows begins, int64; the places of its elements; the mask of n rows."""
    first = number * BLOCK_N
    rows = tl.arange(0, BLOCK_N)
    # [BLOCK_N, BLOCK_C]
    mask = (first + rows < n)[:, None] & mask_c[None, :]
    return first.to(tl.int64) * c, rows[:, None] * c + offs_c[None, :], mask


@triton.jit
def _store_tile(ptr, value, real, number, n, c, offs_c, mask_c, BLOCK_N: tl.constexpr):
    """Store a tile of ``n`` rows; rows outside ``real`` are padding, and become zero."""
    start, offs, mask = _tile(number, n, c, offs_c, mask_c, BLOCK_N)
    value = tl.where(real, value, 0.0)
    tl.store(ptr + start + offs, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _load_tile(ptr, offs, mask):
    return tl.load(ptr + offs, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _load_channels(ptr, offs_c, mask_c, default: tl.constexpr):
    """Load a vector of channels, float32 [BLOCK_C]; ``default`` where there is none."""
    if ptr is None:
        loaded = tl.full(offs_c.shape, default, tl.float32)
    else:
        loaded = tl.load(ptr + offs_c, mask=mask_c, other=default).to(tl.float32)
    return loaded


@triton.jit
def _scaled(x, mean, inverse_std, weight, bias):
    """Return normalised rows, and those after weight and bias; forward and backward alike."""
    normal = (x - mean[None, :]) * inverse_std[None, :]
    return normal, normal * weight[None, :] + bias[None, :]


@triton.jit(do_not_specialize=["n", "tiles"])
def moments_kernel(
    feats_ptr,
    strips_ptr,
    count_ptr,
    n,
    c,
    tiles,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Write mean and sum of squared deviations of ``tiles`` tiles of rows, float32 [2, c]."""
    n = real_rows(count_ptr, n)
    strip = tl.program_id(0)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < c
    mean = tl.zeros((BLOCK_C,), tl.float32)
    square = tl.zeros((BLOCK_C,), tl.float32)
    for tile in range(tiles):
        number = strip * tiles + tile
        start, offs, mask = _tile(number, n, c, offs_c, mask_c, BLOCK_N)
        x = _load_tile(feats_ptr + start, offs, mask)
        before = ((number - strip * tiles) * BLOCK_N).to(tl.float32)
        own = tl.minimum(tl.maximum(n - number * BLOCK_N, 0), BLOCK_N).to(tl.float32)
        own_mean = tl.sum(x, axis=0) / tl.maximum(own, 1.0)
        far = tl.where(mask, x - own_mean[None, :], 0.0)
        # Chan, Golub and LeVeque, "Updating formulae", 1979.
        step = own_mean - mean
        share = own / tl.maximum(before + own, 1.0)
        mean += step * share
        square += tl.sum(far * far, axis=0) + step * step * (before * share)
    at = strips_ptr + strip * (2 * c) + offs_c
    tl.store(at, mean, mask=mask_c)
    tl.store(at + c, square, mask=mask_c)


@triton.jit(do_not_specialize=["n", "tiles", "n_strips", "strip_rows"])
def normalise_kernel(
    feats_ptr,
    strips_ptr,
    weight_ptr,
    bias_ptr,
    running_mean_ptr,
    running_var_ptr,
    batches_ptr,
    residual_ptr,
    stats_ptr,
    out_ptr,
    count_ptr,
    n,
    c,
    tiles,
    n_strips,
    strip_rows,
    momentum,
    eps,
    RELU: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Normalise ``tiles`` tiles of rows, add a residual and clamp.

    The first program also writes the statistics: float32 [2, c], mean and
    ``1 / sqrt(variance + eps)``, and the running ones, which fewer than two rows leave as they are.
    Rows behind the count are padding and become zero.
    """
    real = real_rows(count_ptr, n)
    first = tl.program_id(0)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < c
    strip = tl.arange(0, _STRIPS)
    size = tl.minimum(tl.maximum(real - strip.to(tl.int64) * strip_rows, 0), strip_rows)
    # [STRIPS, BLOCK_C]
    at = strips_ptr + strip[:, None] * (2 * c) + offs_c[None, :]
    held = (strip < n_strips)[:, None] & mask_c[None, :]
    size = size.to(tl.float32)[:, None]
    count = tl.maximum(real, 1).to(tl.float32)
    # Differences from one of the means lose no digits to a common offset of all rows.
    base = tl.load(strips_ptr + offs_c, mask=mask_c, other=0.0)
    step = tl.load(at, mask=held, other=0.0) - base[None, :]
    mean = tl.sum(step * size, axis=0) / count
    step -= mean[None, :]
    square = tl.load(at + c, mask=held, other=0.0) + step * step * size
    variance = tl.sum(square, axis=0) / count
    mean += base
    inverse_std = 1.0 / tl.sqrt(variance + eps)
    if first == 0:
        tl.store(stats_ptr + offs_c, mean, mask=mask_c)
        tl.store(stats_ptr + c + offs_c, inverse_std, mask=mask_c)
        # A block, because the interpreter makes an int32 of a scalar comparison.
        moves = mask_c & (tl.zeros_like(offs_c) + real > 1)
        old = tl.load(running_mean_ptr + offs_c, mask=moves, other=0.0)
        tl.store(running_mean_ptr + offs_c, old + momentum * (mean - old), mask=moves)
        old = tl.load(running_var_ptr + offs_c, mask=moves, other=0.0)
        unbiased = variance * (count / tl.maximum(count - 1.0, 1.0))
        tl.store(running_var_ptr + offs_c, old + momentum * (unbiased - old), mask=moves)
        if batches_ptr is not None:
            tl.store(batches_ptr, tl.load(batches_ptr) + 1, mask=tl.program_id(1) == 0)
    weight = _load_channels(weight_ptr, offs_c, mask_c, 1.0)
    bias = _load_channels(bias_ptr, offs_c, mask_c, 0.0)
    for tile in range(tiles):
        number = first * tiles + tile
        start, offs, mask = _tile(number, real, c, offs_c, mask_c, BLOCK_N)
        x = _load_tile(feats_ptr + start, offs, mask)
        _normal, y = _scaled(x, mean, inverse_std, weight, bias)
        if residual_ptr is not None:
            y += _load_tile(residual_ptr + start, offs, mask)
        if RELU:
            y = tl.where(y < 0, 0.0, y)
        _store_tile(out_ptr, y, mask, number, n, c, offs_c, mask_c, BLOCK_N)


@triton.jit
def _load_gradient(
    grad_ptr, feats_ptr, offs, mask, mean, inverse_std, weight, bias, RELU: tl.constexpr
):
    """Return a tile's gradient in front of the ReLU, and its normalised rows.

    ``RELU``: the ReLU follows the norm at once.
    """
    grad = _load_tile(grad_ptr, offs, mask)
    x = _load_tile(feats_ptr, offs, mask)
    normal, y = _scaled(x, mean, inverse_std, weight, bias)
    if RELU:
        # The rounded output decides: an entry that rounds to zero did not pass.
        rounded = y.to(feats_ptr.dtype.element_ty).to(tl.float32)
        grad = tl.where(rounded <= 0, 0.0, grad)
    return grad, normal


@triton.jit(do_not_specialize=["n", "tiles"])
def gradient_sums_kernel(
    grad_ptr,
    feats_ptr,
    stats_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    strips_ptr,
    masked_ptr,
    count_ptr,
    n,
    c,
    tiles,
    RELU: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Write two sums over ``tiles`` tiles: gradients, and their products with normalised rows.

    If ``out_ptr`` is given, a ReLU behind the residual has made ``out``. The kernel then also
    writes the gradient in front of this ReLU.
    """
    real = real_rows(count_ptr, n)
    strip = tl.program_id(0)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < c
    mean = _load_channels(stats_ptr, offs_c, mask_c, 0.0)
    inverse_std = _load_channels(stats_ptr + c, offs_c, mask_c, 0.0)
    weight = _load_channels(weight_ptr, offs_c, mask_c, 1.0)
    bias = _load_channels(bias_ptr, offs_c, mask_c, 0.0)
    total = tl.zeros((BLOCK_C,), tl.float32)
    product = tl.zeros((BLOCK_C,), tl.float32)
    for tile in range(tiles):
        number = strip * tiles + tile
        start, offs, mask = _tile(number, real, c, offs_c, mask_c, BLOCK_N)
        grad, normal = _load_gradient(
            grad_ptr + start, feats_ptr + start, offs, mask, mean, inverse_std, weight, bias, RELU
        )
        if out_ptr is not None:
            grad = tl.where(_load_tile(out_ptr + start, offs, mask) <= 0, 0.0, grad)
            _store_tile(masked_ptr, grad, mask, number, n, c, offs_c, mask_c, BLOCK_N)
        total += tl.sum(grad, axis=0)
        product += tl.sum(grad * normal, axis=0)
    at = strips_ptr + strip * (2 * c) + offs_c
    tl.store(at, total, mask=mask_c)
    tl.store(at + c, product, mask=mask_c)


@triton.jit(do_not_specialize=["n", "tiles", "n_strips"])
def gradient_kernel(
    grad_ptr,
    feats_ptr,
    stats_ptr,
    weight_ptr,
    bias_ptr,
    strips_ptr,
    grad_weight_ptr,
    grad_bias_ptr,
    out_ptr,
    count_ptr,
    n,
    c,
    tiles,
    n_strips,
    RELU: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Write the gradient of ``tiles`` tiles of rows; the first program also the other two."""
    real = real_rows(count_ptr, n)
    first = tl.program_id(0)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < c
    strip = tl.arange(0, _STRIPS)
    at = strips_ptr + strip[:, None] * (2 * c) + offs_c[None, :]
    held = (strip < n_strips)[:, None] & mask_c[None, :]
    total = tl.sum(tl.load(at, mask=held, other=0.0), axis=0)
    product = tl.sum(tl.load(at + c, mask=held, other=0.0), axis=0)
    if first == 0:
        tl.store(grad_bias_ptr + offs_c, total, mask=mask_c)
        tl.store(grad_weight_ptr + offs_c, product, mask=mask_c)
    mean = _load_channels(stats_ptr, offs_c, mask_c, 0.0)
    inverse_std = _load_channels(stats_ptr + c, offs_c, mask_c, 0.0)
    weight = _load_channels(weight_ptr, offs_c, mask_c, 1.0)
    bias = _load_channels(bias_ptr, offs_c, mask_c, 0.0)
    count = tl.maximum(real, 1).to(tl.float32)
    scale = weight * inverse_std
    for tile in range(tiles):
        number = first * tiles + tile
        start, offs, mask = _tile(number, real, c, offs_c, mask_c, BLOCK_N)
        grad, normal = _load_gradient(
            grad_ptr + start, feats_ptr + start, offs, mask, mean, inverse_std, weight, bias, RELU
        )
        grad -= (total / count)[None, :] + normal * (product / count)[None, :]
        _store_tile(out_ptr, grad * scale[None, :], mask, number, n, c, offs_c, mask_c, BLOCK_N)


class _Plan(NamedTuple):
    """The blocks into which rows and channels are cut.

    Attributes:
        block_n: Rows of a tile.
        block_c: Channels of a tile.
        channels: Blocks of channels.
        strip_tiles: Tiles of a strip.
        strips: Strips.
        tiles: Tiles that a program changes.
        writers: Programs that change rows.
    """

    block_n: int
    block_c: int
    channels: int
    strip_tiles: int
    strips: int
    tiles: int
    writers: int


@functools.lru_cache(maxsize=1024)
def _plan(n: int, c: int) -> _Plan:
    block_c = min(next_power_of_2(c), _MAX_CHANNELS)
    block_n = min(_TILE // block_c, _MAX_ROWS)
    blocks, channels = num_blocks(n, block_n), num_blocks(c, block_c)
    strip_tiles = num_blocks(blocks, _STRIPS.value)
    tiles = num_blocks(blocks, max(_WRITERS // channels, 1))
    return _Plan(
        block_n, block_c, channels, strip_tiles, num_blocks(blocks, strip_tiles), tiles,
        num_blocks(blocks, tiles),
    )  # fmt: skip


@functools.lru_cache(maxsize=256)
def _bind(
    block_n: int, block_c: int, relu: bool
) -> tuple[BoundKernel, BoundKernel, BoundKernel, BoundKernel]:
    """Return the kernels of both passes, in order."""
    block = {"BLOCK_N": block_n, "BLOCK_C": block_c, "num_warps": _NUM_WARPS}
    return (
        bind(moments_kernel, **block),
        bind(normalise_kernel, RELU=relu, **block),
        bind(gradient_sums_kernel, RELU=relu, **block),
        bind(gradient_kernel, RELU=relu, **block),
    )


def batch_norm(
    feats: Tensor,
    norm: TrainingNorm,
    relu: bool,
    residual: Tensor | None = None,
    count: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See :func:`tritonspconv.kernels.batch_norm.batch_norm`."""
    (n, c), device = feats.shape, feats.device
    plan = _plan(n, c)
    moments, normalise, *_ = _bind(plan.block_n, plan.block_c, relu)
    partial = torch.empty(plan.strips, 2, c, dtype=torch.float32, device=device)
    moments((plan.strips, plan.channels), device, feats, partial, count, n, c, plan.strip_tiles)
    stats = torch.empty(2, c, dtype=torch.float32, device=device)
    out = torch.empty_like(feats)
    normalise(
        (plan.writers, plan.channels), device,
        feats, partial, norm.weight, norm.bias, norm.running_mean, norm.running_var,
        norm.num_batches, residual, stats, out, count, n, c, plan.tiles, plan.strips,
        plan.strip_tiles * plan.block_n, float(norm.momentum), float(norm.eps),
    )  # fmt: skip
    return out, stats


def batch_norm_grad(
    grad: Tensor,
    feats: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    relu: bool,
    out: Tensor | None = None,
    count: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`tritonspconv.kernels.batch_norm.batch_norm_grad`."""
    (n, c), device = feats.shape, feats.device
    plan = _plan(n, c)
    # After the ReLU behind a residual is undone, a norm without ReLU remains.
    at_once = relu and out is None
    *_, sums, gradient = _bind(plan.block_n, plan.block_c, at_once)
    partial = torch.empty(plan.strips, 2, c, dtype=torch.float32, device=device)
    masked = None if out is None else torch.empty_like(grad)
    sums(
        (plan.strips, plan.channels), device,
        grad, feats, stats, weight, bias, out, partial, masked, count, n, c, plan.strip_tiles,
    )  # fmt: skip
    grad = grad if masked is None else masked
    grad_feats = torch.empty_like(feats)
    grad_weight = torch.empty(c, dtype=torch.float32, device=device)
    grad_bias = torch.empty_like(grad_weight)
    gradient(
        (plan.writers, plan.channels), device,
        grad, feats, stats, weight, bias, partial, grad_weight, grad_bias, grad_feats,
        count, n, c, plan.tiles, plan.strips,
    )  # fmt: skip
    return grad_feats, grad_weight, grad_bias, grad
