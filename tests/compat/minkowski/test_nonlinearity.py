"""Nonlinearities: torch's modules on the features, coordinates and their keys untouched."""

import copy

import pytest
import torch
from torch import nn

import compat.minkowski as ME
from compat.minkowski import MinkowskiNonlinearity

ARGUMENTS = {
    "ELU": {"alpha": 0.5},
    "Hardshrink": {"lambd": 0.3},
    "Hardsigmoid": {},
    "Hardtanh": {"min_val": -0.5},
    "Hardswish": {},
    "LeakyReLU": {"negative_slope": 0.2},
    "LogSigmoid": {},
    "PReLU": {"num_parameters": 4},
    "ReLU": {},
    "ReLU6": {},
    "RReLU": {},
    "SELU": {},
    "CELU": {"alpha": 0.5},
    "GELU": {"approximate": "tanh"},
    "Sigmoid": {},
    "SiLU": {},
    "Softplus": {"beta": 2},
    "Softshrink": {"lambd": 0.3},
    "Softsign": {},
    "Tanh": {},
    "Tanhshrink": {},
    "Threshold": {"threshold": 0.1, "value": 2.0},
    "Softmin": {"dim": 1},
    "Softmax": {"dim": 1},
    "LogSoftmax": {"dim": 1},
    "Dropout": {"p": 0.3},
    "AlphaDropout": {"p": 0.3},
}


def test_every_nonlinearity_is_listed():
    classes = {
        name.removeprefix("Minkowski")
        for name, value in vars(MinkowskiNonlinearity).items()
        if isinstance(value, type)
        and issubclass(value, MinkowskiNonlinearity.MinkowskiNonlinearityBase)
    }
    special = {"NonlinearityBase", "AdaptiveLogSoftmaxWithLoss"}
    assert classes - special == ARGUMENTS.keys()
    assert all(hasattr(ME, f"Minkowski{name}") for name in ARGUMENTS)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_is_the_torch_module_on_the_features(name: str, make, make_field, device):
    torch.manual_seed(0)
    layer = getattr(ME, f"Minkowski{name}")(**ARGUMENTS[name]).to(device)
    reference = getattr(nn, name)(**ARGUMENTS[name]).to(device)
    for x in (make(), make_field()):
        torch.manual_seed(1)
        y = layer(x)
        torch.manual_seed(1)
        assert torch.equal(y.F, reference(x.F))
        assert type(y) is type(x)
        assert torch.equal(y.C, x.C)
        assert y.coordinate_manager is x.coordinate_manager
    assert repr(layer) == f"Minkowski{name}()"
    assert isinstance(copy.deepcopy(layer).module, getattr(nn, name))


def test_results_share_the_key(make):
    x = make()
    assert ME.MinkowskiReLU()(x).coordinate_map_key == x.coordinate_map_key


def test_fields_keep_their_quantization_mode(make_field):
    x = make_field()
    x.quantization_mode = ME.SparseTensorQuantizationMode.UNWEIGHTED_SUM
    assert ME.MinkowskiReLU()(x).quantization_mode == x.quantization_mode


def test_in_place_modules_modify_the_input(make):
    x = ME.MinkowskiTanh()(make())
    y = ME.MinkowskiReLU(inplace=True)(x)
    assert y.F.data_ptr() == x.F.data_ptr()
    assert (x.F >= 0).all()


def test_prelu_state_dict_is_the_originals():
    assert list(ME.MinkowskiPReLU().state_dict()) == ["module.weight"]


def test_adaptive_softmax_has_no_target_to_take(make):
    layer = ME.MinkowskiAdaptiveLogSoftmaxWithLoss(4, 10, [3])
    with pytest.raises(TypeError, match="target"):
        layer(make())


def test_sinusoidal(make, make_field, device):
    torch.manual_seed(0)
    layer = ME.MinkowskiSinusoidal(4, 6).to(device)
    assert {key: tuple(value.shape) for key, value in layer.state_dict().items()} == {
        "kernel": (4, 6),
        "bias": (1, 6),
        "coef": (1, 6),
    }
    for x in (make(), make_field()):
        expected = torch.sin(x.F @ layer.kernel + layer.bias) * layer.coef
        torch.testing.assert_close(layer(x).F, expected)
