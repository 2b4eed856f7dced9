"""``indice_key`` and ``indice_dict``: which layers share a kernel map, and which do not."""

import copy
import gc
import pickle
import weakref

import pytest
import torch

import compat.spconv.pytorch as spconv
from compat.spconv.pytorch import SparseConvTensor, _sites
from tritonspconv.debug import check_coords, checks_coords
from tritonspconv.nn import chain

Native = spconv.ConvAlgo.Native


def subm(kernel_size=3, key="k", **kwargs):
    return spconv.SubMConv3d(4, 4, kernel_size, indice_key=key, **kwargs)


def conv(key="k", **kwargs):
    return spconv.SparseConv3d(4, 4, 3, 2, 1, indice_key=key, **kwargs)


def inverse(kernel_size=3, key="k", **kwargs):
    return spconv.SparseInverseConv3d(4, 4, kernel_size, indice_key=key, **kwargs)


def run(x, *layers):
    for layer in layers:
        x = layer.to(x.features.device)(x)
    return x


@pytest.fixture
def built(monkeypatch):
    """Count the engine's calls of ``kernel_map``."""
    from compat.spconv.pytorch import _maps

    calls = []

    def counting(*args, **kwargs):
        calls.append(args)
        return original(*args, **kwargs)

    original = _maps.kernel_map
    monkeypatch.setattr(_maps, "kernel_map", counting)
    return calls


@pytest.fixture
def maps(monkeypatch):
    """List the kernel maps that convolutions ran on."""
    used = []

    def listing(feats, weight, kernel_map, *args, **kwargs):
        used.append(kernel_map)
        return original(feats, weight, kernel_map, *args, **kwargs)

    original = chain.sparse_conv
    monkeypatch.setattr(chain, "sparse_conv", listing)
    return used


def test_keys_travel_downstream_only(make):
    x = make()
    y = run(x, subm(key="a"))
    z = run(y, conv(key="b"))
    assert x.indice_dict == {}
    assert list(y.indice_dict) == ["a"]
    assert list(z.indice_dict) == ["a", "b"]
    assert z.indice_dict["a"] is y.indice_dict["a"]
    sibling = run(y, subm(key="c"))
    assert list(sibling.indice_dict) == ["a", "c"]
    assert run(y, spconv.SubMConv3d(4, 4, 3)).indice_dict == y.indice_dict
    assert run(y, spconv.SubMConv3d(4, 4, 3)).indice_dict is not y.indice_dict


def test_any_dict_serves_as_indice_dict(make):
    x = make()
    first, second = subm(key="a"), inverse(key="d")
    net = first, conv(key="d"), second
    expected = run(x, *net)
    y = SparseConvTensor(x.features, x.indices, x.spatial_shape, x.batch_size, indice_dict={})
    found = run(y, *net)
    assert y.indice_dict == {}
    assert found.indices is x.indices
    assert torch.equal(found.features, expected.features)


def test_a_copied_dict_keeps_sites(make, maps):
    y = run(make(), spconv.SubMConv3d(4, 4, 3))
    own = y.replace_feature(y.features)
    own.indice_dict = y.indice_dict.copy()
    assert own.indice_dict is not y.indice_dict
    run(own, spconv.SubMConv3d(4, 4, 3))
    assert maps[0] is maps[1]


def test_find_indice_pair(make):
    y = run(make(), subm())
    assert y.find_indice_pair("k") is y.indice_dict["k"]
    assert y.find_indice_pair("other") is None
    assert y.find_indice_pair(None) is None


def test_submanifold_layers_share_a_key_whatever_stride_and_padding(make, maps):
    run(make(), subm(), subm(stride=2, padding=1))
    assert maps[0] is maps[1]


@pytest.mark.parametrize(
    ("second", "text"),
    [
        (lambda: subm(kernel_size=5, algo=Native), "another kernel_size"),
        (lambda: subm(dilation=2, algo=Native), "another dilation"),
        (lambda: subm(), "another algo"),
        (lambda: conv(algo=Native), "only submanifold layers may share"),
        (lambda: inverse(algo=Native), "belongs to a submanifold layer"),
        (lambda: spconv.SparseMaxPool3d(2, indice_key="k"), "only submanifold layers may share"),
    ],
    ids=["kernel_size", "dilation", "algo", "conv", "inverse", "pool"],
)
@pytest.mark.parametrize("error", [ValueError, AssertionError])
def test_layers_that_cannot_share_a_submanifold_key(make, second, text, error):
    with pytest.raises(error, match=text):
        run(make(), subm(algo=Native), second())


@pytest.mark.parametrize(
    ("second", "text"),
    [
        (lambda: subm(), "not submanifold"),
        (lambda: conv(), "only submanifold layers may share"),
        (lambda: spconv.SparseMaxPool3d(2, indice_key="k"), "only submanifold layers may share"),
        (lambda: inverse(kernel_size=2), "another kernel_size"),
        (lambda: inverse(algo=Native), "another algo"),
        (lambda: inverse(key="absent"), "no layer recorded"),
        (lambda: inverse(key=None), "no layer recorded"),
    ],
)
def test_layers_that_cannot_share_a_strided_key(make, second, text):
    with pytest.raises(AssertionError, match=text):
        run(make(), conv(), second())


def test_reuse_checks_spatial_shape_and_row_count_and_trusts_coordinates(make, maps):
    x = make()
    y = run(x, subm())
    hand_made = SparseConvTensor(y.features, x.indices.flip(0), [6, 5, 7], 2)
    hand_made.indice_dict = y.indice_dict
    run(hand_made, subm())
    assert maps[0] is maps[1]
    hand_made.spatial_shape = [6, 5, 8]
    with pytest.raises(ValueError, match="another spatial_shape"):
        run(hand_made, subm())
    fewer = SparseConvTensor(y.features[1:], x.indices[1:], [6, 5, 7], 2, indice_dict=y.indice_dict)
    with pytest.raises(ValueError, match="another number of rows"):
        run(fewer, subm())


def test_tuples_in_the_place_of_lists_share_a_map(make, maps):
    """Downstream code assigns tuples to attributes that spconv keeps as lists."""
    twin, up = subm(key="s"), inverse()
    twin.kernel_size, twin.dilation = tuple(twin.kernel_size), tuple(twin.dilation)
    up.kernel_size = tuple(up.kernel_size)
    y = run(make(), subm(key="s"), conv())
    y.spatial_shape = tuple(y.spatial_shape)
    z = run(y, up)
    z.spatial_shape = tuple(z.spatial_shape)
    run(z, twin)
    assert maps[-1] is maps[0]


def test_inverse_checks_spatial_shape_and_row_count(make):
    y = run(make(), conv())
    with pytest.raises(ValueError, match="another spatial_shape"):
        run(y, spconv.SparseConv3d(4, 4, 2), inverse())
    fewer = SparseConvTensor(
        y.features[1:], y.indices[1:], y.spatial_shape, 2, indice_dict=y.indice_dict
    )
    with pytest.raises(ValueError, match="another number of rows"):
        run(fewer, inverse())


def test_force_algo_stands_in_for_every_layer(make):
    x = make()
    x.force_algo = Native
    run(x, subm(), subm(algo=Native))


@pytest.mark.parametrize(
    ("layer", "algo"),
    [
        (lambda: spconv.SubMConv3d(4, 4, 3), "MaskImplicitGemm"),
        (lambda: spconv.SubMConv3d(4, 4, 5), "Native"),
        (lambda: spconv.SubMConv2d(4, 4, 5), "MaskImplicitGemm"),
        (lambda: spconv.SubMConv3d(4, 4, 5, large_kernel_fast_algo=True), "MaskImplicitGemm"),
        (lambda: spconv.SubMConv3d(4, 4, 7, large_kernel_fast_algo=True), "Native"),
        (lambda: spconv.SparseMaxPool3d(5), "MaskImplicitGemm"),
        (lambda: spconv.SparseMaxPool3d(7), "Native"),
    ],
)
def test_default_algo_follows_the_kernel_volume(layer, algo):
    assert layer().algo.name == algo


def test_entries_show_what_downstream_code_reads(make):
    x = make()
    y = run(x, conv(algo=Native))
    record = y.indice_dict["k"]
    assert isinstance(record, spconv.core.IndiceData)
    assert record.indices is x.indices
    assert record.out_indices is y.indices
    assert (record.spatial_shape, record.out_spatial_shape) == ([6, 5, 7], [3, 3, 4])
    assert (record.ksize, record.stride) == ([3, 3, 3], [2, 2, 2])
    assert (record.padding, record.dilation) == ([1, 1, 1], [1, 1, 1])
    assert not record.is_subm
    assert record.algo is Native
    assert record.voxel_num is None
    assert record.kernel_map.n_out == y.features.shape[0]
    assert record.indice_pairs.shape == (2, 27, 40)
    assert record.indice_pairs.dtype == record.indice_pair_num.dtype == torch.int32
    for tap, count in enumerate(record.indice_pair_num.tolist()):
        assert (record.indice_pairs[:, tap, :count] >= 0).all()
        assert (record.indice_pairs[:, tap, count:] == -1).all()
        fine, coarse = record.indice_pairs[:, tap, :count].long()
        offset = torch.tensor([tap // 9, tap // 3 % 3, tap % 3], device=fine.device) - 1
        assert torch.equal(x.indices[fine, 1:], 2 * y.indices[coarse, 1:] + offset)


def test_implicit_gemm_entries_show_pair_tables(make):
    y = run(make(), conv())
    record = y.indice_dict["k"]
    assert isinstance(record, spconv.core.ImplicitGemmIndiceData)
    rows, columns = (record.pair_fwd >= 0).nonzero().unbind(1)
    back = record.pair_bwd[rows, record.pair_fwd[rows, columns].long()]
    assert torch.equal(back.long(), columns)
    assert int(record.indice_pair_num.sum()) == rows.shape[0] == int((record.pair_bwd >= 0).sum())
    assert not any((record.pair_mask_fwd_splits, record.mask_argsort_bwd_splits, record.masks))


def test_submanifold_entries_list_all_taps(make):
    record = run(make(), subm()).indice_dict["k"]
    assert record.is_subm
    assert record.indice_pair_num[13] == 40
    assert torch.equal(record.indice_pair_num, record.indice_pair_num.flip(0))


def test_get_indice_pairs_of_a_submanifold_returns_its_indices(make):
    x = make()
    window = ([3] * 3, [1] * 3, [1] * 3, [1] * 3, [0] * 3)
    out, pairs, _ = spconv.ops.get_indice_pairs(x.indices, 2, [6, 5, 7], Native, *window, subm=True)
    assert out is x.indices
    assert pairs.shape == (2, 27, 40)
    with pytest.raises(NotImplementedError, match="every output is kept"):
        spconv.ops.get_indice_pairs_implicit_gemm(
            x.indices, 2, [6, 5, 7], Native, *window, num_out_act_bound=5
        )


@pytest.mark.usefixtures("rule")
def test_layers_without_key_share_maps_while_indices_stay(make, maps):
    x = make()
    a = run(x, spconv.SubMConv3d(4, 4, 3))
    run(a.replace_feature(a.features * 2), spconv.SubMConv3d(4, 4, 3))
    run(x, spconv.SubMConv3d(4, 4, 3))
    tables = {id(used.out_table) for used in maps}
    assert len(tables) == 1


def test_hand_made_tensors_find_sites_through_indice_dict(make, maps):
    y = run(make(), subm())
    z = SparseConvTensor(y.features, y.indices, y.spatial_shape, 2, indice_dict=y.indice_dict)
    run(z, spconv.SubMConv3d(4, 4, 3))
    assert maps[0].out_table is maps[1].out_table


@pytest.mark.usefixtures("rule")
def test_tensors_rebuilt_around_one_dict_keep_their_maps_without_a_key(make, maps):
    def rebuilt(x):
        return SparseConvTensor(
            x.features, x.indices, x.spatial_shape, x.batch_size, indice_dict=x.indice_dict
        )

    keyless = [spconv.SubMConv3d(4, 4, 3) for _ in range(4)]
    x = run(rebuilt(make()), keyless[0])
    x = run(rebuilt(x), keyless[1])
    assert maps[0].out_table is maps[1].out_table
    x = run(rebuilt(x), conv(key=None))
    x = run(rebuilt(x), keyless[2])
    x = run(rebuilt(x), keyless[3])
    assert maps[3].out_table is maps[4].out_table
    assert maps[3].in_sites is maps[2].out_sites
    assert x.indice_dict == {}


@pytest.fixture(params=["values", "versions"])
def rule(request, monkeypatch):
    """Edits are noticed by values, as on a CPU, and by versions, as on a GPU."""
    if request.param == "versions":
        monkeypatch.setattr(_sites, "_may_compare", lambda coords: False)
    return request.param


@pytest.mark.usefixtures("rule")
@pytest.mark.parametrize("edit", ["in place", "assigned", "shape", "batch size"])
def test_edited_sites_are_not_served_from_the_cache(make, edit):
    x = make()
    layer = spconv.SubMConv3d(4, 4, 3).to(x.features.device)
    strided = spconv.SparseConv3d(4, 4, 3, 2, 1).to(x.features.device)
    layer(x), strided(x)
    if edit == "in place":
        x.indices[:, 1:] *= 2
        x.spatial_shape = [12, 10, 14]
    elif edit == "assigned":
        x.indices = x.indices.roll(1, 0)
    elif edit == "shape":
        x.spatial_shape = [9, 9, 9]
    else:
        x.batch_size = 1
    fresh = SparseConvTensor(x.features, x.indices.clone(), x.spatial_shape, x.batch_size)
    assert torch.equal(layer(x).features, layer(fresh).features)
    assert torch.equal(strided(x).features, strided(fresh).features)
    assert torch.equal(strided(x).indices, strided(fresh).indices)


@pytest.mark.usefixtures("rule")
def test_editing_output_indices_does_not_reach_later_calls(make):
    x = make()
    layer = spconv.SparseConv3d(4, 4, 3, 2, 1, indice_key="k").to(x.features.device)
    first = layer(x)
    expected = first.indices.clone()
    first.indices[:, 1:] *= 2
    again = layer(x)
    assert torch.equal(again.indices, expected)
    # The map of the edited tensor still leads back.
    back = run(first, inverse())
    assert back.indices is x.indices
    assert torch.equal(first.indice_dict["k"].out_indices, first.indices)


def test_row_count_changes_between_replace_feature_and_indices(make):
    x = run(make(), spconv.SubMConv3d(4, 4, 3))
    other = make(n=10, seed=3)
    merged = x.replace_feature(torch.cat([x.features, other.features]))
    merged.indices = torch.cat([x.indices, other.indices])
    assert run(merged, spconv.SubMConv3d(4, 4, 3)).features.shape == (50, 4)


@pytest.mark.usefixtures("rule")
def test_inference_mode_shares_maps_without_a_key(make, maps):
    """Inference tensors have no version; the same object counts as unchanged."""
    with torch.inference_mode():
        x = make()
        assert x.indices.is_inference()
        y = run(x, spconv.SubMConv3d(4, 4, 3), spconv.SubMConv3d(4, 4, 3), conv(None), conv("s"))
        z = run(y, spconv.SubMConv3d(4, 4, 3), spconv.SubMConv3d(4, 4, 3), inverse(key="s"))
        run(z, spconv.SubMConv3d(4, 4, 3))
    assert y.features.is_inference()
    assert maps[0].out_table is maps[1].out_table
    assert maps[4].out_table is maps[5].out_table


@pytest.mark.usefixtures("rule")
def test_inference_mode_keeps_edits_from_other_calls(make):
    """If a user writes to the indices of one output, the outputs of other calls do not change."""
    with torch.inference_mode():
        x, layer = make(), conv(None)
        first = run(x, layer)
        expected = first.indices.clone()
        first.indices[:, 1:] *= 2
        assert torch.equal(run(x, layer).indices, expected)
        moved = x.indices.clone()
        x.indices = moved
        assert torch.equal(run(x, layer).indices, expected)


@pytest.mark.usefixtures("rule")
@pytest.mark.parametrize("repeated", [False, True], ids=["distinct", "repeated"])
def test_a_tensor_is_trained_after_it_was_evaluated_in_inference_mode(make, repeated):
    """Inference tensors cannot be saved for the backward pass, nor edited outside of the mode."""
    x = make()
    if repeated:
        x.indices[1::7] = x.indices[0::7][: len(x.indices[1::7])]
    net = spconv.SparseSequential(
        spconv.SubMConv3d(4, 4, 3), conv("s"), spconv.SubMConv3d(4, 4, 3), inverse(key="s")
    ).to(x.features.device)
    strided = conv(None).to(x.features.device)
    expected = torch.autograd.grad(net(x).features.sum(), [x.features, *net.parameters()])
    y = SparseConvTensor(x.features, x.indices.clone(), x.spatial_shape, x.batch_size)
    with torch.inference_mode():
        net(y), strided(y)
    got = torch.autograd.grad(net(y).features.sum(), [x.features, *net.parameters()])
    assert all(map(torch.equal, got, expected))
    strided(y).indices[:, 1:] *= 2
    with torch.inference_mode():
        assert torch.equal(net(y).features, net(x).features)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_debug_mode_compares_values_on_every_device(make, mode, monkeypatch):
    monkeypatch.setattr(_sites, "_may_compare", lambda coords: checks_coords())
    layer = spconv.SubMConv3d(4, 4, 3)
    with mode():
        for enabled in (False, True):
            x = make()
            layer.to(x.features.device)
            with check_coords(enabled):
                first = layer(x).features
                x.indices.data.copy_(x.indices.roll(1, 0))
                assert torch.equal(layer(x).features, first) != enabled


def write_by_numpy(indices, values):
    indices.numpy()[:] = values.numpy()


def write_by_data(indices, values):
    indices.data.copy_(values)


def write_by_another_view(indices, values):
    torch.from_numpy(indices.numpy()).copy_(values)


@pytest.mark.parametrize("write", [write_by_numpy, write_by_data, write_by_another_view])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_writes_without_a_trace_are_seen_on_a_cpu(write, mode):
    """These writes change neither the object nor its version. spconv makes its pairs again."""
    generator = torch.Generator().manual_seed(0)
    cells = torch.randperm(8**3, generator=generator)[:100]
    columns = torch.stack(torch.unravel_index(cells, (8, 8, 8)), 1)
    before = torch.nn.functional.pad(columns, (1, 0)).int()
    after = before.roll(1, 1).clone()
    after[:, 0], after[:, 1] = 0, before[:, 3]
    feats = torch.randn(100, 4, generator=generator)
    layers = [spconv.SubMConv3d(4, 4, 3), spconv.SparseConv3d(4, 4, 3, 2, 1)]
    with mode():
        x = SparseConvTensor(feats, before.clone(), [8] * 3, 1)
        outputs = [layer(x) for layer in layers]
        write(x.indices, after)
        write(outputs[1].indices, outputs[1].indices + 1)
        fresh = SparseConvTensor(feats, after.clone(), [8] * 3, 1)
        for layer in layers:
            got, expected = layer(x), layer(fresh)
            assert torch.equal(got.features, expected.features)
            assert torch.equal(got.indices, expected.indices)


def test_writes_without_a_trace_do_not_reach_gradients():
    """In the backward pass, maps list their inputs from coordinates that users cannot write to."""
    x = SparseConvTensor(
        torch.randn(6, 2, requires_grad=True),
        torch.tensor([[0, n, n % 2] for n in range(6)], dtype=torch.int32), [6, 2], 1,
    )  # fmt: skip
    layer = spconv.SparseConv2d(2, 2, 3, 2, 1)
    (expected,) = torch.autograd.grad(layer(x).features.sum(), x.features)
    y = layer(SparseConvTensor(x.features, x.indices.clone(), [6, 2], 1))
    out = layer(x)
    x.indices.numpy()[:] = 0
    out.indices.numpy()[:] = 0
    (got,) = torch.autograd.grad(out.features.sum(), x.features)
    assert torch.equal(got, expected)
    assert y.indices.any()


def test_a_reused_key_asks_the_engine_for_nothing(make, built):
    run(make(), subm(), subm(), subm())
    assert len(built) == 1


def test_sites_are_freed_with_the_last_tensor_that_knows_them(make):
    gc.collect()
    gc.disable()
    try:
        x = make()
        y = run(x, subm(), conv("d"), spconv.SubMConv3d(4, 4, 3), inverse(key="d"))
        y.features.sum().backward()
        sites = weakref.ref(x._sites)
        del x, y
        assert sites() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("copied", ["pickled", "deep copied"])
@pytest.mark.parametrize("algo", [Native, spconv.ConvAlgo.MaskImplicitGemm])
def test_recorded_keys_can_be_pickled_and_copied(make, copied, algo):
    x = make()
    back = inverse(key="d", algo=algo).to(x.features.device)
    again = subm(key="s", algo=algo).to(x.features.device)
    y = run(x, subm(key="s", algo=algo), conv(key="d", algo=algo))
    y = y.replace_feature(y.features.detach())
    twin = pickle.loads(pickle.dumps(y)) if copied == "pickled" else copy.deepcopy(y)
    assert type(twin.indice_dict["d"]) is type(y.indice_dict["d"])
    assert twin.indice_dict["d"].indices is twin.indice_dict["s"].indices
    for found, expected in ((twin, y), (run(twin, back, again), run(y, back, again))):
        torch.testing.assert_close(found.features, expected.features)
        assert torch.equal(found.indices, expected.indices)
