"""``MinkowskiOps``: several tensors on the same coordinates, dense tensors, linear layers."""

import pytest
import torch
from torch import nn

import compat.minkowski as ME
from compat.minkowski import MinkowskiOps
from compat.minkowski.sparse_matrix_functions import spmm, spmm_average


def on_same_sites(x, feats: torch.Tensor) -> ME.SparseTensor:
    return ME.SparseTensor(
        feats, coordinate_map_key=x.coordinate_map_key, coordinate_manager=x.coordinate_manager
    )


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (ME.cat, lambda a, b, c: torch.cat([a, b, c], 1)),
        (ME.sum, lambda a, b, c: a + b + c),
        (ME.mean, lambda a, b, c: torch.stack([a, b, c]).mean(0)),
        (ME.var, lambda a, b, c: torch.stack([a, b, c]).var(0, unbiased=False)),
    ],
    ids=["cat", "sum", "mean", "var"],
)
def test_b5_37_features_of_one_key_are_combined(function, expected, make, make_field):
    x = make()
    others = [on_same_sites(x, torch.randn_like(x.F)) for _ in range(2)]
    y = function(x, *others)
    assert y.coordinate_map_key == x.coordinate_map_key
    torch.testing.assert_close(y.F, expected(x.F, *(other.F for other in others)))
    assert torch.equal(function([x, *others]).F, y.F)
    field = make_field()
    z = function(field, field, field)
    assert isinstance(z, ME.TensorField)
    torch.testing.assert_close(z.F, expected(field.F, field.F, field.F))


def test_b5_37_errors(make, make_field):
    x = make()
    with pytest.raises(AssertionError, match=r"two or more tensors must be given.*got 1"):
        ME.cat([x])
    with pytest.raises(AssertionError, match="got SparseTensor"):
        ME.cat(x)
    with pytest.raises(ValueError, match="must be sparse tensors or fields; got Tensor"):
        ME.cat(x.F, x.F)
    with pytest.raises(AssertionError, match="of one kind; got SparseTensor and TensorField"):
        ME.cat(x, make_field())
    with pytest.raises(AssertionError, match="must share a coordinate manager"):
        ME.sum(x, make())
    down = ME.MinkowskiSumPooling(kernel_size=2, stride=2, dimension=3)(x)
    with pytest.raises(AssertionError, match="must share their coordinates; got keys"):
        ME.mean(x, down)


def test_linear(make, make_field, device):
    layer = ME.MinkowskiLinear(4, 6, bias=False).to(device)
    for x in (make(), make_field()):
        y = layer(x)
        assert type(y) is type(x)
        torch.testing.assert_close(y.F, x.F @ layer.linear.weight.T)
    assert repr(layer) == "MinkowskiLinear(in_features=4, out_features=6, bias=False)"
    assert list(ME.MinkowskiLinear(4, 6).state_dict()) == ["linear.weight", "linear.bias"]


def test_dense_coordinates_run_last_axis_fastest():
    coords = ME.dense_coordinates((2, 5, 3, 4))
    assert coords.dtype == torch.int32
    expected = [[b, i, j] for b in range(2) for i in range(3) for j in range(4)]
    assert coords.tolist() == expected
    with pytest.raises(AssertionError, match=r"must be \(B, C, \*spatial axes\); got \(2, 5\)"):
        ME.dense_coordinates((2, 5))


@pytest.mark.parametrize("format", [None, "BCXX", "BXCX", "BXXC"])
def test_to_sparse_drops_cells_that_are_zero_in_every_channel(format: str | None, device):
    dense = torch.randn(2, 3, 4, 5, device=device)
    dense[:, 0, :2] = 0
    dense[:, :, 2:] = 0
    dense.requires_grad_()
    axis = (format or "BC").index("C")
    x = ME.to_sparse(dense.movedim(1, axis), format)
    expected = [[b, i, j] for b in range(2) for i in range(2) for j in range(5)]
    assert x.C.tolist() == expected
    rows = torch.tensor(expected)
    feats = dense[rows[:, 0], :, rows[:, 1], rows[:, 2]]
    assert torch.equal(x.F, feats)
    x.F.sum().backward()
    assert dense.grad is not None
    assert dense.grad[:, :, :2].eq(1).all()
    assert dense.grad[:, :, 2:].eq(0).all()


@pytest.mark.parametrize("format", ["BXX", "CBXX", "BCXC", "BCXY", "XBCX"])
def test_to_sparse_formats(format: str):
    with pytest.raises(AssertionError, match="format must have 4 letters, B first, one C"):
        ME.to_sparse(torch.zeros(1, 2, 3, 4), format)


def test_to_sparse_needs_a_spatial_axis():
    with pytest.raises(AssertionError, match=r"must have 3 axes or more; got \[1, 2\]"):
        ME.to_sparse(torch.zeros(1, 2))


def test_dense_to_sparse_and_back_is_differentiable(device):
    dense = torch.randn(2, 3, 4, 5, 6, device=device, requires_grad=True)
    coords = ME.dense_coordinates(dense.shape)
    net = nn.Sequential(
        ME.MinkowskiToSparseTensor(remove_zeros=False, coordinates=coords),
        ME.MinkowskiReLU(),
        ME.MinkowskiToDenseTensor(dense.shape),
    )
    out = net(dense)
    assert torch.equal(out, dense.relu())
    out.sum().backward()
    assert torch.equal(dense.grad, (dense > 0).float())
    assert len(ME.to_sparse_all(dense)) == 2 * 4 * 5 * 6
    assert len(ME.MinkowskiToSparseTensor()(dense.relu())) < len(ME.to_sparse_all(dense))


def test_to_sparse_tensor_takes_fields_and_refuses_others(make_field):
    field = make_field()
    assert torch.equal(ME.MinkowskiToSparseTensor()(field).C, field.sparse().C)
    with pytest.raises(ValueError, match=r"must be a TensorField or a torch\.Tensor; got int"):
        ME.MinkowskiToSparseTensor()(3)
    with pytest.raises(AssertionError, match="coordinates need remove_zeros=False"):
        ME.MinkowskiToSparseTensor(coordinates=torch.zeros(1, 3))


def test_to_feature(make, make_field):
    for x in (make(), make_field()):
        assert ME.MinkowskiToFeature()(x) is x.F
    with pytest.raises(AssertionError, match="must be a SparseTensor or TensorField; got Tensor"):
        ME.MinkowskiToFeature()(torch.zeros(1))


@pytest.mark.parametrize("name", ["Cat", "Sum", "Mean", "Var"])
def test_stacks_combine_what_their_modules_return(name: str, make):
    x = make()
    stack = getattr(ME, f"MinkowskiStack{name}")(ME.MinkowskiReLU(), ME.MinkowskiTanh())
    expected = getattr(ME, name.lower())(stack[0](x), stack[1](x))
    assert torch.equal(stack(x).F, expected.F)


def test_ops_module_has_the_names_that_downstream_code_imports():
    assert MinkowskiOps.SparseTensor is ME.SparseTensor
    assert MinkowskiOps.cat is ME.cat
    assert MinkowskiOps._sum is ME.sum


def test_networks_know_their_dimension_and_must_define_forward():
    class Net(ME.MinkowskiNetwork):
        def forward(self, x):
            return x

    assert Net(3).D == 3
    with pytest.raises(TypeError, match="abstract"):
        ME.MinkowskiNetwork(3)


def test_spmm_is_the_product_with_a_sparse_matrix(device):
    rows = torch.tensor([2, 0, 2, 1, 2], device=device)
    cols = torch.tensor([0, 1, 2, 3, 3], device=device)
    vals = torch.randn(5, dtype=torch.float64, device=device, requires_grad=True)
    mat = torch.randn(4, 3, dtype=torch.float64, device=device, requires_grad=True)
    dense = torch.zeros(3, 4, dtype=torch.float64, device=device).index_put((rows, cols), vals)
    out = spmm(rows, cols, vals, torch.Size([3, 4]), mat)
    torch.testing.assert_close(out, dense @ mat)
    assert torch.equal(ME.MinkowskiSPMMFunction.apply(rows, cols, vals, (3, 4), mat), out)
    for ours, theirs in zip(
        torch.autograd.grad(out.sin().sum(), (vals, mat)),
        torch.autograd.grad((dense @ mat).sin().sum(), (vals, mat)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)
    average, entries, weights = spmm_average(rows, cols, (3, 4), mat)
    torch.testing.assert_close(average[2], mat[[0, 2, 3]].mean(0))
    assert entries.tolist() == [[0, 1, 2, 2, 2], [1, 3, 0, 2, 3]]
    torch.testing.assert_close(weights[2:].sum().item(), 1.0)
    assert torch.equal(ME.MinkowskiSPMMAverageFunction.apply(rows, cols, (3, 4), mat), average)


def test_spmm_errors():
    rows, vals, mat = torch.tensor([0, 1]), torch.ones(2), torch.ones(3, 2)
    with pytest.raises(AssertionError, match=r"got shapes \[2\], \[1\] and \[2\]"):
        spmm(rows, rows[:1], vals, (2, 3), mat)
    with pytest.raises(AssertionError, match=r"got torch\.float64 on cpu and torch\.float32"):
        spmm(rows, rows, vals.double(), (2, 3), mat)
