"""``MinkowskiFunctional``: functions of torch on the features, and losses."""

import inspect

import pytest
import torch
from torch.nn import functional as F

import compat.minkowski as ME
from compat.minkowski import MinkowskiFunctional as MF

ARGUMENTS = {
    "threshold": (0.1, 2.0),
    "hardtanh": (-0.5, 0.5),
    "prelu": (torch.tensor([0.1]),),
    "softmin": (1,),
    "softmax": (1,),
    "log_softmax": (1,),
    "linear": (torch.arange(12.0).reshape(3, 4),),
    "batch_norm": (torch.zeros(4), torch.ones(4)),
}
ACTIVATIONS = [
    "threshold",
    "relu",
    "hardtanh",
    "hardswish",
    "relu6",
    "elu",
    "selu",
    "celu",
    "leaky_relu",
    "prelu",
    "rrelu",
    "glu",
    "gelu",
    "logsigmoid",
    "hardshrink",
    "tanhshrink",
    "softsign",
    "softplus",
    "softmin",
    "softmax",
    "softshrink",
    "gumbel_softmax",
    "log_softmax",
    "tanh",
    "sigmoid",
    "hardsigmoid",
    "silu",
    "batch_norm",
    "normalize",
    "linear",
    "dropout",
    "alpha_dropout",
]
LOSSES = [
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "poisson_nll_loss",
    "cross_entropy",
    "hinge_embedding_loss",
    "kl_div",
    "l1_loss",
    "mse_loss",
    "multilabel_margin_loss",
    "multilabel_soft_margin_loss",
    "multi_margin_loss",
    "nll_loss",
    "smooth_l1_loss",
    "soft_margin_loss",
]
CLASSES = ("cross_entropy", "multi_margin_loss", "nll_loss")


def test_every_function_is_listed():
    functions = {name for name, value in vars(MF).items() if inspect.isfunction(value)}
    own = {name for name in functions if hasattr(F, name)}
    assert own == {*ACTIVATIONS, *LOSSES}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_sparse_in_sparse_out(name: str, make, make_field, device):
    arguments = [
        value.to(device) if isinstance(value, torch.Tensor) else value
        for value in ARGUMENTS.get(name, ())
    ]
    for x in (make(), make_field()):
        torch.manual_seed(0)
        y = getattr(MF, name)(x, *arguments)
        torch.manual_seed(0)
        assert torch.equal(y.F, getattr(F, name)(x.F, *arguments))
        assert type(y) is type(x)
        assert y.coordinate_manager is x.coordinate_manager


# torch warns of the meaning of "mean" in kl_div.
@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")
@pytest.mark.parametrize("name", LOSSES)
def test_losses_return_a_tensor(name: str, make, device):
    x = MF.sigmoid(make())
    target = torch.zeros(len(x), dtype=torch.long, device=device)
    if name == "multilabel_margin_loss":
        target = target[:, None].expand(-1, 4).contiguous()
    elif name not in CLASSES:
        target = torch.ones(len(x), 4, device=device)
    loss = getattr(MF, name)(x, target)
    assert torch.equal(loss, getattr(F, name)(x.F, target))
    assert torch.equal(
        getattr(MF, name)(x, target, reduction="sum"),
        getattr(F, name)(x.F, target, reduction="sum"),
    )


def test_keyword_arguments_and_keys_pass_through(make):
    x = make()
    y = MF.normalize(x, p=1, dim=1)
    assert y.coordinate_map_key == x.coordinate_map_key
    assert torch.equal(y.F, F.normalize(x.F, p=1, dim=1))
    assert isinstance(y, ME.SparseTensor)
