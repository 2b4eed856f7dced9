"""dtypes, algorithms, autocast and evaluation mode of spconv."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from tests.parity.case import FAILS, Case, Quirk, Run, assigned
from tests.parity.cases.spconv_chains import ON_A_CPU
from tests.parity.cases.spconv_run import (
    CUDA_ONLY,
    SHAPES,
    SINGLE,
    layer,
    record,
    run_module,
    tensor,
)

SHAPE = SHAPES[3]
LAYERS: dict[str, tuple[str, tuple[Any, ...]]] = {
    "subm": ("SubMConv", (8, 16, 3)),
    "conv": ("SparseConv", (8, 16, 3, 2, 1)),
    "pointwise": ("SubMConv", (8, 16, 1)),
}


def algorithm(run: Run, name: str, algo: str) -> None:
    """Train with an algorithm named by the caller."""
    kind, args = LAYERS[name]
    chosen = getattr(run.module("pytorch").ConvAlgo, algo)
    run_module(run, layer(run, kind, 3, *args, algo=chosen), tensor(run, 8, SHAPE))


def plain(run: Run, name: str, **options: Any) -> None:
    """Train in the run's dtype."""
    kind, args = LAYERS[name]
    run_module(run, layer(run, kind, 3, *args, **options), tensor(run, 8, SHAPE))


def evaluated(run: Run, name: str, bias: bool) -> None:
    """Forward in evaluation mode, under autocast if the run has it."""
    kind, args = LAYERS[name]
    module = run.fill(layer(run, kind, 3, *args, bias=bias)).eval()
    with run.autocast():
        out = module(tensor(run, 8, SHAPE))
    record(run, "out", out)
    run.fact("requires grad", out.features.requires_grad)


def tensor_floats(run: Run, name: str) -> None:
    """Train with TF32 products, which are exact for inputs of eleven bits."""
    with assigned(run.module("constants"), SPCONV_ALLOW_TF32=True):
        kind, _ = LAYERS[name]
        geometry = (3,) if kind == "SubMConv" else (3, 2, 1)
        run_module(run, layer(run, kind, 3, 32, 32, *geometry), tensor(run, 32, SHAPE))


def mixed(run: Run) -> None:
    """Run a float32 layer on float16 features without autocast."""
    x = tensor(run, 8, SHAPE)
    module = run.fill(layer(run, "SubMConv", 3, 8, 16, 3))
    record(run, "out", module(x.replace_feature(x.features.half())))


def counted(run: Run) -> None:
    """``record_voxel_count`` keeps the most output sites seen in training."""
    module = run.fill(layer(run, "SparseConv", 3, 4, 5, 3, 2, 1, record_voxel_count=True))
    for n in (20, 50, 30):
        x = tensor(run, 4, SHAPE, coords=run.sites(SHAPE, n, name=str(n)))
        module(x)
    run.tensor("count", module.get_max_num_voxels())
    run.fact("state", sorted(module.state_dict()))


def far(run: Run) -> None:
    """A grid of more than 2^31 cells."""
    shape = [2100, 1900, 2000]
    near = run.sites((30, 30, 30), 60)
    corner = torch.tensor([0, *(n - 30 for n in shape)], dtype=torch.int32, device=run.device)
    x = tensor(run, 4, shape, coords=torch.cat([near[:30], near[30:] + corner]))
    module = run.module("pytorch").SparseSequential(
        layer(run, "SubMConv", 3, 4, 4, 3), layer(run, "SparseConv", 3, 4, 5, 3, 2, 1)
    )
    run_module(run, module, x)


EVAL = Quirk("Gradients flow in eval mode", ("requires grad",), targets=("cuda",))
AUTOCAST = Quirk("Autocast casts to its own dtype", ("out dtype",), targets=("cuda",))
BFLOAT16 = Quirk("bfloat16 features and weights", FAILS)
FLOAT64 = Quirk("float64 works on every device", FAILS)
MIXED = Quirk("Without autocast, features of another dtype", (*FAILS, "out", "out dtype"))

CASES = [
    *(
        Case(
            f"algo-{algo}-{name}",
            partial(algorithm, name=name, algo=algo),
            {"cuda": ("float32", "float16")},
        )
        for algo in ("Native", "MaskImplicitGemm", "MaskSplitImplicitGemm")
        for name in ("subm", "conv")
    ),
    *(
        Case(
            f"dtype-{name}", partial(plain, name=name), {"cpu": ("float16",), "cuda": ("float16",)}
        )
        for name in LAYERS
    ),
    *(
        Case(
            f"float64-{name}", partial(algorithm, name=name, algo="Native"),
            {"cuda": ("float64",)}, quirks=(FLOAT64,),
        )
        for name in ("subm", "conv")
    ),
    *(
        Case(
            f"bfloat16-{name}", partial(plain, name=name), {"cuda": ("bfloat16",)},
            quirks=(BFLOAT16,),
        )
        for name in ("subm", "conv")
    ),
    *(
        Case(
            f"eval-{name}-{'bias' if bias else 'no-bias'}",
            partial(evaluated, name=name, bias=bias),
            {"cpu": ("float64", "float32"), "cuda": ("float32", "float16", "amp-float16")},
            quirks=(EVAL, AUTOCAST, ON_A_CPU),
        )
        for name in LAYERS
        for bias in (True, False)
    ),
    *(
        Case(
            f"autocast-bfloat16-{name}", partial(plain, name=name), {"cuda": ("amp-bfloat16",)},
            quirks=(AUTOCAST,),
        )
        for name in LAYERS
    ),
    Case("fp32-accum", partial(plain, name="subm", fp32_accum=True), {"cuda": ("float16",)}),
    Case(
        "large-kernel-fast-algo",
        partial(plain, name="subm", large_kernel_fast_algo=True),
        CUDA_ONLY,
    ),
    Case("mixed-dtypes", mixed, {"cpu": ("float32",), "cuda": ("float32",)}, quirks=(MIXED,)),
    Case("record-voxel-count", counted, SINGLE),
    Case("far-corners", far, SINGLE),
    # This case comes last, because spconv keeps its choice of TF32 kernels for later layers.
    *(
        Case(f"tf32-{name}", partial(tensor_floats, name=name), CUDA_ONLY)
        for name in ("subm", "conv")
    ),
]  # fmt: skip
