"""SparseConvTensor, containers, tables and feature layers of spconv."""

from __future__ import annotations

from collections import OrderedDict
from functools import partial
from typing import Any

import torch
from torch import nn

from tests.parity.case import FAILS, GRAD, Case, Quirk, Run
from tests.parity.cases.spconv_chains import ON_A_CPU
from tests.parity.cases.spconv_run import SHAPES, SINGLE, layer, record, run_module, shares, tensor

SHAPE = SHAPES[3]


def dense(run: Run, channels_first: bool) -> None:
    """Scatter into a grid, and send a gradient back."""
    x = tensor(run, 4, SHAPE)
    out = x.dense(channels_first)
    run.tensor("out", out)
    run.fact("contiguous", out.is_contiguous())
    out.backward(run.values("grad", *out.shape))
    run.tensor(f"{GRAD}input", x.features.grad)


def from_dense(run: Run) -> None:
    """Gather from a grid, channels last; a site is where any channel is not zero."""
    values = run.values("values", 2, *SHAPE, 3)
    empty = run.integers("empty", 3, 2, *SHAPE, 1) > 0
    out = run.module("pytorch").SparseConvTensor.from_dense(values.masked_fill(empty, 0))
    record(run, "out", out, kept=True)
    run.fact("batch size", int(out.batch_size))


def arithmetic(run: Run) -> None:
    """Tensors add by row, and with plain tensors."""
    x = tensor(run, 4, SHAPE)
    y = run.fill(layer(run, "SubMConv", 3, 4, 4, 3, indice_key="key"))(x)
    for name, out in {
        "sum": x + y,
        "minus": y.minus(),
        "tensor": y + run.values("row", 1, 4),
        "replaced": y.replace_feature(y.features[:, :2]),
        "copy": y.shadow_copy(),
    }.items():
        record(run, name, out, kept=True)
        run.fact(f"{name} keys", sorted(out.indice_dict))
        run.fact(f"{name} shares coordinates", shares(out, x))
    run.fact("size", [int(x.spatial_size), x.is_quantized, x.batch_size])
    run.fact("shared dict", y.replace_feature(y.features).indice_dict is y.indice_dict)


def fields(run: Run) -> None:
    """The fields that downstream code copies one by one, and their defaults."""
    x = tensor(run, 4, SHAPE)
    run.fact("grid", list(x.grid.shape) if x.grid is not None else None)
    names = "benchmark voxel_num thrust_allocator int8_scale indice_dict benchmark_record"
    run.fact("fields", {name: repr(getattr(x, name)) for name in names.split()})
    run.fact("force_algo", str(x.force_algo))
    x._features = run.values("any", len(x.indices), 2, 3)
    run.fact("any rank", list(x.features.shape))
    x.indices = x.indices[:3]
    run.fact("assigned", list(x.indices.shape))


def read_only(run: Run) -> None:
    """``features`` has no setter."""
    tensor(run, 4, SHAPE).features = torch.zeros(1, 4)


def scalar(run: Run) -> None:
    """Python numbers do not add."""
    _ = tensor(run, 4, SHAPE) + 1


def in_place(run: Run) -> None:
    """``+=``."""
    x = tensor(run, 4, SHAPE)
    x = x.replace_feature(x.features.detach())
    x += x
    record(run, "out", x, kept=True)


def selected(run: Run) -> None:
    """Rows by a mask."""
    x = tensor(run, 4, SHAPE)
    record(run, "out", x.select_by_index(x.indices[:, 0] == 0), kept=True)


def sequential(run: Run) -> None:
    """Containers: dense children, names, ``add``, the order of states.

    Layers before batch norms have no bias, because its gradient would be rounding error alone.
    """
    library = run.module("pytorch")
    module = library.SparseSequential(
        OrderedDict(
            first=layer(run, "SubMConv", 3, 4, 8, 3, bias=False, indice_key="key"),
            norm=nn.BatchNorm1d(8),
            act=nn.ReLU(),
            drop=nn.Dropout(0.0),
            inner=library.SparseSequential(
                layer(run, "SubMConv", 3, 8, 8, 3, bias=False, indice_key="key"),
                library.SparseBatchNorm(8),
                library.SparseReLU(),
                library.SparseIdentity(),
            ),
        )
    )
    module.add(nn.Linear(8, 6))
    module.add(library.Identity(), name="last")
    run.fact("names", list(module.state_dict()))
    run.fact("length", [len(module), type(module[-1]).__name__, type(module[0]).__name__])
    run_module(run, module, tensor(run, 4, SHAPE), kept=True)


def continued(run: Run) -> None:
    """After ``ToDense`` a container goes on with plain tensors."""
    library = run.module("pytorch")
    module = library.SparseSequential(
        layer(run, "SparseConv", 3, 4, 8, 3, 2, 1), library.ToDense(), nn.Conv3d(8, 3, 1)
    )
    x = tensor(run, 4, SHAPE)
    out = run.fill(module)(x)
    run.tensor("out", out)
    out.backward(run.values("grad", *out.shape))
    run.tensor(f"{GRAD}input", x.features.grad)
    for name, parameter in module.named_parameters():
        run.tensor(GRAD + name, parameter.grad)


def tables(run: Run) -> None:
    """Add branches, join them, and add a part of them."""
    library = run.module("pytorch")
    fork = library.ConcatTable()
    for number in range(2):
        fork.add(layer(run, "SubMConv", 3, 4, 4, 3, indice_key=f"key{number}"))
    branches = run.fill(fork)(tensor(run, 4, SHAPE))
    for name in ("AddTable", "JoinTable"):
        out = getattr(library, name)()(branches)
        record(run, name, out, kept=True)
        run.fact(f"{name} keys", sorted(out.indice_dict))


def united(run: Run, name: str) -> None:
    """Add tensors of different sites."""
    library = run.module("pytorch")
    tensors = []
    for number in range(3):
        coords = run.sites(SHAPE, 30, name=str(number))
        feats = run.values(f"feats {number}", 30, 4).requires_grad_()
        tensors.append(library.SparseConvTensor(feats, coords, SHAPE, 2))
    out = getattr(library.functional, name)(*tensors)
    record(run, "out", out)
    run.fact("keys", sorted(out.indice_dict))
    run.backward(
        out.indices, out.features, **{f"input{i}": t.features for i, t in enumerate(tensors)}
    )


def repeated(run: Run) -> None:
    """If rows share a site, ``dense`` keeps the last."""
    coords = run.sites(SHAPE, 20)
    coords = torch.cat([coords, coords[:5]])
    x = tensor(run, 4, SHAPE, coords=coords)
    run.tensor("out", x.dense())


def repeated_rows(run: Run, kind: str, args: tuple[Any, ...]) -> None:
    """Convolve or pool where rows share a site."""
    coords = run.sites((3, 3, 3), 20)
    coords = torch.cat([coords, coords[:5]])
    run_module(run, layer(run, kind, 3, *args), tensor(run, 4, (3, 3, 3), coords=coords))


def repeated_back(run: Run) -> None:
    """Go down and up again, with submanifold layers of one key, where rows share a site."""
    coords = run.sites((5, 5, 5), 40)
    coords = torch.cat([coords, coords[:15], coords[:5]])
    subm = partial(layer, run, "SubMConv", 3, indice_key="s")
    module = run.module("pytorch").SparseSequential(
        subm(4, 4, 3), layer(run, "SparseConv", 3, 4, 4, 3, 2, 1, indice_key="d"),
        layer(run, "SparseInverseConv", 3, 4, 4, 3, indice_key="d"), subm(4, 5, 3),
    )  # fmt: skip
    run_module(run, module, tensor(run, 4, (5, 5, 5), coords=coords))


def outside(run: Run) -> None:
    """Convolve where rows lie outside the grid."""
    coords = run.sites((9, 8, 10), 40)
    x = tensor(run, 4, (9, 8, 6), coords=coords)
    run_module(run, layer(run, "SparseConv", 3, 4, 5, 3, 1, 1), x)


def dropped(run: Run) -> None:
    """A strided layer drops points whose batch index is out of range."""
    coords = run.sites(SHAPE, 40, batch_size=4)
    x = tensor(run, 4, SHAPE, coords=coords)
    out = run.fill(layer(run, "SparseConv", 3, 4, 5, 3, 2, 1))(x)
    record(run, "out", out)


def empty(run: Run) -> None:
    """No sites at all."""
    x = tensor(run, 4, SHAPE, coords=run.sites(SHAPE, 0))
    out = run.fill(layer(run, "SparseConv", 3, 4, 5, 3, 2, 1))(x)
    record(run, "out", out)


def one_site(run: Run) -> None:
    """A single site, in the second sample."""
    coords = torch.tensor([[1, 4, 3, 9]], dtype=torch.int32, device=run.device)
    module = run.module("pytorch").SparseSequential(
        layer(run, "SubMConv", 3, 4, 4, 3), layer(run, "SparseConv", 3, 4, 5, 3, 2, 1)
    )
    run_module(run, module, tensor(run, 4, SHAPE, coords=coords))


def without_grid(run: Run) -> None:
    """``RemoveGrid`` and the attributes it leaves."""
    out = run.module("pytorch").RemoveGrid()(tensor(run, 4, SHAPE))
    run.fact("grid", out.grid)


IN_PLACE = Quirk("`+=` returns the sum", FAILS)
SELECTED = Quirk("`select_by_index` returns a new tensor", FAILS)
EMPTY = Quirk("Empty input gives empty output", FAILS)
SUMS = ("out", "grad input", "grad weight")
REPEATED = Quirk("Pools read the first row of a repeated site", SUMS)
OUTSIDE = Quirk("Rows outside `spatial_shape` take no part", (*SUMS, "out shape", "grad bias"))
# On a GPU, any of the repeated rows may win.
CPU_ONLY = {"cpu": ("float64", "float32")}

CASES = [
    Case("dense", partial(dense, channels_first=True), SINGLE),
    Case("dense-channels-last", partial(dense, channels_first=False), SINGLE),
    Case("dense-repeated-sites", repeated, CPU_ONLY),
    Case("from-dense", from_dense, SINGLE),
    Case("arithmetic", arithmetic, SINGLE),
    Case("fields", fields, SINGLE),
    Case("refused-features-setter", read_only, SINGLE, refuses=True),
    Case("refused-scalar", scalar, SINGLE, refuses=True),
    Case("in-place-sum", in_place, SINGLE, quirks=(IN_PLACE,)),
    Case("select-by-index", selected, SINGLE, quirks=(SELECTED,)),
    Case("sequential", sequential, SINGLE, nudges=2),
    Case("sequential-to-dense", continued, SINGLE),
    Case("tables", tables, SINGLE),
    Case("sparse-add", partial(united, name="sparse_add"), SINGLE),
    Case("sparse-add-hash-based", partial(united, name="sparse_add_hash_based"), SINGLE,
         quirks=(ON_A_CPU,)),
    *(
        Case(f"repeated-sites-{name}", partial(repeated_rows, kind=kind, args=args), CPU_ONLY,
             quirks=quirks)
        for name, kind, args, quirks in (
            ("SubMConv", "SubMConv", (4, 5, 3), ()),
            ("SubMConv-k5", "SubMConv", (4, 5, 5), ()),
            ("SparseConv", "SparseConv", (4, 5, 2, 1), ()),
            ("SparseConv-s2", "SparseConv", (4, 5, 3, 2, 1), ()),
            ("SparseConvTranspose", "SparseConvTranspose", (4, 5, 3, 2), ()),
            ("SparseMaxPool", "SparseMaxPool", (2, 1), (REPEATED,)),
        )
    ),
    Case("repeated-sites-there-and-back", repeated_back, CPU_ONLY),
    Case("rows-outside-the-grid", outside, CPU_ONLY, quirks=(OUTSIDE,)),
    Case("batch-out-of-range", dropped, SINGLE),
    Case("empty-input", empty, SINGLE, quirks=(EMPTY,)),
    Case("one-site", one_site, SINGLE),
    Case("remove-grid", without_grid, SINGLE),
]  # fmt: skip
