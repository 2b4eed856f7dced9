"""Parameters, state dicts and the loaders that downstream frameworks patch in."""

import itertools

import pytest
import torch
from torch import nn

import compat.spconv.pytorch as spconv
from compat.spconv import constants
from compat.spconv.checkpoint import convert_state_dict

KINDS = (spconv.SubMConv3d, spconv.SparseConv3d, spconv.SparseConvTranspose3d)


def small_net():
    """Return two sparse convolutions with a norm between them, parameters at random."""
    net = spconv.SparseSequential(
        spconv.SubMConv3d(4, 6, 3, bias=False),
        nn.BatchNorm1d(6),
        nn.ReLU(),
        spconv.SparseConv3d(6, 8, (3, 1, 5), 2),
    )
    nn.init.uniform_(net[1].weight)
    return net


def save_as(model, layout):
    """Return a plain dict of the model's state, the weights of its convolutions in ``layout``."""
    order = {"KRSC": (0, 1, 2, 3, 4), "RSKC": (1, 2, 3, 0, 4), "RSCK": (1, 2, 3, 4, 0)}[layout]
    return {
        name: value.permute(order).contiguous() if value.dim() == 5 else value.clone()
        for name, value in model.state_dict().items()
    }


def assert_same_state(model, expected):
    state = model.state_dict()
    for name, value in expected.state_dict().items():
        assert torch.equal(state[name], value), name


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


def find_all_spconv_keys(module, prefix=""):
    """As OpenPCDet: return the weights of all sparse convolutions of a detector."""
    found = set()
    for name, child in module.named_children():
        path = f"{prefix}.{name}" if prefix else name
        if isinstance(child, spconv.conv.SparseConvolution):
            found.add(f"{path}.weight")
        found |= find_all_spconv_keys(child, path)
    return found


def load_as_openpcdet(model, checkpoint):
    """As OpenPCDet: try the two older layouts where shapes differ, and load weights that fit."""
    own, keys, update = model.state_dict(), find_all_spconv_keys(model), {}
    for key, value in checkpoint.items():
        if key in keys and key in own and own[key].shape != value.shape:
            native = value.transpose(-1, -2)
            if native.shape == own[key].shape:
                value = native.contiguous()
            else:
                assert value.dim() == 5
                implicit = value.permute(4, 0, 1, 2, 3)
                if implicit.shape == own[key].shape:
                    value = implicit.contiguous()
        if key in own and own[key].shape == value.shape:
            update[key] = value
    own.update(update)
    model.load_state_dict(own)
    return update


def test_openpcdet_loads_1x_checkpoints_by_its_own_walk():
    def build():
        return nn.Sequential(small_net(), nn.Linear(2, 2))

    source, target = build(), build()
    assert find_all_spconv_keys(target) == {"0.0.weight", "0.3.weight"}
    old = {name: value.clone() for name, value in source.state_dict().items()}
    for key in find_all_spconv_keys(source):
        old[key] = old[key].permute(1, 2, 3, 4, 0).contiguous()
    old["gone.weight"] = torch.zeros(3)
    assert load_as_openpcdet(target, old).keys() == target.state_dict().keys()
    assert_same_state(target, source)


def load_as_mmdet3d(
    self, state_dict, prefix, local_metadata, strict, missing, unexpected, error_msgs
):
    """mmdet3d replaces SparseModule's loader: weights of old versions have the outputs last."""
    for hook in self._load_state_dict_pre_hooks.values():
        hook(state_dict, prefix, local_metadata, strict, missing, unexpected, error_msgs)
    for name, own in itertools.chain(self._parameters.items(), self._buffers.items()):
        if own is None:
            continue
        value = state_dict.get(prefix + name)
        if value is None:
            missing.append(prefix + name)
            continue
        if local_metadata.get("version") != 2:
            value = value.permute(value.dim() - 1, *range(value.dim() - 1))
        if value.shape != own.shape:
            error_msgs.append(f"size mismatch for {prefix + name}")
            continue
        with torch.no_grad():
            own.copy_(value)


@pytest.fixture
def register_spconv2(monkeypatch):
    """Patch SparseModule as mmdet3d does."""
    monkeypatch.setattr(spconv.SparseModule, "_version", 2)
    monkeypatch.setattr(spconv.SparseModule, "_load_from_state_dict", load_as_mmdet3d)


@pytest.mark.usefixtures("register_spconv2")
def test_mmdet3d_permutes_mmcv_checkpoints_in_its_own_loader():
    source, target = small_net(), small_net()
    old = {
        name: value.permute(1, 2, 3, 4, 0) if value.dim() == 5 else value
        for name, value in source.state_dict().items()
    }
    target.load_state_dict(old)
    assert_same_state(target, source)


@pytest.mark.usefixtures("register_spconv2")
def test_mmdet3d_leaves_what_it_saved_itself(tmp_path):
    source, target = small_net(), small_net()
    assert source.state_dict()._metadata["0"]["version"] == 2
    torch.save(source.state_dict(), tmp_path / "new.pth")
    target.load_state_dict(torch.load(tmp_path / "new.pth", weights_only=True))
    assert_same_state(target, source)


@pytest.mark.usefixtures("register_spconv2")
def test_mmdet3d_does_not_permute_converted_checkpoints_again():
    source, target = small_net(), small_net()
    old = save_as(source, "RSCK")
    assert not hasattr(old, "_metadata")
    target.load_state_dict(convert_state_dict(old, target))
    assert_same_state(target, source)


class Registry(dict):
    """As much of mmengine's registry as ``build_conv_layer`` needs."""

    def register_module(self, name, module=None, force=False):
        if name in self and not force:
            raise KeyError(f"{name} is already registered")
        self[name] = module


def build_conv_layer(registry, cfg, *args, **kwargs):
    """mmcv: ``cfg`` names the class and holds further arguments."""
    cfg = dict(cfg)
    return registry[cfg.pop("type")](*args, **kwargs, **cfg)


def test_mm_registry_builds_layers_from_configs(make, device):
    registry = Registry(SubMConv3d=object)
    for name in ("SparseConv3d", "SparseInverseConv3d", "SubMConv3d"):
        registry.register_module(name=name, module=getattr(spconv, name), force=True)
    down = {"type": "SparseConv3d", "indice_key": "down"}
    up = {"type": "SparseInverseConv3d", "indice_key": "down"}
    subm = {"type": "SubMConv3d", "indice_key": "subm"}
    net = spconv.SparseSequential(
        build_conv_layer(registry, subm, 4, 8, 3, stride=1, padding=1, bias=False),
        nn.BatchNorm1d(8, eps=1e-3, momentum=0.01),
        nn.ReLU(inplace=True),
        build_conv_layer(registry, down, 8, 16, 3, stride=2, padding=1, bias=False),
        build_conv_layer(registry, up, 16, 8, 3, bias=False),
    ).to(device)
    x = make()
    out = net(x)
    assert out.features.shape == (len(x.features), 8)
    assert set(out.indice_dict) == {"subm", "down"}
    assert net[0].bias is None


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


@pytest.mark.parametrize(
    ("order", "channels", "source"),
    [
        ((1, 2, 3, 4, 0), 6, r"layout of spconv 1\.x and mmcv, .*out\]\. Load"),
        ((1, 2, 3, 0, 4), 6, r"layout of spconv 2\.0 and 2\.1, .*in\]\. Load"),
        ((1, 2, 3, 0, 4), 4, r"layout of spconv 1\.x and mmcv, .*, or of spconv 2\.0 and 2\.1"),
    ],
)
def test_weights_of_older_layouts_name_what_converts_them(order, channels, source):
    net = spconv.SparseSequential(spconv.SubMConv3d(4, channels, 3))
    state = net.state_dict()
    state["0.weight"] = state["0.weight"].permute(*order)
    message = rf"size mismatch for 0\.weight.*{source}.*tritonspconv convert"
    with pytest.raises(RuntimeError, match=message):
        net.load_state_dict(state)
    state["0.weight"] = torch.zeros(5, 5)
    with pytest.raises(RuntimeError) as failed:
        net.load_state_dict(state)
    assert "tritonspconv convert" not in str(failed.value)
