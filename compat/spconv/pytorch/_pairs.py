"""Kernel maps from spconv's pair lists and pair tables.

The map of a pair tensor is kept for as long as the tensor lives and its entries stay the same. If
the adapter made the tensor, the map exists already. For any other tensor the map is built once,
from the entries. On a CPU entries are compared with a copy, because NumPy can write to a tensor
without a trace. On a GPU a comparison would wait for the device, so torch's version of the tensor
is compared.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from compat.spconv.pytorch._errors import SpconvError
from tritonspconv.kernel_map import KernelMap
from tritonspconv.kernel_map.from_pairs import map_from_pairs


class _State(NamedTuple):
    """The contents of a tensor at some time.

    Attributes:
        version: Number of torch's writes to it.
        entries: A copy of its entries; None on a GPU.
    """

    version: int
    entries: Tensor | None

    @classmethod
    def of(cls, tensor: Tensor) -> _State:
        """Remember the current contents of a tensor."""
        entries = tensor.detach().clone() if tensor.device.type == "cpu" else None
        return cls(tensor._version, entries)

    def still_holds(self, tensor: Tensor) -> bool:
        """Return whether the tensor is unchanged."""
        if self.version != tensor._version:
            return False
        return self.entries is None or torch.equal(self.entries, tensor)


class _Known(NamedTuple):
    """The maps of one pair tensor, valid while the tensor and its counts do not change."""

    state: _State
    counts: weakref.ref[Tensor] | None
    counts_state: _State | None
    maps: dict[Hashable, KernelMap]

    def still_holds(self, pairs: Tensor, counts: Tensor | None) -> bool:
        """Return whether the maps belong to these tensors."""
        if (self.counts and self.counts()) is not counts or not self.state.still_holds(pairs):
            return False
        return counts is None or (
            self.counts_state is not None and self.counts_state.still_holds(counts)
        )


_known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def remember_pairs(pairs: Tensor, counts: Tensor, kernel_map: KernelMap) -> None:
    """Record that ``pairs [2, V, N]`` with ``counts [V]`` represent ``kernel_map``."""
    maps = _maps_of(pairs, counts)
    for subm in (False, True):
        maps[kernel_map.n_in, kernel_map.n_out, subm] = kernel_map


def map_of_pairs(
    pairs: Tensor, counts: Tensor, n_in: int, n_out: int, subm: bool = False
) -> KernelMap:
    """Return the map of a pair list.

    Args:
        pairs: Input and output rows by tap ``[2, V, N]``.
        counts: Pairs of each tap ``[V]``; entries behind them are ignored.
        n_in: Rows that ``pairs[0]`` numbers.
        n_out: Rows that ``pairs[1]`` numbers.
        subm: Taps from the central one on follow from the first half by symmetry, as spconv lists
            the pairs of a submanifold convolution.

    Raises:
        SpconvError: The shapes do not fit.
        ValueError: Rows are out of range or repeat within a tap.

    This call waits for the device, except for pairs of ``get_indice_pairs``.
    """
    if pairs.ndim != 3 or pairs.shape[0] != 2 or counts.shape != pairs.shape[1:2]:
        raise SpconvError(
            "indice_pairs must be [2, V, N] and indice_pair_num [V]; got "
            f"{list(pairs.shape)} and {list(counts.shape)}."
        )
    maps = _maps_of(pairs, counts)
    found = maps.get((n_in, n_out, subm))
    if found is None:
        if subm:
            pairs, counts = _both_halves(pairs, counts, n_in, n_out)
        present = torch.arange(pairs.shape[2], device=pairs.device) < counts[:, None]
        tap_ptr = torch.nn.functional.pad(present.sum(1).cumsum(0), (1, 0))
        found = map_from_pairs(pairs[0][present], pairs[1][present], tap_ptr, n_in, n_out)
        maps[n_in, n_out, subm] = found
    return found


def remember_table(table: Tensor, kernel_map: KernelMap) -> None:
    """Record that ``table [V, n_out]`` of input rows represents ``kernel_map``."""
    _maps_of(table, None)[kernel_map.n_in] = kernel_map


def map_of_table(table: Tensor, n_in: int, n_out: int) -> KernelMap:
    """Return the map of a pair table: the input row of each tap and output row, or -1.

    Raises:
        SpconvError: ``table`` is not ``[V, n_out]``.
        ValueError: Rows are out of range or repeat within a tap.

    This call waits for the device, except for tables of ``get_indice_pairs_implicit_gemm``.
    """
    if table.ndim != 2 or table.shape[1] != n_out:
        raise SpconvError(
            f"a pair table must be [V, {n_out}], one column per output row; got "
            f"{list(table.shape)}. Pass num_activate_out={table.shape[-1]}?"
        )
    maps = _maps_of(table, None)
    found = maps.get(n_in)
    if found is None:
        present = table >= 0
        tap_ptr = torch.nn.functional.pad(present.sum(1).cumsum(0), (1, 0))
        out_rows = torch.nonzero(present)[:, 1]
        found = maps[n_in] = map_from_pairs(table[present], out_rows, tap_ptr, n_in, n_out)
    return found


def pair_tables(kernel_map: KernelMap) -> tuple[Tensor, Tensor]:
    """Return the tables of both sides, int32 ``[V, n_out]`` and ``[V, n_in]``, -1 where empty."""
    in_rows, out_rows, tap_ptr = kernel_map.pairs()
    taps = torch.repeat_interleave(tap_ptr.diff(), output_size=in_rows.shape[0])
    forward = in_rows.new_full((kernel_map.kernel_volume, kernel_map.n_out), -1)
    backward = in_rows.new_full((kernel_map.kernel_volume, kernel_map.n_in), -1)
    forward[taps, out_rows.long()] = in_rows
    backward[taps, in_rows.long()] = out_rows
    return forward, backward


def _maps_of(pairs: Tensor, counts: Tensor | None) -> dict[Hashable, KernelMap]:
    """Return the maps of an unchanged pair tensor, to read and to add to."""
    if pairs.is_inference() or (counts is not None and counts.is_inference()):
        return {}  # Inference tensors have no version, so edits would not be noticed.
    known = _known.get(pairs)
    if known is None or not known.still_holds(pairs, counts):
        known = _known[pairs] = _Known(
            _State.of(pairs),
            None if counts is None else weakref.ref(counts),
            None if counts is None else _State.of(counts),
            {},
        )
    return known.maps


def _both_halves(pairs: Tensor, counts: Tensor, n_in: int, n_out: int) -> tuple[Tensor, Tensor]:
    """Return a submanifold pair list with its centre and second half written out."""
    volume, length = pairs.shape[1:]
    if volume % 2 == 0 or n_in != n_out or length < n_in:
        raise SpconvError(
            "submanifold pairs must be [2, V, N] with odd V and the same rows on both sides; got "
            f"{list(pairs.shape)} for {n_in} input and {n_out} output rows."
        )
    half = volume // 2
    rows = torch.arange(length, dtype=pairs.dtype, device=pairs.device).expand(2, 1, length)
    first = pairs[:, :half]
    whole = torch.cat([first, rows, first.flip(0, 1)], 1)
    centre = counts.new_full((1,), n_in)
    return whole, torch.cat([counts[:half], centre, counts[:half].flip(0)])
