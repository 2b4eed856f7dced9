"""Convolutions against MinkowskiEngine's rules in loops over coordinates."""

import copy
import io
import math

import pytest
import torch

import compat.minkowski as ME
from compat.minkowski.MinkowskiSparseTensor import _get_coordinate_map_key
from tests.compat.minkowski import _oracle as oracle

FLOAT64 = {"dtype": torch.float64}


def tuple_of(value, ndim):
    return (value,) * ndim if isinstance(value, int) else tuple(value)


def layer(cls, *args, device, **options):
    return getattr(ME, f"Minkowski{cls}")(*args, **options).double().to(device)


def expected(module, x, y, transposed=False):
    """Return the expected result of ``module`` for ``x`` at the sites of ``y``."""
    generator = module.kernel_generator
    fine = y if transposed else x
    steps = [d * ts for d, ts in zip(generator.kernel_dilation, fine.tensor_stride, strict=True)]
    offsets = generator._window.taps()
    kernel = module.kernel.reshape(len(offsets), *module.kernel.shape[-2:])
    out = oracle.conv(x.C, x.F, kernel, y.C, offsets, steps, transposed)
    return out if module.bias is None else out + module.bias


CONVOLUTIONS = pytest.mark.parametrize(
    ("ndim", "options"),
    [
        (3, {"kernel_size": 3}),
        (3, {"kernel_size": 3, "dilation": 2}),
        (3, {"kernel_size": 2}),
        (3, {"kernel_size": 2, "stride": 2}),
        (3, {"kernel_size": 3, "stride": 2}),
        (3, {"kernel_size": 3, "stride": 3}),
        (3, {"kernel_size": 1, "stride": 2}),
        (3, {"kernel_size": [3, 2, 1], "stride": [2, 1, 3], "dilation": [1, 3, 2]}),
        (1, {"kernel_size": 5, "stride": 2}),
        (1, {"kernel_size": 1, "stride": 2}),
        (2, {"kernel_size": 4, "stride": 3}),
        (4, {"kernel_size": [2, 2, 2, 1], "stride": [2, 2, 2, 1]}),
        (5, {"kernel_size": 3}),
        (6, {"kernel_size": 2, "stride": 2}),
    ],
    ids=str,
)


@CONVOLUTIONS
@pytest.mark.parametrize("tensor_stride", [1, 2])
def test_b5_12_convolution_gathers_around_the_output(ndim, options, tensor_stride, make):
    reach = {1: 20, 2: 5, 3: 3}.get(ndim, 2)
    x = make(30, ndim=ndim, reach=reach, channels=2, **FLOAT64)
    x = ME.SparseTensor(x.F, x.C * x.C.new_tensor([1] + [tensor_stride] * ndim), tensor_stride)
    module = layer("Convolution", 2, 3, bias=True, dimension=ndim, device=x.device, **options)
    y = module(x)
    stride = tuple_of(options.get("stride", 1), ndim)
    assert y.tensor_stride == [tensor_stride * s for s in stride]
    if max(stride) == 1:
        assert y.coordinate_map_key == x.coordinate_map_key
    else:
        cells = {oracle.cell(tuple(c), y.tensor_stride) for c in x.C.tolist()}
        assert [tuple(c) for c in y.C.tolist()] == sorted(cells)
    torch.testing.assert_close(y.F, expected(module, x, y))


@CONVOLUTIONS
def test_b5_21_transposed_convolution_lands_on_the_cached_map(ndim, options, make):
    x = make(30, ndim=ndim, reach={1: 20}.get(ndim, 3), channels=2, **FLOAT64)
    down = layer("Convolution", 2, 2, dimension=ndim, device=x.device, **options)
    up = layer("ConvolutionTranspose", 2, 3, bias=True, dimension=ndim, device=x.device, **options)
    coarse = down(x)
    y = up(coarse)
    assert y.coordinate_map_key == x.coordinate_map_key
    torch.testing.assert_close(y.F, expected(up, coarse, y, transposed=True))
    other = dict(options, kernel_size=3)
    up = layer("ConvolutionTranspose", 2, 3, dimension=ndim, device=x.device, **other)
    if ndim < 5:
        torch.testing.assert_close(up(coarse).F, expected(up, coarse, y, transposed=True))


@CONVOLUTIONS
@pytest.mark.parametrize("cls", ["ConvolutionTranspose", "GenerativeConvolutionTranspose"])
def test_b5_21_and_22_generated_sites_are_input_plus_offset(cls, ndim, options, make):
    if ndim > 4:
        options = dict(options, kernel_size=2)
    stride = tuple_of(options.get("stride", 1), ndim)
    x = make(8, ndim=ndim, reach=2, channels=2, **FLOAT64)
    scaled = x.C * x.C.new_tensor([1, *(2 * s for s in stride)])
    x = ME.SparseTensor(x.F, scaled, tensor_stride=[2 * s for s in stride])
    up = layer(cls, 2, 3, bias=True, dimension=ndim, device=x.device, **options)
    y = up(x)
    assert y.tensor_stride == [2] * ndim
    if cls == "ConvolutionTranspose" and max(stride) == 1:
        assert y.coordinate_map_key == x.coordinate_map_key
    else:
        assert (y.coordinate_map_key.get_key()[1] == "") == (max(stride) > 1)
        dilation = up.kernel_generator.kernel_dilation
        reached = [
            oracle.moved(tuple(c), offset, [2 * d for d in dilation])
            for c in x.C.tolist()
            for offset in oracle.taps(up.kernel_generator.kernel_size)
        ]
        # Where no two inputs can reach one site, sites come input by input.
        taps = oracle.taps(up.kernel_generator.kernel_size)
        remainders = {
            tuple(d * o % s for d, o, s in zip(dilation, tap, stride, strict=True)) for tap in taps
        }
        apart = len(remainders) == len(taps)
        assert [tuple(c) for c in y.C.tolist()] == (reached if apart else sorted(set(reached)))
    torch.testing.assert_close(y.F, expected(up, x, y, transposed=True))


def test_b5_22_eight_children_of_a_generative_layer(device):
    x = ME.SparseTensor(
        torch.ones(1, 1, device=device),
        torch.tensor([[0, 4, -4, 0]], dtype=torch.int32, device=device),
        tensor_stride=4,
    )
    up = ME.MinkowskiGenerativeConvolutionTranspose(1, 1, kernel_size=2, stride=2, dimension=3)
    up = up.to(device)
    y = up(x)
    children = [[0, 4 + a, -4 + b, c] for c in (0, 2) for b in (0, 2) for a in (0, 2)]
    assert y.C.tolist() == children
    assert y.coordinate_map_key == ME.CoordinateMapKey([2, 2, 2], "")
    again = up(x)
    assert again.C.tolist() == children
    assert again.coordinate_map_key != y.coordinate_map_key
    assert up(x, y.coordinate_map_key).coordinate_map_key == y.coordinate_map_key


def test_b5_21_a_pruned_branch_is_upsampled_onto_the_map_with_the_empty_id(make):
    x = make(40, channels=2, **FLOAT64)
    down = layer("Convolution", 2, 2, kernel_size=2, stride=2, dimension=3, device=x.device)
    up = layer("ConvolutionTranspose", 2, 2, kernel_size=2, stride=2, dimension=3, device=x.device)
    coarse = down(x)
    kept = ME.MinkowskiPruning()(coarse, torch.arange(len(coarse), device=x.device) % 2 > 0)
    y = up(kept)
    assert y.coordinate_map_key == x.coordinate_map_key
    torch.testing.assert_close(y.F, expected(up, kept, y, transposed=True))


def test_b5_22_a_chain_of_generation_and_pruning(make):
    """A decoder: every stage makes children, scores them and keeps the better half."""
    x = make(12, reach=2, channels=2, **FLOAT64)
    x = ME.SparseTensor(x.F, x.C * x.C.new_tensor([1, 4, 4, 4]), tensor_stride=4)
    for stride in (2, 1):
        up = layer(
            "GenerativeConvolutionTranspose", 2, 2, kernel_size=2, stride=2, dimension=3,
            device=x.device,
        )  # fmt: skip
        conv = layer("Convolution", 2, 2, kernel_size=3, dimension=3, device=x.device)
        y = up(x)
        assert len(y) == 8 * len(x)
        z = conv(y)
        torch.testing.assert_close(z.F, expected(conv, y, y))
        mask = z.F[:, 0] > z.F[:, 0].median()
        x = ME.MinkowskiPruning()(z, mask)
        assert x.tensor_stride == [stride] * 3
        assert x.C.tolist() == z.C[mask].tolist()
        torch.testing.assert_close(conv(x).F, expected(conv, x, x))


def test_b5_3_and_17_layers_of_one_stride_return_equal_keys(make):
    x = make()
    first = ME.MinkowskiConvolution(4, 4, kernel_size=3, stride=2, dimension=3).to(x.device)(x)
    second = ME.MinkowskiConvolution(4, 4, kernel_size=1, stride=2, dimension=3).to(x.device)(x)
    assert first.coordinate_map_key == second.coordinate_map_key
    first += second


def test_b5_18_pointwise_layers_multiply_and_ignore_coordinates(make):
    x = make()
    module = ME.MinkowskiConvolution(4, 3, kernel_size=1, bias=True, dimension=3).to(x.device)
    assert module.use_mm
    assert module.kernel.shape == (4, 3)
    y = module(x, x.C[:3])
    assert y.coordinate_map_key == x.coordinate_map_key
    torch.testing.assert_close(y.F, x.F @ module.kernel + module.bias)


def test_b5_18_strided_pointwise_layers_read_the_coarse_grid_alone(device):
    coords = torch.tensor([[0, 2], [0, 3], [0, -4], [0, -1]], dtype=torch.int32, device=device)
    feats = torch.tensor([[1.0], [2], [4], [8]], device=device)
    module = ME.MinkowskiConvolution(1, 1, kernel_size=1, stride=2, bias=True, dimension=1)
    module = module.to(device)
    assert not module.use_mm
    assert module.kernel.shape == (1, 1, 1)
    y = module(ME.SparseTensor(feats, coords))
    weight, bias = module.kernel.item(), module.bias.item()
    assert y.C.tolist() == [[0, -4], [0, -2], [0, 2]]
    torch.testing.assert_close(
        y.F.flatten().tolist(), [4 * weight + bias, bias, weight + bias], rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize(
    ("kernel_size", "stride"), [(3, 1), (2, 1), (3, 2), (2, 2), ([2, 3], [1, 4])], ids=str
)
def test_b5_19_expanded_sites_are_input_plus_offset_on_the_output_stride(kernel_size, stride, make):
    x = make(12, ndim=2, channels=2, **FLOAT64)
    module = layer(
        "Convolution", 2, 3, kernel_size=kernel_size, stride=stride, expand_coordinates=True,
        dimension=2, device=x.device,
    )  # fmt: skip
    y = module(x)
    steps = y.tensor_stride
    reached = {
        oracle.moved(tuple(c), offset, (1, 1))
        for c in x.C.tolist()
        for offset in oracle.taps(module.kernel_generator.kernel_size)
    }
    on_grid = sorted(site for site in reached if oracle.cell(site, steps) == site)
    assert [tuple(c) for c in y.C.tolist()] == on_grid
    torch.testing.assert_close(y.F, expected(module, x, y))
    assert module(x).coordinate_map_key != y.coordinate_map_key


def test_b5_20_a_given_kernel_generator_takes_the_place_of_the_window():
    generator = ME.KernelGenerator(5, stride=2, expand_coordinates=True, dimension=2)
    module = ME.MinkowskiConvolution(
        1, 1, kernel_size=3, stride=4, kernel_generator=generator, dimension=2
    )
    assert module.kernel.shape == (25, 1, 1)
    assert module.kernel_generator is generator
    assert not generator.expand_coordinates


@pytest.mark.parametrize("given", ["tensor", "key", "coordinates"])
@pytest.mark.parametrize("options", [{}, {"stride": 2}, {"expand_coordinates": True}], ids=str)
def test_b5_6_given_coordinates_take_the_place_of_the_rule(given, options, make):
    x = make(30, channels=2, **FLOAT64)
    target = make(20, seed=1, coordinate_manager=x.coordinate_manager)
    module = layer("Convolution", 2, 3, kernel_size=3, dimension=3, device=x.device, **options)
    where = {"tensor": target, "key": target.coordinate_map_key, "coordinates": target.C}[given]
    y = module(x, where)
    assert y.C.tolist() == target.C.tolist()
    torch.testing.assert_close(y.F, expected(module, x, y))
    if given != "coordinates":
        assert y.coordinate_map_key == target.coordinate_map_key
    else:
        assert y.tensor_stride == [options.get("stride", 1)] * 3


def test_b5_6_coarse_features_are_convolved_onto_finer_given_sites(make):
    x = make(40, channels=2, **FLOAT64)
    coarse = ME.MinkowskiSumPooling(2, 2, dimension=3)(x)
    module = layer("Convolution", 2, 3, kernel_size=3, dimension=3, device=x.device)
    y = module(coarse, x)
    assert y.coordinate_map_key == x.coordinate_map_key
    torch.testing.assert_close(y.F, expected(module, coarse, y))


@pytest.mark.parametrize("cls", ["Convolution", "ConvolutionTranspose"])
def test_coordinates_off_the_grid_of_their_stride(cls, make):
    """Coordinates need not be multiples of the tensor stride that a caller gives them."""
    x = make(40, ndim=2, reach=6, channels=2, tensor_stride=2, **FLOAT64)
    module = layer(cls, 2, 3, kernel_size=3, stride=2, dimension=2, device=x.device)
    y = module(x)
    assert y.tensor_stride == ([4, 4] if cls == "Convolution" else [1, 1])
    if cls == "Convolution":
        cells = {oracle.cell(tuple(c), (4, 4)) for c in x.C.tolist()}
        assert {tuple(c) for c in y.C.tolist()} == cells
    torch.testing.assert_close(y.F, expected(module, x, y, cls != "Convolution"))
    same = layer("Convolution", 2, 3, kernel_size=3, dimension=2, device=x.device)
    torch.testing.assert_close(same(x).F, expected(same, x, x))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("region", ["cross", "custom", "custom-off-centre"])
def test_b5_15_and_16_other_regions(region, stride, transposed, make):
    x = make(40, ndim=2, reach=5, channels=2, **FLOAT64)
    x = ME.SparseTensor(x.F, x.C * x.C.new_tensor([1, stride, stride]), tensor_stride=stride)
    options = {
        "cross": {"kernel_size": [3, 5], "region_type": ME.RegionType.HYPER_CROSS},
        "custom": {"region_type": ME.RegionType.CUSTOM,
                   "region_offsets": torch.IntTensor([[1, 0], [0, 0], [-2, 3]])},
        "custom-off-centre": {"region_type": ME.RegionType.CUSTOM,
                              "region_offsets": torch.IntTensor([[1, 0], [-1, 2]])},
    }[region]  # fmt: skip
    generator = ME.KernelGenerator(stride=stride, dimension=2, **options)
    cls = "ConvolutionTranspose" if transposed else "Convolution"
    module = layer(cls, 2, 3, kernel_generator=generator, dimension=2, device=x.device)
    y = module(x)
    torch.testing.assert_close(y.F, expected(module, x, y, transposed))
    if stride == 1:
        assert y.coordinate_map_key == x.coordinate_map_key


def test_a_custom_region_of_one_tap_moves(device):
    generator = ME.KernelGenerator(
        region_type=ME.RegionType.CUSTOM, region_offsets=torch.IntTensor([[1]]), dimension=1
    )
    module = ME.MinkowskiConvolution(1, 1, kernel_generator=generator, dimension=1).to(device)
    coords = torch.tensor([[0, 0], [0, 1]], dtype=torch.int32, device=device)
    y = module(ME.SparseTensor(torch.tensor([[1.0], [2]], device=device), coords))
    weight = module.kernel.item()
    torch.testing.assert_close(y.F.flatten().tolist(), [2 * weight, 0.0])


def test_b5_23_and_24_rows_without_inputs_are_the_bias(make):
    x = make(20, channels=2)
    target = ME.SparseTensor(
        torch.ones(1, 1, device=x.device),
        torch.tensor([[0, 50, 0, 0]], dtype=torch.int32, device=x.device),
        coordinate_manager=x.coordinate_manager,
    )
    module = ME.MinkowskiConvolution(2, 3, kernel_size=3, bias=True, dimension=3).to(x.device)
    assert module.bias.shape == (1, 3)
    torch.testing.assert_close(module(x, target).F, module.bias)


@pytest.mark.parametrize("transposed", [False, True])
def test_b5_25_initial_values_follow_the_channels_and_the_volume(transposed):
    cls = ME.MinkowskiConvolutionTranspose if transposed else ME.MinkowskiConvolution
    module = cls(4, 64, kernel_size=3, bias=True, dimension=3)
    bound = 1 / math.sqrt(27 * (64 if transposed else 4))
    for parameter in (module.kernel, module.bias):
        assert parameter.abs().max() <= bound
        assert parameter.abs().max() > 0.8 * bound


def test_b7_parameters():
    module = ME.MinkowskiConvolution(4, 8, kernel_size=[3, 2, 1], bias=True, dimension=3)
    shapes = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    assert shapes == {"kernel": (6, 4, 8), "bias": (1, 8)}
    assert ME.MinkowskiConvolution(4, 8, kernel_size=3, dimension=3).bias is None


@pytest.mark.parametrize("cls", ["Convolution", "ConvolutionTranspose", "ChannelwiseConvolution",
                                 "GenerativeConvolutionTranspose"])  # fmt: skip
def test_gradcheck(cls, device):
    coords = torch.tensor(
        [[0, 0, 0], [0, 2, -2], [0, -2, 0], [1, 0, 2]], dtype=torch.int32, device=device
    )
    feats = torch.randn(4, 2, dtype=torch.float64, device=device, requires_grad=True)
    channels = (2,) if cls == "ChannelwiseConvolution" else (2, 3)
    module = layer(cls, *channels, kernel_size=3, stride=2, bias=True, dimension=2, device=device)

    def run(feats, kernel, bias):
        parameters = {"kernel": kernel, "bias": bias}
        x = ME.SparseTensor(feats, coords, tensor_stride=2)
        return torch.func.functional_call(module, parameters, (x,)).F

    assert torch.autograd.gradcheck(run, (feats, module.kernel, module.bias))


@pytest.mark.parametrize("options", [{}, {"stride": 2}, {"kernel_size": [2, 3, 1]}], ids=str)
def test_channelwise_convolution_is_a_diagonal_one(options, make):
    x = make(40, channels=3, **FLOAT64)
    options = {"kernel_size": 3, **options}
    module = layer("ChannelwiseConvolution", 3, bias=True, dimension=3, device=x.device, **options)
    full = layer("Convolution", 3, 3, bias=True, dimension=3, device=x.device, **options)
    assert module.kernel.shape == (module.kernel_generator.kernel_volume, 3)
    with torch.no_grad():
        full.kernel.copy_(torch.diag_embed(module.kernel))
        full.bias.copy_(module.bias)
    y, z = module(x), full(x)
    assert y.coordinate_map_key == z.coordinate_map_key
    torch.testing.assert_close(y.F, z.F)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernel_size", [1, 3])
@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "cast"])
def test_b6_half_precision_is_a_superset(dtype, kernel_size, autocast, make):
    x = make(40, channels=8)
    module = ME.MinkowskiConvolution(8, 8, kernel_size=kernel_size, bias=True, dimension=3)
    module = module.to(x.device)
    exact = module(x).F
    if autocast:
        with torch.autocast(x.device.type, dtype):
            y = module(x)
    else:
        module = module.to(dtype)
        y = module(x.to(dtype))
    assert y.dtype == dtype
    torch.testing.assert_close(y.F.float(), exact, atol=0.05, rtol=0.05)
    y.F.float().sum().backward()
    assert module.kernel.grad.dtype == module.kernel.dtype


@pytest.mark.parametrize("kernel_size", [1, 3])
def test_b6_unlike_types_are_promoted(kernel_size, make):
    x = make(20, channels=4, **FLOAT64)
    module = ME.MinkowskiConvolution(4, 2, kernel_size=kernel_size, dimension=3).to(x.device)
    assert module(x).dtype == torch.float64


@pytest.mark.parametrize("cls", ["Convolution", "ConvolutionTranspose", "ChannelwiseConvolution",
                                 "GenerativeConvolutionTranspose"])  # fmt: skip
def test_empty_tensors_have_empty_outputs_with_gradients(cls, device):
    coords = torch.empty(0, 3, dtype=torch.int32, device=device)
    feats = torch.empty(0, 2, device=device, requires_grad=True)
    channels = (2,) if cls == "ChannelwiseConvolution" else (2, 3)
    for stride in (1, 2):
        module = getattr(ME, f"Minkowski{cls}")(
            *channels, kernel_size=3, stride=stride, dimension=2
        ).to(device)
        y = module(ME.SparseTensor(feats, coords, tensor_stride=2))
        assert y.shape == (0, channels[-1])
        y.F.sum().backward()
        assert not module.kernel.grad.any()


def test_functions_set_the_output_key(make):
    x = make(20, channels=2)
    generator = ME.KernelGenerator(3, stride=2, dimension=3)
    module = ME.MinkowskiConvolution(2, 3, kernel_generator=generator, dimension=3).to(x.device)
    key = _get_coordinate_map_key(x)
    feats = ME.MinkowskiConvolutionFunction.apply(
        x.F, module.kernel, generator, module.convolution_mode, x.coordinate_map_key, key,
        x.coordinate_manager,
    )  # fmt: skip
    assert key == module(x).coordinate_map_key
    torch.testing.assert_close(feats, module(x).F)
    back = ME.CoordinateMapKey(4)
    ME.MinkowskiConvolutionTransposeFunction.apply(
        feats, module.kernel.transpose(1, 2), generator, module.convolution_mode, key, back,
        x.coordinate_manager,
    )  # fmt: skip
    assert back == x.coordinate_map_key


def test_layers_can_be_copied_and_saved(make):
    x = make(channels=4)
    module = ME.MinkowskiConvolution(4, 2, kernel_size=3, stride=2, dimension=3).to(x.device)
    saved = io.BytesIO()
    torch.save(module, saved)
    saved.seek(0)
    for again in (copy.deepcopy(module), torch.load(saved, weights_only=False)):
        assert torch.equal(again(x).F, module(x).F)


def test_repr():
    module = ME.MinkowskiConvolution(2, 3, kernel_size=3, stride=2, dimension=2)
    text = "MinkowskiConvolution(in=2, out=3, kernel_size=[3, 3], stride=[2, 2], dilation=[1, 1])"
    assert repr(module) == text


def test_b5_26_and_errors(make):
    x = make(10, channels=2)
    module = ME.MinkowskiConvolution(2, 3, kernel_size=3, dimension=2)
    with pytest.raises(AssertionError, match="has dimension=2; got a tensor with D=3"):
        module(x)
    with pytest.raises(AssertionError, match="takes a SparseTensor; got Tensor"):
        module(x.F)
    with pytest.raises(AssertionError, match="dimension, the number of spatial axes, must be"):
        ME.MinkowskiConvolution(2, 3, kernel_size=3)
    module = ME.MinkowskiConvolution(3, 3, kernel_size=3, dimension=3)
    with pytest.raises(AssertionError, match=r"has in_channels=3; got features \[10, 2\]"):
        module(x)
    module = ME.MinkowskiConvolution(2, 3, kernel_size=3, dimension=3).to(x.device)
    with pytest.raises(AssertionError, match="must share a coordinate manager"):
        module(x, make())
    with pytest.raises(AssertionError, match="coordinates must be a SparseTensor, a Coordinate"):
        module(x, [0, 1])
    module = ME.MinkowskiConvolutionTranspose(2, 3, kernel_size=3, stride=2, dimension=3)
    with pytest.raises(AssertionError, match="needs a tensor stride that its stride divides"):
        module(x)
    pooled = ME.MinkowskiGlobalSumPooling()(x)
    module = ME.MinkowskiConvolution(2, 3, kernel_size=3, dimension=3).to(x.device)
    with pytest.raises(AssertionError, match="leaves no room for a window"):
        module(pooled)
