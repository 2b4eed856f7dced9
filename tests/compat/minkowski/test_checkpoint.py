"""Checkpoints have MinkowskiEngine's names and shapes, and convert to spconv's layers and back."""

import pytest
import torch
from torch import nn

import compat.minkowski as ME
import compat.spconv.pytorch as spconv
from compat.minkowski.checkpoint import from_spconv, to_spconv
from tritonspconv.cli import convert, main

CONV = ME.MinkowskiConvolution
TRANSPOSED = ME.MinkowskiConvolutionTranspose
GENERATIVE = ME.MinkowskiGenerativeConvolutionTranspose


@pytest.mark.parametrize(
    ("module", "shapes"),
    [
        (CONV(3, 5, 3, bias=True, dimension=3), {"kernel": (27, 3, 5), "bias": (1, 5)}),
        (CONV(3, 5, [3, 1, 2, 2], dimension=4), {"kernel": (12, 3, 5)}),
        (CONV(3, 5, 1, dimension=3), {"kernel": (3, 5)}),
        (CONV(3, 5, 1, stride=2, dimension=3), {"kernel": (1, 3, 5)}),
        (TRANSPOSED(3, 5, 2, stride=2, dimension=3), {"kernel": (8, 3, 5)}),
        (GENERATIVE(3, 5, 2, stride=2, dimension=2), {"kernel": (4, 3, 5)}),
        (
            ME.MinkowskiChannelwiseConvolution(3, 3, bias=True, dimension=3),
            {"kernel": (27, 3), "bias": (1, 3)},
        ),
        (ME.MinkowskiChannelwiseConvolution(3, 1, dimension=3), {"kernel": (1, 3)}),
        (ME.MinkowskiLinear(3, 5), {"linear.weight": (5, 3), "linear.bias": (5,)}),
        (ME.MinkowskiInstanceNorm(3), {"weight": (1, 3), "bias": (1, 3)}),
        (ME.MinkowskiPReLU(), {"module.weight": (1,)}),
        (ME.MinkowskiSinusoidal(3, 5), {"kernel": (3, 5), "bias": (1, 5), "coef": (1, 5)}),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_b7_checkpoint_layout(module: nn.Module, shapes: dict[str, tuple[int, ...]]):
    assert {name: tuple(value.shape) for name, value in module.state_dict().items()} == shapes


class MinkowskiNet(nn.Module):
    """A network of every layer that both libraries have."""

    def __init__(self, ndim: int = 3, window: object = 2) -> None:
        super().__init__()
        self.stem = CONV(3, 4, kernel_size=3, bias=True, dimension=ndim)
        self.norm = ME.MinkowskiBatchNorm(4)
        self.act = ME.MinkowskiPReLU()
        self.down = CONV(4, 6, kernel_size=window, stride=window, bias=True, dimension=ndim)
        self.wide = CONV(6, 6, kernel_size=3, dilation=2, dimension=ndim)
        self.up = TRANSPOSED(6, 5, kernel_size=window, stride=window, bias=True, dimension=ndim)
        self.head = CONV(9, 7, kernel_size=1, bias=True, dimension=ndim)

    def forward(self, x: ME.SparseTensor) -> ME.SparseTensor:
        x = self.act(self.norm(self.stem(x)))
        return self.head(ME.cat(self.up(self.wide(self.down(x))), x))


class SpconvNet(nn.Module):
    """The same network of spconv, with the same names."""

    def __init__(self, ndim: int = 3, window: object = 2) -> None:
        super().__init__()
        subm, conv, inverse = (
            getattr(spconv, f"{kind}{ndim}d")
            for kind in ("SubMConv", "SparseConv", "SparseInverseConv")
        )
        self.stem = subm(3, 4, 3, bias=True)
        self.norm = nn.BatchNorm1d(4)
        self.act = nn.PReLU()
        self.down = conv(4, 6, window, window, bias=True, indice_key="down")
        self.wide = subm(6, 6, 3, dilation=2, bias=False)
        self.up = inverse(6, 5, window, indice_key="down", bias=True)
        self.head = subm(9, 7, 1, bias=True)

    def forward(self, x: spconv.SparseConvTensor) -> spconv.SparseConvTensor:
        x = self.stem(x)
        x = x.replace_feature(self.act(self.norm(x.features)))
        y = self.up(self.wide(self.down(x)))
        return self.head(y.replace_feature(torch.cat([y.features, x.features], 1)))


@pytest.mark.parametrize(
    ("ndim", "window"), [(2, 2), (3, 2), (3, 4), (3, [2, 1, 4]), (4, [2, 2, 2, 1])]
)
def test_converted_networks_compute_the_same_through_both_adapters(ndim: int, window, device):
    torch.manual_seed(0)
    ours, theirs = MinkowskiNet(ndim, window), SpconvNet(ndim, window)
    ours.norm.bn.running_mean.uniform_()
    ours, theirs = ours.to(device, torch.float64).eval(), theirs.to(device, torch.float64).eval()
    theirs.load_state_dict(to_spconv(ours.state_dict(), ours))

    shape = [8] * ndim
    cells = torch.randperm(2 * 8**ndim, generator=torch.Generator().manual_seed(0))[:60]
    coords = torch.stack(torch.unravel_index(cells, (2, *shape)), 1).int().to(device)
    feats = torch.randn(60, 3, dtype=torch.float64, device=device)
    expected = ours(ME.SparseTensor(feats, coordinates=coords))
    out = theirs(spconv.SparseConvTensor(feats, coords, shape, 2))
    assert torch.equal(out.indices, expected.C)
    torch.testing.assert_close(out.features, expected.F)

    back = from_spconv(theirs.state_dict(), ours)
    assert back.keys() == ours.state_dict().keys()
    assert all(torch.equal(back[name], value) for name, value in ours.state_dict().items())


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (CONV(3, 5, 2, dimension=3), "no submanifold convolution with an even window"),
        (CONV(3, 5, 3, stride=2, dimension=3), "only even windows equal to the stride"),
        (CONV(3, 5, 3, stride=3, dimension=3), "only even windows equal to the stride"),
        (CONV(3, 5, 1, stride=2, dimension=3), "only even windows equal to the stride"),
        (CONV(3, 5, 2, stride=2, dilation=2, dimension=3), "dilated beyond its stride"),
        (CONV(3, 5, 3, expand_coordinates=True, dimension=3), "other output sites"),
        (GENERATIVE(3, 5, 2, stride=2, dimension=3), "other output sites"),
        (ME.MinkowskiChannelwiseConvolution(3, 3, dimension=3), "no channelwise convolution"),
        (
            CONV(
                3,
                5,
                kernel_generator=ME.KernelGenerator(
                    3, region_type=ME.RegionType.HYPER_CROSS, dimension=3
                ),
                dimension=3,
            ),
            "no windows but boxes",
        ),
    ],
)
def test_layers_that_differ_are_refused(layer: nn.Module, reason: str):
    net = nn.Sequential(layer)
    for translate in (to_spconv, from_spconv):
        with pytest.raises(ValueError, match=f"0 must be a layer that spconv has too.*{reason}"):
            translate(net.state_dict(), net)


def test_shapes_are_checked():
    net = nn.Sequential(CONV(3, 5, 3, dimension=3))
    with pytest.raises(ValueError, match=r"0\.kernel must have shape \[27, 3, 5\]; got"):
        to_spconv({"0.kernel": torch.zeros(8, 3, 5)}, net)
    with pytest.raises(ValueError, match=r"0\.weight must have shape \[5, 3, 3, 3, 3\]; got"):
        from_spconv({"0.weight": torch.zeros(5, 2, 2, 2, 3)}, net)


def test_script_converts_files_both_ways(tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    net = MinkowskiNet()
    monkeypatch.setattr(convert, "build_model", lambda name: net)
    ours, theirs, back = (tmp_path / name for name in ("ours.pt", "theirs.pt", "back.pt"))
    torch.save({"state_dict": net.state_dict(), "epoch": 3}, ours)
    main(["convert", str(ours), str(theirs), "--from-minkowski", "--model", "net:build"])
    assert "entries change" in capsys.readouterr().out
    SpconvNet().load_state_dict(torch.load(theirs)["state_dict"])
    main(["convert", str(theirs), str(back), "--to-minkowski", "--model", "net:build"])
    found = torch.load(back)
    assert found["epoch"] == 3
    assert all(torch.equal(found["state_dict"][k], v) for k, v in net.state_dict().items())
    assert main(["convert", str(ours), "--dry-run", "--from-minkowski"]) == 2
    assert "--model is needed" in capsys.readouterr().err
