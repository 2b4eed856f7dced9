"""``export_program``: a sparse network as a program of torch operations with fixed shapes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from tritonspconv.capture._inputs import Signature
from tritonspconv.capture._state import rehearsal, without_autocast_cache
from tritonspconv.capture._tree import leaves
from tritonspconv.coords import Grid
from tritonspconv.coords.row_tensor import plain
from tritonspconv.export._run import Network

Box = tuple[tuple[int, ...], tuple[int, ...]]


def export_program(
    model: Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
    *,
    capacity: int | None = None,
    level_capacities: Sequence[int] | None = None,
    headroom: float = 1.25,
    box: Box | None = None,
    coords: str | None = None,
    reads: Sequence[str] | None = None,
) -> torch.export.ExportedProgram:
    """Export a sparse network as a program of plain torch operations with fixed shapes.

    The program builds kernel maps itself, so it takes new scans with up to ``capacity`` voxels. It
    runs without this package, and ``torch._inductor.aoti_compile_and_package`` compiles it.

    The inputs of the program are the tensors among ``args`` and ``kwargs``, in order; of a sparse
    tensor these are features ``[capacity, C]`` and coordinates int32 ``[capacity, 1 + D]``. The
    last input is the count, int64 ``[]``, the number of voxels. Rows behind it may hold anything.

    The program returns ``(outputs, faults)``. ``outputs`` is the model's result, with lists in
    place of tuples. In place of a sparse tensor stands a dict of ``features``, ``coords`` and
    ``count``, and in place of features alone a dict of ``features`` and ``count``. Features behind
    the count are zero, and coordinates there have batch index -1. Entries of a dict that are
    arguments of the model are left out. ``faults`` is int64 ``[3 + levels]``, all zero if the
    outputs are right: voxels beyond the capacity, rows outside the grid or the batch, rows that
    repeat a site, and for each level the number of sites for which it has no room.

    Args:
        model: A network of this engine or of its adapters, in evaluation mode.
        args: Arguments of an example call: sparse tensors, or nested dicts, lists and tuples of
            tensors, as for :func:`tritonspconv.capture`. The batch size is the batch size of the
            example.
        kwargs: Keyword arguments of the example call.
        capacity: Number of rows of the inputs. Default: 1.25 times the example's.
        level_capacities: Number of sites of each level that the network makes, in order. Default:
            as many as in the example, in proportion to the capacity, times ``headroom``.
        headroom: Factor on the default capacity of each level. A scan may have this many times the
            sites of the example at a level, in proportion to its voxels.
        box: Smallest and largest coordinate of every axis, inclusive, for tensors without a grid of
            their own, as in MinkowskiEngine. Default: the cube around the origin that reaches at
            least twice as far as the example. Rows outside count as faults.
        coords: Key or argument name of the coordinates; None: the coordinates of the sparse tensor.
        reads: Keys or argument names that the model reads, among entries of dicts; None: all.

    Returns:
        The program. It has run on the example and on half of the example's rows, and gave the
        results of the model but for the order of summation: the largest difference is at most 1e-4
        of the largest value for float32 (float64: 1e-9, float16: 2e-2, bfloat16: 1e-1).

    Raises:
        ExportError: A module needs shapes that are not fixed, or the results differ.
        TypeError: ``args`` is no tuple.
        ValueError: The model is in training mode, an option is wrong, or the coordinates are not
            found.
    """
    if any(module.training for module in model.modules()):
        raise ValueError("export_program: call model.eval() first: a program has no training mode.")
    if not isinstance(args, tuple):
        raise TypeError(
            "export_program: args must be a tuple of the model's arguments, such as (x,); got "
            f"{type(args).__name__}."
        )
    example = (args, kwargs or {})
    found = {path: plain(value) for path, value in leaves(example).items()}
    signature = Signature.of(
        example, coords, None if reads is None else tuple(reads), "export_program"
    )
    rows = found[signature.coords].shape[0]
    capacity = _capacity(rows, capacity, headroom)
    grid = _grid(found[signature.coords], box)
    network = Network(model, example, signature, found, grid)
    with rehearsal([model]), without_autocast_cache(), torch.no_grad():
        sizes = network.measure()
        levels = _level_capacities(sizes, level_capacities, headroom * capacity / rows)
        fitting = min(rows, capacity)
        inputs = network.inputs(fitting, capacity)
        program = torch.export.export(network.record(inputs, levels), tuple(inputs.values()))
        for number in (fitting, (fitting + 1) // 2):
            network.compare(program, number, capacity)
    return program


def _capacity(rows: int, capacity: int | None, headroom: float) -> int:
    """Check numbers of the caller; return the capacity."""
    if rows == 0:
        raise ValueError("export_program: the example must have at least one row; got 0.")
    if capacity is not None and capacity < 1:
        raise ValueError(f"export_program: capacity must be at least 1; got {capacity}.")
    if not headroom >= 1:
        raise ValueError(f"export_program: headroom must be at least 1; got {headroom}.")
    return math.ceil(1.25 * rows) if capacity is None else capacity


def _level_capacities(sizes: list[int], given: Sequence[int] | None, share: float) -> list[int]:
    """Return the capacity of each level, from the caller or from the sizes in the example."""
    if given is None:
        return [max(math.ceil(size * share), 1) for size in sizes]
    if len(given) != len(sizes) or min(given, default=1) < 1:
        raise ValueError(
            f"export_program: level_capacities must be {len(sizes)} positive numbers, one for each "
            f"set of sites that the network makes; got {list(given)}. The example has {sizes}."
        )
    return list(given)


def _grid(coords: Tensor, box: Box | None) -> Grid:
    """Return the grid of a box, for the samples of ``coords`` [N, 1 + D].

    Without a box, the grid is the cube around the origin that reaches twice as far as ``coords``.
    """
    batch_size = int(coords[:, 0].max()) + 1
    if box is None:
        largest = int(coords[:, 1:].long().abs().max())
        reach, ndim = 2 ** (2 * largest).bit_length(), coords.shape[1] - 1
        box = (-reach,) * ndim, (reach - 1,) * ndim
    lower, upper = box
    if len(lower) != coords.shape[1] - 1 or any(
        lo > hi for lo, hi in zip(lower, upper, strict=True)
    ):
        raise ValueError(
            "export_program: box must be the smallest and the largest coordinate, each with one "
            f"entry for each of {coords.shape[1] - 1} axes; got {box}."
        )
    return Grid((0,), (1,), batch_size, bounded=False).with_box(lower, upper)
