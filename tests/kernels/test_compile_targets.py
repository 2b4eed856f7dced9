"""Every kernel compiles for every supported GPU, on a machine without a GPU.

To cover a new kernel, add a case to ``launch_cases.LAUNCH_CASES``: a function that calls its
launcher with small CPU tensors. The test records each launch and compiles it; no kernel runs.
"""

import dataclasses
import importlib
import pkgutil
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")
tl = pytest.importorskip("triton.language", reason="Triton is not installed")

from tests.kernels._record import (  # noqa: E402
    Launch,
    compile_for,
    record_launches,
    resources,
)
from tests.kernels._targets import IN_CI, KNOWN_SPILLS, MAY_SPILL, TARGETS, card  # noqa: E402
from tests.kernels.launch_cases import LAUNCH_CASES  # noqa: E402
from tritonspconv.kernels.triton import configs, gather_gemm, weight_grad  # noqa: E402

pytestmark = pytest.mark.compile


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))


@pytest.mark.parametrize("target", IN_CI)
@pytest.mark.parametrize(
    ("name", "case"), [pytest.param(name, case, id=name) for name, case in LAUNCH_CASES]
)
def test_compiles(
    name: str, case: Callable[[], object], target: str, monkeypatch: pytest.MonkeyPatch
):
    for module in (gather_gemm, weight_grad):
        monkeypatch.setattr(module, "card_of", lambda device: card(target))
    with record_launches() as launches:
        case()
    assert launches, "the case launched no kernel"
    for launch in launches:
        check_compiles(launch, target, KNOWN_SPILLS.get((name, target), 0))


@pytest.mark.parametrize("kilobytes", [99, 163, 227])
@pytest.mark.parametrize("channels", ["64", "128", "256", "few-256"])
@pytest.mark.parametrize("op", ["gather_gemm", "weight_grad"])
def test_rows_are_gathered_ahead(
    op: str, channels: str, kilobytes: int, monkeypatch: pytest.MonkeyPatch
):
    """Products do not wait for the rows of their own step, for any size of shared memory."""
    case = dict(LAUNCH_CASES).get(f"{op}-{channels}")
    if case is None:
        pytest.skip("weight gradients do not depend on the number of rows")
    for module in (gather_gemm, weight_grad):
        monkeypatch.setattr(module, "card_of", lambda device: configs.Card(False, kilobytes * 1024))
    with record_launches() as launches:
        case()
    for launch in launches:
        if launch.name in ("gather_gemm_kernel", "weight_grad_kernel"):
            target = TARGETS["sm_90" if kilobytes == 227 else "sm_80"][0]
            compiled = compile_for(launch, target)
            waits = re.findall(r"cp\.async\.wait_group\s+(\d+)", compiled.asm["ptx"])
            assert max(map(int, waits)) >= 2, f"{launch} gathers and waits"
            assert resources(compiled).shared_bytes <= kilobytes * 1024


def test_every_kernel_has_a_case():
    with record_launches() as launches:
        for _, case in LAUNCH_CASES:
            case()
    recorded = {(launch.kernel.__module__, launch.name) for launch in launches}
    kernels = kernels_of("tritonspconv.kernels.triton")
    assert kernels, "no kernel found: has the package moved?"
    missing = sorted(f"{module}.{name}" for module, name in kernels - recorded)
    assert not missing, f"kernels that no case in LAUNCH_CASES launches: {missing}"


def test_debug_mode_does_not_check_sums():
    """Kernels count bits with intended overflow, and the checks of overflow cost compile time."""
    with record_launches() as launches:
        dict(LAUNCH_CASES)["reached_sites-up-1d"]()
    launch = next(launch for launch in launches if launch.name == "rank_kernel")
    debugged = dataclasses.replace(launch, kwargs={**launch.kwargs, "debug": True})
    assert "overflow" not in compile_for(debugged, TARGETS["sm_90"][0]).asm["ttir"]


def kernels_of(package_name: str) -> set[tuple[str, str]]:
    """Return ``(module, name)`` of all jitted functions whose name ends in ``_kernel``."""
    package = importlib.import_module(package_name)
    found = set()
    for info in pkgutil.walk_packages(package.__path__, f"{package_name}."):
        for value in vars(importlib.import_module(info.name)).values():
            kernel = value
            while isinstance(kernel, triton.runtime.KernelInterface) and hasattr(kernel, "fn"):
                if isinstance(kernel, triton.JITFunction):
                    break
                kernel = kernel.fn  # autotuner, heuristics
            if isinstance(kernel, triton.JITFunction) and kernel.__name__.endswith("_kernel"):
                found.add((kernel.__module__, kernel.__name__))
    return found


def check_compiles(launch: Launch, target: str, known_spill: int = 0) -> None:
    gpu, kilobytes, _ = TARGETS[target]
    compiled = compile_for(launch, gpu)
    assert compiled.asm["cubin" if gpu.backend == "cuda" else "hsaco"]
    used = resources(compiled)
    assert used.shared_bytes <= kilobytes * 1024, f"{launch} does not fit {target}: {used}"
    if (target, launch.name) not in MAY_SPILL:
        assert used.spill <= known_spill, f"{launch} spills on {target}: {used}"


# Tests of the recorder use a kernel like the real ones: gather, dot, tails, flags.


@triton.jit
def toy_kernel(
    feats_ptr,
    weight_ptr,
    bias_ptr,
    rows_ptr,
    out_ptr,
    n_out,
    c_in,
    c_out,
    stride_feats_n,
    stride_feats_c,
    scale,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    mask_m = offs_m < n_out
    mask_n = offs_n < c_out
    rows = tl.load(rows_ptr + offs_m, mask=mask_m, other=-1).to(tl.int64)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, c_in, BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K)
        mask_k = offs_k < c_in
        feats = tl.load(
            feats_ptr + rows[:, None] * stride_feats_n + offs_k[None, :] * stride_feats_c,
            mask=(rows >= 0)[:, None] & mask_k[None, :],
            other=0.0,
        )
        weight = tl.load(
            weight_ptr + offs_k[:, None] * c_out + offs_n[None, :],
            mask=mask_k[:, None] & mask_n[None, :],
            other=0.0,
        )
        acc = tl.dot(feats, weight, acc, input_precision="ieee")
    acc *= scale
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0)[None, :]
    tl.store(
        out_ptr + offs_m[:, None] * c_out + offs_n[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=mask_m[:, None] & mask_n[None, :],
    )


tuned_toy_kernel = triton.autotune(
    [triton.Config({"BLOCK_M": m, "BLOCK_K": 32}, num_warps=4) for m in (32, 64)], key=["c_in"]
)(toy_kernel)


def launch_toy(kernel=toy_kernel, n=50, c=48, dtype=torch.float16, bias=False, **config):
    feats = torch.zeros(n, c, dtype=dtype)
    rows = torch.arange(n, dtype=torch.int32)
    kernel[lambda meta: (triton.cdiv(n, meta["BLOCK_M"]),)](
        feats,
        torch.zeros(c, c, dtype=dtype),
        torch.zeros(c, dtype=dtype) if bias else None,
        rows,
        torch.zeros_like(feats),
        n,
        c,
        c,
        *feats.stride(),
        0.5,
        HAS_BIAS=bias,
        BLOCK_N=64,
        **config,
    )


# Triton 3.9 warns that the default of `enable_fp_fusion` will change, so launches set it.
FIXED = {
    "BLOCK_M": 32,
    "BLOCK_K": 16,
    "num_warps": 2,
    "num_stages": 3,
    "enable_fp_fusion": True,
}


def test_record_holds_types_constants_and_options():
    with record_launches() as launches:
        launch_toy(**FIXED)
    (launch,) = launches
    assert (launch.name, launch.grid) == ("toy_kernel", (2,))
    assert launch.kwargs["num_warps"] == 2
    types = launch.signature
    assert types["feats_ptr"] == "*fp16"
    assert types["rows_ptr"] == "*i32"
    assert types["n_out"] == "i32"
    assert types["scale"] == "fp32"
    assert launch.constexprs["BLOCK_M"] == 32
    assert launch.constexprs["bias_ptr"] is None
    assert launch.constexprs["stride_feats_c"] == 1


def test_record_drops_launches_that_share_a_binary():
    with record_launches() as launches:
        for n in (50, 51, 63, 50):
            launch_toy(n=n, **FIXED)
        assert len(launches) == 1
        launch_toy(n=64, **FIXED)  # Triton compiles multiples of 16 apart
        launch_toy(bias=True, **FIXED)
        launch_toy(**{**FIXED, "num_warps": 4})
    assert len(launches) == 4


@pytest.mark.parametrize(("configs", "blocks"), [(1, [32]), (None, [32, 64])])
def test_record_autotuned_kernel(configs: int | None, blocks: list[int]):
    with record_launches(configs) as launches:
        launch_toy(tuned_toy_kernel, enable_fp_fusion=True)
    assert [launch.constexprs["BLOCK_M"] for launch in launches] == blocks


def test_kernels_of_a_package_that_has_none():
    assert kernels_of("json") == set()


@pytest.mark.parametrize("target", IN_CI)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_toy_kernel_compiles(dtype: torch.dtype, target: str):
    with record_launches() as launches:
        launch_toy(dtype=dtype, bias=True, **FIXED)
    check_compiles(launches[0], target)


@pytest.mark.parametrize(("target", "block_m"), [("sm_90", 128), ("gfx942", 256)])
def test_spills_are_seen(target: str, block_m: int):
    """One warp cannot hold such an accumulator in registers."""
    with record_launches() as launches:
        launch_toy(dtype=torch.float32, **{**FIXED, "BLOCK_M": block_m, "num_warps": 1})
    assert resources(compile_for(launches[0], TARGETS[target][0])).spill > 0


def test_pipelined_copies_are_compiled():
    """The compiler knows the alignment: loads become asynchronous copies of 16 bytes."""
    with record_launches() as launches:
        launch_toy(n=64, c=64, **FIXED)
    ptx = compile_for(launches[0], TARGETS["sm_80"][0]).asm["ptx"]
    assert "cp.async.cg.shared.global" in ptx
