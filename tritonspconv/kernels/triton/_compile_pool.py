"""Compile kernels ahead of their first launch, in processes of their own, into Triton's cache.

A process of the pool takes the steps of an ordinary launch, up to the binary, under a driver that
has a target and no device. So the cache has the binaries under the names by which a launch finds
them. The processes are started by command. A forked process would copy the CUDA context and the
locks of other threads, and a spawned process would run the user's main module again.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterable, Sequence
from queue import Empty, SimpleQueue
from typing import IO, Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.compiler import make_backend
from triton.runtime.cache import get_cache_manager
from triton.runtime.jit import create_function_from_signature

_STAMP = "compiled.txt"


class TensorKind(NamedTuple):
    """Properties of a tensor on which Triton specialises.

    Attributes:
        dtype: Its type.
        is_aligned: True if its address is a multiple of 16.
    """

    dtype: torch.dtype
    is_aligned: bool


class Job(NamedTuple):
    """The facts about a launch that decide its compiled kernel.

    Attributes:
        module: Module of the kernel.
        name: Its name there.
        args: Its run-time arguments; tensors as :class:`TensorKind`.
        options: Its constexpr arguments and Triton's options.
    """

    module: str
    name: str
    args: tuple[Any, ...]
    options: tuple[tuple[str, Any], ...]

    @classmethod
    def of(cls, kernel: Any, args: Iterable[Any], options: dict[str, Any]) -> Job:
        """Describe a launch of a jitted function."""
        kinds = tuple(
            TensorKind(arg.dtype, arg.data_ptr() % 16 == 0) if isinstance(arg, Tensor) else arg
            for arg in args
        )
        return cls(kernel.fn.__module__, kernel.fn.__name__, kinds, tuple(options.items()))

    @property
    def kernel(self) -> Any:
        """The jitted function."""
        return getattr(importlib.import_module(self.module), self.name)

    def stamp(self, target: Any) -> Any:
        """Return the place in Triton's cache that records whether the job was done."""
        text = repr((self, self.kernel.cache_key, target, triton.__version__))
        return get_cache_manager(hashlib.sha256(text.encode()).hexdigest())

    def compile(self) -> None:
        """Compile the kernel for the active driver's target, or find it in Triton's cache."""
        args = [
            _memory(arg) if isinstance(arg, TensorKind) else arg for arg in self.args
        ]  # fmt: skip
        self.kernel.warmup(*args, grid=(1,), **dict(self.options))


def _memory(kind: TensorKind) -> Tensor:
    made = torch.empty(32, dtype=kind.dtype, device="cpu")
    return made if kind.is_aligned else made[1:]


class _AheadDriver:
    """A driver that has a target and no device."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def distinct(jobs: Iterable[Job], target: Any) -> list[Job]:
    """Return one job for each kernel that is compiled, in order.

    Arguments of one kind, such as other row counts, compile to one kernel.
    """
    found: dict[Any, Job] = {}
    for job in jobs:
        found.setdefault(_kind(job, target), job)
    return list(found.values())


def _kind(job: Job, target: Any) -> tuple[Any, ...]:
    """Return the key by which Triton distinguishes kernels: types, specialisations and options."""
    args = [_memory(arg) if isinstance(arg, TensorKind) else arg for arg in job.args]
    _bound, specialization, _options = _binder(job.kernel, target)(*args, **dict(job.options))
    return job.module, job.name, repr(specialization), job.options


@functools.lru_cache(maxsize=256)
def _binder(kernel: Any, target: Any) -> Any:
    return create_function_from_signature(kernel.signature, kernel.params, make_backend(target))


def compile_all(jobs: Sequence[Job], target: Any, processes: int) -> list[Job]:
    """Compile kernels in a pool of processes; wait for them.

    Jobs that were done before, by any process that shares Triton's cache, are left out.

    Args:
        jobs: The kernels, each once; see :func:`distinct`.
        target: Triton's target, such as ``GPUTarget("cuda", 90, 32)``.
        processes: Number of processes. With one nothing is gained, so that the launches compile.

    Returns:
        The jobs that were compiled. A kernel that does not compile is not among them: its launch
        raises the error.
    """
    missing = [job for job in jobs if job.stamp(target).get_file(_STAMP) is None]
    processes = min(processes, len(missing))
    if processes < 2 or not sys.executable:
        return []
    todo: SimpleQueue[Job] = SimpleQueue()
    for job in missing:
        todo.put(job)
    done: list[Job] = []
    threads = [
        threading.Thread(target=_feed, args=(todo, target, done), daemon=True)
        for _ in range(processes)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for job in done:
        job.stamp(target).put(b"", _STAMP)
    return done


def _feed(todo: SimpleQueue[Job], target: Any, done: list[Job]) -> None:
    """Start a process and hand it jobs, one after the other, until there are none."""
    # The process compiles for the target that it is told, and needs no GPU.
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "CUDA_VISIBLE_DEVICES": "",
    }
    with subprocess.Popen(
        [sys.executable, "-m", __name__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            _send(process.stdin, target)
            while True:
                job = todo.get_nowait()
                _send(process.stdin, job)
                if pickle.load(process.stdout):
                    done.append(job)
        except Empty:
            process.stdin.close()
        except (EOFError, BrokenPipeError):
            # The process ended, so the launches compile its remaining jobs.
            pass


def _send(stream: IO[bytes], value: Any) -> None:
    pickle.dump(value, stream)
    stream.flush()


def _serve() -> None:
    """Do the jobs that come from the standard input; their output goes to the standard error."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    torch.set_num_threads(1)
    triton.runtime.driver.set_active(_AheadDriver(pickle.load(sys.stdin.buffer)))
    while True:
        try:
            job: Job = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            job.compile()
        except Exception as error:
            sys.stderr.write(f"{job.name} was not compiled ahead: {error}\n")
            _send(answers, False)
        else:
            _send(answers, True)


if __name__ == "__main__":
    # Import the module by its name, by which jobs are pickled.
    importlib.import_module("tritonspconv.kernels.triton._compile_pool")._serve()
