"""Tensors of MinkowskiEngine: arithmetic, unions, pruning, fields, quantisation."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator
from typing import Any

import torch

from tests.parity.case import GRAD, Case, Quirk, Run
from tests.parity.cases.minkowski_run import (
    EXACT,
    case,
    coordinates,
    layer,
    random_points,
    record,
    record_gradients,
    run_module,
    tensor,
)

AVERAGE = Quirk("Averages of points", ("out", "grad input"))
COARSE_SLICE = Quirk("`slice` of a coarser tensor", ("out", "grad input"))
BROADCAST = Quirk("Broadcasts of three samples or more", ("out", "grad input"))
STABLE_NORM = Quirk("`MinkowskiStableInstanceNorm` works", ("original error",))


def _pair(run: Run, same_sites: bool, strides: tuple[int, int] = (1, 1)) -> tuple[Any, Any]:
    """Return two tensors in one coordinate manager."""
    x = tensor(run, 3, tensor_stride=strides[0])
    if same_sites:
        feats = run.values("other", len(x), 3).requires_grad_()
        options = {"coordinate_map_key": x.coordinate_map_key}
        return x, run.module().SparseTensor(
            feats, coordinate_manager=x.coordinate_manager, **options
        )
    # Some sites are in both tensors, some in only one.
    shared = x.C[: len(x) // 2]
    coords = coordinates(run, name="other", stride=strides[1])
    if strides[0] == strides[1]:
        coords = torch.cat([shared, coords])
        coords = torch.unique(coords, dim=0)
    return x, tensor(
        run,
        3,
        coords=coords,
        name="other",
        tensor_stride=strides[1],
        coordinate_manager=x.coordinate_manager,
    )


def combine(run: Run, name: str, same_sites: bool, strides: tuple[int, int] = (1, 1)) -> None:
    """Combine two tensors by an arithmetic operator."""
    x, y = _pair(run, same_sites, strides)
    # Divisors are not near zero.
    right = y if name != "truediv" else _shifted(run, y)
    out = getattr(operator, name)(x, right)
    record(run, "out", out, kept=same_sites)
    run.backward(out.C, out.F, input=x.F, other=y.F)


def _shifted(run: Run, x: Any) -> Any:
    return run.module().SparseTensor(
        x.F + 2, coordinate_map_key=x.coordinate_map_key, coordinate_manager=x.coordinate_manager
    )


def in_place(run: Run, name: str) -> None:
    """Combine two tensors of one key in place."""
    x, y = _pair(run, same_sites=True)
    out = run.fill(run.module().MinkowskiLinear(3, 3))(x)
    out = getattr(operator, name)(out, y)
    record(run, "out", out, kept=True)
    run.backward(out.C, out.F, input=x.F, other=y.F)


def with_torch(run: Run, name: str) -> None:
    """Combine a sparse tensor with a row of a torch tensor."""
    x = tensor(run, 3)
    out = getattr(operator, name)(x, run.values("row", 1, 3) + 2)
    record(run, "out", out, kept=True)
    run.backward(out.C, out.F, input=x.F)


def stack(run: Run, name: str) -> None:
    """Combine three tensors on the same coordinates."""
    ME = run.module()
    x, y = _pair(run, same_sites=True)
    out = getattr(ME, name)(x, y, ME.MinkowskiSigmoid()(x))
    record(run, "out", out, kept=True)
    run.backward(out.C, out.F, input=x.F, other=y.F)


def unite(run: Run, count: int) -> None:
    """Add tensors over the union of their sites."""
    x, y = _pair(run, same_sites=False)
    tensors = [x, y]
    if count == 3:
        tensors.append(tensor(run, 3, name="third", coordinate_manager=x.coordinate_manager))
    out = run.module().MinkowskiUnion()(*tensors)
    record(run, "out", out)
    run.backward(out.C, out.F, input=x.F, other=y.F)


def prune(run: Run, share: int, then: bool) -> None:
    """Keep some rows; ``then`` run a strided and a transposed layer on them."""
    x = tensor(run, 3)
    mask = run.integers("mask", 4, len(x)) < share
    out = run.module().MinkowskiPruning()(x, mask)
    if then:
        down = layer(run, "Convolution", 3, 4, kernel_size=3, stride=2)
        up = layer(run, "ConvolutionTranspose", 4, 5, kernel_size=2, stride=2)
        # The layer returns to the sites before pruning, as in the original.
        out = up(down(out))
        run.fact("same key", out.coordinate_map_key == x.coordinate_map_key)
    record(run, "out", out, kept=then)
    run.backward(out.C, out.F, input=x.F)


def broadcast(run: Run, kind: str, batch_size: int) -> None:
    """Combine every row with the mean of its sample."""
    ME = run.module()
    x = tensor(run, 3, batch_size=batch_size)
    mean = ME.MinkowskiGlobalAvgPooling(mode=ME.PoolingMode.GLOBAL_AVG_POOLING_KERNEL)(x)
    out = getattr(ME, f"MinkowskiBroadcast{kind}")()(x, mean)
    record(run, "out", out, kept=True)
    run.backward(out.C, out.F, input=x.F)


def interpolate(run: Run, stride: int, ndim: int) -> None:
    """Interpolate between sites; some corners are missing."""
    x = tensor(run, 3, ndim, tensor_stride=stride)
    points = random_points(run, 50, ndim)
    out = run.module().MinkowskiInterpolation()(x, points)
    run.tensor("out", out)
    run.tensor("features_at_coordinates", x.features_at_coordinates(points))
    out.backward(run.values("grad", *out.shape))
    assert x.F.grad is not None
    run.tensor(GRAD + "input", x.F.grad)


# Views of a tensor.


def decompose(run: Run) -> None:
    """Split a tensor by sample; the batch index 1 has no row."""
    coords = coordinates(run, batch_size=2)
    coords[:, 0] *= 2
    x = tensor(run, 3, coords=coords)
    run.fact("samples", len(x.decomposed_coordinates))
    run.fact("rows", [len(feats) for feats in x.decomposed_features])
    run.fact("shape", list(x.shape))
    for batch in (0, 2):
        coords, feats = x.coordinates_and_features_at(batch)
        run.rows(f"sample {batch}", torch.nn.functional.pad(coords, (1, 0)), feats)
        rows = x.decomposition_permutations[batch]
        run.tensor(f"rows {batch}", torch.sort(rows)[0].long())
        assert torch.equal(x.F[rows], x.decomposed_features[batch])


def densify(run: Run, shifted: bool, contract: bool, tensor_stride: int) -> None:
    """Make a dense tensor."""
    coords = coordinates(run, stride=tensor_stride)
    if not shifted:
        coords[:, 1:] -= coords[:, 1:].min(0).values
    x = tensor(run, 3, coords=coords, tensor_stride=tensor_stride)
    lower = coords[:, 1:].min(0).values.int() if shifted else None
    dense, found, stride = x.dense(min_coordinate=lower, contract_stride=contract)
    run.tensor("dense", dense)
    run.tensor("min_coordinate", found)
    run.fact("tensor_stride", [int(step) for step in stride])
    dense.backward(run.values("grad", *dense.shape))
    assert x.F.grad is not None
    run.tensor(GRAD + "input", x.F.grad)


def negative_dense(run: Run) -> None:
    """Make a dense tensor of negative coordinates without a lower corner."""
    tensor(run, 3).dense()


def sparsify(run: Run, all_cells: bool) -> None:
    """Make a sparse tensor of a dense one."""
    ME = run.module()
    dense = run.values("dense", 2, 3, 5, 4, 6)
    dense[:, :, :2] = 0
    dense.requires_grad_()
    out = ME.to_sparse_all(dense) if all_cells else ME.to_sparse(dense)
    record(run, "out", out, kept=True)
    run.backward(out.C, out.F, input=dense)


# Repeated coordinates.


def quantize(run: Run, mode: str) -> None:
    """Build a tensor from coordinates that repeat."""
    ME = run.module()
    coords = coordinates(run, n=30)[run.integers("repeat", 30, 80)]
    feats = run.values("feats", 80, 3).requires_grad_()
    x = ME.SparseTensor(
        feats,
        coordinates=coords,
        quantization_mode=getattr(ME.SparseTensorQuantizationMode, mode),
    )
    record(run, "out", x, kept=True)
    run.tensor("unique_index", x.unique_index)
    run.tensor("inverse_mapping", x.inverse_mapping.long())
    run.backward(x.C, x.F, input=feats)


def sparse_quantize(run: Run, size: Any, labelled: bool) -> None:
    """Quantise points."""
    points = random_points(run, 80)[:, 1:]
    feats = run.values("feats", 80, 3)
    labels = run.integers("labels", 5, 80).int() if labelled else None
    items = run.module("utils").sparse_quantize(
        points, feats, labels, return_index=True, return_inverse=True, quantization_size=size
    )
    for number, item in enumerate(items):
        run.tensor(f"item {number}", item)


def collate(run: Run, dtype: torch.dtype) -> None:
    """Make a batch of samples of several lengths."""
    points = [run.values(f"points {n}", n, 3, scale=4.0) for n in (5, 1, 7)]
    feats = [run.values(f"feats {n}", n, 2) for n in (5, 1, 7)]
    utils = run.module("utils")
    run.tensor("batched", utils.batched_coordinates(points, dtype=dtype))
    labels = [run.integers(f"labels {n}", 5, n) for n in (5, 1, 7)]
    for number, item in enumerate(utils.sparse_collate(points, feats, labels, dtype=dtype)):
        run.tensor(f"item {number}", item)


# Fields.


def _field(run: Run, mode: str, n: int = 80, dtype: torch.dtype = torch.float32) -> Any:
    ME = run.module()
    return ME.TensorField(
        run.values("feats", n, 3).requires_grad_(),
        coordinates=random_points(run, n).to(dtype),
        quantization_mode=getattr(ME.SparseTensorQuantizationMode, mode),
    )


def field_to_sparse(run: Run, mode: str, stride: int) -> None:
    """Make a sparse tensor of a field."""
    field = _field(run, mode)
    x = field.sparse(tensor_stride=stride)
    record(run, "out", x, kept=True)
    run.tensor("inverse", field.inverse_mapping(x.coordinate_map_key).long())
    run.backward(x.C, x.F, input=field.F)


def field_round_trip(run: Run, method: str, stride: int) -> None:
    """Run a field through a strided layer and back to its points."""
    field = _field(run, "UNWEIGHTED_AVERAGE")
    x = field.sparse()
    if stride > 1:
        x = layer(run, "Convolution", 3, 3, kernel_size=3, stride=stride)(x)
    out = getattr(x, method)(field)
    run.tensor("points", out.C)
    run.tensor("out", out.F)
    out.F.backward(run.values("grad", *out.F.shape))
    assert field.F.grad is not None
    run.tensor(GRAD + "input", field.F.grad)


def splat(run: Run) -> None:
    """Spread a field over the sites around its points, and interpolate back."""
    # Interpolation uses coordinates as weights, so they have the dtype of the features.
    field = _field(run, "UNWEIGHTED_AVERAGE", n=30, dtype=run.dtype)
    x = field.splat()
    record(run, "out", x)
    back = x.interpolate(field)
    run.tensor("back", back.F)
    back.F.backward(run.values("grad", *back.F.shape))
    assert field.F.grad is not None
    run.tensor(GRAD + "input", field.F.grad)


# Layers on the features.


def normalize(run: Run, kind: str, batch_size: int) -> None:
    """Run a norm."""
    module = run.fill(getattr(run.module(), f"Minkowski{kind}Norm")(3))
    run_module(run, module, tensor(run, 3, batch_size=batch_size), kept=True)
    for name, value in module.named_buffers():
        run.tensor(name, value)


def stable_norm(run: Run) -> None:
    """Run the stable instance norm, whose call fails in the original."""
    module = run.fill(run.module().MinkowskiStableInstanceNorm(3))
    run_module(run, module, tensor(run, 3), kept=True)


def nonlinearity(run: Run, kind: str, options: dict[str, Any]) -> None:
    """Run a nonlinearity."""
    module = run.fill(getattr(run.module(), f"Minkowski{kind}")(**options))
    run_module(run, module, tensor(run, 3), kept=True)


def functional(run: Run, name: str) -> None:
    """Call a function."""
    x = tensor(run, 3)
    out = getattr(run.module("MinkowskiFunctional"), name)(x)
    record(run, "out", out, kept=True)
    run.backward(out.C, out.F, input=x.F)


def linear(run: Run) -> None:
    """Run a linear layer."""
    module = run.fill(run.module().MinkowskiLinear(3, 5))
    run_module(run, module, tensor(run, 3), kept=True)


def block(run: Run, kind: str) -> None:
    """Run a residual block."""
    block = getattr(run.module("modules.resnet_block"), kind)
    net = run.fill(block(4 * block.expansion, 4, dimension=3))
    x = tensor(run, 4 * block.expansion)
    out = net(x)
    record(run, "out", out, kept=True)
    run.backward(out.C, out.F, input=x.F)
    record_gradients(run, net)


def squeeze(run: Run) -> None:
    """Run a squeeze-and-excitation layer."""
    net = run.fill(run.module("modules.senet_block").SELayer(4, reduction=2))
    run_module(run, net, tensor(run, 4), kept=True)


def _cases() -> Iterator[Case]:
    for name, same in itertools.product(("add", "sub", "mul", "truediv"), (True, False)):
        yield case(f"{name}-{'same' if same else 'union'}", combine, name=name, same_sites=same)
    yield case("add-strides", combine, name="add", same_sites=False, strides=(1, 2))
    for name in ("iadd", "isub", "imul"):
        yield case(name, in_place, name=name)
    for name in ("add", "sub", "mul", "truediv"):
        yield case(f"{name}-torch", with_torch, name=name)
    for name in ("cat", "sum", "mean", "var"):
        yield case(name, stack, name=name)
    for count in (2, 3):
        yield case(f"union-{count}", unite, count=count)
    for share, then in ((1, False), (3, False), (0, False), (4, False), (2, True)):
        yield case(f"prune-{share}of4{'-then' if then else ''}", prune, share=share, then=then)
    for kind, batch_size in itertools.product(
        ("", "Addition", "Multiplication", "Concatenation"), (2, 3)
    ):
        name = f"broadcast-{kind.lower() or 'copy'}-batch{batch_size}"
        quirks = (BROADCAST,) if batch_size > 2 and kind in ("", "Concatenation") else ()
        yield case(name, broadcast, kind=kind, batch_size=batch_size, quirks=quirks)
    for stride, ndim in ((1, 3), (2, 3), (1, 2), (1, 4)):
        yield case(f"interpolate-{ndim}d-stride{stride}", interpolate, stride=stride, ndim=ndim)
    yield case("decompose", decompose)
    for shifted, contract, stride in itertools.product((True, False), (True, False), (1, 2)):
        yield case(
            f"dense-{'shifted' if shifted else 'plain'}-contract{contract:d}-stride{stride}",
            densify,
            shifted=shifted,
            contract=contract,
            tensor_stride=stride,
        )
    yield Case("dense-negative", negative_dense, EXACT, refuses=True)
    for all_cells in (True, False):
        yield case(f"to-sparse{'-all' if all_cells else ''}", sparsify, all_cells=all_cells)
    for mode in ("RANDOM_SUBSAMPLE", "UNWEIGHTED_AVERAGE", "UNWEIGHTED_SUM"):
        quirks = (AVERAGE,) if mode == "UNWEIGHTED_AVERAGE" else ()
        yield case(f"quantize-{mode}", quantize, mode=mode, quirks=quirks)
        for stride in (1, 2):
            name = f"field-sparse-{mode}-stride{stride}"
            yield case(name, field_to_sparse, mode=mode, stride=stride, quirks=quirks)
    for method, stride in itertools.product(("slice", "cat_slice"), (1, 2)):
        quirks = (COARSE_SLICE,) if stride > 1 else (AVERAGE,)
        name = f"field-{method}-stride{stride}"
        yield case(name, field_round_trip, method=method, stride=stride, quirks=quirks)
    yield case("field-splat", splat)
    for size, labelled in itertools.product((None, 0.5, [0.5, 1.0, 0.25]), (False, True)):
        text = "x".join(map(str, size)) if isinstance(size, list) else size
        yield case(
            f"sparse-quantize-{text}{'-labels' if labelled else ''}",
            sparse_quantize,
            size=size,
            labelled=labelled,
        )
    for dtype in (torch.int32, torch.float32):
        yield case(f"collate-{str(dtype)[6:]}", collate, dtype=dtype)
    for kind, batch_size in itertools.product(("Batch", "Instance"), (1, 3)):
        yield case(f"norm-{kind}-batch{batch_size}", normalize, kind=kind, batch_size=batch_size)
    yield case("norm-stable", stable_norm, quirks=(STABLE_NORM,))
    for kind, options in NONLINEARITIES.items():
        yield case(f"nonlinearity-{kind}", nonlinearity, kind=kind, options=options)
    for name in ("relu", "elu", "sigmoid", "normalize", "gelu", "leaky_relu"):
        yield case(f"functional-{name}", functional, name=name)
    yield case("linear", linear)
    for kind in ("BasicBlock", "Bottleneck"):
        yield case(f"block-{kind}", block, kind=kind)
    yield case("block-SELayer", squeeze)


NONLINEARITIES: dict[str, dict[str, Any]] = {
    "ELU": {},
    "Hardshrink": {},
    "Hardsigmoid": {},
    "Hardtanh": {},
    "Hardswish": {},
    "LeakyReLU": {},
    "LogSigmoid": {},
    "PReLU": {},
    "ReLU": {},
    "ReLU6": {},
    "SELU": {},
    "CELU": {},
    "GELU": {},
    "Sigmoid": {},
    "SiLU": {},
    "Softplus": {},
    "Softshrink": {},
    "Softsign": {},
    "Tanh": {},
    "Tanhshrink": {},
    "Threshold": {"threshold": 0.1, "value": 2.0},
    "Softmin": {"dim": 1},
    "Softmax": {"dim": 1},
    "LogSoftmax": {"dim": 1},
    "Sinusoidal": {"in_channel": 3, "out_channel": 5},
}


CASES = list(_cases())
