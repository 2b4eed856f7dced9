"""``spconv.tools``: the timer that tensors carry and that users' own layers enter."""

from __future__ import annotations

from contextlib import nullcontext

from compat.spconv._names import module_getattr

__all__ = ["CUDAKernelTimer"]

__getattr__ = module_getattr(__name__, elsewhere={"compat.spconv.cppconstants": "CPU_ONLY_BUILD"})


class CUDAKernelTimer:
    """Takes no times; use ``torch.profiler``.

    Args:
        enable: Kept as an attribute.
    """

    def __init__(self, enable: bool = True) -> None:
        self.enable = enable

    def namespace(self, name: str) -> nullcontext[None]:
        """Return a context that does nothing."""
        return nullcontext()

    def record(self, name: str, stream: int = 0) -> nullcontext[None]:
        """Return a context that does nothing."""
        return nullcontext()

    def get_all_pair_time(self) -> dict[str, float]:
        """Return no times."""
        return {}

    @staticmethod
    def collect_by_name(name: str, res: dict[str, float]) -> dict[str, float]:
        """Return the times whose dotted path has ``name`` in it."""
        return {path: time for path, time in res.items() if name in path.split(".")}
