"""The rows of made maps have the order of the original on a GPU, if it has an order there.

The original inserts the rows of a union map by map, and generated sites input by input and tap by
tap. If several inputs reach one site, a race decides which of them makes the row.
"""

import pytest
import torch

import compat.minkowski as ME
from tests._back_end import every_back_end
from tests.compat.minkowski import _oracle as oracle

pytestmark = every_back_end


def tensor(coords, device, **options):
    """Return a tensor whose features are the numbers of its rows."""
    coords = torch.as_tensor(coords, dtype=torch.int32, device=device)
    feats = torch.arange(float(len(coords)), device=device)[:, None]
    return ME.SparseTensor(feats, coords, **options)


def first_come(*lists):
    """Return the distinct rows of lists of coordinates, in the order in which they appear."""
    return [list(row) for row in dict.fromkeys(tuple(row) for rows in lists for row in rows)]


FIRST = [[1, 3, 0], [0, -2, 5], [0, 9, 9], [1, 0, 0]]
SECOND = [[0, 4, 4], [0, -2, 5], [1, -7, 1], [1, 3, 0]]
THIRD = [[0, 0, 0], [1, -7, 1], [0, 9, 9]]


def test_a_union_has_the_first_operands_rows_first(device):
    x = tensor(FIRST, device)
    others = [tensor(c, device, coordinate_manager=x.coordinate_manager) for c in (SECOND, THIRD)]
    union = ME.MinkowskiUnion()(x, *others)
    assert union.C.tolist() == first_come(FIRST, SECOND, THIRD)
    assert union.F.flatten().tolist() == [0 + 3, 1 + 1, 2 + 2, 3, 0, 2 + 1, 0]
    for result in (x + others[0], x * others[0], x - others[0]):
        assert result.C.tolist() == first_come(FIRST, SECOND)
    assert (others[0] + x).C.tolist() == first_come(SECOND, FIRST)


def test_features_of_a_union_fit_the_first_operand(device):
    """A published codec adds a tensor to a subset of its rows and keeps the first's key."""
    x = tensor(FIRST, device)
    part = ME.MinkowskiPruning()(x, torch.tensor([False, True, False, True], device=device))
    both = x + part
    again = ME.SparseTensor(
        both.F,
        coordinate_map_key=x.coordinate_map_key,
        coordinate_manager=x.coordinate_manager,
    )
    expected = x.F + torch.tensor([[0.0], [1], [0], [3]], device=device)
    torch.testing.assert_close(again.F, expected)


def test_the_union_of_strides_two_and_three(device):
    """Rows keep their coordinates, which are multiples of neither stride."""
    x = tensor([[0, 6, -2], [0, -4, 0]], device, tensor_stride=2)
    y = tensor([[0, 9, 3], [0, 6, -3], [0, 6, 0]], device, tensor_stride=3,
               coordinate_manager=x.coordinate_manager)  # fmt: skip
    union = ME.MinkowskiUnion()(x, y)
    assert union.C.tolist() == [[0, 6, -2], [0, -4, 0], [0, 9, 3], [0, 6, -3], [0, 6, 0]]
    assert union.tensor_stride == [2, 2]
    manager, key = x.coordinate_manager, union.coordinate_map_key
    coarse = manager.get_coordinates(manager.stride(key, 2))
    cells = sorted({oracle.cell(tuple(c), (4, 4)) for c in union.C.tolist()})
    assert [tuple(c) for c in coarse.tolist()] == cells


@pytest.mark.parametrize(
    ("kernel_size", "stride"), [(2, 2), (3, 3), (1, 2), (2, 3), ([2, 1], [2, 1])], ids=str
)
@pytest.mark.parametrize("cls", ["GenerativeConvolutionTranspose", "ConvolutionTranspose"])
def test_generated_sites_come_input_by_input_and_tap_by_tap(cls, kernel_size, stride, device):
    strides = [stride] * 2 if isinstance(stride, int) else stride
    coords = [[b, 6 * i, 6 * j] for b, i, j in [(1, 2, 0), (0, -3, 1), (0, 1, 1), (1, -1, -1)]]
    x = tensor(coords, device, tensor_stride=strides)
    layer = getattr(ME, f"Minkowski{cls}")(
        1, 1, kernel_size=kernel_size, stride=stride, dimension=2
    ).to(device)
    y = layer(x)
    offsets = oracle.taps(layer.kernel_generator.kernel_size)
    expected = [list(oracle.moved(tuple(c), tap, (1, 1))) for c in coords for tap in offsets]
    assert y.C.tolist() == expected
    # Row by row and tap by tap, so features fold into [inputs, taps].
    folded = y.F.view(len(x), len(offsets))
    torch.testing.assert_close(folded, x.F * layer.kernel.view(1, -1))


def test_generated_sites_that_inputs_share_ascend(device):
    x = tensor([[0, 2], [0, 0]], device, tensor_stride=2)
    layer = ME.MinkowskiGenerativeConvolutionTranspose(1, 1, kernel_size=3, stride=2, dimension=1)
    assert layer.to(device)(x).C.tolist() == [[0, -1], [0, 0], [0, 1], [0, 2], [0, 3]]


def test_pruning_keeps_the_order_and_strides_ascend(device):
    x = tensor(FIRST, device)
    mask = torch.tensor([True, False, True, True], device=device)
    assert ME.MinkowskiPruning()(x, mask).C.tolist() == x.C[mask].tolist()
    pooled = ME.MinkowskiSumPooling(2, 2, dimension=2)(x)
    cells = sorted({oracle.cell(tuple(c), (2, 2)) for c in FIRST})
    assert [tuple(c) for c in pooled.C.tolist()] == cells


def test_a_field_has_its_cells_in_the_order_of_their_first_points(device):
    points = torch.tensor([[0, 2.5, 0], [0, -0.5, 0.2], [0, 2.1, 0.9], [0, 0, 0]], device=device)
    field = ME.TensorField(torch.ones(4, 1, device=device), points)
    assert field.sparse().C.tolist() == [[0, 2, 0], [0, -1, 0], [0, 0, 0]]


@pytest.mark.parametrize("name", ["cat", "sum", "mean"])
def test_features_combine_on_keys_of_equal_rows(name, device):
    """The original accepts this too, because its keys of all unions compare equal."""
    x = tensor(FIRST, device)
    other = tensor(SECOND, device, coordinate_manager=x.coordinate_manager)
    everything = torch.ones(len(x), dtype=torch.bool, device=device)
    same = ME.MinkowskiPruning()(x, everything)
    first, second = x + other, same + other
    assert first.coordinate_map_key != second.coordinate_map_key
    combined = getattr(ME, name)(first, second)
    assert combined.coordinate_map_key == first.coordinate_map_key
    pair = [first.F, second.F]
    expected = {
        "cat": lambda: torch.cat(pair, 1),
        "sum": lambda: pair[0] + pair[1],
        "mean": lambda: (pair[0] + pair[1]) / 2,
    }
    torch.testing.assert_close(combined.F, expected[name]())


def test_operators_take_keys_of_equal_rows(device):
    x = tensor(FIRST, device)
    everything = torch.ones(len(x), dtype=torch.bool, device=device)
    same = ME.MinkowskiPruning()(x, everything)
    product = x * same
    assert product.coordinate_map_key == x.coordinate_map_key
    torch.testing.assert_close(product.F, x.F.square())
    x += same
    assert x.F.flatten().tolist() == [0, 2, 4, 6]
    # If equal coordinates have another order, their rows differ.
    moved = tensor(FIRST[::-1], device, coordinate_manager=x.coordinate_manager)
    with pytest.raises(AssertionError, match="must have the same coordinate_map_key"):
        x += moved
    with pytest.raises(AssertionError, match="inputs must share their coordinates"):
        ME.cat(x, moved)
    assert (x + moved).F.flatten().tolist() == [3, 4, 5, 6]


@pytest.mark.parametrize("is_transpose", [False, True])
def test_the_kernel_map_of_a_pool_follows_the_rows_of_the_finer_side(is_transpose, device):
    x = tensor(FIRST + SECOND[:1], device)
    pooled = ME.MinkowskiSumPooling(2, 2, dimension=2)(x)
    keys = [x.coordinate_map_key, pooled.coordinate_map_key]
    found = x.coordinate_manager.kernel_map(
        *(keys[::-1] if is_transpose else keys), stride=2, kernel_size=2,
        is_transpose=is_transpose, is_pool=True,
    )  # fmt: skip
    assert list(found) == [0]
    fine, cells = found[0][[1, 0]] if is_transpose else found[0]
    assert fine.tolist() == list(range(len(x)))
    assert pooled.C[cells].tolist() == [list(oracle.cell(tuple(c), (2, 2))) for c in x.C.tolist()]
    assert found[0].dtype == torch.int32
