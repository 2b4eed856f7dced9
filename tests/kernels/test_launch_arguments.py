"""Launches without a GPU: which of them share a kernel, and the arguments that kernels get."""

import contextlib
import itertools
import shutil
import subprocess
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget

from tests._process import ROOT, run, write
from tests.kernels._record import record_launches
from tritonspconv.kernels.triton import _launch, _torch_launcher, _versions
from tritonspconv.kernels.triton.pairs import count_pairs_kernel

pytestmark = pytest.mark.compile  # Triton's own binder, which the interpreter replaces


@triton.jit(do_not_specialize=["size"])
def kernel(x_ptr, bias_ptr, count, size, box, BLOCK: tl.constexpr):
    pass


MEMORY = torch.zeros(64)
HALVES = torch.zeros(64, dtype=torch.float16)
ARGUMENTS = {
    "usual": (MEMORY, HALVES, 48, 5, (6, 10)),
    "other values": (MEMORY[16:], HALVES[32:], 64, 1, (2, 22)),
    "unaligned": (MEMORY[1:], HALVES, 48, 5, (6, 10)),
    "unaligned second": (MEMORY, HALVES[1:], 48, 5, (6, 10)),
    "other dtype": (HALVES, HALVES, 48, 5, (6, 10)),
    "none": (MEMORY, None, 48, 5, (6, 10)),
    "one": (MEMORY, HALVES, 1, 5, (6, 10)),
    "no multiple of 16": (MEMORY, HALVES, 50, 5, (6, 10)),
    "large multiple": (MEMORY, HALVES, 2**40, 5, (6, 10)),
    "large": (MEMORY, HALVES, 2**40 + 2, 5, (6, 10)),
    "large size": (MEMORY, HALVES, 48, 2**31, (6, 10)),
    "most negative size": (MEMORY, HALVES, 48, -(2**31), (6, 10)),
    "one in the box": (MEMORY, HALVES, 48, 5, (6, 1)),
    "multiple in the box": (MEMORY, HALVES, 48, 5, (32, 10)),
    "large in the box": (MEMORY, HALVES, 48, 5, (6, 2**40 + 2)),
}


def hand_values_to(runner, monkeypatch):
    """Let launches on any machine take the fast way, which ends in ``runner``."""
    monkeypatch.setattr(_versions, "hands_values", True)
    monkeypatch.setattr(_versions, "runner", lambda compiled, constants: runner)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0, raising=False)


@pytest.mark.parametrize(("first", "second"), list(itertools.combinations(ARGUMENTS, 2)))
def test_arguments_share_a_compiled_kernel_where_triton_compiles_them_alike(
    first, second, monkeypatch
):
    hand_values_to(lambda *_: None, monkeypatch)
    bound = _launch.BoundKernel(kernel, {"BLOCK": 16})
    with record_launches() as apart:
        for name in (first, second):
            kernel[(1,)](*ARGUMENTS[name], BLOCK=16, enable_fp_fusion=True)
    with record_launches():
        for name in (first, second):
            bound._launch((1,), 0, ARGUMENTS[name])
    assert len(bound.compiled) == len(apart)


def test_a_kernel_that_does_not_take_the_values_is_launched_by_triton(monkeypatch):
    def refuse(*_):
        raise TypeError("function takes exactly 3 arguments")

    hand_values_to(refuse, monkeypatch)
    by_triton = []
    bound = _launch.BoundKernel(kernel, {"BLOCK": 16})
    monkeypatch.setattr(
        _launch.BoundKernel, "_launch_by_triton", lambda _self, *call: by_triton.append(call)
    )
    call = (1,), 0, ARGUMENTS["usual"]
    bound._launch(*call)
    with pytest.warns(RuntimeWarning, match=r"takes exactly 3 arguments.*Please report this"):
        bound._launch(*call)
    bound._launch(*call)
    assert len(by_triton) == 3


def test_a_jitted_function_keeps_its_bound_kernels(monkeypatch):
    @triton.jit
    def other(x_ptr, BLOCK: tl.constexpr):
        pass

    bound = _launch.bind(kernel, BLOCK=32, num_warps=2)
    assert _launch.bind(kernel, BLOCK=32, num_warps=2) is bound
    assert bound.meta == {"BLOCK": 32, "num_warps": 2}
    apart = [
        _launch.bind(kernel, BLOCK=32),
        _launch.bind(kernel, BLOCK=32, num_stages=2),
        _launch.bind(other, BLOCK=32, num_warps=2),
    ]
    assert len({id(one) for one in (bound, *apart)}) == 4
    assert bound in kernel.bound_kernels.values()
    # `compiled_kernels` lists the kernels of the package alone.
    before = _launch.compiled_kernels()
    bound = _launch.bind(count_pairs_kernel, BLOCK_N=64)
    monkeypatch.setattr(bound, "compiled", [*bound.compiled, "a kernel"])
    assert _launch.compiled_kernels().count(count_pairs_kernel) == 1 + before.count(
        count_pairs_kernel
    )


def test_an_interpreted_kernel_is_launched_by_triton():
    from triton.runtime.interpreter import InterpretedFunction

    def fill(x_ptr, BLOCK: tl.constexpr):
        tl.store(x_ptr + tl.arange(0, BLOCK), 1.0)

    x = torch.zeros(16)
    bound = _launch.BoundKernel(InterpretedFunction(fill), {"BLOCK": 16})
    for _ in range(2):
        bound._launch((1,), 0, (x,))
    assert x.eq(1).all()


@pytest.fixture
def torch_launches(monkeypatch):
    """Return the arguments of torch's launcher, with a driver that claims a GPU of 1,000 bytes."""
    launches = []
    utils = SimpleNamespace(
        get_device_properties=lambda index: {"max_shared_mem": 1000},
        load_binary=lambda name, binary, shared, index: (1, 4321, 32, 0, 1024),
    )
    driver = SimpleNamespace(
        utils=utils,
        get_current_device=lambda: 0,
        get_current_stream=lambda index: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
    )
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    monkeypatch.setattr(_versions, "hands_values", True)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 99, raising=False)
    launcher = SimpleNamespace(_launch_kernel=lambda *call: launches.append(call))
    monkeypatch.setattr(_torch_launcher, "torch_launcher", launcher)
    return launches


def test_torchs_launcher_is_handed_numbers_and_addresses_only(torch_launches):
    @triton.jit(do_not_specialize=["size"])
    def fresh(x_ptr, bias_ptr, count, size, box, scale, FACTORS: tl.constexpr, V: tl.constexpr):
        tl.store(x_ptr, (count + size + box[0] + box[1]).to(tl.float32) * scale)

    bound = _launch.BoundKernel(fresh, {"FACTORS": (2, 3), "V": 7, "num_warps": 8})
    for size in (5, 6):
        bound._launch((3, 2), 0, (MEMORY, None, 48, size, (1, 2**40), 0.5))
    bound._launch((4,), 0, (MEMORY, HALVES, 1, 5, (6, 10), 0.5))
    address = MEMORY.data_ptr()
    many, few = (4321, 3, 2, 1, 8, 0, "OiilfOO"), (4321, 4, 1, 1, 8, 0, "OOiiifOO")
    assert torch_launches == [
        (*many, (address, 48, 5, 2**40, 0.5, None, None), 99),
        (*many, (address, 48, 6, 2**40, 0.5, None, None), 99),
        (*few, (address, HALVES.data_ptr(), 5, 6, 10, 0.5, None, None), 99),
    ]
    assert len(bound.compiled) == 2


@pytest.mark.parametrize("lack", ["nothing", "shared memory", "threads", "types"])
def test_triton_launches_what_torch_cannot(lack, torch_launches, monkeypatch):
    @triton.jit
    def fresh(x_ptr, flag, BLOCK: tl.constexpr):
        square = tl.arange(0, BLOCK)[:, None] + tl.arange(0, BLOCK)
        tl.store(x_ptr + square, tl.dot(square.to(tl.float16), square.to(tl.float16)))

    by_triton = []
    monkeypatch.setattr(
        _launch.BoundKernel, "_launch_by_triton", lambda _self, *call: by_triton.append(call)
    )
    monkeypatch.setattr(_versions, "runner", lambda compiled, constants: lambda *_: None)
    utils = triton.runtime.driver.active.utils
    if lack != "shared memory":
        monkeypatch.setattr(utils, "get_device_properties", lambda index: {"max_shared_mem": 2**20})
    if lack == "threads":
        monkeypatch.setattr(utils, "load_binary", lambda *_: (1, 4321, 255, 0, 64))
    bound = _launch.BoundKernel(fresh, {"BLOCK": 32})
    bound._launch((1,), 0, (MEMORY, True if lack == "types" else 2))
    assert (len(by_triton), len(torch_launches)) == ((0, 1) if lack == "nothing" else (1, 0))


STUB_LAUNCH = """
from types import SimpleNamespace
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver
from triton.compiler import ASTSource
from tritonspconv.kernels.triton import _versions

@triton.jit(do_not_specialize=["size"])
def kernel(x_ptr, bias_ptr, size, box, count, FACTORS: tl.constexpr, V: tl.constexpr):
    tl.store(x_ptr, (size + box[0] + box[1] + count).to(tl.float32))

signature = dict(x_ptr="*fp32", bias_ptr="constexpr", size="i32", box=("i32", "i32"), count="i32",
                 FACTORS="constexpr", V="constexpr")
source = ASTSource(kernel, signature, {(1,): None, (5,): (2, 3), (6,): 7}, {})
compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
triton.runtime.driver.set_active(SimpleNamespace(utils=driver.CudaUtils()))
launcher = driver.CudaLauncher(source, compiled.metadata)
compiled = SimpleNamespace(run=launcher, function=4321, packed_metadata=compiled.packed_metadata)
values = (1000, None, -11, (12, 13), 14)
assert _versions.hands_values
_versions.runner(compiled, ((2, 3), 7))((5, 6), 0, values)
_versions._is_bare = lambda launcher: False
_versions.runner(compiled, ((2, 3), 7))((8,), 0, values)
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_tritons_launcher_hands_the_driver_the_values_in_order(tmp_path):
    """The installed Triton launches through a driver that prints its arguments."""
    source = Path(__file__).parent / "stub_driver.c"
    driver = tmp_path / "libcuda.so.1"
    subprocess.run(["cc", "-shared", "-fPIC", "-w", source, "-o", driver], check=True)
    (tmp_path / "libcuda.so").symlink_to(driver)
    process = run(
        write(tmp_path, "stub_launch.py", STUB_LAUNCH), cwd=ROOT, STUB_PARAMS="5",
        TRITON_LIBCUDA_PATH=str(tmp_path), LD_LIBRARY_PATH=str(tmp_path),
        TRITON_CACHE_DIR=str(tmp_path / "cache"),
    )  # fmt: skip
    arguments = "4321: 1000 -11 12 13 14"
    assert process.stdout.splitlines() == [f"5 6 1, {arguments}", f"8 1 1, {arguments}"]


@pytest.mark.parametrize(("current", "guarded"), [(0, True), (1, False)])
def test_tensors_of_another_device_make_it_current_for_the_launch(current, guarded, monkeypatch):
    events = []

    @contextlib.contextmanager
    def device_guard(device):
        events.append(f"enter {device}")
        yield
        events.append("leave")

    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: current, raising=False)
    monkeypatch.setattr(torch.cuda, "device", device_guard)
    monkeypatch.setattr(
        _launch.BoundKernel, "_launch", lambda self, grid, index, args: events.append(index)
    )
    _launch.launch(kernel, (1,), torch.device("cuda", 1), *ARGUMENTS["usual"], BLOCK=16)
    assert events == (["enter cuda:1", 1, "leave"] if guarded else [1])


@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook"])
def test_profilers_see_every_launch(hook, monkeypatch):
    """Only Triton calls launch hooks, so launches with hooks do not take the fast way."""
    ran, by_triton = [], []
    hand_values_to(lambda *call: ran.append(call), monkeypatch)
    bound = _launch.BoundKernel(kernel, {"BLOCK": 16})
    monkeypatch.setattr(
        _launch.BoundKernel, "_launch_by_triton", lambda _self, *call: by_triton.append(call)
    )
    call = (1,), 0, ARGUMENTS["usual"]
    bound._launch(*call)
    bound._launch(*call)
    assert (len(by_triton), len(ran)) == (1, 1)
    called = triton.knobs.runtime
    getattr(called, hook).add(print)
    try:
        bound._launch(*call)
    finally:
        getattr(called, hook).remove(print)
    assert (len(by_triton), len(ran)) == (2, 1)
    bound._launch(*call)
    assert (len(by_triton), len(ran)) == (2, 2)


def test_a_watcher_sees_the_launches_of_its_own_thread(monkeypatch):
    """Another thread may run a network while this one lists kernels."""
    ran, inner, outer = [], [], []
    monkeypatch.setattr(
        _launch.BoundKernel, "_launch_by_triton", lambda _self, grid, args: ran.append(args[0])
    )
    bound = _launch.BoundKernel(kernel, {"BLOCK": 16})

    def launch(name: str) -> None:
        bound((1,), torch.device("cpu"), name)

    with _launch.watched(lambda _, args: outer.append(args[0])):
        with _launch.watched(lambda _, args: not inner.append(args[0])):
            launch("left out")
            thread = threading.Thread(target=launch, args=("other thread",))
            thread.start()
            thread.join()
            # A backward pass on a GPU would launch in threads of autograd.
            assert not torch._C._is_multithreading_enabled()
        launch("seen")
    launch("behind")
    assert torch._C._is_multithreading_enabled()
    assert (inner, outer) == (["left out"], ["seen"])
    assert ran == ["other thread", "seen", "behind"]


class CudaLauncher:
    """Triton's launcher of the name, without a GPU: it keeps the grids of its launches."""

    global_scratch_size = profile_scratch_size = 0
    launch_cooperative_grid = launch_pdl = False
    arg_annotations = ()

    def __init__(self, **attributes):
        self.grids = []
        vars(self).update(attributes)

    def launch(self, x, y, z, *_):
        self.grids.append((x, y, z))

    __call__ = launch


@pytest.mark.parametrize(
    "launcher",
    [
        pytest.param(CudaLauncher(global_scratch_size=8), id="by the launcher"),
        pytest.param(CudaLauncher(kernel_signature=b""), id="signed"),
        pytest.param(CudaLauncher(), id="directly"),
    ],
)
def test_a_grid_has_one_program_along_each_axis_that_is_not_given(launcher):
    compiled = SimpleNamespace(run=launcher, function=0, packed_metadata=b"")
    run = _versions.runner(compiled, ())
    for grid in ((5,), (5, 3), (5, 3, 2)):
        run(grid, 0, ())
    assert launcher.grids == [(5, 1, 1), (5, 3, 1), (5, 3, 2)]
