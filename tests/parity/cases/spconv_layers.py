"""Single layers of spconv: every kind and dimension, kernel, stride, padding and dilation."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from tests.parity.case import Case, Run, options_name
from tests.parity.cases.spconv_run import (
    AMP,
    HALF,
    N_SITES,
    SHAPES,
    SINGLE,
    layer,
    run_module,
    shares,
    tensor,
)

Window = tuple[Any, Any, Any, Any]  # kernel size, stride, padding, dilation


def single(
    run: Run,
    kind: str,
    ndim: int,
    channels: tuple[int, int],
    *args: Any,
    n: int = N_SITES,
    **options: Any,
) -> None:
    """Run one layer forward and backward."""
    module = layer(run, kind, ndim, *channels, *args, **options)
    subm = kind == "SubMConv"
    x = tensor(run, channels[0], SHAPES[ndim], n)
    out = run_module(run, module, x, kept=subm)
    run.fact("shares coordinates", shares(out, x))


def _case(
    prefix: str,
    kind: str,
    ndim: int,
    channels: tuple[int, int],
    *args: Any,
    n: int = N_SITES,
    dtypes: Any = SINGLE,
    **options: Any,
) -> Case:
    name = f"{prefix}-{ndim}d-{options_name(dict(zip('kspd', args, strict=False)) | options)}"
    function = partial(
        single, kind=kind, ndim=ndim, channels=channels, n=n, **_arguments(args), **options
    )
    return Case(name, function, dtypes)


def _arguments(args: Sequence[Any]) -> dict[str, Any]:
    names = ("kernel_size", "stride", "padding", "dilation")
    return dict(zip(names, args, strict=False))


def windows(
    ndim: int,
    kernel_sizes: Sequence[int],
    strides: Sequence[int],
    paddings: Sequence[int],
    dilations: Sequence[int],
) -> Iterator[Window]:
    """Yield every combination that leaves an output and that the layers accept."""
    for k, s, p, d in itertools.product(kernel_sizes, strides, paddings, dilations):
        if k == 1 and (d > 1 or p > 0):
            continue
        if min((n + 2 * p - d * (k - 1) - 1) // s + 1 for n in SHAPES[ndim]) >= 1:
            yield k, s, p, d


def _submanifold() -> Iterator[Case]:
    for ndim, d in itertools.product((1, 2, 3, 4), (1, 2)):
        for k in (3, 5, (3, 1, 5, 3)[:ndim]):
            # 625 taps take long and show nothing new.
            if (ndim, k) not in ((1, (3,)), (4, 5)):
                dtypes = AMP if (ndim, k, d) == (3, 3, 1) else SINGLE
                yield _case("subm", "SubMConv", ndim, (3, 5), k, dilation=d, dtypes=dtypes)
    for options in ({"padding": 1}, {"stride": 2}, {"padding": 0, "stride": 3}):
        yield _case("subm-ignores", "SubMConv", 3, (3, 5), 3, **options)
    for channels in ((1, 1), (8, 16), (17, 40), (32, 32)):
        name = f"subm-channels{channels[0]}x{channels[1]}"
        yield _case(name, "SubMConv", 3, channels, 3, dtypes=HALF)


def _pointwise() -> Iterator[Case]:
    for kind, bias in itertools.product(("SubMConv", "SparseConv"), (True, False)):
        for channels in ((4, 4), (3, 5)):
            name = f"pointwise-{kind}-{channels[0]}x{channels[1]}"
            yield _case(name, kind, 3, channels, 1, bias=bias, dtypes=HALF)


GRID = {
    1: ([2, 3, 4], [1, 2, 3], [0, 1, 2], [1, 2]),
    2: ([2, 3], [1, 2, 3], [0, 1], [1, 2]),
    3: ([1, 2, 3, 4], [1, 2], [0, 1], [1, 2]),
    4: ([2, 3], [2], [0, 1], [1]),
}
TRANSPOSED_GRID = {
    1: ([2, 3], [1, 2, 3], [0, 1], [1, 2]),
    2: ([2, 3], [1, 2], [0, 1], [1, 2]),
    3: ([2, 3], [1, 2], [0, 1], [1, 2]),
    4: ([2], [2], [0], [1]),
}
ANISOTROPIC = (
    ((3, 1, 1), (2, 1, 1), 0),
    ((3, 3, 3), (2, 2, 2), (0, 1, 1)),
    ((1, 2, 3), (3, 1, 2), (0, 0, 1)),
)


def _strided() -> Iterator[Case]:
    for ndim, choices in GRID.items():
        for window in windows(ndim, *choices):
            dtypes = AMP if (ndim, *window) == (3, 3, 2, 1, 1) else SINGLE
            yield _case("conv", "SparseConv", ndim, (2, 3), *window, dtypes=dtypes)
    for window in ANISOTROPIC:
        yield _case("conv", "SparseConv", 3, (3, 4), *window)


def _transposed() -> Iterator[Case]:
    """The transposed output size of spconv ignores the dilation, but its pairs do not."""
    for ndim, choices in TRANSPOSED_GRID.items():
        for window in windows(ndim, *choices):
            dtypes = HALF if (ndim, *window) == (3, 2, 2, 0, 1) else SINGLE
            yield _case(
                "transposed", "SparseConvTranspose", ndim, (2, 3), *window, n=25, dtypes=dtypes
            )


CASES = [*_submanifold(), *_pointwise(), *_strided(), *_transposed()]
