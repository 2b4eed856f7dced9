"""Residual and squeeze-and-excitation blocks, and the summary of a network."""

import pytest
import torch
from torch import nn

import compat.minkowski as ME
from compat.minkowski.diagnostics import print_diagnostics
from compat.minkowski.modules.resnet_block import BasicBlock, Bottleneck
from compat.minkowski.modules.senet_block import SEBasicBlock, SEBottleneck, SELayer


def downsample(planes: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        ME.MinkowskiConvolution(4, planes, kernel_size=1, stride=stride, dimension=3),
        ME.MinkowskiBatchNorm(planes),
    )


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    ("block", "options"),
    [
        (BasicBlock, {"dimension": 3}),
        (Bottleneck, {"dimension": 3}),
        (SEBasicBlock, {"D": 3, "reduction": 2}),
        (SEBottleneck, {"D": 3, "reduction": 2}),
    ],
)
def test_blocks_add_the_residual_of_the_same_key(block, options, stride: int, make, device):
    torch.manual_seed(0)
    planes = 4 * block.expansion
    net = block(4, 4, stride=stride, downsample=downsample(planes, stride), **options).to(device)
    x = make()
    y = net(x)
    assert y.F.shape[1] == planes
    assert y.tensor_stride == [stride] * 3
    y.F.square().sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())
    inner = {}
    net.relu.register_forward_pre_hook(lambda _, inputs: inner.update(last=inputs[0].F.clone()))
    torch.testing.assert_close(net(x).F, inner["last"].relu())


def test_basic_block_is_conv_norm_relu_conv_norm_plus_input(make, device):
    torch.manual_seed(0)
    net = BasicBlock(4, 4, dimension=3).to(device)
    x = make()
    before = x.F.detach().clone()
    hidden = net.norm1(net.conv1(x)).F.relu()
    hidden = ME.SparseTensor(
        hidden, coordinate_map_key=x.coordinate_map_key, coordinate_manager=x.coordinate_manager
    )
    expected = (net.norm2(net.conv2(hidden)).F + x.F).relu()
    torch.testing.assert_close(net(x).F, expected)
    assert torch.equal(x.F, before)


def test_b7_basic_block_state_dict_is_the_originals():
    block = BasicBlock(4, 8, stride=2, downsample=downsample(8, 2), dimension=3)
    state = block.state_dict()
    assert {name: tuple(state[name].shape) for name in state if name.endswith("kernel")} == {
        "conv1.kernel": (27, 4, 8),
        "conv2.kernel": (27, 8, 8),
        "downsample.0.kernel": (1, 4, 8),
    }
    assert {"norm1.bn.weight", "norm2.bn.running_mean", "downsample.1.bn.bias"} <= state.keys()
    state = Bottleneck(4, 8, dimension=3).state_dict()
    assert tuple(state["conv1.kernel"].shape) == (4, 8)
    assert tuple(state["conv3.kernel"].shape) == (8, 32)
    assert "norm3.bn.weight" in state


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_blocks_need_a_dimension(block):
    with pytest.raises(AssertionError, match="dimension must be positive; got -1"):
        block(4, 4)


def test_se_layer_gates_channels_by_the_mean_of_the_sample(make, device):
    torch.manual_seed(0)
    layer = SELayer(4, reduction=2).to(device)
    x = make(batch_size=3)
    expected = torch.empty_like(x.F)
    for sample in range(3):
        rows = x.C[:, 0] == sample
        hidden = layer.fc[0].linear(x.F[rows].mean(0)).relu()
        expected[rows] = x.F[rows] * layer.fc[2].linear(hidden).sigmoid()
    torch.testing.assert_close(layer(x).F, expected)
    assert list(layer.state_dict()) == [
        f"fc.{i}.linear.{name}" for i in (0, 2) for name in ("weight", "bias")
    ]


def test_summary_lists_layers_shapes_and_parameters(make, device, capsys):
    net = nn.Sequential(
        ME.MinkowskiConvolution(4, 8, kernel_size=3, bias=True, dimension=3),
        ME.MinkowskiBatchNorm(8),
    ).to(device)
    net[0].kernel.requires_grad_(False)
    x = make()
    assert ME.utils.summary(net, x) == (27 * 4 * 8 + 8 + 16, 16)
    lines = capsys.readouterr().out.splitlines()
    assert lines[3].split() == ["MinkowskiConvolution-1", "[40,", "8]", "872"]
    assert lines[4].split() == ["BatchNorm1d-2", "[40,", "8]", "16"]
    assert "Total params: 888" in lines
    assert "Non-trainable params: 872" in lines
    assert not any(module._forward_hooks for module in net.modules())


def test_diagnostics_name_the_versions(capsys):
    print_diagnostics()
    assert torch.__version__ in capsys.readouterr().out
