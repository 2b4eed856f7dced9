"""A CUDA graph of a piece of work on static memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

import torch

from tritonspconv.graph_capture import GraphCaptureError
from tritonspconv.kernels.compile_ahead import compile_ahead

T = TypeVar("T")

_WARM_UPS = 2


class GraphMemory(NamedTuple):
    """The stream and memory that all graphs of a captured function share.

    Attributes:
        pool: Their memory, from ``torch.cuda.graph_pool_handle``.
        stream: The stream on which they are captured. Autograd ties a parameter to the stream of
            its first use, and runs a backward pass on the stream of its forward pass.
        compile_processes: Processes that compile kernels before a warm-up; see :func:`warm_up`.
    """

    pool: Any
    stream: torch.cuda.Stream
    compile_processes: int = 0


def warm_up(
    work: Callable[[], object], stream: torch.cuda.Stream, compile_processes: int = 0
) -> None:
    """Run ``work`` twice on ``stream``, which compiles kernels and fills caches.

    Args:
        work: The work.
        stream: The stream of the graphs.
        compile_processes: Number of processes that compile kernels in parallel. From 2 on, the
            work runs once more before, without the kernels of features, which lists them.
    """
    current = torch.cuda.current_stream(stream.device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        if compile_processes > 1:
            compile_ahead(work, stream.device, compile_processes)
        for _ in range(_WARM_UPS):
            work()
    current.wait_stream(stream)


class Program(Generic[T]):
    """Work that a CUDA graph repeats; it must have been warmed up.

    Args:
        work: The work; it reads and writes static memory only.
        memory: Memory and stream of the graph.

    Attributes:
        result: The result of ``work`` while it was captured; tensors in it are static.

    Raises:
        RuntimeError: The work does something that a graph cannot hold.
    """

    def __init__(self, work: Callable[[], T], memory: GraphMemory) -> None:
        torch.cuda.synchronize(memory.stream.device)
        self._graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(self._graph, pool=memory.pool, stream=memory.stream):
                self.result = work()
        except Exception as error:
            if isinstance(error, GraphCaptureError) or "captur" not in str(error):
                raise
            raise RuntimeError(
                "capture: the function does something that a CUDA graph cannot hold, such as "
                ".item(), .tolist(), .cpu(), torch.unique or printing a value. The traceback above "
                "names the line. Move it out of the captured function."
            ) from error

    def run(self) -> T:
        """Do the work once more; return its result, in the same memory as before."""
        self._graph.replay()
        return self.result
