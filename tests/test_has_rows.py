"""Every sparse tensor has the methods that capture and export call."""

import inspect

import pytest
import torch

import compat.minkowski as ME
import compat.spconv.pytorch as spconv
import tritonspconv as ts
from tritonspconv.coords import Grid
from tritonspconv.has_rows import HasRows, has_rows

COORDS = torch.tensor([[0, 4, 2, 0], [0, 0, 6, 2], [1, 2, 2, 2]], dtype=torch.int32)
FEATS = torch.arange(6.0).reshape(3, 2)


def engine() -> ts.SparseTensor:
    return ts.SparseTensor(FEATS, ts.ActiveSites(COORDS, Grid((0, 0, 0), (8, 8, 8), 2)))


TENSORS = {
    "engine": (engine, 1),
    "spconv": (lambda: spconv.SparseConvTensor(FEATS, COORDS, [8, 8, 8], 2), 1),
    "minkowski": (lambda: ME.SparseTensor(FEATS, COORDS), 1),
    "minkowski-stride-2": (lambda: ME.SparseTensor(FEATS, COORDS, tensor_stride=2), 2),
}


@pytest.fixture(params=TENSORS.values(), ids=TENSORS)
def tensor_and_unit(request):
    make, unit = request.param
    return make(), unit


def test_the_protocol_is_whole(tensor_and_unit):
    tensor, _ = tensor_and_unit
    asked = {
        name
        for name, value in vars(HasRows).items()
        if inspect.isfunction(value) and value.__module__ == HasRows.__module__
    }
    assert len(asked) == 5
    assert has_rows(tensor)
    for name in asked:
        wanted, found = (
            list(inspect.signature(getattr(kind, name)).parameters)
            for kind in (HasRows, type(tensor))
        )
        assert found == wanted


def test_rows_have_the_coordinates_of_users_and_those_of_cells(tensor_and_unit):
    tensor, unit = tensor_and_unit
    feats, coords = tensor._row_tensors()
    assert torch.equal(feats, FEATS)
    assert torch.equal(coords, COORDS)
    feats, sites = tensor._rows_in_cells()
    assert torch.equal(feats, FEATS)
    assert torch.equal(sites.coords * torch.tensor([1] + [unit] * 3), COORDS)


def test_other_rows_take_the_place_of_rows(tensor_and_unit):
    tensor, _ = tensor_and_unit
    cells = tensor._rows_in_cells()[1].coords
    for made in (
        tensor._with_row_tensors(-FEATS[:2], COORDS[:2]),
        tensor._with_rows_in_cells(-FEATS[:2], cells[:2]),
    ):
        assert type(made) is type(tensor)
        assert made._grid_of_rows() == tensor._grid_of_rows()
        feats, coords = made._row_tensors()
        assert torch.equal(feats, -FEATS[:2])
        assert torch.equal(coords, COORDS[:2])


def test_coordinates_off_the_stride_have_no_cells():
    tensor = ME.SparseTensor(FEATS, COORDS + torch.tensor([0, 1, 0, 0]).int(), tensor_stride=2)
    with pytest.raises(ValueError, match=r"not multiples of the tensor stride \[2, 2, 2\]"):
        tensor._rows_in_cells()


@pytest.mark.parametrize("value", [None, FEATS, [FEATS]], ids=["None", "tensor", "list"])
def test_other_values_have_no_rows(value):
    assert not has_rows(value)
