"""Tables and pair lists: the forms of a kernel map that the kernels make and read."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Int32

    from tritonspconv.kernels.eager.pairs import PairPanels
    from tritonspconv.kernels.numba._panels import TapPanels


T = TypeVar("T")


class NeighborTable(NamedTuple):
    """Table of the rows that meet through each tap: a row of one side finds one of the other side.

    Attributes:
        kept_rows: int32 [V, n], a row of the other side or -1; or [1, n] where no row meets two,
            and ``mask`` says through which tap. None: ``panels`` keep them; read ``rows``.
        mask: int32 [ceil(V/32), n]; bit v % 32 of word v // 32 says that tap v is present.
            None on a CPU, because the CPU kernels do not read it.
        order: int32 [n], the row of each column; None: column c is row c.
        panels: The pairs in the form that the kernels of this CPU multiply, listed on first use:
            ``PairPanels`` for torch, ``TapPanels`` for numba. None in a table of the Triton
            kernels, which do not read them. ``TapPanels`` give up the rows of the table when they
            list its pairs, because the pairs of a large window take a tenth of the memory.
        mirrored: True: the table's tap v is the weight's tap V-1-v.
        real_columns: int64 [] on the device, the number of columns that are real rows; None: all.
            The columns behind the real ones are padding, in the order of their rows. No kernel
            reads the padding, and Triton kernels leave ``kept_rows`` and ``mask`` unwritten there.
    """

    kept_rows: Tensor | None
    mask: Tensor | None
    order: Tensor | None
    panels: PairPanels | TapPanels | None = None
    mirrored: bool = False
    real_columns: Tensor | None = None

    @property
    def rows(self) -> Tensor:
        """The rows [V, n] or [1, n], written again where ``panels`` hold their pairs alone."""
        if self.kept_rows is not None:
            return self.kept_rows
        return cast("TapPanels", self.panels).rows()

    def entries(self, volume: int) -> Int32[Tensor, "V n"]:
        """Return rows int32 [V, n] of ``volume`` taps, however they are stored; -1 in padding."""
        rows = self.rows
        if self.mask is not None and rows.shape[0] != volume:
            tap = torch.arange(volume, device=rows.device)
            is_present = (self.mask[tap // 32] >> (tap % 32)[:, None]) & 1 != 0
            rows = torch.where(is_present, rows, -1)
        if self.real_columns is None:
            return rows
        is_real = torch.arange(rows.shape[1], device=rows.device) < self.real_columns
        return torch.where(is_real, rows, -1)


class PairList(NamedTuple):
    """All pairs, tap by tap.

    Attributes:
        pairs: int32 [2, capacity]: input rows, output rows.
        tap_ptr: int64 [taps + 1], where each tap's pairs begin; on the device.
        mirrored: True: only the first ceil(V/2) taps are listed, and tap V-1-v has the pairs of
            tap v with input and output swapped.
    """

    pairs: Tensor
    tap_ptr: Tensor
    mirrored: bool


def held_bytes(forms: Iterable[NeighborTable | PairList]) -> int:
    """Return the memory of tables and pair lists in bytes; memory that two share counts once.

    The number of real columns is not counted: it belongs to the sites.
    """
    sizes: dict[int, int] = {}
    for form in forms:
        if isinstance(form, NeighborTable):
            tensors = form.kept_rows, form.mask, form.order
            if form.panels is not None:
                sizes[id(form.panels)] = form.panels.num_bytes
        else:
            tensors = form.pairs, form.tap_ptr
        for tensor in tensors:
            if tensor is not None:
                storage = tensor.untyped_storage()
                sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


class ConvMap(Protocol):
    """The part of a kernel map that a convolution reads; see ``kernel_map.KernelMap``."""

    @property
    def n_in(self) -> int:
        """Number of input rows."""
        ...

    @property
    def n_out(self) -> int:
        """Number of output rows."""
        ...

    @property
    def in_count(self) -> Tensor | None:
        """Number of real input rows, int64 [] on the device; None: all."""
        ...

    @property
    def out_count(self) -> Tensor | None:
        """Number of real output rows, int64 [] on the device; None: all."""
        ...

    @property
    def is_inverse(self) -> bool:
        """True if ``pair_list`` names the map's output rows first."""
        ...

    @property
    def out_table(self) -> NeighborTable:
        """Per output row, the input row of each tap."""
        ...

    @property
    def in_table(self) -> NeighborTable:
        """Per input row, the output row of each tap."""
        ...

    def in_table_for(self, c_in: int, c_out: int) -> NeighborTable:
        """Return ``in_table``, with ordered columns if a gradient of these channels gains by it."""
        ...

    @property
    def pair_list(self) -> PairList:
        """Pairs by tap."""
        ...


def in_listed_order(kernel_map: ConvMap, feats: T, grad: T, out: Tensor) -> tuple[T, T, Tensor]:
    """Return the operands of a weight gradient in the order of the rows that pairs name.

    The pairs of an inverse map name its output rows first.
    """
    if kernel_map.is_inverse:
        return grad, feats, out.transpose(1, 2)
    return feats, grad, out
