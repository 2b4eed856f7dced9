"""Single layers of MinkowskiEngine: convolutions and pools of every kind, dimension and window."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch

from tests.parity.case import Case, Quirk, Run, options_name
from tests.parity.cases.minkowski_run import (
    case,
    coordinates,
    layer,
    record,
    record_gradients,
    run_module,
    tensor,
)

CROSS = Quirk("`HYPER_CROSS` is the centre and the axes", ("out", "grad input", "grad kernel"))
CUSTOM = Quirk("`CUSTOM` windows", ("original error",))
EMPTY = Quirk("Empty tensors", ("original error",))
RAW_COORDINATES = Quirk("Coordinates given to a layer", ("out tensor_stride",))
# In the original, these cases write beyond the memory, and the process dies.
MAX_OF_NOTHING = Quirk("A maximum over no rows", ("original error",))
UNPOOL_CELLS = Quirk("A transposed pool whose window is its stride", ("original error",))
GLOBAL_ORDER = Quirk("Global sums and averages of three samples or more", ("out", "grad input"))
GLOBAL_MAX = Quirk("The gradient of a global maximum", ("grad input",))


def _named(prefix: str, ndim: int, k: Any, s: Any, d: Any) -> str:
    return f"{prefix}-{ndim}d-{options_name({'k': k, 's': s, 'd': d})}"


# Convolutions.


def convolve(run: Run, ndim: int, k: Any, s: Any, d: Any, stride: Any = 1, **options: Any) -> None:
    """Run one convolution on a tensor of tensor stride ``stride``."""
    module = layer(
        run, "Convolution", 3, 5, kernel_size=k, stride=s, dilation=d, ndim=ndim, **options
    )
    kept = s == 1 and not options.get("expand_coordinates")
    run_module(run, module, tensor(run, 3, ndim, tensor_stride=stride), kept=kept)


def convolve_onto(run: Run, given: str) -> None:
    """Run a convolution whose output sites are given as a tensor or a key."""
    x = tensor(run, 3)
    y = run.module().SparseTensor(
        run.values("target", 40, 1),
        coordinates=coordinates(run, n=40, name="target"),
        coordinate_manager=x.coordinate_manager,
    )
    module = layer(run, "Convolution", 3, 5, kernel_size=3)
    target = {"tensor": y, "key": y.coordinate_map_key, "coordinates": y.C}[given]
    run_module(run, module, x, target, kept=True)


def convolve_region(run: Run, region: str, k: int, s: int) -> None:
    """Run a convolution with a kernel generator of another region."""
    ME = run.module()
    generator = ME.KernelGenerator(
        kernel_size=k, stride=s, region_type=getattr(ME.RegionType, region), dimension=3
    )
    run.fact("kernel_volume", int(generator.kernel_volume))
    module = layer(run, "Convolution", 3, 5, kernel_generator=generator)
    run_module(run, module, tensor(run, 3), kept=s == 1)


def convolve_custom(run: Run) -> None:
    """Run a convolution over given offsets."""
    ME = run.module()
    generator = ME.KernelGenerator(
        kernel_size=3,
        region_type=ME.RegionType.CUSTOM,
        region_offsets=torch.tensor([[0, 0, 0], [1, 0, 0], [0, -2, 1]], dtype=torch.int32),
        dimension=3,
    )
    module = layer(run, "Convolution", 3, 5, kernel_generator=generator)
    run_module(run, module, tensor(run, 3), kept=True)


def convolve_channelwise(run: Run, k: Any, s: int, bias: bool) -> None:
    """Run a channelwise convolution."""
    module = layer(run, "ChannelwiseConvolution", 3, kernel_size=k, stride=s, bias=bias)
    run_module(run, module, tensor(run, 3), kept=s == 1)


def convolve_nothing(run: Run) -> None:
    """Run a convolution on no rows."""
    module = layer(run, "Convolution", 3, 5, kernel_size=3)
    run_module(run, module, tensor(run, 3, n=0), kept=True)


def convolve_other_dimension(run: Run) -> None:
    """Run a convolution on a tensor of another dimension."""
    layer(run, "Convolution", 3, 5, kernel_size=3, ndim=2)(tensor(run, 3, ndim=3))


GRID = {
    1: ([2, 3, 5], [1, 2, 3], [1, 2]),
    2: ([2, 3, 4], [1, 2, 3], [1, 2]),
    3: ([1, 2, 3, 4], [1, 2, 3], [1, 2]),
    4: ([2, 3], [1, 2], [1]),
    5: ([2], [2], [1]),
}
ANISOTROPIC = (
    (3, [3, 1, 5], 1, 1),
    (3, [3, 2, 1], [1, 2, 1], 1),
    (3, [3, 3, 3], [2, 1, 3], [1, 2, 1]),
    (4, [2, 2, 2, 1], [2, 2, 2, 1], 1),
    (4, [3, 3, 3, 2], 1, 1),
)


def _convolutions() -> Iterator[Case]:
    for ndim, choices in GRID.items():
        for k, s, d in itertools.product(*choices):
            if k > 1 or d == 1:
                yield case(_named("conv", ndim, k, s, d), convolve, ndim=ndim, k=k, s=s, d=d)
    for ndim, k, s, d in ANISOTROPIC:
        yield case(_named("conv", ndim, k, s, d), convolve, ndim=ndim, k=k, s=s, d=d)
    for stride in (2, [1, 2, 4]):
        for k, s in ((3, 1), (2, 2), (3, 2)):
            name = f"conv-from-{options_name({'stride': stride, 'k': k, 's': s})}"
            yield case(name, convolve, ndim=3, k=k, s=s, d=1, stride=stride)
    for k, s in ((3, 1), (3, 2), (2, 2), (1, 1), (1, 2)):
        yield case(f"conv-bias-k{k}-s{s}", convolve, ndim=3, k=k, s=s, d=1, bias=True)
    for k, s, d in ((3, 1, 1), (3, 1, 2), (3, 2, 1), (5, 2, 1), (2, 1, 1), (2, 2, 1)):
        yield case(
            f"conv-expand-{options_name({'k': k, 's': s, 'd': d})}",
            convolve,
            ndim=3,
            k=k,
            s=s,
            d=d,
            expand_coordinates=True,
        )
    for given in ("tensor", "key"):
        yield case(f"conv-onto-{given}", convolve_onto, given=given)
    quirks = (RAW_COORDINATES,)
    yield case("conv-onto-coordinates", convolve_onto, given="coordinates", quirks=quirks)
    yield case("conv-cube", convolve_region, region="HYPER_CUBE", k=3, s=1)
    for k, s in ((3, 1), (5, 1), (3, 2)):
        name = f"conv-cross-k{k}-s{s}"
        yield case(name, convolve_region, region="HYPER_CROSS", k=k, s=s, quirks=(CROSS,))
    for k, s, bias in ((3, 1, False), (3, 2, True), (2, 2, False), (1, 1, False)):
        name = f"channelwise-k{k}-s{s}"
        yield case(name, convolve_channelwise, k=k, s=s, bias=bias)
    yield case("conv-empty", convolve_nothing, quirks=(EMPTY,))
    yield case("conv-custom", convolve_custom, quirks=(CUSTOM,))
    dtypes = {"cpu": ("float32",)}
    yield Case("conv-other-dimension", convolve_other_dimension, dtypes, refuses=True)


# Transposed convolutions.


def transpose(
    run: Run, kind: str, ndim: int, k: Any, s: Any, stride: Any, d: int = 1, **options: Any
) -> None:
    """Run a transposed convolution that makes the finer sites."""
    module = layer(run, kind, 3, 5, kernel_size=k, stride=s, dilation=d, ndim=ndim, **options)
    x = tensor(run, 3, ndim, n=25, tensor_stride=stride)
    run_module(run, module, x)


def transpose_back(run: Run, kind: str, ndim: int, k: Any, s: Any, back: Any) -> None:
    """Run a strided layer, then a transposed layer back to the strided layer's input sites."""
    x = tensor(run, 3, ndim)
    down = layer(run, "Convolution", 3, 4, kernel_size=k, stride=s, ndim=ndim)
    up = layer(run, kind, 4, 5, kernel_size=back, stride=s, ndim=ndim)
    out = up(down(x))
    run.fact("same key", out.coordinate_map_key == x.coordinate_map_key)
    record(run, "out", out, kept=kind == "ConvolutionTranspose")
    run.backward(out.C, out.F, input=x.F)
    record_gradients(run, up)


def transpose_onto(run: Run, kind: str) -> None:
    """Run a transposed layer onto given finer sites."""
    x = tensor(run, 3, n=25, tensor_stride=2)
    y = run.module().SparseTensor(
        run.values("target", 60, 1),
        coordinates=coordinates(run, n=60, name="target"),
        coordinate_manager=x.coordinate_manager,
    )
    module = layer(run, kind, 3, 5, kernel_size=3, stride=2, bias=True)
    run_module(run, module, x, y.coordinate_map_key, kept=True)


def _transposed() -> Iterator[Case]:
    for kind in ("ConvolutionTranspose", "GenerativeConvolutionTranspose"):
        short = "transposed" if kind == "ConvolutionTranspose" else "generative"
        for ndim, k, s in itertools.product((1, 2, 3), (2, 3), (1, 2, 3)):
            if s > 1 or short == "generative":
                stride = 6
                name = f"{short}-{ndim}d-k{k}-s{s}"
                yield case(name, transpose, kind=kind, ndim=ndim, k=k, s=s, stride=stride)
        yield case(f"{short}-4d-k2-s2", transpose, kind=kind, ndim=4, k=2, s=2, stride=2)
        yield case(
            f"{short}-4d-k2x2x2x1-s2x2x2x1",
            transpose,
            kind=kind,
            ndim=4,
            k=[2, 2, 2, 1],
            s=[2, 2, 2, 1],
            stride=[2, 2, 2, 1],
        )
        yield case(
            f"{short}-3d-k3-s2-bias-d2",
            transpose,
            kind=kind,
            ndim=3,
            k=3,
            s=2,
            stride=4,
            d=2,
            bias=True,
        )
        for ndim, k, s, back in (
            (1, 3, 2, 3),
            (2, 2, 2, 2),
            (3, 2, 2, 2),
            (3, 3, 2, 2),
            (3, 2, 2, 3),
            (3, 3, 3, 3),
            (3, [3, 1, 2], [2, 1, 2], [3, 1, 2]),
            (4, [2, 2, 2, 1], [2, 2, 2, 1], [2, 2, 2, 1]),
        ):
            name = f"{short}-back-{ndim}d-{options_name({'k': k, 's': s, 'b': back})}"
            yield case(name, transpose_back, kind=kind, ndim=ndim, k=k, s=s, back=back)
        yield case(f"{short}-onto", transpose_onto, kind=kind)


# Pools.


def pool(run: Run, kind: str, ndim: int, k: Any, s: Any, d: Any = 1) -> None:
    """Run one local pool."""
    module = layer(run, f"{kind}Pooling", kernel_size=k, stride=s, dilation=d, ndim=ndim)
    run_module(run, module, tensor(run, 3, ndim), kept=s == 1)


def pool_onto(run: Run, kind: str) -> None:
    """Run a pool onto given sites; no row reaches some of them."""
    x = tensor(run, 3, n=20)
    y = run.module().SparseTensor(
        run.values("target", 40, 1),
        coordinates=coordinates(run, n=40, name="target"),
        coordinate_manager=x.coordinate_manager,
    )
    module = layer(run, f"{kind}Pooling", kernel_size=3, stride=1)
    run_module(run, module, x, y.coordinate_map_key, kept=True)


def unpool(run: Run, ndim: int, k: Any, s: Any, back: bool) -> None:
    """Run a transposed pool, back onto the sites of a pool's input or onto new ones."""
    up = layer(run, "PoolingTranspose", kernel_size=k, stride=s, ndim=ndim)
    if not back:
        run_module(run, up, tensor(run, 3, ndim, n=25, tensor_stride=s))
        return
    x = tensor(run, 3, ndim)
    out = up(layer(run, "AvgPooling", kernel_size=k, stride=s, ndim=ndim)(x))
    record(run, "out", out, kept=True)
    run.backward(out.C, out.F, input=x.F)


def global_pool(run: Run, kind: str, batch_size: int, mode: str) -> None:
    """Run one global pool by one of the original's algorithms."""
    ME = run.module()
    mode = getattr(ME.PoolingMode, f"GLOBAL_{kind.upper()}_POOLING_{mode}")
    module = getattr(ME, f"MinkowskiGlobal{kind}Pooling")(mode=mode)
    run_module(run, module, tensor(run, 3, batch_size=batch_size))


def _pools() -> Iterator[Case]:
    for kind in ("Sum", "Avg", "Max"):
        for ndim, k, s, d in (
            *itertools.product((1, 2, 3), (2, 3), (1, 2, 3), (1,)),
            (3, 3, 1, 2),
            (3, 2, 2, 2),
            (3, 5, 2, 1),
            (3, [3, 1, 2], [2, 1, 2], 1),
            (3, [2, 1, 3], [2, 1, 3], 1),
            (4, 2, 2, 1),
            (4, 3, 2, 1),
        ):
            yield case(
                _named(f"pool-{kind.lower()}", ndim, k, s, d),
                pool,
                kind=kind,
                ndim=ndim,
                k=k,
                s=s,
                d=d,
                # These strides leave rows between the windows of an axis.
                quirks=(MAX_OF_NOTHING,) if kind == "Max" and (k, s) == (2, 3) else (),
            )
        quirks = (MAX_OF_NOTHING,) if kind == "Max" else ()
        yield case(f"pool-{kind.lower()}-onto", pool_onto, kind=kind, quirks=quirks)
    for ndim, k, s in ((1, 3, 2), (2, 2, 2), (3, 2, 2), (3, 3, 2), (3, 3, 3), (4, 2, 2)):
        for back in (True, False):
            name = f"unpool-{'back' if back else 'new'}-{ndim}d-k{k}-s{s}"
            quirks = (UNPOOL_CELLS,) if (k, s, back) == (3, 3, False) else ()
            yield case(name, unpool, ndim=ndim, k=k, s=s, back=back, quirks=quirks)
    modes = ("KERNEL", "PYTORCH_INDEX")
    for kind, batch_size, mode in itertools.product(("Sum", "Avg", "Max"), (1, 2, 3), modes):
        name = f"global-{kind.lower()}-batch{batch_size}-{mode.lower()}"
        quirks = ()
        if kind == "Max" and batch_size == 1:
            quirks = (GLOBAL_MAX,)
        if mode == "PYTORCH_INDEX" and kind != "Max" and batch_size > 2:
            quirks = (GLOBAL_ORDER,)
        yield case(name, global_pool, kind=kind, batch_size=batch_size, mode=mode, quirks=quirks)


CASES = [*_convolutions(), *_transposed(), *_pools()]
