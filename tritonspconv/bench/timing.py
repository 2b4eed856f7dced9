"""Times and memory of a callable, on a GPU or the CPU."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from tritonspconv.bench.allocated import peak_of

Run = Callable[[], object]

# The clocks, and the names of their times in tables.
CLOCKS = {"wall": "wall time", "cpu": "processor time"}


@dataclass(frozen=True)
class Measurement:
    """The median of repeated runs and their spread.

    Attributes:
        median: In ``unit``.
        low: Tenth percentile.
        high: Ninetieth percentile.
        runs: Their number.
        unit: ``"ms"``, ``"s"`` or ``"MiB"``.
    """

    median: float
    low: float
    high: float
    runs: int
    unit: str

    @classmethod
    def of(cls, values: list[float], unit: str) -> Measurement:
        """Summarise the values of all runs; at least one."""
        ordered = sorted(values)
        last = len(ordered) - 1
        low, high = ordered[round(0.1 * last)], ordered[round(0.9 * last)]
        return cls(statistics.median(ordered), low, high, len(ordered), unit)


@dataclass(frozen=True)
class Metric:
    """Values of a run that were measured in several rounds.

    Libraries take turns round by round, so that a host or a card whose speed changes affects all of
    them.

    Attributes:
        once: Returns the values of one round.
        unit: Unit of the values.
        rounds: Their number.
    """

    once: Callable[[Run], list[float]]
    unit: str
    rounds: int = 1

    def alone(self, run: Run) -> Measurement:
        """Measure one run in all rounds, with nothing between them."""
        values = [value for _ in range(self.rounds) for value in self.once(run)]
        return Measurement.of(values, self.unit)


# Each part takes a third of the repetitions.
_ROUNDS = 3


class Meter:
    """Measures on one device.

    Args:
        device: Device of the work.
        quick: Fewer repetitions.
        clock: ``"wall"``, or ``"cpu"`` for the processor time of this process, all threads
            together. Other work on the machine hardly changes processor time.

    Raises:
        ValueError: Processor time is asked for on a GPU, where it says nothing.
    """

    def __init__(self, device: torch.device, quick: bool, clock: str = "wall") -> None:
        if clock not in CLOCKS:
            raise ValueError(f"clock must be one of {tuple(CLOCKS)}; got {clock!r}.")
        if clock == "cpu" and device.type != "cpu":
            raise ValueError(
                f"clock 'cpu' measures work on a CPU; got device {device}. Use 'wall'."
            )
        self.device = device
        self.quick = quick
        self._now = time.process_time if clock == "cpu" else time.perf_counter

    @property
    def on_gpu(self) -> bool:
        """True if the device is a CUDA or ROCm GPU."""
        return self.device.type == "cuda"

    def synchronize(self) -> None:
        """Wait for the device; raises the error of an earlier asynchronous failure."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    @property
    def layer(self) -> Metric:
        """Time of one layer by events, the L2 cache cleared before each run; by wall on a CPU."""
        return Metric(self._layer if self.on_gpu else self._wall, "ms", _ROUNDS)

    @property
    def wall(self) -> Metric:
        """Time by the chosen clock, the device synchronised before and after each run."""
        return Metric(self._wall, "ms", _ROUNDS)

    @property
    def device_time(self) -> Metric:
        """Durations of a run's kernels and copies, added up, gaps left out; GPU only."""
        return Metric(self._device_time, "ms")

    @property
    def peak(self) -> Metric:
        """The memory that a run adds at its peak.

        On a GPU this metric counts the memory that torch allocates. On a CPU it counts all memory
        that the process allocates; see :func:`tritonspconv.bench.allocated.peak_of`.
        """
        return Metric(self._peak, "MiB")

    @property
    def footprint(self) -> Metric:
        """Memory of the device that a run needs, including memory that earlier runs keep; GPU only.

        It counts the memory that torch has reserved, because graphs keep memory between calls.
        Parameters and input, which exist before the first run, are left out.
        """
        return Metric(self._footprint, "MiB")

    def _layer(self, run: Run) -> list[float]:
        from triton.testing import do_bench

        for _ in range(3):
            run()
        warmup, rep = (10, 17) if self.quick else (10, 67)
        times = do_bench(run, warmup=warmup, rep=rep, return_mode="all")
        assert isinstance(times, list)
        return times

    def _wall(self, run: Run) -> list[float]:
        if self.on_gpu:
            warmup, repeat = (2, 4) if self.quick else (3, 10)
        else:
            warmup, repeat = (1, 1) if self.quick else (1, 7)
        for _ in range(warmup):
            run()
        times = []
        for _ in range(repeat):
            self.synchronize()
            start = self._now()
            run()
            self.synchronize()
            times.append(1e3 * (self._now() - start))
        return times

    def _device_time(self, run: Run) -> list[float]:
        if not self.on_gpu:
            raise RuntimeError("device time needs a GPU")
        from torch._C._autograd import DeviceType
        from torch.profiler import ProfilerActivity, profile

        repeat = 5 if self.quick else 10
        run()
        self.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            for _ in range(repeat):
                run()
            self.synchronize()
        microseconds = sum(
            event.time_range.elapsed_us()
            for event in profiler.events() or ()
            if event.device_type == DeviceType.CUDA
        )
        if not microseconds:
            raise RuntimeError("the profiler recorded no kernels")
        return [1e-3 * microseconds / repeat]

    def _peak(self, run: Run) -> list[float]:
        if not self.on_gpu:
            return [peak_of(run) / 2**20 for _ in range(1 if self.quick else 3)]
        for _ in range(2):
            run()
        gc.collect()
        self.synchronize()
        held = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        run()
        self.synchronize()
        return [(torch.cuda.max_memory_allocated(self.device) - held) / 2**20]

    def _footprint(self, run: Run) -> list[float]:
        if not self.on_gpu:
            raise RuntimeError("the memory of a run needs a GPU")
        before = self._reserved()
        for _ in range(2):
            run()
        # Give back memory that only the first run needed, such as the memory of a capture.
        self._reserved()
        torch.cuda.reset_peak_memory_stats(self.device)
        run()
        self.synchronize()
        return [(torch.cuda.max_memory_reserved(self.device) - before) / 2**20]

    def _reserved(self) -> int:
        """Return how many bytes torch holds, free blocks given back."""
        gc.collect()
        self.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved(self.device)
