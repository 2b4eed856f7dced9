"""Measure one forward pass of the network that a script runs."""

from __future__ import annotations

import contextlib
import runpy
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)

from tritonspconv.profile.layers import (
    NetworkProfile,
    Recorder,
    device_name,
    measure_device,
    now,
    role_of,
)


def profile_script(path: Path, arguments: Sequence[str] = (), *, call: int = 3) -> NetworkProfile:
    """Run a script until its network has run some times; measure its last forward pass.

    A network is an outermost module that holds a sparse convolution or a pool. The call before the
    measured one is timed without hooks: it is ``forward_ms``. The script ends there.

    Args:
        path: The script; it runs as ``__main__``.
        arguments: Arguments of the script; they follow its name in ``sys.argv``.
        call: Number of the forward pass to measure, counted from 1.

    Raises:
        FileNotFoundError: There is no such script.
        ValueError: The file is no Python, or the script ends before that call.
    """
    if not path.is_file():
        raise FileNotFoundError(f"profile_script: {path} must be a script; there is no such file.")
    try:
        compile(path.read_bytes(), str(path), "exec")
    except (SyntaxError, ValueError) as error:
        raise ValueError(
            f"profile_script: {path} must be a Python script; it cannot be compiled: {error}."
        ) from error
    watch = _Watch(call)
    argv = [str(path), *arguments]
    places = [str(path.resolve().parent), *sys.path]
    with (
        mock.patch.object(sys, "argv", argv),
        mock.patch.object(sys, "path", places),
        watch.watching(),
        contextlib.suppress(_Measured, SystemExit),
    ):
        runpy.run_path(str(path), run_name="__main__")
    if watch.profile is None:
        raise ValueError(
            f"profile_script: {path} must run a network with sparse layers at least {call} times; "
            f"it ended after {watch.calls}. Let it run longer, or ask for an earlier call."
        )
    return watch.profile


class _Measured(BaseException):
    """Ends the script; no handler of its own catches it by mistake."""


class _Watch:
    """Follows the calls of all modules and measures one of a network."""

    def __init__(self, call: int) -> None:
        self.calls = 0
        self.profile: NetworkProfile | None = None
        self._wanted = call
        self._depth = 0
        self._start = 0.0
        self._free_ms = 0.0
        self._network: nn.Module | None = None
        self._stack = contextlib.ExitStack()
        self._recorder: Recorder | None = None

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Hook all modules; undo it at the end."""
        before = register_module_forward_pre_hook(self._before)
        after = register_module_forward_hook(self._after, always_call=True)
        try:
            with self._stack:
                yield
        finally:
            before.remove()
            after.remove()

    def _before(self, module: nn.Module, args: Any) -> None:
        self._depth += 1
        if self._depth != 1 or not any(role_of(part) == "sparse" for part in module.modules()):
            return
        self._network = module
        self.calls += 1
        device = _device_of(module)
        if self.calls == self._wanted:
            self._recorder = Recorder(device)
            self._stack.enter_context(self._recorder.attached(module))
        self._start = now(device)

    def _after(self, module: nn.Module, args: Any, out: Any) -> None:
        self._depth -= 1
        if self._depth or module is not self._network:
            return
        device = _device_of(module)
        if self._recorder is None:
            self._free_ms = now(device) - self._start
            return
        self._stack.close()
        profile = NetworkProfile(device_name(device), self._recorder.layers)
        profile.forward_ms = self._free_ms
        profile.bandwidth, profile.rate = measure_device(device)
        self.profile = profile
        raise _Measured


def _device_of(module: nn.Module) -> torch.device:
    return next((p.device for p in module.parameters()), torch.device("cpu"))
