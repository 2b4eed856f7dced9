"""A pool of processes compiles kernels ahead, on a machine without a GPU."""

import importlib
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")

from triton.backends.compiler import GPUTarget  # noqa: E402

from tests._back_end import send_cpu_to_triton, use_torch  # noqa: E402
from tests._process import ROOT  # noqa: E402
from tests.kernels._targets import card  # noqa: E402
from tritonspconv import ops  # noqa: E402
from tritonspconv.coords import ActiveSites  # noqa: E402
from tritonspconv.coords.row_tensor import RowBounds  # noqa: E402
from tritonspconv.coords.site_plan import SitePlan  # noqa: E402
from tritonspconv.geometry import ConvGeometry  # noqa: E402
from tritonspconv.kernel_map import kernel_map  # noqa: E402
from tritonspconv.kernels import compile_ahead as face  # noqa: E402
from tritonspconv.kernels.triton import _compile_pool as pool  # noqa: E402
from tritonspconv.kernels.triton import (  # noqa: E402
    _launch,
    compile_ahead,
    gather_gemm,
    weight_grad,
)
from tritonspconv.testing import random_sites  # noqa: E402

pytestmark = pytest.mark.compile

TARGET = GPUTarget("cuda", 90, 32)
DOWN = ConvGeometry((2, 2, 2), (2, 2, 2), (0, 0, 0), (1, 1, 1))
# Compiles the kernels of a pickled list, on the path of an ordinary launch.
LAUNCHES = """
import pickle, sys, triton
from tritonspconv.kernels.triton import _compile_pool as pool
target, jobs = pickle.load(sys.stdin.buffer)
triton.runtime.driver.set_active(pool._AheadDriver(target))
for job in jobs:
    job.compile()
"""


@pytest.fixture(autouse=True)
def _sm_90(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    send_cpu_to_triton(monkeypatch)
    for module in (gather_gemm, weight_grad):
        monkeypatch.setattr(module, "card_of", lambda device: card("sm_90"))
    monkeypatch.setattr(triton.runtime.driver, "_active", pool._AheadDriver(TARGET))


def layer(rows: int) -> None:
    """A strided layer over padded rows: the host reads nothing."""
    sites = random_sites(rows, 3, extent=40)
    bounds = RowBounds(torch.tensor(rows), SitePlan([rows]))
    found = kernel_map(ActiveSites(sites.coords, sites.grid, bounds=bounds), DOWN)
    ops.sparse_conv(torch.ones(rows, 16).half(), torch.ones(8, 16, 16).half(), found)


def jobs_of(rows: int) -> list[pool.Job]:
    found = []

    def collect(bound, args):
        found.append(pool.Job.of(bound.kernel, args, bound.options))
        return True

    with _launch.watched(collect):
        layer(rows)
    return pool.distinct(found, TARGET)


def cached() -> set[str]:
    """Return the folders of Triton's cache that hold a binary."""
    return {path.parent.name for path in Path(os.environ["TRITON_CACHE_DIR"]).rglob("*.cubin")}


def test_the_pool_fills_the_cache_that_launches_read():
    jobs = jobs_of(1000)
    assert {"gather_gemm_kernel", "rank_kernel"} < {job.name for job in jobs}
    assert sorted(pool.compile_all(jobs, TARGET, 2)) == sorted(jobs)
    found = cached()
    assert len(found) == len(jobs)
    command, given = [sys.executable, "-c", LAUNCHES], pickle.dumps((TARGET, jobs))
    subprocess.run(command, input=given, cwd=ROOT, check=True, timeout=600)
    assert cached() == found
    # Another capture starts no pool for these kernels, also in another process.
    assert pool.compile_all(jobs, TARGET, 2) == []


@pytest.mark.parametrize("is_aligned", [True, False], ids=["aligned", "unaligned"])
@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.float16, torch.int32, torch.float32, torch.int64], ids=str
)
def test_kernels_are_compiled_for_the_alignment_of_the_launch(dtype, is_aligned):
    made = pool._memory(pool.TensorKind(dtype, is_aligned))
    assert made.dtype == dtype
    assert (made.data_ptr() % 16 == 0) == is_aligned


def test_other_row_counts_compile_nothing_new():
    few = {pool._kind(job, TARGET) for job in jobs_of(1000)}
    assert {pool._kind(job, TARGET) for rows in (17, 1600, 4999) for job in jobs_of(rows)} == few


def test_what_does_not_compile_is_left_to_its_launch(capfd):
    good, other, *_ = jobs_of(100)
    bad = other._replace(args=(1.5,) * len(other.args))
    assert pool.compile_all([bad, good], TARGET, 2) == [good]
    assert f"{other.name} was not compiled ahead" in capfd.readouterr().err


def test_one_process_leaves_it_to_the_launches():
    assert pool.compile_all(jobs_of(100), TARGET, 1) == []
    assert not cached()


def test_nothing_runs_where_no_kernels_run(monkeypatch):
    use_torch(monkeypatch, "compile_ahead")
    assert face.compile_ahead(lambda: pytest.fail("it ran"), torch.device("cpu"), 2) == 0


def test_kernels_of_features_are_compiled_and_those_of_maps_run(monkeypatch):
    """Torch may index by the results of map kernels."""
    launched, compiled = [], []
    monkeypatch.setattr(
        _launch.BoundKernel,
        "_launch_by_triton",
        lambda bound, grid, args: launched.append(bound.kernel.__name__),
    )

    def record(jobs, target, processes):
        assert (target, processes) == (TARGET, 2)
        compiled.extend(job.name for job in jobs)
        return jobs

    monkeypatch.setattr(compile_ahead, "compile_all", record)
    assert face.compile_ahead(lambda: layer(1000), torch.device("cpu"), 2) == 1
    assert compiled == ["gather_gemm_kernel"]
    assert "rank_kernel" in launched
    assert "gather_gemm_kernel" not in launched


def test_a_rehearsal_launches_maps_alone(monkeypatch):
    launched = []
    monkeypatch.setattr(
        _launch.BoundKernel,
        "_launch_by_triton",
        lambda bound, grid, args: launched.append(bound.kernel.__name__),
    )
    with face.maps_only(torch.device("cpu")):
        layer(100)
    assert "rank_kernel" in launched
    assert "gather_gemm_kernel" not in launched
    layer(100)
    assert "gather_gemm_kernel" in launched


def test_modules_of_features_exist():
    assert gather_gemm.gather_gemm_kernel.fn.__module__ in compile_ahead._OF_FEATURES
    for module in compile_ahead._OF_FEATURES:
        importlib.import_module(module)
