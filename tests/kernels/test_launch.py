"""Launches: which arguments compile a new kernel, and which must not."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from tritonspconv.coords import Grid
from tritonspconv.geometry import ConvGeometry
from tritonspconv.kernel_map import kernel_map
from tritonspconv.kernels.triton import _launch, _versions, gather_gemm, neighbor_table, sites
from tritonspconv.ops import sparse_conv
from tritonspconv.testing import random_sites

pytestmark = pytest.mark.gpu


def run_conv(n: int, weight: torch.Tensor, feats: torch.Tensor | None = None) -> torch.Tensor:
    """Return a table of one tap that pairs every row with itself."""
    rows = torch.arange(n, dtype=torch.int32, device="cuda")[None]
    mask = torch.ones(1, n, dtype=torch.int32, device="cuda")
    if feats is None:
        feats = torch.ones(n, weight.shape[1], dtype=weight.dtype, device="cuda")
    return gather_gemm.gather_gemm(feats, weight, None, rows, mask, None, mirrored=False)


def test_many_row_counts_compile_few_kernels():
    weight = torch.randn(1, 32, 32, device="cuda", dtype=torch.float16)
    counts = [1, 2, 15, 16, 17, *range(100, 5000, 111)]
    assert len(counts) >= 50
    before = len(_launch.compiled_kernels())
    for n in counts:
        run_conv(n, weight)
    assert len(_launch.compiled_kernels()) - before <= 1


def test_many_grids_compile_few_map_kernels():
    offsets = ((0, 0, -1), (0, 0, 0), (0, 0, 1))
    compiled = []
    for n in range(1, 51):
        coords = torch.randint(0, n, (n, 4), dtype=torch.int32, device="cuda")
        shape = (n, n + 1, 3 * n)
        grid = Grid((0, 0, 0), shape, n)
        index = sites.build_index(coords, grid)
        neighbor_table.lookup_table(coords, offsets, index, grid)
        compiled.append(len(_launch.compiled_kernels()))
    # All grids use the kernels of the first, and Triton has compiled no others.
    assert compiled[-1] == compiled[0]
    if _versions.hands_values:
        current = torch.cuda.current_device()
        assert len(neighbor_table.lookup_kernel.device_caches[current][0]) == sum(
            kernel is neighbor_table.lookup_kernel for kernel in _launch.compiled_kernels()
        )


def test_tensors_of_any_alignment(triton_device):
    """A view that starts 2 bytes into its storage must not meet a kernel for aligned ones."""
    flat = torch.randn(1 + 32 * 32, device=triton_device, dtype=torch.float16)
    feats = torch.randn(1 + 64 * 32, device=triton_device, dtype=torch.float16)
    for w_start in (0, 1):
        for f_start in (0, 1):
            weight = flat[w_start : w_start + 1024].view(1, 32, 32)
            x = feats[f_start : f_start + 2048].view(64, 32)
            expected = x.float() @ weight[0].float()
            torch.testing.assert_close(
                run_conv(64, weight, x).float(), expected, rtol=2e-3, atol=2e-3
            )


def test_a_watcher_sees_the_launches_of_a_backward_pass():
    sites = random_sites(100, extent=9, device="cuda")
    found = kernel_map(sites, ConvGeometry.submanifold((3,) * 3, (1,) * 3))
    feats = torch.randn(100, 16, device="cuda", requires_grad=True)
    weight = torch.randn(27, 16, 16, device="cuda", requires_grad=True)
    loss = sparse_conv(feats, weight, found).sum()
    seen = []
    with _launch.watched(lambda bound, args: not seen.append(bound.kernel.__name__)):
        loss.backward()
    assert {"weight_grad_kernel", "gather_gemm_kernel"} <= set(seen)


def test_profiler_hooks_are_called():
    triton = pytest.importorskip("triton")
    called = []
    weight = torch.randn(1, 16, 16, device="cuda")
    run_conv(8, weight)
    hook = called.append
    triton.knobs.runtime.launch_enter_hook.add(hook)
    try:
        run_conv(8, weight)
    finally:
        triton.knobs.runtime.launch_enter_hook.remove(hook)
    assert len(called) == 1


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_on_another_device_than_the_current_one():
    weight = torch.eye(16, device="cuda:1")[None]
    feats = torch.randn(8, 16, device="cuda:1")
    with torch.cuda.device(0):
        out = gather_gemm.gather_gemm(
            feats,
            weight,
            None,
            torch.arange(8, dtype=torch.int32, device="cuda:1")[None],
            torch.ones(1, 8, dtype=torch.int32, device="cuda:1"),
            None,
            mirrored=False,
        )
    torch.testing.assert_close(out, feats)
