"""numba kernels: compilation, the cache of compiled code, and threads."""

import ast
import importlib
import inspect
import pkgutil
import sys
import threading
import time
import types

import pytest
import torch

from tests._process import run

pytest.importorskip("numba", reason="numba is not installed")

from numba.core.dispatcher import Dispatcher

from tritonspconv.kernels import numba as room
from tritonspconv.kernels.numba import _threads
from tritonspconv.kernels.numba._compile import compiled
from tritonspconv.kernels.numba._threads import in_ranges


def modules() -> list[types.ModuleType]:
    return [
        importlib.import_module(f"{room.__name__}.{found.name}")
        for found in pkgutil.iter_modules(room.__path__)
    ]


@pytest.mark.parametrize("module", modules(), ids=lambda module: module.__name__.split(".")[-1])
def test_compiled_functions_use_names_of_their_own_module(module):
    """The cache of numba does not notice changes of other modules; see `compiled`."""
    imported = {
        name.asname or name.name
        for node in ast.walk(ast.parse(inspect.getsource(module)))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tritonspconv")
        for name in node.names
    }
    for function in vars(module).values():
        if isinstance(function, Dispatcher) and function.__module__ == module.__name__:
            borrowed = imported & set(function.py_func.__code__.co_names)
            assert not borrowed, f"{function.__name__} uses {borrowed} of other modules"


def test_code_that_cannot_be_kept_is_compiled_anew():
    """A function that comes from no file has no folder for its machine code."""
    names = {}
    exec("def double(x):\n    return 2 * x", names)
    double = compiled(names["double"])
    assert double(21) == 42


def test_nothing_is_compiled_on_import(tmp_path):
    """A process that imports everything public has not imported numba."""
    code = "import sys, tritonspconv, compat.spconv.pytorch; print('numba' in sys.modules)"
    assert run("-c", code, cwd=tmp_path).stdout.split() == ["False"]


@pytest.fixture(params=["openmp", "pool"])
def way(request, monkeypatch):
    """The threads of torch's OpenMP, and the pool where torch has none that we can use."""
    if request.param == "pool":
        monkeypatch.setattr(_threads, "_openmp", lambda: None)
    elif _threads._openmp() is None:
        pytest.skip("torch has no OpenMP that GCC's code could call")
    return request.param


@pytest.mark.parametrize(
    ("n", "least", "threads", "ranges"),
    [(0, 1, 4, 1), (9, 10, 4, 1), (20, 10, 4, 2), (1000, 10, 3, 3), (5, 1, 1, 1)],
)
def test_ranges_cover_all_rows_once(way, n, least, threads, ranges):
    torch.set_num_threads(threads)
    seen = []
    in_ranges(lambda start, end: seen.append((start, end)), n, least)
    assert len(seen) == ranges
    assert [row for start, end in sorted(seen) for row in range(start, end)] == list(range(n))


def test_ranges_run_at_the_same_time(way):
    torch.set_num_threads(3)
    meeting = threading.Barrier(3, timeout=20)
    in_ranges(lambda start, end: meeting.wait(), 3, 1)


@pytest.mark.parametrize("fails", [0, 1])
def test_an_error_of_a_range_is_raised(way, fails):
    torch.set_num_threads(2)

    def fail(start, end):
        if (start > 0) == fails:
            raise ValueError("a range failed")

    with pytest.raises(ValueError, match="a range failed"):
        in_ranges(fail, 10, 1)


def test_an_error_is_raised_after_all_ranges_have_ended(way):
    torch.set_num_threads(2)
    ended = []

    def fail_first(start, end):
        if start == 0:
            raise ValueError("a range failed")
        time.sleep(0.05)
        ended.append(start)

    with pytest.raises(ValueError, match="a range failed"):
        in_ranges(fail_first, 10, 1)
    assert ended == [5]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems use the pool")
def test_ranges_run_on_the_threads_of_torch():
    """A second set of threads would compete with torch's, which spin while they are idle."""
    assert "OpenMP" in torch.__config__.parallel_info()
    torch.set_num_threads(3)
    before = set(threading.enumerate())
    seen = set()
    meeting = threading.Barrier(3, timeout=20)

    def note(start, end):
        meeting.wait()
        seen.add(threading.get_ident())

    for _ in range(3):
        in_ranges(note, 3, 1)
        torch.zeros(1 << 20).add_(1)
    assert len(seen) == 3
    assert not any("tritonspconv" in thread.name for thread in {*threading.enumerate()} - before)


@pytest.mark.parametrize("threads", [2, 4])
def test_a_range_may_have_ranges_of_its_own(way, threads):
    torch.set_num_threads(threads)
    seen = []

    def outer(start, end):
        in_ranges(lambda first, last: seen.append((start + first, start + last)), end - start, 1)

    in_ranges(outer, 8, 1)
    assert sorted(row for first, last in seen for row in range(first, last)) == list(range(8))


FORK = """
import os, sys, torch
from tritonspconv.kernels.numba._threads import in_ranges

torch.set_num_threads(2)
def total():
    seen = []
    in_ranges(lambda start, end: seen.append(end - start), 100, 1)
    return sum(seen)
assert total() == 100
child = os.fork()
if child == 0:
    os._exit(total())
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 100)
"""


def test_a_forked_process_has_threads_of_its_own(tmp_path):
    run("-W", "ignore", "-c", FORK, cwd=tmp_path)
