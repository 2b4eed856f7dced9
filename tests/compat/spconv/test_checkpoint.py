"""Parameters, state dicts and the loaders that downstream frameworks patch in."""

import pytest
import torch
from torch import nn

import compat.spconv.pytorch as spconv
from compat.spconv import constants

KINDS = (spconv.SubMConv3d, spconv.SparseConv3d, spconv.SparseConvTranspose3d)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("algo", spconv.ConvAlgo)
def test_weight_is_out_kernel_in_for_every_kind_and_algo(kind, algo):
    layer = kind(4, 6, (3, 1, 5), algo=algo)
    assert list(layer.state_dict()) == ["weight", "bias"]
    assert layer.weight.shape == (6, 3, 1, 5, 4)
    assert layer.weight_shape == [6, 3, 1, 5, 4]
    assert layer.bias.shape == (6,)
    assert list(kind(4, 6, 3, bias=False).state_dict()) == ["weight"]


def test_inverse_weight_is_out_first_too():
    assert spconv.SparseInverseConv2d(4, 6, 3, "k").weight.shape == (6, 3, 3, 4)


def test_names_inside_sequential_are_positions():
    chain = spconv.SparseSequential(spconv.SubMConv3d(1, 1, 3), nn.BatchNorm1d(1))
    assert list(chain.state_dict())[:3] == ["0.weight", "0.bias", "1.weight"]


def test_a_missing_voxel_count_is_tolerated():
    layer = spconv.SparseConv3d(1, 1, 3, record_voxel_count=True)
    state = layer.state_dict()
    assert list(state) == ["weight", "bias", "max_num_voxels_during_training"]
    del state["max_num_voxels_during_training"]
    layer.load_state_dict(state)
    assert "max_num_voxels_during_training" not in state


@pytest.mark.parametrize(
    ("layout", "order"), [("RSCK", (1, 2, 3, 4, 0)), ("RSKC", (1, 2, 3, 0, 4)), ("KRSC", range(5))]
)
def test_saved_weight_layout_is_converted_once(monkeypatch, layout, order):
    source = spconv.SparseSequential(spconv.SubMConv3d(4, 6, (3, 1, 5)))
    state = {name: value.clone() for name, value in source.state_dict().items()}
    state["0.weight"] = state["0.weight"].permute(*order)
    target = spconv.SparseSequential(spconv.SubMConv3d(4, 6, (3, 1, 5)))
    monkeypatch.setattr(constants, "SAVED_WEIGHT_LAYOUT", layout)
    target.load_state_dict(state)
    assert torch.equal(target[0].weight, source[0].weight)


def test_openpcdet_walker_finds_and_permutes_old_weights():
    net = nn.Sequential(spconv.SparseSequential(spconv.SubMConv3d(4, 6, 3)), nn.Linear(2, 2))

    def weight_names(module, prefix=""):
        for name, child in module.named_children():
            if isinstance(child, spconv.conv.SparseConvolution):
                yield f"{prefix}{name}.weight"
            yield from weight_names(child, f"{prefix}{name}.")

    assert list(weight_names(net)) == ["0.0.weight"]
    old = torch.randn(3, 3, 3, 4, 6)
    native = old.transpose(-1, -2)
    assert native.shape != net[0][0].weight.shape
    assert old.permute(4, 0, 1, 2, 3).shape == net[0][0].weight.shape


def test_mmdet3d_can_patch_the_version_and_the_loader_of_sparse_module(monkeypatch):
    original = spconv.SparseModule._load_from_state_dict
    seen = []

    def patched(self, state_dict, prefix, local_metadata, *args):
        if local_metadata.get("version") != 2:
            for name in self._parameters:
                value = state_dict[prefix + name]
                seen.append(prefix + name)
                state_dict[prefix + name] = value.permute(-1, *range(value.ndim - 1))
        original(self, state_dict, prefix, local_metadata, *args)

    monkeypatch.setattr(spconv.SparseModule, "_version", 2)
    monkeypatch.setattr(spconv.SparseModule, "_load_from_state_dict", patched)
    layer = spconv.SubMConv3d(4, 6, 3)
    assert layer.state_dict()._metadata[""]["version"] == 2
    old = {"weight": torch.randn(3, 3, 3, 4, 6), "bias": torch.randn(6)}
    layer.load_state_dict(dict(old))
    assert seen == ["weight", "bias"]
    assert torch.equal(layer.weight, old["weight"].permute(4, 0, 1, 2, 3))


def test_forward_and_repr_can_be_replaced_by_dotted_name(monkeypatch, make, device):
    original = spconv.conv.SparseConvolution.forward
    calls = []

    def traced(self, *args, **kwargs):
        calls.append(self)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(spconv.conv.SparseConvolution, "forward", traced)
    monkeypatch.setattr(spconv.conv.SparseConvolution, "__repr__", lambda self: "conv")
    layer = spconv.SubMConv3d(4, 4, 3).to(device)
    layer(make())
    assert calls == [layer]
    assert repr(layer) == "conv"


def test_weights_that_are_not_contiguous_work(make, device):
    x = make()
    layer = spconv.SubMConv3d(4, 6, 3).to(device)
    expected = layer(x).features
    layer.weight = nn.Parameter(layer.weight.detach().movedim(0, -1).contiguous().movedim(-1, 0))
    assert not layer.weight.is_contiguous()
    torch.testing.assert_close(layer(x).features, expected)


def test_fused_scale_can_be_written_into_the_weight(make, device):
    x = make()
    layer = spconv.SubMConv3d(4, 6, 3, bias=False).to(device)
    expected = layer(x).features * 2
    layer.weight.data = (layer.weight.data.permute(4, 0, 1, 2, 3) * 2).permute(1, 2, 3, 4, 0)
    torch.testing.assert_close(layer(x).features, expected)
