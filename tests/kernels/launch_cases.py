"""One case per launcher and path through it, for the ahead-of-time compile test.

A case calls a launcher on small CPU tensors inside ``record_launches``. No kernel runs, so a case
makes the tensors that an earlier kernel would fill.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from tritonspconv.coords import Grid
from tritonspconv.geometry import ConvGeometry
from tritonspconv.kernels.channel_norm import ChannelNorm, TrainingNorm
from tritonspconv.kernels.index import SiteIndex
from tritonspconv.kernels.triton import (
    batch_norm,
    gather_gemm,
    half_parts,
    invert_table,
    neighbor_table,
    order_columns,
    pairs,
    pool,
    scatter_table,
    segment_reduce,
    sites,
    weight_grad,
)

# Numbers of rows of a table whose columns are ordered, and of a table whose columns are not.
MANY, FEW = 140_000, 100

CUBE = ConvGeometry.submanifold((3, 3, 3), (1, 1, 1))
WIDE = ConvGeometry.submanifold((5, 5, 5), (1, 1, 1))
HYPER = ConvGeometry.submanifold((3, 3, 3, 3), (1, 1, 1, 1))
DOWN = ConvGeometry((3, 3, 3), (2, 2, 2), (1, 1, 1), (1, 1, 1))
HALVE = ConvGeometry((2, 2, 2), (2, 2, 2), (0, 0, 0), (1, 1, 1))
DOWN_4D = ConvGeometry((2,) * 4, (2,) * 4, (0,) * 4, (1,) * 4)
UP_1D = ConvGeometry((2,), (2,), (0,), (1,), transposed=True)
POINT_UP = ConvGeometry((1,), (2,), (0,), (1,), transposed=True)

# A box whose keys take 64 bits.
WIDE_BOX = Grid((-3,) * 4, (300,) * 4, 2)

Case = Callable[[], object]


def _coords(n: int, ndim: int) -> Tensor:
    return torch.zeros(n, 1 + ndim, dtype=torch.int32)


def _box(ndim: int) -> Grid:
    return Grid((-3,) * ndim, (40,) * ndim, 2)


def _sorted_index(n: int) -> SiteIndex:
    keys = torch.zeros(n, dtype=torch.int64)
    return SiteIndex("sorted", keys, keys)


def _block_index(n: int) -> SiteIndex:
    return SiteIndex("pages", torch.zeros(n, dtype=torch.int64), torch.zeros(n, dtype=torch.int32))


def _bitmap_index(n: int) -> SiteIndex:
    return SiteIndex("bitmap", torch.zeros(n, dtype=torch.int64), None)


def _table(volume: int, n: int, ordered: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    return (
        torch.zeros(volume, n, dtype=torch.int32),
        torch.zeros(-(-volume // 32), n, dtype=torch.int32),
        torch.zeros(n, dtype=torch.int32) if ordered else None,
    )


def _real_rows() -> Tensor:
    """Return a number of real rows, as kernels read it from the device."""
    return torch.zeros((), dtype=torch.int64)


def _sites_case(
    geometry: ConvGeometry, box: Grid, flag: Tensor | None = None, capacity: int | None = None
) -> None:
    # The number of sites is read back as zero, because no kernel has written it here.
    sites.reached_sites(
        _coords(FEW, geometry.ndim),
        geometry.offsets,
        geometry.stride,
        not geometry.transposed,
        box,
        box,
        flag,
        capacity,
        None if capacity is None else torch.zeros((), dtype=torch.int32),
    )


def _lookup_case(
    geometry: ConvGeometry,
    index: SiteIndex,
    n: int,
    box: Grid | None = None,
    count: Tensor | None = None,
) -> None:
    neighbor_table.lookup_table(
        _coords(n, geometry.ndim), geometry.offsets, index, box or _box(geometry.ndim), count=count
    )


def _reach_case(
    geometry: ConvGeometry, index: SiteIndex, n: int, out_index: SiteIndex | None = None
) -> None:
    neighbor_table.reach_table(
        _coords(n, geometry.ndim),
        geometry.offsets,
        geometry.stride,
        not geometry.transposed,
        index,
        _box(geometry.ndim),
        _box(geometry.ndim),
        out_index,
    )


def _scatter_case(geometry: ConvGeometry, index: SiteIndex, n: int, box: Grid) -> None:
    scatter_table.scatter_table(
        _coords(n, geometry.ndim),
        geometry.offsets,
        geometry.stride,
        not geometry.transposed,
        index,
        box,
        box,
        n,
    )


def _norm(channels: int, dtype: torch.dtype, affine: bool = True) -> ChannelNorm:
    vector = torch.zeros(channels, dtype=dtype)
    return ChannelNorm(vector, vector, *(vector, vector) if affine else (None, None))


def _gather_gemm_case(
    n: int,
    c_in: int,
    c_out: int,
    dtype: torch.dtype,
    volume: int = 27,
    dgrad: bool = False,
    precision: str = "ieee",
    fused: bool = False,
    norm: ChannelNorm | None = None,
    one_row: bool = False,
    count: Tensor | None = None,
) -> None:
    rows, mask, order = _table(volume, n, ordered=n >= MANY or one_row)
    weight = torch.zeros(c_out, volume, c_in, dtype=dtype).permute(1, 2, 0)
    feats = torch.zeros(n, c_out if dgrad else c_in, dtype=dtype)
    gather_gemm.gather_gemm(
        feats,
        weight.transpose(1, 2) if dgrad else weight,
        None if dgrad else torch.zeros(c_out, dtype=dtype),
        rows[:1] if one_row else rows,
        mask,
        order,
        mirrored=dgrad and not one_row,
        precision=precision,
        norm=norm,
        residual=torch.zeros(n, c_out, dtype=dtype) if fused else None,
        relu=fused or norm is not None,
        count=count,
    )


def _weight_grad_case(
    c_in: int, c_out: int, dtype: torch.dtype, mirrored: bool, precision: str = "ieee"
) -> None:
    weight_grad.weight_grad(
        torch.zeros(FEW, c_in, dtype=dtype),
        torch.zeros(FEW, c_out, dtype=dtype),
        torch.zeros(2, FEW, dtype=torch.int32),
        torch.zeros(15 if mirrored else 28, dtype=torch.int64),
        torch.zeros(27, c_in, c_out),
        mirrored=mirrored,
        precision=precision,
    )


def _parts_cases(c_in: int, c_out: int, with_low: bool, norm: bool = False) -> None:
    feats, weight, grad = (
        half_parts.split_half(x, with_low=with_low)
        for x in (torch.zeros(MANY, c_in), torch.zeros(27, c_in, c_out), torch.zeros(MANY, c_out))
    )
    gather_gemm.gather_gemm(
        feats, weight, torch.zeros(c_out), *_table(27, MANY, ordered=True), mirrored=False,
        norm=_norm(c_out, torch.float32) if norm else None, relu=norm,
    )  # fmt: skip
    weight_grad.weight_grad(
        feats, grad,
        torch.zeros(2, MANY, dtype=torch.int32), torch.zeros(28, dtype=torch.int64),
        torch.zeros(27, c_in, c_out), mirrored=False,
    )  # fmt: skip


def _pool_case(
    mode: str,
    dtype: torch.dtype,
    ordered: bool,
    by_value: bool = False,
    count: Tensor | None = None,
) -> None:
    rows, _, order = _table(8, FEW, ordered)
    feats, out = torch.zeros(FEW, 20, dtype=dtype), torch.zeros(FEW, 20, dtype=dtype)
    pool.pool_fwd(feats, rows, order, mode, 0.0 if by_value else None, not by_value, count)
    saved = {
        "max": {"argmax": torch.zeros(FEW, 20, dtype=torch.int32)},
        "avg": {"present": torch.zeros(FEW, dtype=torch.int32)},
        "sum": {},
    }[mode]
    saved = {"feats": feats, "out": out} if by_value else saved
    pool.pool_bwd(out, rows, order, mode, count=count, **saved)


def _segment_case(mode: str, dtype: torch.dtype, n: int) -> None:
    ends = torch.tensor([40, n])
    segment_reduce.segment_reduce(
        torch.zeros(n, 17, dtype=dtype),
        torch.zeros(n, dtype=torch.int64),
        ends - torch.tensor([40, n - 40]),
        ends,
        mode,
        want_argmax=mode == "max",
    )


def _batch_norm_case(
    n: int,
    c: int,
    dtype: torch.dtype,
    affine: bool,
    relu: bool,
    added: bool = False,
    real: Tensor | None = None,
) -> None:
    feats, vector = torch.zeros(n, c, dtype=dtype), torch.zeros(c)
    factors = (vector, vector) if affine else (None, None)
    count = torch.zeros((), dtype=torch.int64) if affine else None
    other = torch.zeros_like(feats) if added else None
    batch_norm.batch_norm(feats, TrainingNorm(vector, vector, *factors, count), relu, other, real)
    batch_norm.batch_norm_grad(feats, feats, torch.zeros(2, c), *factors, relu, other, real)


def _bounded_invert_case() -> None:
    rows, _, order = _table(27, MANY, True)
    counts = {"count": _real_rows(), "other_count": _real_rows()}
    invert_table.invert_table(rows, order, MANY, DOWN.offsets, **counts)


def _bounded_order_case() -> None:
    rows, mask, _ = _table(27, FEW, False)
    order_columns.order_columns(rows, mask, CUBE.offsets, _real_rows())


def _gemm_cases() -> list[tuple[str, Case]]:
    half, bfloat, single, double = torch.float16, torch.bfloat16, torch.float32, torch.float64
    shapes = [
        ("few-odd", (FEW, 5, 33, half)),
        ("16", (MANY, 16, 16, half)),
        ("64", (MANY, 64, 64, bfloat)),
        ("128", (50_000, 128, 128, half)),
        ("256", (50_000, 256, 256, half)),
        ("few-256", (FEW, 256, 256, bfloat)),
        ("f32", (MANY, 64, 64, single)),
        ("f64", (FEW, 20, 40, double)),
        ("125-taps", (FEW, 4, 32, half, 125)),
        ("dgrad", (MANY, 64, 128, half, 27, True)),
        ("dgrad-f32", (MANY, 32, 64, single, 27, True)),
        ("tf32x3", (MANY, 64, 64, single, 27, False, "tf32x3")),
        ("tf32", (MANY, 64, 64, single, 27, False, "tf32")),
        ("fused", (MANY, 32, 32, half, 27, False, "ieee", True)),
        ("norm", (MANY, 64, 64, half, 27, False, "ieee", True, _norm(64, single))),
        ("norm-256", (50_000, 256, 256, bfloat, 27, False, "ieee", False, _norm(256, bfloat))),
        ("norm-f32", (MANY, 64, 64, single, 27, False, "ieee", False, _norm(64, single, False))),
        ("norm-f64", (FEW, 20, 40, double, 27, False, "ieee", True, _norm(40, double))),
        ("one-row", (MANY, 64, 64, half, 8, True, "ieee", False, None, True)),
        ("bounded", (MANY, 64, 64, half, 27, False, "ieee", True, None, False, _real_rows())),
        ("one-row-64-taps", (FEW, 16, 33, single, 64, False, "ieee", True, None, True)),
    ]
    return [(f"gather_gemm-{name}", partial(_gather_gemm_case, *args)) for name, args in shapes]


def _weight_grad_cases() -> list[tuple[str, Case]]:
    shapes = [
        ("64", (64, 64, torch.float16, True)),
        ("128", (128, 128, torch.float16, True)),
        ("256", (256, 256, torch.bfloat16, False)),
        ("odd-f32", (5, 33, torch.float32, True)),
        ("tf32x3", (64, 64, torch.float32, True, "tf32x3")),
        ("f64", (20, 40, torch.float64, False)),
    ]
    return [(f"weight_grad-{name}", partial(_weight_grad_case, *args)) for name, args in shapes]


LAUNCH_CASES: list[tuple[str, Case]] = [
    ("build_index", partial(sites.build_index, _coords(FEW, 3), _box(3))),
    ("build_index-4d-wide", partial(sites.build_index, _coords(FEW, 4), WIDE_BOX)),
    ("reached_sites-down", partial(_sites_case, DOWN, _box(3))),
    ("reached_sites-flag", partial(_sites_case, DOWN, _box(3), torch.tensor(1))),
    ("reached_sites-up-1d", partial(_sites_case, UP_1D, _box(1))),
    ("reached_sites-4d", partial(_sites_case, DOWN_4D, _box(4))),
    ("lookup-given", partial(_lookup_case, CUBE, _block_index(64), FEW)),
    ("lookup-given-ordered", partial(_lookup_case, CUBE, _block_index(64), MANY)),
    ("lookup-generated", partial(_lookup_case, CUBE, _bitmap_index(64), FEW)),
    ("lookup-generated-ordered", partial(_lookup_case, CUBE, _bitmap_index(64), MANY)),
    ("lookup-sorted-ordered", partial(_lookup_case, CUBE, _sorted_index(64), MANY)),
    ("lookup-sorted-wide", partial(_lookup_case, HYPER, _sorted_index(64), FEW, WIDE_BOX)),
    ("lookup-given-wide", partial(_lookup_case, HYPER, _block_index(64), FEW, WIDE_BOX)),
    ("reached_sites-bounded", partial(_sites_case, DOWN, _box(3), None, FEW)),
    ("lookup-bounded", partial(_lookup_case, CUBE, _block_index(64), FEW, None, _real_rows())),
    (
        "lookup-bounded-ordered",
        partial(_lookup_case, CUBE, _block_index(64), MANY, None, _real_rows()),
    ),
    ("lookup-125", partial(_lookup_case, WIDE, _block_index(64), FEW)),
    ("reach-down", partial(_reach_case, DOWN, _block_index(64), MANY)),
    (
        "reach-up-to-given",
        partial(_reach_case, UP_1D, _bitmap_index(64), FEW, _sorted_index(64)),
    ),
    ("scatter", partial(_scatter_case, HALVE, _bitmap_index(64), MANY, _box(3))),
    ("scatter-given-4d-wide", partial(_scatter_case, DOWN_4D, _block_index(64), FEW, WIDE_BOX)),
    ("scatter-sorted-1d", partial(_scatter_case, POINT_UP, _sorted_index(64), FEW, _box(1))),
    (
        "invert",
        lambda: invert_table.invert_table(*_table(27, MANY, True)[::2], MANY, DOWN.offsets),
    ),
    (
        "order_columns",
        lambda: order_columns.order_columns(*_table(27, FEW, False)[:2], CUBE.offsets),
    ),
    ("invert-bounded", _bounded_invert_case),
    ("order_columns-bounded", _bounded_order_case),
    ("pairs-bounded", lambda: pairs.pair_lists(*_table(27, MANY, True), 27, MANY, _real_rows())),
    ("pairs-few", lambda: pairs.pair_lists(*_table(27, FEW, False), 14, 14 * FEW)),
    ("pairs-many", lambda: pairs.pair_lists(*_table(27, MANY, True), 27, 27 * MANY)),
    ("pairs-125-taps", lambda: pairs.pair_lists(*_table(125, FEW, False), 63, 63 * FEW)),
    ("list-inputs-few", lambda: pairs.list_inputs(*_table(8, FEW, False), 4 * FEW)),
    ("list-inputs-many", lambda: pairs.list_inputs(*_table(8, MANY, True), 2 * MANY)),
    ("list-inputs-64-taps", lambda: pairs.list_inputs(*_table(64, FEW, False), 4 * FEW)),
    *_gemm_cases(),
    *_weight_grad_cases(),
    ("parts-2-64", partial(_parts_cases, 64, 64, True)),
    ("parts-2-odd", partial(_parts_cases, 33, 260, True)),
    ("parts-2-norm", partial(_parts_cases, 64, 128, True, True)),
    ("parts-1-128", partial(_parts_cases, 128, 128, False)),
    ("pool-max", partial(_pool_case, "max", torch.float16, True)),
    ("pool-max-ties", partial(_pool_case, "max", torch.float32, False, True)),
    ("pool-avg", partial(_pool_case, "avg", torch.bfloat16, True)),
    ("pool-max-bounded", partial(_pool_case, "max", torch.float16, True, False, _real_rows())),
    ("pool-sum", partial(_pool_case, "sum", torch.float64, False)),
    ("batch_norm-16", partial(_batch_norm_case, MANY, 16, torch.float16, True, True)),
    ("batch_norm-128", partial(_batch_norm_case, MANY, 128, torch.bfloat16, True, True)),
    ("batch_norm-odd-f32", partial(_batch_norm_case, FEW, 33, torch.float32, False, False)),
    ("batch_norm-added", partial(_batch_norm_case, MANY, 64, torch.float16, True, True, True)),
    (
        "batch_norm-bounded",
        partial(_batch_norm_case, MANY, 64, torch.float16, True, True, True, _real_rows()),
    ),
    ("segment-sum", partial(_segment_case, "sum", torch.float16, FEW)),
    ("segment-max", partial(_segment_case, "max", torch.float32, FEW)),
    ("segment-max-split", partial(_segment_case, "max", torch.bfloat16, 70_000)),
]
