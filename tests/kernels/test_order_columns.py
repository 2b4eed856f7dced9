"""Order of columns: Triton against a permutation in torch."""

import pytest
import torch

from tritonspconv.geometry import ConvGeometry
from tritonspconv.kernels.eager.invert_table import mask_words
from tritonspconv.kernels.order_columns import pays_to_order
from tritonspconv.kernels.table import NeighborTable

pytest.importorskip("triton", reason="Triton is not installed")

from tritonspconv.kernels.triton import order_columns as kernels
from tritonspconv.kernels.triton._column_order import tap_groups

WINDOWS = {
    2: ConvGeometry((2,), (2,), (0,), (1,)),
    8: ConvGeometry((2,) * 3, (2,) * 3, (0,) * 3, (1,) * 3),
    27: ConvGeometry.submanifold((3,) * 3, (1,) * 3),
    32: ConvGeometry((2,) * 5, (2,) * 5, (0,) * 5, (1,) * 5),
}


def key_of(mask: int, groups: list[int]) -> int:
    """Return the place in the Gray code of a mask's groups, the first group as the highest bit."""
    code = sum((mask & group != 0) << (15 - g) for g, group in enumerate(groups))
    place = 0
    while code:
        place ^= code
        code >>= 1
    return place


@pytest.mark.parametrize("volume", WINDOWS)
@pytest.mark.parametrize("n", [1, 2, 511, 1030])
def test_order_columns(triton_device, volume, n):
    offsets = WINDOWS[volume].offsets
    rows = torch.randint(1000, (volume, n), dtype=torch.int32)
    rows[torch.rand(volume, n) < 0.7] = -1
    mask = mask_words(rows)
    found = kernels.order_columns(rows.to(triton_device), mask.to(triton_device), offsets)
    new_rows, new_mask, order = (part.cpu() for part in found)
    assert order.dtype == torch.int32
    groups = [group & 0xFFFFFFFF for group in tap_groups(offsets, torch.device("cpu")).tolist()]
    keys = [key_of(word & 0xFFFFFFFF, groups) for word in mask[0].tolist()]
    assert order.tolist() == sorted(range(n), key=lambda column: keys[column])
    assert torch.equal(new_rows, rows[:, order.long()])
    assert torch.equal(new_mask, mask[:, order.long()])


def pays(n: int, volume: int, channels: int) -> bool:
    table = NeighborTable(torch.empty(volume, n, device="meta"), None, None)
    return pays_to_order(table, volume, channels, channels)


def test_only_large_layers_pay():
    """The sizes are levels of a U-Net on four LiDAR sweeps, and of a detector on one sweep."""
    for n, channels in ((96_821, 64), (37_127, 128), (13_566, 256)):
        assert pays(n, 27, channels)
    for n, channels in ((13_092, 16), (20_309, 32), (12_361, 64), (5_801, 128)):
        assert not pays(n, 27, channels)
    # The mask has more than one word; there is one tap; there are no columns.
    assert not pays(10**6, 125, 256)
    assert not pays(10**6, 1, 256)
    assert not pays(0, 27, 256)
