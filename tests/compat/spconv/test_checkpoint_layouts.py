"""Checkpoints of older layouts are recognised and converted, and give the same results."""

import itertools
import re
from collections import OrderedDict

import pytest
import torch
from torch import nn

import compat.spconv.pytorch as spconv
from compat.spconv import constants
from compat.spconv.checkpoint import (
    LAYOUTS,
    convert_state_dict,
    detect_layout,
    load_state_dict,
    read_checkpoint,
)
from tritonspconv import reference
from tritonspconv.cli import convert, main

SHAPE, BATCH = (6, 5, 7), 2
KERNEL = (3, 1, 5)


def axes_of(kernel_size, c_in, c_out, layout):
    return {
        "KRSC": (c_out, *kernel_size, c_in),
        "RSKC": (*kernel_size, c_out, c_in),
        "RSCK": (*kernel_size, c_in, c_out),
    }[layout]


def saved_weight(matrices, kernel_size, layout):
    """Return the weight that a checkpoint holds for one matrix ``[in, out]`` per tap."""
    c_in, c_out = matrices.shape[1:]
    shape = axes_of(kernel_size, c_in, c_out, layout)
    if len(matrices) == 1:
        # Every version of spconv computes features @ weight.view(in, out) here, for any order of
        # axes.
        return matrices[0].reshape(shape)
    weight = matrices.new_zeros(shape)
    for tap, position in enumerate(itertools.product(*map(range, kernel_size))):
        for i, o in itertools.product(range(c_in), range(c_out)):
            at = {"KRSC": (o, *position, i), "RSKC": (*position, o, i), "RSCK": (*position, i, o)}
            weight[at[layout]] = matrices[tap, i, o]
    return weight


def random_net():
    return spconv.SparseSequential(
        spconv.SubMConv3d(4, 6, KERNEL),
        nn.BatchNorm1d(6),
        spconv.SubMConv3d(6, 5, 1, bias=False),
        spconv.SparseConv3d(5, 5, 3, 2),
    )


def saved_as(net, layout):
    """Return the state of ``net`` as a checkpoint in ``layout``."""
    state = OrderedDict((name, value.clone()) for name, value in net.state_dict().items())
    for name, layer in net.named_children():
        if isinstance(layer, spconv.conv.SparseConvolution):
            matrices = layer._matrices(layer.weight.detach())
            state[f"{name}.weight"] = saved_weight(matrices, layer.kernel_size, layout)
    return state


def assert_same(state, expected):
    assert list(state) == list(expected)
    for name, value in expected.items():
        assert torch.equal(state[name], value), name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("build", "kernel_size", "stride"),
    [
        pytest.param(lambda: spconv.SubMConv3d(4, 6, KERNEL), KERNEL, None, id="subm"),
        pytest.param(lambda: spconv.SparseConv3d(4, 6, KERNEL, 2), KERNEL, 2, id="strided"),
        pytest.param(lambda: spconv.SubMConv3d(4, 6, 1), (1, 1, 1), None, id="1x1"),
        pytest.param(lambda: spconv.SubMConv3d(4, 4, 1), (1, 1, 1), None, id="1x1 square"),
    ],
)
def test_converted_weights_compute_what_the_checkpoint_meant(
    make, device, build, kernel_size, stride, layout
):
    layer, x = build().double().to(device), make(dtype=torch.float64, shape=SHAPE)
    c_out = layer.out_channels
    taps = kernel_size[0] * kernel_size[1] * kernel_size[2]
    matrices = torch.randn(taps, 4, c_out, dtype=torch.float64)
    bias = torch.randn(c_out, dtype=torch.float64)
    saved = {"weight": saved_weight(matrices, kernel_size, layout), "bias": bias}
    load_state_dict(layer, saved, layout)

    coords = x.indices.cpu()
    ones = (1, 1, 1)
    if stride is None:
        centre = tuple(k // 2 for k in kernel_size)
        window, sites = (kernel_size, ones, centre, ones), coords
    else:
        window = (kernel_size, (stride,) * 3, (0, 0, 0), ones)
        extent = [(n - k) // stride + 1 for n, k in zip(SHAPE, kernel_size, strict=True)]
        box = reference.Box((0, 0, 0), tuple(extent), BATCH)
        sites = reference.output_sites(coords, *window, out_box=box)
    triples = reference.relation(coords, sites, *window, submanifold=stride is None)
    expected = reference.conv(x.features.detach().cpu(), matrices, triples, len(sites), bias)
    out = layer(x)
    assert torch.equal(out.indices.cpu(), sites)
    torch.testing.assert_close(out.features.cpu(), expected)


@pytest.mark.parametrize("layout", ["RSKC", "RSCK"])
def test_a_strided_1x1_weight_is_read_by_its_axes(make, device, layout):
    layer = spconv.SparseConv3d(4, 6, 1, 2, bias=False).double().to(device)
    x = make(dtype=torch.float64)
    matrix = torch.randn(4, 6, dtype=torch.float64)
    saved = matrix.T if layout == "RSKC" else matrix
    load_state_dict(layer, {"weight": saved[None, None, None]}, layout)
    feats, coords = x.features.detach().cpu(), x.indices.cpu()
    on_grid = (coords[:, 1:] % 2 == 0).all(1)
    order = sorted(on_grid.nonzero()[:, 0].tolist(), key=lambda row: coords[row].tolist())
    torch.testing.assert_close(layer(x).features.cpu(), feats[order] @ matrix)


def test_one_by_one_layout_moves_the_axes_of_1x1_weights_too():
    layer = spconv.SubMConv3d(4, 6, 1, bias=False)
    saved = torch.randn(1, 1, 1, 4, 6)
    converted = convert_state_dict({"weight": saved}, layer, one_by_one="layout")["weight"]
    assert torch.equal(converted.view(6, 4).T, saved[0, 0, 0])
    with pytest.raises(ValueError, match=r"one_by_one must be 'meaning' or 'layout'; got 'x'"):
        convert_state_dict({"weight": saved}, layer, one_by_one="x")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("wrapped", [(), ("model",), ("state",), ("model", "state")])
def test_a_whole_net_is_found_converted_and_loaded(layout, wrapped):
    source, target = random_net(), random_net()
    expected, state = source.state_dict(), saved_as(source, layout)
    model = nn.ModuleDict({"module": target}) if "model" in wrapped else target
    if "state" in wrapped:
        state = OrderedDict((f"module.{name}", value) for name, value in state.items())
    before = {name: value.clone() for name, value in state.items()}
    assert detect_layout(state, model) == layout
    converted = convert_state_dict(state, model)
    assert [value.shape for value in converted.values()] == [v.shape for v in expected.values()]
    load_state_dict(model, state)
    assert_same(target.state_dict(), expected)
    assert_same(state, before)


def test_missing_and_unexpected_entries_are_left_to_load_state_dict():
    state = saved_as(random_net(), "RSCK")
    del state["3.weight"]
    state["other.weight"] = torch.zeros(3, 3, 3, 4, 4)
    converted = convert_state_dict(state, random_net())
    assert converted["other.weight"] is state["other.weight"]
    assert converted["1.weight"] is state["1.weight"]
    result = load_state_dict(random_net(), state, strict=False)
    assert (result.missing_keys, result.unexpected_keys) == (["3.weight"], ["other.weight"])
    with pytest.raises(RuntimeError, match=r"Missing key.*3\.weight"):
        load_state_dict(random_net(), state)
    unrelated = {"x": torch.zeros(1)}
    assert convert_state_dict(unrelated, random_net()) == unrelated
    with pytest.raises(ValueError, match=r"must hold the weight of a sparse .* got the names x\."):
        detect_layout(unrelated, random_net())


@pytest.mark.parametrize(
    ("layer", "shape", "names"),
    [
        (spconv.SubMConv3d(3, 3, 3), (3, 3, 3, 3, 3), "KRSC and RSKC and RSCK"),
        (spconv.SubMConv2d(3, 3, 3), (3, 3, 3, 3), "KRSC and RSKC and RSCK"),
        (spconv.SubMConv2d(8, 8, 3), (3, 3, 8, 8), "RSKC and RSCK"),
        (spconv.SubMConv3d(2, 3, 3), (3, 3, 3, 3, 2), "KRSC and RSKC"),
    ],
)
def test_ambiguous_shapes_are_refused(layer, shape, names):
    with pytest.raises(ValueError, match=rf'one layout only; got {names},.*layout="RSKC"'):
        detect_layout({"weight": torch.zeros(shape)}, layer)
    converted = convert_state_dict({"weight": torch.zeros(shape)}, layer, "RSKC")
    assert list(converted["weight"].shape) == layer.weight_shape


def test_one_telling_layer_decides_for_all():
    net = nn.ModuleList([spconv.SubMConv3d(3, 3, 3), spconv.SubMConv3d(8, 8, 3)])
    net.append(spconv.SubMConv3d(3, 8, 3))
    state = saved_as(net, "RSCK")
    assert detect_layout(state, net) == "RSCK"
    state.pop("2.weight")
    with pytest.raises(ValueError, match=r"got RSKC and RSCK, for example 0\.weight"):
        detect_layout(state, net)


def test_mixed_layouts_need_a_dict():
    net, target = random_net(), random_net()
    state = saved_as(net, "KRSC")
    state["0.weight"] = saved_as(net, "RSKC")["0.weight"]
    with pytest.raises(ValueError, match=r"RSKC fits 0\.weight; RSCK fits none.*spconv 2\.0"):
        detect_layout(state, target)
    layouts = {"0.weight": "RSKC", "2.weight": "KRSC", "3.weight": "KRSC"}
    load_state_dict(target, state, layouts)
    assert_same(target.state_dict(), net.state_dict())
    with pytest.raises(ValueError, match=r"layout must be one of .* got None for 2\.weight"):
        convert_state_dict(state, target, {"0.weight": "RSKC"})


def test_wrong_shapes_and_layouts_are_refused():
    layer = spconv.SubMConv3d(4, 6, 3)
    with pytest.raises(ValueError, match=r"weight must be one of \[6, 3, 3, 3, 4\] \(KRSC\)"):
        detect_layout({"weight": torch.zeros(3, 3, 3, 4, 5)}, layer)
    with pytest.raises(ValueError, match=r"must be \[3, 3, 3, 6, 4\] in layout RSKC; got \[3, 3"):
        convert_state_dict({"weight": torch.zeros(3, 3, 3, 4, 6)}, layer, "RSKC")
    with pytest.raises(ValueError, match=r"layout must be one of .*; got 'CRSK'"):
        convert_state_dict({"weight": torch.zeros(3, 3, 3, 4, 6)}, layer, "CRSK")


def test_the_environment_must_not_convert_a_second_time(monkeypatch):
    monkeypatch.setattr(constants, "SAVED_WEIGHT_LAYOUT", "RSCK")
    with pytest.raises(ValueError, match=r"must be unset, .*; got 'RSCK'"):
        load_state_dict(random_net(), {})


@pytest.mark.parametrize("key", [None, "state_dict", "model", "model_state"])
def test_files_are_read_whatever_they_call_the_state_dict(tmp_path, key):
    source, target = random_net(), random_net()
    state = saved_as(source, "RSCK")
    torch.save(state if key is None else {"epoch": 3, key: state}, tmp_path / "old.pth")
    load_state_dict(target, tmp_path / "old.pth")
    assert_same(target.state_dict(), source.state_dict())


def test_files_that_are_no_checkpoints_are_refused(tmp_path):
    with pytest.raises(TypeError, match=r"must be a dict; got list\. Save model\.state_dict"):
        load_state_dict(random_net(), [1])
    with pytest.raises(ValueError, match=r"one of state_dict, .*; got the keys epoch, net\."):
        load_state_dict(random_net(), {"epoch": 1, "net": {}})
    torch.save(nn.ReLU(), tmp_path / "module.pth")
    with pytest.raises(ValueError, match=r"must hold tensors and plain containers only"):
        read_checkpoint(tmp_path / "module.pth")
    assert isinstance(read_checkpoint(tmp_path / "module.pth", weights_only=False), nn.ReLU)


@pytest.mark.parametrize(
    ("layout", "arguments"),
    [
        ("RSCK", ["--model", f"{__name__}:random_net"]),
        ("RSKC", []),  # the bias tells the layout
        ("RSCK", []),
        ("KRSC", []),
        ("RSCK", ["--layout", "RSCK"]),
    ],
)
def test_script_converts_the_weights_and_keeps_the_rest(
    tmp_path, capsys, monkeypatch, layout, arguments
):
    monkeypatch.setattr(convert, "build_model", lambda name: random_net())
    source, target = random_net(), random_net()
    state = saved_as(source, layout)
    old, new = tmp_path / "old.pth", tmp_path / "new.pth"
    torch.save({"epoch": 3, "model_state": state}, old)
    main(["convert", str(old), "--dry-run", *arguments])
    assert not new.exists()
    main(["convert", str(old), str(new), *arguments])
    printed = capsys.readouterr().out
    assert f"0.weight  {list(state['0.weight'].shape)}" in printed
    result = torch.load(new, weights_only=True)
    assert result["epoch"] == 3
    target.load_state_dict(result["model_state"])
    assert_same(target.state_dict(), source.state_dict())


def test_script_refuses_what_shapes_cannot_tell(tmp_path, capsys):
    old = tmp_path / "old.pth"
    torch.save({"a.weight": torch.zeros(3, 3, 3, 16, 32)}, old)
    assert main(["convert", str(old), "--dry-run"]) == 2
    printed = capsys.readouterr()
    assert re.search(r"got RSKC and RSCK, .* Or pass --layout, or --model", printed.err)
    assert "a.weight  [3, 3, 3, 16, 32]  RSKC or RSCK" in printed.out
    torch.save({"a.weight": torch.zeros(32, 3, 3, 3, 16)}, old)
    assert main(["convert", str(old), "--dry-run", "--layout", "RSCK"]) == 2
    printed = capsys.readouterr().err
    assert re.search(r"got RSCK, and a\.weight .* can be KRSC\. Pass --model", printed)


def test_script_leaves_dense_weights_alone(tmp_path, capsys):
    old = tmp_path / "old.pth"
    dense = {"a.weight": torch.zeros(64, 32, 3, 3, 3), "b.weight": torch.zeros(3, 3, 8, 8)}
    torch.save(dense, old)
    main(["convert", str(old), "--dry-run"])
    assert "0 of 2 entries change" in capsys.readouterr().out


def test_script_builds_the_named_model():
    assert isinstance(convert.build_model("torch.nn:ReLU"), nn.ReLU)
    with pytest.raises(ValueError, match=r"--model must be module:builder; got 'torch\.nn'"):
        convert.build_model("torch.nn")
    with pytest.raises(ValueError, match=r"--model must name a function .* got 'torch\.nn:no'"):
        convert.build_model("torch.nn:no")
    with pytest.raises(TypeError, match=r"--model must return a torch\.nn\.Module; .* returned"):
        convert.build_model("collections:OrderedDict")


def test_script_says_what_is_missing(tmp_path, capsys):
    assert main(["convert", str(tmp_path / "none.pth"), "--dry-run"]) == 2
    assert "No such file" in capsys.readouterr().err
    assert main(["convert", "old.pth"]) == 2
    assert "DST is needed" in capsys.readouterr().err


@pytest.mark.parametrize("wrapped", ["model", "state"])
def test_versions_of_modules_follow_a_prefix_that_is_dropped_or_added(wrapped):
    """Torch hands each module the version that it was saved with, under its path."""
    source, target = random_net(), random_net()
    outer = nn.ModuleDict({"module": source if wrapped == "state" else target})
    saved, model = (outer, target) if wrapped == "state" else (source, outer)
    state = saved.state_dict()
    assert set(state._metadata) > {""}
    for path, metadata in state._metadata.items():
        metadata["saved as"] = path
    seen = {}
    for path, module in model.named_modules():
        module._register_load_state_dict_pre_hook(
            lambda state, prefix, metadata, *rest, path=path: seen.update({path: dict(metadata)})
        )
    load_state_dict(model, state)
    for path, module in target.named_modules():
        path_in_model = path if wrapped == "state" else f"module.{path}".rstrip(".")
        path_in_state = f"module.{path}".rstrip(".") if wrapped == "state" else path
        assert seen[path_in_model]["saved as"] == path_in_state
        assert seen[path_in_model]["version"] == module._version
