"""Tensors and layers that travel: pickling, worker processes, the meta device, default devices."""

import copy
import io
import pickle

import pytest
import torch
from torch.utils.data import DataLoader

import compat.minkowski as ME

COORDS = torch.tensor([[0, 0, 0], [0, 1, 0], [1, 3, 2], [0, 4, 1]], dtype=torch.int32)


def tensor(feats: torch.Tensor | None = None) -> ME.SparseTensor:
    return ME.SparseTensor(torch.arange(8.0).view(4, 2) if feats is None else feats, COORDS)


def network() -> torch.nn.Sequential:
    return torch.nn.Sequential(
        ME.MinkowskiConvolution(2, 4, kernel_size=3, stride=2, dimension=2),
        ME.MinkowskiBatchNorm(4),
        ME.MinkowskiReLU(),
        ME.MinkowskiConvolutionTranspose(4, 4, kernel_size=2, stride=2, dimension=2),
        ME.MinkowskiConvolution(4, 2, kernel_size=1, bias=True, dimension=2),
    )


TENSORS = {
    "input": lambda x: x,
    "convolution": lambda x: ME.MinkowskiConvolution(2, 2, kernel_size=3, dimension=2)(x),
    "network": lambda x: network()(x),
    "pool": lambda x: ME.MinkowskiMaxPooling(2, 2, dimension=2)(x),
    "global-pool": lambda x: ME.MinkowskiGlobalSumPooling()(x),
    "pruned": lambda x: ME.MinkowskiPruning()(x, x.C[:, 1] > 0),
    "union": lambda x: x + ME.MinkowskiSumPooling(2, 2, dimension=2)(x),
    "field": lambda x: ME.TensorField(x.F, x.C.float()),
    "sliced": lambda x: _sliced(ME.TensorField(x.F, x.C.float())),
}


def _sliced(field: ME.TensorField) -> ME.TensorField:
    return field.sparse().slice(field)


@pytest.mark.parametrize("name", TENSORS)
def test_used_tensors_and_outputs_are_pickled(name):
    x = tensor()
    # A layer has read the tensor, so its manager holds kernel maps.
    network()(x)
    made = TENSORS[name](x)
    other = pickle.loads(pickle.dumps(made))
    assert other.C.tolist() == made.C.tolist()
    torch.testing.assert_close(other.F, made.F)
    assert other.coordinate_key == made.coordinate_key


def test_tensors_that_share_a_manager_share_it_after_pickling():
    x = tensor()
    net = network()
    y = net[0](x).detach()
    a, b = pickle.loads(pickle.dumps((x, y)))
    assert a.coordinate_manager is b.coordinate_manager
    up = net[3](b)
    assert up.coordinate_map_key == a.coordinate_map_key
    torch.testing.assert_close(up.F, net[3](y).F)
    torch.testing.assert_close(net[0](a).F, y.F)


def test_used_tensors_are_copied_and_saved():
    x = tensor()
    net = network().eval()
    y = net(x)
    file = io.BytesIO()
    torch.save((net, x), file)
    file.seek(0)
    other_net, other_x = torch.load(file, weights_only=False)
    torch.testing.assert_close(other_net(other_x).F, y.F)
    torch.testing.assert_close(net(copy.deepcopy(x)).F, y.F)


def collate(samples: list[torch.Tensor]) -> ME.SparseTensor:
    """Run a layer in the worker process."""
    with torch.no_grad():
        torch.manual_seed(0)
        return network().eval()(tensor(samples[0]))


def test_a_data_loader_whose_collate_function_runs_layers():
    feats = [torch.full((4, 2), float(i)) for i in range(3)]
    batches = list(DataLoader(feats, batch_size=1, collate_fn=collate, num_workers=1, timeout=100))
    for own, batch in zip(feats, batches, strict=True):
        torch.testing.assert_close(batch.F, collate([own]).F)
        assert batch.C.tolist() == COORDS.tolist()


LAYERS = {
    "convolution": lambda: ME.MinkowskiConvolution(2, 3, kernel_size=3, bias=True, dimension=2),
    "pointwise": lambda: ME.MinkowskiConvolution(2, 3, kernel_size=1, bias=True, dimension=2),
    "generative": lambda: ME.MinkowskiGenerativeConvolutionTranspose(
        2, 3, kernel_size=2, stride=2, dimension=2
    ),
    "channelwise": lambda: ME.MinkowskiChannelwiseConvolution(
        2, kernel_size=3, bias=True, dimension=2
    ),
    "cross": lambda: ME.MinkowskiConvolution(
        2, 3, dimension=2, kernel_generator=ME.KernelGenerator(
            3, region_type=ME.RegionType.HYPER_CROSS, dimension=2
        ),
    ),
    "instance-norm": lambda: ME.MinkowskiInstanceNorm(2),
    "batch-norm": lambda: ME.MinkowskiBatchNorm(2),
    "average": lambda: ME.MinkowskiAvgPooling(3, 2, dimension=2),
    "large-cells": lambda: ME.MinkowskiSumPooling(9, 9, dimension=2),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_made_on_the_meta_device(name):
    with torch.device("meta"):
        layer = LAYERS[name]()
    assert all(parameter.is_meta for parameter in layer.parameters())
    layer = layer.to_empty(device="cpu")
    for module in layer.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    x = tensor()
    if name == "generative":
        x = ME.MinkowskiSumPooling(2, 2, dimension=2)(x)
    torch.testing.assert_close(layer(x).F, like(layer, name)(x).F)


def like(layer: torch.nn.Module, name: str) -> torch.nn.Module:
    """Return a layer made on the CPU with the parameters of another."""
    made = LAYERS[name]()
    made.load_state_dict(layer.state_dict())
    return made


def test_a_window_of_no_numbers_is_refused():
    offsets = torch.zeros(2, 3, dtype=torch.int32, device="meta")
    with pytest.raises(ValueError, match="on the meta device"):
        ME.KernelGenerator(3, region_type=ME.RegionType.CUSTOM, region_offsets=offsets, dimension=3)


NETWORK = network().eval()
AVERAGE = ME.MinkowskiAvgPooling(3, 2, dimension=2)
LARGE_CELLS = ME.MinkowskiSumPooling(9, 9, dimension=2)
CALLS = {
    **TENSORS,
    "network": NETWORK,
    "convolution": NETWORK[0],
    "large-cells": LARGE_CELLS,
    "average": AVERAGE,
    "input": lambda x: tensor(x.F),
    "repeats": lambda x: ME.SparseTensor(
        x.F, torch.zeros_like(x.C),
        quantization_mode=ME.SparseTensorQuantizationMode.UNWEIGHTED_AVERAGE,
    ),
    "unpool": lambda x: ME.MinkowskiPoolingTranspose(2, 2, dimension=2)(
        ME.MinkowskiSumPooling(2, 2, dimension=2)(x)
    ),
    "generated": lambda x: ME.MinkowskiPoolingTranspose(
        2, 2, expand_coordinates=True, dimension=2
    )(ME.MinkowskiSumPooling(2, 2, dimension=2)(x)),
    "broadcast": lambda x: ME.MinkowskiBroadcastAddition()(x, ME.MinkowskiGlobalSumPooling()(x)),
    "interpolated": lambda x: x.features_at_coordinates(x.C.float()),
    "splat": lambda x: ME.TensorField(x.F, x.C.float()).splat(),
    "dense": lambda x: x.dense()[0],
    "torch-sparse": lambda x: x.sparse()[0].to_dense(),
    "to-sparse": lambda x: ME.to_sparse(x.dense()[0]),
    "to-sparse-all": lambda x: ME.to_sparse_all(x.dense()[0]),
    "quantized": lambda x: ME.utils.sparse_quantize(x.C.float(), quantization_size=2.0),
    "collated": lambda x: ME.utils.sparse_collate([x.C[:, 1:]], [x.F])[0],
    "kernel-map": lambda x: x.coordinate_manager.kernel_map(
        x.coordinate_map_key, x.coordinate_map_key, kernel_size=3
    )[4],
    "samples": lambda x: x.coordinate_manager.origin_map(x.coordinate_map_key)[0],
    "spmm": lambda x: ME.spmm(x.C[:, 0], x.C[:, 0], x.F[:, 0], [4, 4], x.F),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_calls_under_another_default_device(name):
    """Intermediate tensors are on the device of the input, not on torch's default device."""
    results = []
    for device in ("cpu", "meta"):
        x = tensor()
        with torch.device(device):
            result = CALLS[name](x)
            feats = getattr(result, "F", result)
            if feats.requires_grad:
                feats.sum().backward()
        results.append(feats)
    assert results[1].device.type == "cpu"
    torch.testing.assert_close(*results)
