"""Layers that downstream code writes on MinkowskiEngine's functions, keys and managers."""

import torch

import compat.minkowski as ME
from compat.minkowski._backend import _C
from compat.minkowski.MinkowskiSparseTensor import _get_coordinate_map_key


class Mixture(ME.MinkowskiModuleBase):
    """A layer as downstream code writes it: it mixes kernels and calls the function's instance."""

    def __init__(self, channels: tuple[int, int], stride: int, transposed: bool) -> None:
        super().__init__()
        self.kernel_generator = ME.KernelGenerator(3, stride, dimension=3)
        volume = self.kernel_generator.kernel_volume
        self.kernels = torch.nn.Parameter(torch.randn(2, volume, *channels))
        self.weights = torch.nn.Parameter(torch.randn(2))
        functions = (ME.MinkowskiConvolutionFunction, ME.MinkowskiConvolutionTransposeFunction)
        self.conv = functions[transposed]()

    def forward(self, input: ME.SparseTensor) -> ME.SparseTensor:
        assert isinstance(input, ME.SparseTensor)
        kernel = torch.einsum("e,evio->vio", self.weights, self.kernels)
        key = _get_coordinate_map_key(input, None, self.kernel_generator.expand_coordinates)
        feats = self.conv.apply(
            input._F,
            kernel,
            self.kernel_generator,
            _C.ConvolutionMode.DEFAULT,
            input.coordinate_map_key,
            key,
            input._manager,
        )
        return ME.SparseTensor(feats, coordinate_map_key=key, coordinate_manager=input._manager)


def test_d30_and_d31_layers_of_downstream_code(make):
    x = make(40, channels=3)
    down = Mixture((3, 5), 2, transposed=False).to(x.device)
    up = Mixture((5, 2), 2, transposed=True).to(x.device)
    out = up(down(x))
    assert out.coordinate_map_key == x.coordinate_map_key
    assert out.shape == (40, 2)
    for layer, cls in ((down, ME.MinkowskiConvolution), (up, ME.MinkowskiConvolutionTranspose)):
        twin = cls(*layer.kernels.shape[2:], 3, stride=2, dimension=3).to(x.device)
        with torch.no_grad():
            twin.kernel.copy_(torch.einsum("e,evio->vio", layer.weights, layer.kernels))
        given = x if layer is down else down(x)
        torch.testing.assert_close(layer(given).F, twin(given).F)
    out.F.sum().backward()
    assert all(p.grad is not None for p in [*down.parameters(), *up.parameters()])


def test_b5_49_algorithms_and_allocators_change_nothing(make):
    x = make(40, channels=3)
    labels = {
        "minkowski_algorithm": ME.MinkowskiAlgorithm.MEMORY_EFFICIENT,
        "allocator_type": ME.GPUMemoryAllocatorType.CUDA,
    }
    twin = ME.SparseTensor(x.F, x.C, **labels)
    assert twin.coordinate_manager.minkowski_algorithm == labels["minkowski_algorithm"]
    for mode in _C.ConvolutionMode:
        layer = ME.MinkowskiConvolution(3, 4, 3, convolution_mode=mode, dimension=3).to(x.device)
        assert torch.equal(layer(x).F, layer(twin).F)
