"""Local, transposed and global pools."""

import pytest
import torch

import compat.minkowski as ME
from tests.compat.minkowski import _oracle as oracle

REDUCE = {
    "Sum": lambda values: values.sum(0),
    "Avg": lambda values: values.mean(0),
    "Max": lambda values: values.amax(0),
}


def window_rows(x, site, kernel_size, dilation):
    """Return the rows of ``x`` in the window at ``site``; the window is that of a convolution."""
    rows = oracle.rows_of(x.C)
    steps = [d * ts for d, ts in zip(dilation, x.tensor_stride, strict=True)]
    offsets = oracle.taps(kernel_size)
    found = [rows.get(oracle.moved(site, offset, steps)) for offset in offsets]
    return [row for row in found if row is not None]


@pytest.mark.parametrize("mode", REDUCE)
@pytest.mark.parametrize(
    ("kernel_size", "stride", "dilation"),
    [(3, 1, 1), (3, 2, 1), (2, 1, 2), ([3, 2, 1], 2, 1)],
    ids=str,
)
def test_b5_27_and_29_windows_are_those_of_a_convolution(mode, kernel_size, stride, dilation, make):
    x = make(50, dtype=torch.float64)
    y = getattr(ME, f"Minkowski{mode}Pooling")(kernel_size, stride, dilation, dimension=3)(x)
    assert y.coordinate_map_key == x.coordinate_manager.stride(x.coordinate_map_key, stride)
    sizes = [kernel_size] * 3 if isinstance(kernel_size, int) else kernel_size
    for site, feats in zip(map(tuple, y.C.tolist()), y.F, strict=True):
        rows = window_rows(x, site, sizes, [dilation] * 3)
        expected = REDUCE[mode](x.F[rows]) if rows else torch.zeros_like(feats)
        torch.testing.assert_close(feats, expected)


@pytest.mark.parametrize("mode", REDUCE)
@pytest.mark.parametrize("size", [2, 3, [1, 2, 3], 5], ids=str)
@pytest.mark.parametrize("tensor_stride", [1, 2])
def test_b5_28_a_window_as_large_as_the_stride_is_the_cell(mode, size, tensor_stride, make):
    x = make(60, reach=4, dtype=torch.float64)
    x = ME.SparseTensor(x.F, x.C * x.C.new_tensor([1] + [tensor_stride] * 3), tensor_stride)
    y = getattr(ME, f"Minkowski{mode}Pooling")(size, size, dilation=2, dimension=3)(x)
    cells = {}
    for row, site in enumerate(map(tuple, x.C.tolist())):
        cells.setdefault(oracle.cell(site, y.tensor_stride), []).append(row)
    assert [tuple(c) for c in y.C.tolist()] == sorted(cells)
    for site, feats in zip(map(tuple, y.C.tolist()), y.F, strict=True):
        torch.testing.assert_close(feats, REDUCE[mode](x.F[cells[site]]))


def test_b5_29_negative_maxima_are_kept_and_rows_without_inputs_are_zero(make):
    x = make(10, channels=2)
    target = ME.SparseTensor(
        torch.ones(2, 1, device=x.device),
        torch.tensor([[0, 50, 0, 0], x.C[0].tolist()], dtype=torch.int32, device=x.device),
        coordinate_manager=x.coordinate_manager,
    )
    low = ME.SparseTensor(
        -x.F.abs() - 1,
        coordinate_map_key=x.coordinate_map_key,
        coordinate_manager=x.coordinate_manager,
    )
    y = ME.MinkowskiMaxPooling(3, 1, dimension=3)(low, target)
    assert y.F[0].tolist() == [0, 0]
    assert (y.F[1] < 0).all()


@pytest.mark.parametrize("given", ["tensor", "key", "coordinates"])
def test_b5_6_given_coordinates(given, make):
    x = make(30)
    target = make(20, seed=1, coordinate_manager=x.coordinate_manager)
    where = {"tensor": target, "key": target.coordinate_map_key, "coordinates": target.C}[given]
    y = ME.MinkowskiSumPooling(3, 2, dimension=3)(x, where)
    assert y.C.tolist() == target.C.tolist()
    assert y.tensor_stride == [1, 1, 1]
    for site, feats in zip(map(tuple, y.C.tolist()), y.F, strict=True):
        torch.testing.assert_close(feats, x.F[window_rows(x, site, (3,) * 3, (1,) * 3)].sum(0))


@pytest.mark.parametrize(
    ("kernel_size", "stride"), [(2, 2), (3, 3), (5, 5), (3, 2), (3, 1)], ids=str
)
def test_b5_30_a_transposed_pool_sums_the_coarse_features(kernel_size, stride, make):
    x = make(50, channels=1, dtype=torch.float64)
    coarse = ME.MinkowskiSumPooling(stride, stride, dimension=3)(x)
    y = ME.MinkowskiPoolingTranspose(kernel_size, stride, dimension=3)(coarse)
    assert y.coordinate_map_key == x.coordinate_map_key
    rows = oracle.rows_of(coarse.C)
    for site, feats in zip(map(tuple, y.C.tolist()), y.F, strict=True):
        if kernel_size == stride:
            sources = [rows[oracle.cell(site, coarse.tensor_stride)]]
        else:
            back = [tuple(-o for o in offset) for offset in oracle.taps((kernel_size,) * 3)]
            found = [rows.get(oracle.moved(site, offset, (1, 1, 1))) for offset in back]
            sources = [row for row in found if row is not None]
        torch.testing.assert_close(feats, coarse.F[sources].sum(0))


@pytest.mark.parametrize("expand", [False, True])
def test_b5_30_a_transposed_pool_makes_the_sites_it_fills(expand, device):
    coords = torch.tensor([[0, 3], [0, -3]], dtype=torch.int32, device=device)
    feats = torch.tensor([[1.0], [2]], device=device)
    x = ME.SparseTensor(feats, coords, tensor_stride=3)
    if expand:
        x.coordinate_manager.insert_and_map(coords, 1)
    y = ME.MinkowskiPoolingTranspose(3, 3, expand_coordinates=expand, dimension=1)(x)
    assert y.C[:, 1].tolist() == [3, 4, 5, -3, -2, -1]
    assert y.F.flatten().tolist() == [1, 1, 1, 2, 2, 2]
    assert (y.coordinate_map_key.get_key()[1] == "") == (not expand)


@pytest.mark.parametrize("mode", REDUCE)
def test_b5_31_global_pools_have_one_row_per_sample(mode, make):
    x = make(50, batch_size=3, dtype=torch.float64)
    y = getattr(ME, f"MinkowskiGlobal{mode}Pooling")()(x)
    assert y.C.tolist() == [[b, 0, 0, 0] for b in range(3)]
    assert y.tensor_stride == [0, 0, 0]
    assert y.coordinate_map_key == x.coordinate_manager.origin()
    for batch in range(3):
        torch.testing.assert_close(y.F[batch], REDUCE[mode](x.F[x.C[:, 0] == batch]))


@pytest.mark.parametrize(
    ("mode", "reduce"),
    [(mode, mode.name.split("_")[1].title()) for mode in ME.PoolingMode if mode.name[0] == "G"],
    ids=str,
)
def test_global_pooling_takes_a_mode(mode, reduce, make):
    x = make()
    module = ME.MinkowskiGlobalPooling(mode)
    torch.testing.assert_close(module(x).F, getattr(ME, f"MinkowskiGlobal{reduce}Pooling")()(x).F)
    assert repr(module) == f"MinkowskiGlobalPooling(mode=PoolingMode.{mode.name})"


def test_global_pooling_averages_by_default(make):
    x = make()
    torch.testing.assert_close(
        ME.MinkowskiGlobalPooling()(x).F, ME.MinkowskiGlobalAvgPooling()(x).F
    )


def test_b5_31_one_point_per_sample(device):
    coords = torch.tensor([[1, 7], [0, 3]], dtype=torch.int32, device=device)
    x = ME.SparseTensor(torch.tensor([[-2.0], [-3]], device=device), coords)
    for mode in REDUCE:
        y = getattr(ME, f"MinkowskiGlobal{mode}Pooling")()(x)
        assert y.F.flatten().tolist() == [-3, -2]


@pytest.mark.parametrize("mode", REDUCE)
def test_global_pools_take_fields(mode, make_field):
    field = make_field()
    y = getattr(ME, f"MinkowskiGlobal{mode}Pooling")()(field)
    for batch in range(2):
        torch.testing.assert_close(y.F[batch], REDUCE[mode](field.F[field.C[:, 0] == batch]))


def test_global_pools_of_a_pruned_tensor_keep_every_sample(make):
    x = make(20, channels=2)
    kept = ME.MinkowskiPruning()(x, x.C[:, 0] == 0)
    y = ME.MinkowskiGlobalSumPooling()(kept)
    assert y.F[1].tolist() == [0, 0]
    given = ME.MinkowskiGlobalSumPooling()(x)
    assert ME.MinkowskiGlobalSumPooling()(x, given).coordinate_map_key == given.coordinate_map_key
    with pytest.raises(AssertionError, match="one site for each of 2 samples; got 20"):
        ME.MinkowskiGlobalSumPooling()(x, x)


@pytest.mark.parametrize("mode", REDUCE)
@pytest.mark.parametrize(
    "make_layer",
    [
        lambda mode: getattr(ME, f"Minkowski{mode}Pooling")(2, 2, dimension=3),
        lambda mode: getattr(ME, f"Minkowski{mode}Pooling")(5, 5, dimension=3),
        lambda mode: getattr(ME, f"Minkowski{mode}Pooling")(3, 2, dimension=3),
        lambda mode: getattr(ME, f"MinkowskiGlobal{mode}Pooling")(),
    ],
    ids=["cells", "large-cells", "windows", "global"],
)
def test_gradcheck(mode, make_layer, make):
    x = make(12, channels=2, reach=2, dtype=torch.float64)

    def run(feats):
        key, manager = x.coordinate_map_key, x.coordinate_manager
        tensor = ME.SparseTensor(feats, coordinate_map_key=key, coordinate_manager=manager)
        return make_layer(mode)(tensor).F

    assert torch.autograd.gradcheck(run, (x.F,))


@pytest.mark.parametrize("size", [2, 5])
def test_transposed_gradcheck(size, make):
    x = make(12, channels=2, reach=2, dtype=torch.float64)
    coarse = ME.MinkowskiSumPooling(size, size, dimension=3)(x)

    def run(feats):
        key, manager = coarse.coordinate_map_key, coarse.coordinate_manager
        tensor = ME.SparseTensor(feats, coordinate_map_key=key, coordinate_manager=manager)
        return ME.MinkowskiPoolingTranspose(size, size, dimension=3)(tensor).F

    assert torch.autograd.gradcheck(run, (coarse.F.detach().requires_grad_(),))


def test_functions(make):
    x = make(20, channels=2)
    generator = ME.KernelGenerator(2, stride=2, dimension=3)
    manager, in_key, key = x.coordinate_manager, x.coordinate_map_key, ME.CoordinateMapKey(4)
    feats = ME.MinkowskiLocalPoolingFunction.apply(
        x.F, ME.PoolingMode.LOCAL_MAX_POOLING, generator, in_key, key, manager
    )
    torch.testing.assert_close(feats, ME.MinkowskiMaxPooling(2, 2, dimension=3)(x).F)
    back = ME.CoordinateMapKey(4)
    ME.MinkowskiLocalPoolingTransposeFunction.apply(
        feats, ME.PoolingMode.LOCAL_SUM_POOLING, generator, key, back, manager
    )
    assert back == in_key
    origin = ME.CoordinateMapKey(4)
    pooled = ME.MinkowskiGlobalPoolingFunction.apply(
        x.F, ME.PoolingMode.GLOBAL_SUM_POOLING_DEFAULT, in_key, origin, manager
    )
    assert origin == manager.origin()
    torch.testing.assert_close(pooled, ME.MinkowskiGlobalSumPooling()(x).F)
    most = ME.MinkowskiDirectMaxPoolingFunction.apply(
        torch.tensor([0, 1, 2], device=x.device), torch.tensor([1, 1, 0], device=x.device), x.F, 2
    )
    torch.testing.assert_close(most, torch.stack([x.F[2], x.F[:2].amax(0)]))


def test_repr_and_errors(make):
    module = ME.MinkowskiMaxPooling(2, 2, dimension=2)
    assert repr(module) == "MinkowskiMaxPooling(kernel_size=[2, 2], stride=[2, 2], dilation=[1, 1])"
    with pytest.raises(AssertionError, match="takes a SparseTensor with D=2; got D=3"):
        module(make(4))
    with pytest.raises(AssertionError, match="takes a SparseTensor with D=2; got int"):
        module(1)
    with pytest.raises(AssertionError, match="dimension, the number of spatial axes, must be"):
        ME.MinkowskiPoolingTranspose(2, 2)
    with pytest.raises(AssertionError, match="mode must be a PoolingMode; got 0"):
        ME.MinkowskiGlobalPooling(0)
    with pytest.raises(AssertionError, match=r"needs a GLOBAL mode; got PoolingMode\.LOCAL_MAX"):
        ME.MinkowskiGlobalPooling(ME.PoolingMode.LOCAL_MAX_POOLING)
