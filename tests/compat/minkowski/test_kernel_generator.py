"""Windows: sizes, regions, the order of taps."""

import copy

import pytest
import torch

import compat.minkowski as ME
from compat.minkowski.MinkowskiKernelGenerator import Window
from tests.compat.minkowski import _oracle as oracle


@pytest.mark.parametrize("kernel_size", [(3, 2), (2, 2, 2), (3, 3, 3), (5,), (2, 2, 2, 1)])
def test_b5_13_and_14_axis_0_is_fastest_and_even_extents_are_not_centred(kernel_size):
    assert list(Window(kernel_size, (1,) * len(kernel_size)).taps()) == oracle.taps(kernel_size)


def test_b5_13_and_14_written_out():
    window = Window((3, 2), (1, 1))
    assert window.taps() == ((-1, 0), (0, 0), (1, 0), (-1, 1), (0, 1), (1, 1))


def test_b5_15_a_hyper_cross_is_the_centre_and_the_axes():
    generator = ME.KernelGenerator((5, 3), region_type=ME.RegionType.HYPER_CROSS, dimension=2)
    expected = ((0, 0), (1, 0), (2, 0), (-2, 0), (-1, 0), (0, 1), (0, -1))
    assert generator._window.taps() == expected
    assert generator.kernel_volume == 7


def test_b5_16_custom_regions_are_their_offsets():
    offsets = torch.tensor([[0, 0], [2, -1], [0, 3]])
    generator = ME.KernelGenerator(
        region_type=ME.RegionType.CUSTOM, region_offsets=offsets, dimension=2
    )
    assert generator._window.taps() == ((0, 0), (2, -1), (0, 3))
    assert generator.kernel_volume == 3


def test_attributes_follow_the_arguments():
    generator = ME.KernelGenerator(
        3, stride=[1, 2], dilation=2, is_transpose=True, axis_types=None, dimension=2
    )
    assert generator.kernel_size == [3, 3]
    assert generator.kernel_stride == [1, 2]
    assert generator.kernel_dilation == [2, 2]
    assert generator.kernel_volume == 9
    assert generator.region_offsets.numel() == 0
    assert not generator.requires_strided_coordinates
    assert not generator.expand_coordinates
    assert str(generator) == (
        "KernelGenerator(kernel_size=[3, 3], kernel_stride=[1, 2], kernel_dilation=[2, 2], "
        "region_type=RegionType.HYPER_CUBE, expand_coordinates=False, dimension=2)"
    )
    region, region_offsets, volume = generator.get_kernel([1, 1], False)
    assert (region, region_offsets.numel(), volume) == (ME.RegionType.HYPER_CUBE, 0, 9)


def test_d26_strides_are_asked_for_in_one_dimension_too():
    assert not ME.KernelGenerator(1, stride=2, dimension=1).requires_strided_coordinates
    assert ME.KernelGenerator(1, stride=1, dimension=1).requires_strided_coordinates


@pytest.mark.parametrize(
    "size", [3, [3, 3], (3, 3), torch.tensor([3, 3])], ids=["int", "list", "tuple", "tensor"]
)
def test_sizes_are_one_int_or_one_per_axis(size):
    assert ME.KernelGenerator(size, dimension=2).kernel_size == [3, 3]


def test_generators_can_be_copied():
    generator = ME.KernelGenerator(3, stride=2, dimension=3)
    again = copy.deepcopy(generator)
    assert again._window == generator._window
    assert again.kernel_stride == [2, 2, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dimension": 0}, "dimension must be at least 1 and at most 1024; got 0"),
        ({"dimension": 10**9}, "dimension must be at least 1 and at most 1024; got 1000000000"),
        ({"kernel_size": 0}, r"kernel_size must be at least 1 on every axis; got \[0, 0\]"),
        ({"kernel_size": [3]}, r"expected an int or 2 of them, one per axis; got \[3\]"),
        ({"stride": 0}, r"stride must be at least 1 on every axis; got \[0, 0\]"),
        ({"dilation": [1, 0]}, r"dilation must be at least 1"),
        ({"region_type": 1}, "region_type must be a RegionType; got 1"),
        ({"axis_types": [0, 1]}, "axis_types must be None"),
        (
            {"kernel_size": 2, "region_type": ME.RegionType.HYPER_CROSS},
            "a HYPER_CROSS needs odd kernel sizes",
        ),
        ({"region_type": ME.RegionType.CUSTOM}, "must be given with RegionType.CUSTOM and only"),
        (
            {"region_type": ME.RegionType.CUSTOM, "region_offsets": torch.zeros(2, 3).int()},
            r"region_offsets must have shape \[V, 2\]",
        ),
        ({"region_offsets": torch.zeros(2, 2).int()}, "must be given with RegionType.CUSTOM"),
    ],
    ids=str,
)
def test_errors(options, message):
    with pytest.raises(AssertionError, match=message):
        ME.KernelGenerator(**{"kernel_size": 3, "dimension": 2, **options})


@pytest.mark.parametrize(
    "layer",
    [
        lambda: ME.MinkowskiConvolution(1, 1, 3, dimension=20),
        lambda: ME.MinkowskiConvolutionTranspose(1, 1, 3, dimension=20),
        lambda: ME.MinkowskiChannelwiseConvolution(1, 3, dimension=20),
    ],
    ids=["convolution", "transposed", "channelwise"],
)
def test_weights_of_too_many_taps_are_refused(layer):
    with pytest.raises(RuntimeError, match=r"2\*\*31 taps; got kernel_size=\[3\] in 20 dimensions"):
        layer()
