"""Keys, coordinate maps, and the maps between them."""

import gc
import weakref

import pytest
import torch

import compat.minkowski as ME
from compat.minkowski._coordinate_map import CoordinateMap
from tests.compat.minkowski import _oracle as oracle


def test_b5_3_keys_are_values():
    key = ME.CoordinateMapKey([2, 4], "a")
    assert key == ME.CoordinateMapKey([2, 4], "a")
    assert hash(key) == hash(ME.CoordinateMapKey([2, 4], "a"))
    assert key != ME.CoordinateMapKey([2, 4], "b")
    assert key.get_key() == ([2, 4], "a")
    assert key.get_tensor_stride() == [2, 4]
    assert key.get_coordinate_size() == 3
    assert str(key) == "coordinate map key:[2, 4]:a"


def test_keys_are_set_once():
    key = ME.CoordinateMapKey(3)
    assert not key.is_key_set()
    with pytest.raises(RuntimeError, match="the coordinate map key is not set"):
        key.get_key()
    with pytest.raises(RuntimeError, match="takes a tensor stride of 2 axes"):
        key.set_key([1], "")
    key.set_key([1, 1], "")
    assert key.is_key_set()
    with pytest.raises(RuntimeError, match="is set; make a new CoordinateMapKey"):
        key.set_key([2, 2], "")
    with pytest.raises(RuntimeError, match="Pass the tensor stride as a list"):
        ME.CoordinateMapKey(3, "a")


@pytest.mark.parametrize("stride", [2, [2, 1, 3]])
def test_b5_2_strided_coordinates_are_floored_to_multiples_in_input_units(stride, make):
    x = make(60, reach=5)
    manager = x.coordinate_manager
    key = manager.stride(x.coordinate_map_key, stride)
    steps = [2, 2, 2] if stride == 2 else stride
    expected = {oracle.cell(tuple(c), steps) for c in x.C.tolist()}
    assert min(min(site[1:]) for site in expected) < 0
    assert [tuple(c) for c in manager.get_coordinates(key).tolist()] == sorted(expected)
    again = manager.stride(key, stride)
    twice = [step * step for step in steps]
    assert again.get_tensor_stride() == twice
    expected = {oracle.cell(tuple(c), twice) for c in x.C.tolist()}
    assert [tuple(c) for c in manager.get_coordinates(again).tolist()] == sorted(expected)


def test_b5_2_the_floor_is_exact_beyond_2_to_the_24(device):
    far = 2**24
    coords = torch.tensor([[0, far + 1], [0, far + 3], [0, -far - 1]], dtype=torch.int32)
    x = ME.SparseTensor(torch.ones(3, 1, device=device), coords.to(device))
    y = ME.MinkowskiSumPooling(2, 2, dimension=1).to(device)(x)
    assert y.C.tolist() == [[0, -far - 2], [0, far], [0, far + 2]]


def test_b5_3_stride_reuses_the_map_of_its_key(make):
    x = make()
    manager = x.coordinate_manager
    half = manager.stride(x.coordinate_map_key, 2)
    coarse = manager.stride(half, 2)
    assert manager.stride(x.coordinate_map_key, 4) == coarse
    assert manager.stride(x.coordinate_map_key, 1) == x.coordinate_map_key
    assert manager._map(coarse) is manager._map(manager.stride(x.coordinate_map_key, 4))


def test_b5_4_an_occupied_key_gets_a_fresh_id(make, device):
    x = make()
    manager = x.coordinate_manager
    keys = [manager.insert_and_map(x.C, 1)[0] for _ in range(2)]
    ids = [key.get_key()[1] for key in (x.coordinate_map_key, *keys)]
    assert ids[0] == ""
    assert len(set(ids)) == 3
    assert all(len(name) == 5 for name in ids[1:])
    assert manager.get_unique_coordinate_map_key([1, 1, 1]) not in (x.coordinate_map_key, *keys)


def test_b5_4_and_5_ids_of_pruned_and_merged_maps(make):
    x = make()
    mask = torch.arange(len(x), device=x.device) % 3 > 0
    first, second = (ME.MinkowskiPruning()(x, mask) for _ in range(2))
    assert first.coordinate_map_key == ME.CoordinateMapKey([1, 1, 1], "pruned")
    assert second.coordinate_map_key.get_key()[1].startswith("pruned-")
    merged = [(x + first).coordinate_map_key, (second + x).coordinate_map_key]
    assert merged[0].get_key()[1] == "merge"
    assert merged[1].get_key()[1].startswith("merge-")
    # Uniting the same maps again returns the same union.
    assert (x - first).coordinate_map_key == merged[0]
    key = x.coordinate_manager.stride(first.coordinate_map_key, 2)
    assert key == ME.CoordinateMapKey([2, 2, 2], "pruned")
    assert x.coordinate_manager.stride(x.coordinate_map_key, 2, "own").get_key() == ([2] * 3, "own")


def test_b5_8_insertion_keeps_the_first_of_repeated_rows_in_order(device):
    coords = torch.tensor([[0, 5], [0, -2], [0, 5], [1, 5], [0, -2]], dtype=torch.int32)
    manager = ME.CoordinateManager(D=1)
    key, (rows, position) = manager.insert_and_map(coords.to(device))
    assert rows.tolist() == [0, 1, 3]
    assert position.tolist() == [0, 1, 0, 2, 1]
    assert manager.get_coordinates(key).tolist() == coords[[0, 1, 3]].tolist()
    assert manager.size(key) == 3


@pytest.mark.parametrize("kernel_size", [2, 3, (3, 2, 1)])
@pytest.mark.parametrize("stride", [1, 2])
def test_kernel_map_lists_pairs_by_tap(kernel_size, stride, make):
    x = make(40)
    manager = x.coordinate_manager
    in_key = x.coordinate_map_key
    out_key = manager.stride(in_key, stride)
    found = manager.kernel_map(in_key, out_key, kernel_size=kernel_size, stride=stride)
    in_rows = oracle.rows_of(x.C)
    out_coords = manager.get_coordinates(out_key)
    sizes = (kernel_size,) * 3 if isinstance(kernel_size, int) else kernel_size
    expected = {}
    for tap, offset in enumerate(oracle.taps(sizes)):
        for out_row, site in enumerate(map(tuple, out_coords.tolist())):
            neighbor = oracle.moved(site, offset, (1, 1, 1))
            if neighbor in in_rows:
                expected.setdefault(tap, set()).add((in_rows[neighbor], out_row))
    assert {tap: set(map(tuple, pairs.T.tolist())) for tap, pairs in found.items()} == expected
    assert all(pairs.dtype == torch.int32 for pairs in found.values())
    swapped = manager.kernel_map(
        out_key, in_key, kernel_size=kernel_size, stride=stride, is_transpose=True
    )
    assert {
        tap: {(i, o) for o, i in pairs.T.tolist()} for tap, pairs in swapped.items()
    } == expected


def test_kernel_map_of_a_cell_pool_is_the_stride_map(make):
    x = make(40)
    manager = x.coordinate_manager
    key = manager.stride(x.coordinate_map_key, 2)
    found = manager.kernel_map(x.coordinate_map_key, key, 2, 2, is_pool=True)
    rows, cells = manager.stride_map(x.coordinate_map_key, key)
    assert list(found) == [0]
    assert sorted(map(tuple, found[0].T.tolist())) == list(
        zip(rows.tolist(), cells.tolist(), strict=True)
    )


def test_kernel_maps_take_tensor_strides_and_the_old_name(make):
    x = make(10)
    manager = x.coordinate_manager
    with pytest.warns(UserWarning, match="is now kernel_map"):
        old = manager.get_kernel_map(1, [1, 1, 1], kernel_size=1)
    assert old[0].tolist() == [list(range(10))] * 2
    with pytest.raises(AssertionError, match=r"no map has tensor stride \[4, 4, 4\]"):
        manager.kernel_map(1, 4)


@pytest.mark.parametrize("kernel_size", [1, 3])
def test_kernel_map_takes_a_region_types_integer(kernel_size, make):
    x = make(40)
    manager, key = x.coordinate_manager, x.coordinate_map_key
    cross, number = (
        manager.kernel_map(key, key, kernel_size=kernel_size, region_type=region)
        for region in (ME.RegionType.HYPER_CROSS, 1)
    )
    assert cross.keys() == number.keys()
    assert len(cross) > kernel_size - 1
    assert all(torch.equal(cross[tap], number[tap]) for tap in cross)
    with pytest.raises(RuntimeError, match="must be a RegionType or its integer; got 7"):
        manager.kernel_map(key, key, region_type=7)


def test_stride_map_leaves_out_rows_without_a_cell(make):
    x = make(40)
    manager = x.coordinate_manager
    coarse = ME.MinkowskiSumPooling(2, 2, dimension=3)(x)
    kept = ME.MinkowskiPruning()(coarse, torch.arange(len(coarse), device=x.device) > 3)
    rows, cells = manager.stride_map(x.coordinate_map_key, kept.coordinate_map_key)
    expected = oracle.rows_of(kept.C)
    found = [expected.get(oracle.cell(tuple(c), (2, 2, 2))) for c in x.C.tolist()]
    assert rows.tolist() == [row for row, at in enumerate(found) if at is not None]
    assert cells.tolist() == [at for at in found if at is not None]


def test_union_map_points_into_the_union(make):
    x = make(30)
    coarse = ME.MinkowskiSumPooling(2, 2, dimension=3)(x)
    manager, key = x.coordinate_manager, ME.CoordinateMapKey(4)
    maps = manager.union_map([x.coordinate_map_key, coarse.coordinate_map_key], key)
    union = manager.get_coordinates(key)
    assert key.get_tensor_stride() == [1, 1, 1]
    assert oracle.sites(union) == sorted(
        map(list, {tuple(c) for t in (x, coarse) for c in t.C.tolist()})
    )
    for (rows, at), tensor in zip(maps, (x, coarse), strict=True):
        assert union[at].tolist() == tensor.C[rows].tolist()


def test_b5_31_the_origin_has_a_site_per_sample(make):
    x = make(batch_size=3)
    manager = x.coordinate_manager
    origin = manager.origin()
    assert origin.get_key() == ([0, 0, 0], "")
    assert manager.get_coordinates(origin).tolist() == [[b, 0, 0, 0] for b in range(3)]
    assert manager.number_of_unique_batch_indices() == 3
    assert manager.get_batch_indices() == [0, 1, 2]
    batches, rows = manager.origin_map(x.coordinate_map_key)
    assert batches.tolist() == [0, 1, 2]
    for batch, own in enumerate(rows):
        assert own.tolist() == [r for r, c in enumerate(x.C.tolist()) if c[0] == batch]
    assert manager.stride(origin, 2) == origin


def test_maps_know_whether_their_samples_ascend(make):
    def ascends(tensor):
        return manager._map(tensor.coordinate_map_key).batch_ascends

    x = make(batch_size=3)
    manager = x.coordinate_manager
    coarse = ME.MinkowskiSumPooling(2, 2, dimension=3)(x)
    kept = torch.ones(len(coarse), dtype=torch.bool, device=x.device)
    assert not ascends(x)
    assert ascends(coarse)
    assert ascends(ME.MinkowskiPruning()(coarse, kept))
    assert not ascends(x + coarse)
    assert ascends(coarse + ME.MinkowskiPruning()(coarse, kept))
    assert ascends(make(batch_size=1, coordinate_manager=manager))
    ordered = ME.SparseTensor(x.F, x.C[x.C[:, 0].argsort()], coordinate_manager=manager)
    assert ascends(ordered)
    for tensor in (x, coarse, ordered):
        sums = [tensor.F[tensor.C[:, 0] == batch].sum(0) for batch in range(3)]
        torch.testing.assert_close(ME.MinkowskiGlobalSumPooling()(tensor).F, torch.stack(sums))


def test_b5_48_layers_of_one_window_share_their_map(make):
    """A transposed layer runs the map of the layer that it undoes."""
    x = make(dtype=torch.float64)
    manager = x.coordinate_manager
    down = ME.MinkowskiConvolution(4, 4, kernel_size=2, stride=2, dimension=3)
    up = ME.MinkowskiConvolutionTranspose(4, 4, kernel_size=2, stride=2, dimension=3)
    y = down.double().to(x.device)(x)
    up.double().to(x.device)(y)
    ME.MinkowskiMaxPooling(2, 2, dimension=3)(x)
    assert len(manager._kernel_maps) == 3
    assert len({id(kmap._relation) for kmap in manager._kernel_maps.values()}) == 1


def test_b5_48_maps_go_with_the_last_tensor_that_holds_them(make):
    x = make()
    conv = ME.MinkowskiConvolution(4, 4, kernel_size=2, stride=2, dimension=3).to(x.device)
    y = ME.MinkowskiPruning()(conv(x), torch.ones(1, dtype=torch.bool, device=x.device).expand(
        len(conv(x))))  # fmt: skip
    y = ME.MinkowskiGlobalPooling()(y + conv(x))
    manager = weakref.ref(x.coordinate_manager)
    gc.collect()
    gc.disable()
    try:
        del x
        assert manager() is not None
        del y
        assert manager() is None
    finally:
        gc.enable()


def test_maps_of_another_manager_are_refused(make):
    x, y = make(), make()
    y = ME.MinkowskiSumPooling(2, 2, dimension=3)(y)
    with pytest.raises(AssertionError, match=r"\[2, 2, 2\] is not in this coordinate manager"):
        x.coordinate_manager.size(y.coordinate_map_key)
    with pytest.raises(AssertionError, match="is not a field of this coordinate manager"):
        x.coordinate_manager.get_coordinate_field(x.coordinate_map_key)


def test_errors_of_coordinates(device):
    manager = ME.CoordinateManager(D=2)
    with pytest.raises(AssertionError, match=r"must have shape \[N, 3\].*got \[4, 2\]"):
        manager.insert_and_map(torch.zeros(4, 2, dtype=torch.int32, device=device))
    with pytest.raises(AssertionError, match="coordinates must be integers"):
        manager.insert_and_map(torch.zeros(4, 3, device=device))
    with pytest.raises(ValueError, match="batch indices must not be negative; got -1"):
        manager.insert_and_map(torch.tensor([[-1, 0, 0]], device=device))
    with pytest.raises(ValueError, match="number of spatial axes, must be at least 1; got 0"):
        ME.CoordinateManager()


def test_old_names():
    with pytest.raises(DeprecationWarning, match="use CoordinateManager"):
        ME.CoordsManager(D=3)
    with pytest.warns(UserWarning, match="is now set_gpu_allocator"):
        ME.set_memory_manager_backend(ME.GPUMemoryAllocatorType.PYTORCH)
    with pytest.raises(AssertionError, match="expected a GPUMemoryAllocatorType; got 'cuda'"):
        ME.set_gpu_allocator("cuda")


def test_repr_lists_the_maps(make):
    x = make(12)
    assert repr(x.coordinate_manager) == "CoordinateManager(\n\t[1, 1, 1]:\t12x4\n)"


def test_coordinates_that_are_no_multiples_of_their_stride_stay_apart():
    coords = torch.tensor([[0, 0, 0], [0, 1, 0], [0, 2, 3]], dtype=torch.int32)
    x = ME.SparseTensor(torch.arange(3.0)[:, None], coordinates=coords, tensor_stride=2)
    assert sorted(x.C.tolist()) == coords.tolist()
    assert x.tensor_stride == [2, 2]


@pytest.mark.parametrize(("shift", "unit"), [(0, (4, 2)), (1, (1, 1)), (2, (1, 1))])
def test_cells_are_strides_where_strides_divide_every_coordinate(shift, unit):
    coordinates = torch.tensor([[0, 4, -8], [1, 12, 0], [1, -4, 6]], dtype=torch.int32)
    coordinates[0, 1] += shift
    found, _, _ = CoordinateMap.around(coordinates, (4, 2))
    assert found.unit == unit
    cells = found.sites.coords * torch.tensor([1, *unit])
    assert torch.equal(cells, coordinates.to(cells.dtype))
