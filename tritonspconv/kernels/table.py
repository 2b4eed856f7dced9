"""Tables and pair lists: the forms of a kernel map that the kernels make and read."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Int32

    from tritonspconv.kernels.eager.pairs import PairBlocks
    from tritonspconv.kernels.operand import Operand


class NeighborTable(NamedTuple):
    """For each row on one side, the row it meets on the other side through each tap.

    Attributes:
        rows: int32 [V, n], a row of the other side or -1; or [1, n] where no row meets two, and
            ``mask`` says through which tap.
        mask: int32 [ceil(V/32), n]; bit v % 32 of word v // 32 says that tap v is present.
            None on a CPU, whose kernels have no need of it.
        order: int32 [n], the row that each column stands for; None: column c is row c.
        blocks: The pairs in the form that the torch kernels multiply, listed on first use; None: a
            table of the Triton kernels, which have no need of it.
        mirrored: True: the table's tap v is the weight's tap V-1-v.
    """

    rows: Tensor
    mask: Tensor | None
    order: Tensor | None
    blocks: PairBlocks | None = None
    mirrored: bool = False

    def entries(self, volume: int) -> Int32[Tensor, "V n"]:
        """Return rows int32 [V, n] of ``volume`` taps, however they are stored."""
        if self.mask is None or self.rows.shape[0] == volume:
            return self.rows
        tap = torch.arange(volume, device=self.rows.device)
        is_present = (self.mask[tap // 32] >> (tap % 32)[:, None]) & 1 != 0
        return torch.where(is_present, self.rows, -1)


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
    def is_inverse(self) -> bool:
        """Whether ``pair_list`` names the map's output rows first."""
        ...

    @property
    def in_table(self) -> NeighborTable:
        """Per input row, the output row of each tap."""
        ...

    def in_table_for(self, c_in: int, c_out: int) -> NeighborTable:
        """Return ``in_table`` as the gradient of a layer of such channels multiplies it fastest."""
        ...

    @property
    def pair_list(self) -> PairList:
        """Pairs by tap."""
        ...


def in_listed_order(
    kernel_map: ConvMap, feats: Operand, grad: Operand, out: Tensor
) -> tuple[Operand, Operand, Tensor]:
    """Return the operands of a weight gradient in the order of the rows that pairs name.

    The pairs of an inverse map name its output rows first.
    """
    if kernel_map.is_inverse:
        return grad, feats, out.transpose(1, 2)
    return feats, grad, out
