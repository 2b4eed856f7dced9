"""The memory of kernel maps: the formula of docs/memory.md, and maps that are released."""

import math
import re
from pathlib import Path

import pytest
import torch

from tests._back_end import every_back_end, interpreted_only
from tritonspconv.coords import ActiveSites
from tritonspconv.geometry import ConvGeometry
from tritonspconv.kernel_map import kernel_map, map_from_pairs
from tritonspconv.kernels.triton import _column_order
from tritonspconv.ops import sparse_conv
from tritonspconv.testing import random_sites

PAGE = Path(__file__).parents[2] / "docs" / "memory.md"
GEOMETRIES = {
    "submanifold 3x3x3": ConvGeometry.submanifold((3, 3, 3), (1, 1, 1)),
    "submanifold 3x3x5": ConvGeometry.submanifold((3, 3, 5), (1, 1, 1)),
    "submanifold 2x2x2": ConvGeometry((2, 2, 2), (1, 1, 1), (0, 0, 0), (1, 1, 1), sites="same"),
    "2x2x2 / 2": ConvGeometry((2, 2, 2), (2, 2, 2), (0, 0, 0), (1, 1, 1), sites="reached"),
    "3x3x3 / 2": ConvGeometry((3, 3, 3), (2, 2, 2), (1, 1, 1), (1, 1, 1), sites="reached"),
}
every_geometry = pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)


def formula(geometry: ConvGeometry, n_in: int, n_out: int, **how: bool) -> int:
    """Return what the function of the page says."""
    source = next(
        block for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
        if "def map_bytes" in block
    )  # fmt: skip
    names: dict = {}
    exec(source, names)
    sizes = geometry.kernel_size, geometry.stride, n_in, n_out
    return names["map_bytes"](*sizes, submanifold=geometry.sites == "same", **how)


def train(found, sites: ActiveSites) -> None:
    """Run a convolution along a map and both its gradients."""
    feats = torch.randn(found.n_in, 2, device=sites.device, requires_grad=True)
    weight = torch.randn(found.kernel_volume, 2, 3, device=sites.device, requires_grad=True)
    sparse_conv(feats, weight, found).sum().backward()


def forms(found) -> list[torch.Tensor]:
    """Return the tensors of all forms of a map that training reads."""
    tables = found.out_table, found.in_table
    return [x for table in tables for x in table[:3] if x is not None] + list(found.pairs())


@interpreted_only
@pytest.mark.parametrize("ordered", [False, True])
@every_geometry
def test_bytes_on_a_gpu(geometry, ordered, device, monkeypatch):
    if ordered:
        monkeypatch.setattr(_column_order, "MIN_ROWS_TO_ORDER", 1)
    sites = random_sites(61, extent=6, device=device)
    found = kernel_map(sites, geometry)
    # Tables that inputs write and windows of many taps have no order.
    ordered = ordered and found.out_table.order is not None
    size = found.n_in, found.n_out
    assert found.num_bytes == formula(geometry, *size, training=False, ordered=ordered)
    train(found, sites)
    assert found.num_bytes == formula(geometry, *size, training=True, ordered=ordered)


@pytest.mark.gpu
@every_geometry
def test_bytes_on_this_gpu(geometry):
    sites = random_sites(150_000, extent=90, device="cuda")
    found = kernel_map(sites, geometry)
    ordered, size = found.out_table.order is not None, (found.n_in, found.n_out)
    assert ordered == (geometry.kernel_volume <= 32 and not geometry.feeds_one_output)
    held = torch.cuda.memory_allocated()
    assert found.num_bytes == formula(geometry, *size, training=False, ordered=ordered)
    found.release()
    freed = held - torch.cuda.memory_allocated()
    # The allocator does not split a block whose rest is less than 1 MiB.
    wanted = formula(geometry, *size, training=False, ordered=ordered)
    assert wanted <= freed <= wanted + 3 * 2**20


@pytest.mark.parametrize("device", ["cpu"], indirect=True)
@every_geometry
def test_bytes_on_a_cpu(geometry, device):
    pytest.importorskip("numba", reason="the page describes the CPU with numba")
    sites = random_sites(700, extent=9, device=device)
    found = kernel_map(sites, geometry)
    volume = found.kernel_volume
    assert found.num_bytes == 4 * volume * found.n_out
    train(found, sites)

    def listed(columns: int) -> tuple[int, int]:
        """Return the fewest and most bytes of the pairs in lists for tables of so many columns."""
        lists = volume * math.ceil(columns / 512)
        fewest = 8 * found.num_pairs() + 16 * lists + 8
        return fewest, fewest + 8 * 7 * lists

    sides = [listed(found.n_out)]
    if not geometry.is_mirrored:
        sides.append(listed(found.n_in))
    assert sum(side[0] for side in sides) <= found.num_bytes
    assert found.num_bytes <= sum(side[1] for side in sides)


@every_back_end
@every_geometry
def test_a_released_map_comes_back_the_same(geometry, device):
    sites = random_sites(53, extent=5, repeats=4, outside=3, device=device)
    found = kernel_map(sites, geometry)
    train(found, sites)
    before = [x.clone() for x in forms(found)]
    out_coords = found.out_sites.coords
    found.release()
    assert found.num_bytes == 0
    found.release()
    assert found.inverse().out_table.rows.shape == before[0].shape or found.num_bytes > 0
    found.inverse().release()
    assert found.num_bytes == 0
    after = forms(found)
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
    assert found.out_sites.coords is out_coords
    assert kernel_map(sites, geometry) is found


def test_given_output_sites():
    sites, target = random_sites(40, extent=6), random_sites(30, extent=6)
    geometry = ConvGeometry.submanifold((3, 3, 3), (1, 1, 1))
    found = kernel_map(sites, geometry, out_sites=target)
    before = found.out_table.rows.clone()
    found.release()
    assert torch.equal(found.out_table.rows, before)


def test_listed_pairs_are_never_released():
    rows = torch.tensor([0, 1])
    found = map_from_pairs(rows, rows, torch.tensor([0, 2]), 2, 2)
    held = found.num_bytes
    found.release()
    assert found.num_bytes == held > 0


@every_geometry
def test_edited_coordinates(geometry):
    sites = random_sites(20, extent=5)
    found = kernel_map(sites, geometry)
    found.release()
    sites.coords[0, 1] += 1
    with pytest.raises(RuntimeError, match="released and cannot be made again, because somebody"):
        found.num_pairs()
