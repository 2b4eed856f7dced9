"""Run a network once more, slowly, and measure each of its layers."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import tritonspconv.nn.chain
import tritonspconv.nn.pool
from tritonspconv import ops
from tritonspconv.kernel_map import KernelMap

# Every place from which a layer calls the two operations that multiply or pool along a map.
_CALLS = (
    (ops, "sparse_conv"),
    (tritonspconv.nn.chain, "sparse_conv"),
    (ops, "sparse_pool"),
    (tritonspconv.nn.pool, "sparse_pool"),
)


@dataclass
class LayerProfile:
    """Measurements of a layer in one forward pass.

    Attributes:
        name: The name in the network.
        kind: The class of the module.
        role: ``"sparse"`` for convolutions and pools, ``"norm"``, or ``"other"``.
        sites_in: Rows of the input.
        sites_out: Rows of the output.
        channels_in: Columns of the input.
        channels_out: Columns of the output.
        pairs: Pairs of the kernel map; 0 for a layer without one, and for other libraries.
        maps_built: Kernel maps that the layer made; 0 where it reused one.
        ms: Wall time of the layer, with the device synchronised before and after.
        host_ms: Time until the call returned to the host.
        product_ms: The part of ``ms`` that multiplies or pools rows.
        map_ms: The rest of a sparse layer: kernel maps, coordinates, checks.
        added_bytes: Peak memory that the layer added, in bytes; 0 on a CPU.
        moved_bytes: Bytes that the product must read and write at the least: gathered rows,
            weights and output.
        flops: Multiplications and additions of the product.
    """

    name: str
    kind: str
    role: str
    sites_in: int = 0
    sites_out: int = 0
    channels_in: int = 0
    channels_out: int = 0
    pairs: int = 0
    maps_built: int = 0
    ms: float = 0.0
    host_ms: float = 0.0
    product_ms: float = 0.0
    map_ms: float = 0.0
    added_bytes: int = 0
    moved_bytes: int = 0
    flops: int = 0


@dataclass
class NetworkProfile:
    """A network on one input.

    Attributes:
        device: The name of the device.
        layers: One entry for each layer, in the order of their first calls.
        forward_ms: Median wall time of a forward pass that nothing interrupts, with new maps.
        backward_ms: The same of a backward pass; 0 if there was none.
        busy: Share of a free-running pass while the GPU ran kernels; None on a CPU.
        peak_bytes: Peak memory of forward and backward; 0 on a CPU.
        bandwidth: Bytes a second that a copy of a large tensor reads and writes here.
        rate: Multiplications and additions a second of a large matrix product here.
    """

    device: str
    layers: list[LayerProfile] = field(default_factory=list)
    forward_ms: float = 0.0
    backward_ms: float = 0.0
    busy: float | None = None
    peak_bytes: int = 0
    bandwidth: float = 0.0
    rate: float = 0.0

    def total(self, attribute: str, role: str | None = None) -> float:
        """Return the sum of an attribute over the layers of a role."""
        return sum(getattr(x, attribute) for x in self.layers if role in (None, x.role))


def profile_network(
    network: nn.Module,
    make_input: Callable[[], Any],
    device: torch.device,
    *,
    backward: bool = True,
    passes: int = 3,
    trace: Path | None = None,
) -> NetworkProfile:
    """Measure a network on one input.

    The first pass warms up. Then free-running passes are timed, and at last one pass with hooks
    that synchronise the device around every layer. Hooks keep containers from fusing layers, so the
    sum over the layers is more than a free-running pass.

    Args:
        network: The network; its mode (training or evaluation) is kept.
        make_input: Makes a new input tensor that knows no kernel map yet.
        device: Device of network and input.
        backward: Also run a backward pass, from a gradient of ones.
        passes: Free-running passes to time.
        trace: Write a Chrome trace of one pass to this file.
    """
    profile = NetworkProfile(device_name(device))
    profile.bandwidth, profile.rate = measure_device(device)
    _pass(network, make_input, device, backward)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    times = [_pass(network, make_input, device, backward) for _ in range(passes)]
    profile.forward_ms = statistics.median(forward for forward, _ in times)
    profile.backward_ms = statistics.median(back for _, back in times)
    if device.type == "cuda":
        profile.peak_bytes = torch.cuda.max_memory_allocated(device)
    if device.type == "cuda" or trace is not None:
        profile.busy = _traced_pass(network, make_input, device, backward, trace)
    recorder = Recorder(device)
    with recorder.attached(network), torch.set_grad_enabled(backward):
        network(make_input())
    profile.layers = recorder.layers
    return profile


def features_of(value: Any) -> Tensor | None:
    """Return the feature rows of a sparse tensor of any library, or a plain tensor itself."""
    if isinstance(value, Tensor):
        return value
    for name in ("features", "feats", "F"):
        found = getattr(value, name, None)
        if isinstance(found, Tensor):
            return found
    return None


def _first_tensor(value: Any) -> Tensor | None:
    """Return the features of a result, or of the first part of a tuple or a list."""
    while isinstance(value, (tuple, list)) and value:
        value = value[0]
    return features_of(value)


def _pass(
    network: nn.Module, make_input: Callable[[], Any], device: torch.device, backward: bool
) -> tuple[float, float]:
    """Return the times of a forward and a backward pass in ms."""
    with torch.set_grad_enabled(backward):
        x = make_input()
        start = now(device)
        out = _first_tensor(network(x))
        middle = now(device)
        if not backward or out is None or not out.requires_grad:
            return middle - start, 0.0
        network.zero_grad()
        out.backward(torch.ones_like(out))
        return middle - start, now(device) - middle


def _traced_pass(
    network: nn.Module,
    make_input: Callable[[], Any],
    device: torch.device,
    backward: bool,
    trace: Path | None,
) -> float | None:
    """Run one pass under torch's profiler; return the share in which the GPU was busy."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with (
        torch.profiler.profile(activities=activities, acc_events=True) as profiler,
        _named_layers(network),
    ):
        start = now(device)
        _pass(network, make_input, device, backward)
        wall_ms = now(device) - start
    if trace is not None:
        trace.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(trace))
    if device.type != "cuda":
        return None
    busy_us = sum(event.self_device_time_total for event in profiler.key_averages())
    return min(1.0, busy_us / 1e3 / wall_ms)


@contextlib.contextmanager
def _named_layers(network: nn.Module) -> Iterator[None]:
    """Give every leaf module a range of its name in the trace."""
    handles, ranges = [], []

    def enter(name: str) -> Callable[..., None]:
        def before(*_: Any) -> None:
            ranges.append(torch.profiler.record_function(name))
            ranges[-1].__enter__()

        return before

    def leave(*_: Any) -> None:
        ranges.pop().__exit__(None, None, None)

    for name, module in network.named_modules():
        if not any(module.children()):
            handles.append(module.register_forward_pre_hook(enter(name)))
            handles.append(module.register_forward_hook(leave))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Recorder:
    """Measures the leaf modules of a network while it is attached."""

    def __init__(self, device: torch.device) -> None:
        self.layers: list[LayerProfile] = []
        self._device = device
        self._current: LayerProfile | None = None
        self._started = 0.0

    @contextlib.contextmanager
    def attached(self, network: nn.Module) -> Iterator[None]:
        """Hook the leaf modules and the engine's operations; undo both at the end."""
        handles = []
        for name, module in network.named_modules():
            if not any(module.children()):
                handles.append(module.register_forward_pre_hook(self._before(name)))
                handles.append(module.register_forward_hook(self._after))
        with contextlib.ExitStack() as stack:
            for owner, name in _CALLS:
                call = self._timed(getattr(owner, name))
                stack.enter_context(mock.patch.object(owner, name, call))
            make = KernelMap.__init__
            stack.enter_context(mock.patch.object(KernelMap, "__init__", self._counted(make)))
            try:
                yield
            finally:
                for handle in handles:
                    handle.remove()

    def _before(self, name: str) -> Callable[..., None]:
        def before(module: nn.Module, args: tuple[Any, ...]) -> None:
            rows = features_of(args[0]) if args else None
            layer = LayerProfile(name, type(module).__name__, role_of(module))
            if rows is not None and rows.ndim == 2:
                layer.sites_in, layer.channels_in = rows.shape
            self._current = layer
            if self._device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self._device)
                layer.added_bytes = -torch.cuda.memory_allocated(self._device)
            self._started = now(self._device)

        return before

    def _after(self, module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        layer = self._current
        if layer is None:
            return
        layer.host_ms = 1e3 * time.perf_counter() - self._started
        layer.ms = now(self._device) - self._started
        self._current = None
        rows = features_of(out)
        if rows is not None and rows.ndim == 2:
            layer.sites_out, layer.channels_out = rows.shape
        if self._device.type == "cuda":
            layer.added_bytes += torch.cuda.max_memory_allocated(self._device)
        if layer.role == "sparse":
            if not layer.pairs:
                # A window of one tap multiplies rows where they are.
                layer.product_ms = layer.ms
            layer.map_ms = layer.ms - layer.product_ms
            _count_work(layer, module, rows)
        self.layers.append(layer)

    def _timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(feats: Tensor, *args: Any, **kwargs: Any) -> Any:
            found = [x for x in (*args, *kwargs.values()) if isinstance(x, KernelMap)]
            start = now(self._device)
            out = call(feats, *args, **kwargs)
            if self._current is not None and found:
                self._current.product_ms += now(self._device) - start
                self._current.pairs += found[0].num_pairs()
            return out

        return timed

    def _counted(self, make: Callable[..., None]) -> Callable[..., None]:
        def counted(kernel_map: KernelMap, *args: Any, **kwargs: Any) -> None:
            # An inverse map is the same map read backwards.
            inverse = kwargs.get("is_inverse", args[3] if len(args) > 3 else False)
            if self._current is not None and not inverse:
                self._current.maps_built += 1
            make(kernel_map, *args, **kwargs)

        return counted


def _count_work(layer: LayerProfile, module: nn.Module, rows: Tensor | None) -> None:
    if rows is None:
        return
    pairs = layer.pairs or layer.sites_out
    weights = sum(parameter.numel() for parameter in module.parameters(recurse=False))
    entries = pairs * layer.channels_in + weights + layer.sites_out * layer.channels_out
    layer.moved_bytes = entries * rows.element_size()
    if weights:
        layer.flops = 2 * pairs * layer.channels_in * layer.channels_out


def role_of(module: nn.Module) -> str:
    """Return ``"sparse"``, ``"norm"`` or ``"other"``; see `LayerProfile`."""
    name = type(module).__name__
    if any(part in name for part in ("Conv", "Pool", "Channelwise", "Unpool")):
        return "sparse"
    return "norm" if "Norm" in name else "other"


def now(device: torch.device) -> float:
    """Return the host's time in ms, after the device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1e3 * time.perf_counter()


def device_name(device: torch.device) -> str:
    """Return the name of the GPU, or ``CPU``."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def measure_device(device: torch.device) -> tuple[float, float]:
    """Return bytes a second of a copy, and operations a second of a float32 product."""
    on_gpu = device.type == "cuda"
    source = torch.zeros((1 << 28 if on_gpu else 1 << 25) // 4, device=device)
    side = 4096 if on_gpu else 768
    matrix = torch.ones(side, side, device=device)
    copy_ms = _best(lambda: source.clone(), device)
    product_ms = _best(lambda: matrix @ matrix, device)
    return 2 * source.numel() * 4 / (copy_ms / 1e3), 2 * side**3 / (product_ms / 1e3)


def _best(call: Callable[[], Any], device: torch.device) -> float:
    times = []
    for _ in range(5):
        start = now(device)
        call()
        times.append(now(device) - start)
    return min(times)
