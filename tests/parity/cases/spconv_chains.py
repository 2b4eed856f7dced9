"""Several layers of spconv together: inverse convolutions, pools, and layers of one key."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from tests.parity.case import FAILS, GRAD, Case, Quirk, Run
from tests.parity.cases.spconv_layers import windows
from tests.parity.cases.spconv_run import (
    AMP,
    CPU_AND_GPU,
    HALF,
    N_SITES,
    SHAPES,
    SINGLE,
    layer,
    native,
    record,
    run_module,
    shares,
    tensor,
)

Step = tuple[str, tuple[Any, ...], dict[str, Any]]  # kind, arguments, options

DOWN: Step = ("SparseConv", (3, 4, 3, 2, 1), {"indice_key": "down"})
UP: Step = ("SparseConvTranspose", (3, 4, 2, 2), {"indice_key": "down"})
POOL: Step = ("SparseMaxPool", (3, 2, 1), {"indice_key": "down"})
BETWEEN: tuple[Step, ...] = (
    ("SubMConv", (3, 3, 3), {"indice_key": "fine"}),
    DOWN,
    ("SubMConv", (4, 4, 3), {"indice_key": "coarse"}),
    ("SubMConv", (4, 4, 3), {"indice_key": "coarse"}),
    ("SparseInverseConv", (4, 5, 3, "down"), {}),
    ("SubMConv", (5, 2, 3), {"indice_key": "fine"}),
)
ON_A_CPU = Quirk("Whatever runs on a GPU runs on a CPU", FAILS, targets=("cpu",))

ALL_CHANNELS = Quirk(
    "`SparseGlobalAvgPool` returns all channels", ("out shape", "grad input"), targets=("cuda",)
)
KEPT_SITES = Quirk("Submanifold pools", ("out", "out shape", "grad input"), targets=("cpu",))
AVERAGE = Quirk("The gradient of an average pool", ("grad input",), targets=("cuda",))


def chain(
    run: Run, ndim: int, steps: tuple[Step, ...], n: int = N_SITES, kept: bool = False
) -> None:
    """Run layers one after the other."""
    made = [layer(run, kind, ndim, *args, **options) for kind, args, options in steps]
    module = run.module("pytorch").SparseSequential(*made)
    run_module(run, module, tensor(run, 3, SHAPES[ndim], n), kept=kept)


def _chain(name: str, ndim: int, *steps: Step, dtypes: Any = SINGLE, **options: Any) -> Case:
    judged = {key: options.pop(key) for key in ("quirks", "nudges") if key in options}
    return Case(name, partial(chain, ndim=ndim, steps=steps, **options), dtypes, **judged)


def _inverse() -> Iterator[Case]:
    for ndim in (1, 2, 3, 4):
        back: Step = ("SparseInverseConv", (4, 5, 3, "down"), {})
        dtypes = HALF if ndim == 3 else SINGLE
        yield _chain(f"inverse-{ndim}d", ndim, DOWN, back, kept=True, dtypes=dtypes)
    yield _chain("inverse-between-submanifold", 3, *BETWEEN, kept=True, dtypes=AMP, nudges=4)
    of_up: Step = ("SparseInverseConv", (4, 5, 2, "down"), {})
    yield _chain("inverse-of-transposed", 2, UP, of_up, n=25, kept=True)
    of_pool: Step = ("SparseInverseConv", (3, 5, 3, "down"), {})
    yield _chain("inverse-of-pool", 3, POOL, of_pool, kept=True)


POOL_GRID = {
    1: ([2, 3], [1, 2], [0, 1], [1, 2]),
    2: ([2, 3], [2, 3], [0, 1], [1]),
    3: ([2, 3], [1, 2], [0, 1], [1, 2]),
    4: ([2], [2], [0], [1]),
}


def ties(run: Run) -> None:
    """Pool few different values, to compare the gradients of equal inputs."""
    x = tensor(run, 4, SHAPES[3])
    feats = (run.integers("ties", 4, len(x.indices), 4) - 1).to(run.dtype).requires_grad_()
    x = x.replace_feature(feats)
    out = layer(run, "SparseMaxPool", 3, 3, 2, 1)(x)
    record(run, "out", out)
    run.backward(out.indices, out.features, input=feats)


def submanifold_pool(run: Run) -> None:
    """Max pooling that keeps the sites."""
    pool = run.module("pytorch.pool").SparseMaxPool(3, 3, 1, 1, subm=True, **native(run))
    run_module(run, pool, tensor(run, 4, SHAPES[3]), kept=True)


def global_pool(run: Run, kind: str) -> None:
    """Reduce each sample to a row."""
    x = tensor(run, 4, SHAPES[3])
    feats = x.features
    out = getattr(run.module("pytorch"), kind)()(x)
    run.tensor("out", out)
    out.backward(run.values("grad", *out.shape).to(out.dtype))
    run.tensor(f"{GRAD}input", feats.grad)


def _pools() -> Iterator[Case]:
    for ndim, choices in POOL_GRID.items():
        for k, s, p, d in windows(ndim, *choices):
            dtypes = HALF if (ndim, k, s, p, d) == (3, 3, 2, 1, 1) else SINGLE
            step: Step = ("SparseMaxPool", (k, s, p, d), {})
            yield _chain(f"maxpool-{ndim}d-k{k}-s{s}-p{p}-d{d}", ndim, step, dtypes=dtypes)
    for ndim in (1, 2, 3):
        step = ("SparseAvgPool", (2, 2), {})
        yield _chain(f"avgpool-{ndim}d-k2-s2", ndim, step, quirks=(ON_A_CPU, AVERAGE))
    yield Case("maxpool-ties", ties, SINGLE)
    yield Case("maxpool-submanifold", submanifold_pool, SINGLE, quirks=(KEPT_SITES,))
    for kind, quirks in {"Max": (ON_A_CPU,), "Avg": (ON_A_CPU, ALL_CHANNELS)}.items():
        function = partial(global_pool, kind=f"SparseGlobal{kind}Pool")
        yield Case(f"globalpool-{kind}", function, SINGLE, quirks=quirks)


def unread(run: Run) -> None:
    """A 1x1 layer neither reads nor writes its key, and passes the dict on."""
    library = run.module("pytorch")
    x = tensor(run, 3, SHAPES[3])
    first = run.fill(layer(run, "SubMConv", 3, 3, 3, 3, indice_key="shared"))
    point = run.fill(layer(run, "SubMConv", 3, 3, 4, 1, indice_key="shared"))
    other = run.fill(layer(run, "SubMConv", 3, 3, 4, 1, indice_key="other"))
    y = first(x)
    z = other(point(y).replace_feature(y.features))
    run.fact("keys", [sorted(t.indice_dict) for t in (x, y, z)])
    run.fact("same dict", z.indice_dict is y.indice_dict)
    run.fact("shares coordinates", shares(z, x))
    run.fact("found", [y.find_indice_pair(key) is None for key in ("shared", "other", None)])
    assert isinstance(y, library.SparseConvTensor)


def travelling(run: Run) -> None:
    """Keys travel downstream, and inputs keep their dict."""
    x = tensor(run, 3, SHAPES[3])
    steps = [layer(run, kind, 3, *args, **how) for kind, args, how in BETWEEN[:3]]
    keys = [sorted(x.indice_dict)]
    outs = [x]
    for step in steps:
        outs.append(run.fill(step)(outs[-1]))
        keys.append([sorted(t.indice_dict) for t in outs])
    run.fact("keys", keys)
    run.fact("spatial shapes", [list(map(int, t.spatial_shape)) for t in outs])
    back = run.fill(layer(run, *("SparseInverseConv", 3), 4, 5, 3, "down"))(outs[-1])
    run.fact("inverse shares coordinates", shares(back, outs[1]))
    record(run, "out", back, kept=True)


def carried(run: Run) -> None:
    """A tensor that a user makes with a dict keeps the keys, so an inverse layer works on it."""
    x = tensor(run, 3, SHAPES[3])
    down = run.fill(layer(run, "SparseConv", 3, 3, 4, 3, 2, 1, indice_key="down"))
    back = run.fill(layer(run, "SparseInverseConv", 3, 4, 2, 3, "down"))
    y = down(x)
    made = run.module("pytorch").SparseConvTensor(
        y.features, y.indices, y.spatial_shape, y.batch_size, indice_dict=y.indice_dict
    )
    record(run, "out", back(made), kept=True)


Refused = tuple[Step, ...]
SAME_KEY = {"indice_key": "key"}
REFUSED: dict[str, Refused] = {
    "submanifold-other-kernel": (
        ("SubMConv", (3, 3, 3), SAME_KEY),
        ("SubMConv", (3, 3, (1, 3, 3)), SAME_KEY),
    ),
    "submanifold-other-dilation": (
        ("SubMConv", (3, 3, 3), SAME_KEY),
        ("SubMConv", (3, 3, 3), SAME_KEY | {"dilation": 2}),
    ),
    "submanifold-of-strided": (
        ("SparseConv", (3, 3, 3, 1, 1), SAME_KEY),
        ("SubMConv", (3, 3, 3), SAME_KEY),
    ),
    "strided-twice": (
        ("SparseConv", (3, 3, 3, 2, 1), SAME_KEY),
        ("SparseConv", (3, 3, 3, 2, 1), SAME_KEY),
    ),
    "pool-twice": (("SparseMaxPool", (2, 2), SAME_KEY), ("SparseMaxPool", (2, 2), SAME_KEY)),
    "inverse-without-key": (("SparseInverseConv", (3, 4, 3, "absent"), {}),),
    "inverse-of-submanifold": (
        ("SubMConv", (3, 3, 3), SAME_KEY),
        ("SparseInverseConv", (3, 4, 3, "key"), {}),
    ),
    "inverse-other-kernel": (
        ("SparseConv", (3, 3, 3, 2, 1), SAME_KEY),
        ("SparseInverseConv", (3, 4, 2, "key"), {}),
    ),
    "inverse-at-other-sites": (
        ("SparseConv", (3, 3, 2, 2), SAME_KEY),
        ("SparseConv", (3, 3, 2, 2), {}),
        ("SparseInverseConv", (3, 4, 2, "key"), {}),
    ),
    "even-submanifold": (("SubMConv", (3, 4, 2), {}),),
    "extent-below-one": (("SparseConv", (3, 4, 11), {}),),
    "padded-1x1": (("SparseConv", (3, 4, 1), {"padding": 1}),),
    "groups": (("SubMConv", (3, 4, 3), {"groups": 2}),),
    "kernel-size-of-two": (("SubMConv", (3, 4, [3, 3]), {}),),
    "wrong-channels": (("SubMConv", (5, 4, 3), {}),),
}


def refused(run: Run, steps: Refused) -> None:
    """Raise when layers are built or called."""
    chain(run, 3, steps)


def vanished(run: Run) -> None:
    """Raise when no window of a strided layer holds a site."""
    coords = torch.tensor([[0, 8, 7, 9]], dtype=torch.int32, device=run.device)
    layer(run, "SparseConv", 3, 4, 5, 2, 8).to(run.device, run.dtype)(
        tensor(run, 4, SHAPES[3], coords=coords)
    )


def _keys() -> Iterator[Case]:
    yield Case("keys-travel", travelling, SINGLE)
    yield Case("keys-of-1x1", unread, SINGLE)
    empty = Quirk("No output for a non-empty input", ("adapter error",), targets=("cpu",))
    yield Case("refused-vanished-points", vanished, CPU_AND_GPU, refuses=True, quirks=(empty,))
    yield Case("keys-carried-by-hand", carried, SINGLE)
    for name, steps in REFUSED.items():
        yield Case(f"refused-{name}", partial(refused, steps=steps), CPU_AND_GPU, refuses=True)


CASES = [*_inverse(), *_pools(), *_keys()]
