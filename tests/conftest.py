"""Fixtures and collection rules for the whole suite."""

import importlib
import importlib.util
import math
import os
import zlib
from datetime import datetime, timezone
from pathlib import Path

import pytest
import torch
from hypothesis import register_random, settings
from torch.utils._device import _device_constructors

from tests import _skips

KERNEL_TESTS = Path(__file__).parent / "kernels"
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
INTERPRETED_DEVICE, TORCH_DEVICE = "interpreted", "cpu-torch"
NO_GPU = "no GPU: torch.cuda.is_available() is False"

# On first use, torch lists the functions that `torch.device` contexts and overrides know, by
# identity. Make the list now, before `_poison_empty` replaces some of these functions.
_device_constructors()
torch.overrides.get_overridable_functions()
torch.overrides.get_ignored_functions()

_INTERPRETER = None
if INTERPRETED and importlib.util.find_spec("triton") is not None:
    _INTERPRETER = importlib.import_module("tests._interpreter")
    _INTERPRETER.list_builtins_once()

# Dense references on a GPU do not round to TF32.
torch.backends.cudnn.allow_tf32 = False


class _TorchRandom:
    """Torch's generator for hypothesis, which seeds it for each example and can replay one."""

    seed = staticmethod(torch.manual_seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


_TORCH_RANDOM = _TorchRandom()  # hypothesis holds a weak reference
register_random(_TORCH_RANDOM)
settings.register_profile("default", deadline=None, max_examples=40)
settings.register_profile("ci", deadline=None, max_examples=40, database=None, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")
SEED_OF_THE_DAY = "TRITONSPCONV_TEST_SEED"


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """In CI, stop where packages are missing, and draw other examples of properties each day.

    The seed is the date. The environment hands it to the processes of pytest-xdist, which may start
    after midnight.
    """
    if not os.environ.get("CI"):
        return
    if absent := _skips.missing():
        lines = "\n  ".join(absent)
        raise pytest.UsageError(
            f"CI needs packages that are not there:\n  {lines}\n"
            "Install the extras that scripts/test.sh installs, or unset CI to skip their tests."
        )
    if config.option.hypothesis_seed is None:
        today = datetime.now(timezone.utc).strftime("%Y%m%d")
        config.option.hypothesis_seed = os.environ.setdefault(SEED_OF_THE_DAY, today)


def pytest_report_header(config: pytest.Config) -> str:
    """Say how to draw the same examples again."""
    seed = config.option.hypothesis_seed
    if seed is None:
        return "examples of properties: at random"
    return f"examples of properties: --hypothesis-seed={seed}"


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Print skips whose reason is not allowed in CI; in CI, fail the run."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or hasattr(session.config, "workerinput"):
        return
    in_ci = bool(os.environ.get("CI"))
    reasons = [_skips.reason_of(report) for report in reporter.stats.get("skipped", [])]
    if over := _skips.over_budget(reasons):
        reporter.section("CI allows fewer skips: see tests/_skips.py", red=in_ci, yellow=not in_ci)
        reporter.write("\n".join([*over, ""]))
        if in_ci:
            session.exitstatus = session.exitstatus or pytest.ExitCode.TESTS_FAILED


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests that launch Triton kernels, and skip tests that cannot run here, with a reason."""
    has_gpu = torch.cuda.is_available()
    for item in items:
        if "triton_device" in getattr(item, "fixturenames", ()):
            item.add_marker("interpreter")
        if item.get_closest_marker("gpu") and not has_gpu:
            item.add_marker(pytest.mark.skip(reason=NO_GPU))
        if item.get_closest_marker("interpreter") and not (INTERPRETED or has_gpu):
            reason = "launches Triton kernels: needs a GPU or TRITON_INTERPRET=1"
            item.add_marker(pytest.mark.skip(reason=reason))
        callspec = getattr(item, "callspec", None)
        device = None if callspec is None else callspec.params.get("device")
        if device == INTERPRETED_DEVICE and has_gpu and not INTERPRETED:
            reason = "runs Triton kernels on a CPU: needs TRITON_INTERPRET=1"
            item.add_marker(pytest.mark.skip(reason=reason))
        if item.get_closest_marker("compile") and INTERPRETED:
            reason = "compiles Triton kernels: needs TRITON_INTERPRET unset"
            item.add_marker(pytest.mark.skip(reason=reason))
        # scripts/test.sh selects tests by this mark. A kernel test without Triton runs in either
        # mode, so it needs no skip.
        if KERNEL_TESTS in item.path.parents and not item.get_closest_marker("compile"):
            item.add_marker("interpreter")


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device in turn; ``cuda`` is skipped where there is none.

    See `tests/_back_end.py` for the CPU whose tensors go to Triton, or to torch without numba.
    """
    is_cpu = request.param in (INTERPRETED_DEVICE, TORCH_DEVICE)
    return torch.device("cpu" if is_cpu else request.param)


@pytest.fixture(autouse=True)
def _back_end(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send tensors on a CPU to Triton, or to torch, where the test's device asks for it."""
    callspec = getattr(request.node, "callspec", None)
    device = None if callspec is None else callspec.params.get("device")
    if device == INTERPRETED_DEVICE:
        importlib.import_module("tests._back_end").send_cpu_to_triton(monkeypatch)
    if device == TORCH_DEVICE:
        importlib.import_module("tests._back_end").send_cpu_to_torch(monkeypatch)


@pytest.fixture(autouse=True)
def _few_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut weight gradients into few shares in the interpreter."""
    if _INTERPRETER is not None:
        _INTERPRETER.cut_into_few_shares(monkeypatch)


@pytest.fixture(scope="session")
def triton_device() -> torch.device:
    """The device on which Triton kernels run here: ``cpu`` in the interpreter, else ``cuda``."""
    return torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Run each test on one thread, because tests run in several processes already.

    spconv's forward pass on a CPU is right on one thread only, because its scatter-add has a race.
    Each coordinate manager of MinkowskiEngine sets the number of threads of the whole process. So
    the number is set for every test.
    """
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed(request: pytest.FixtureRequest) -> None:
    """Seed torch from the test's name, so that the numbers do not depend on the order of tests."""
    torch.manual_seed(zlib.crc32(request.node.name.encode()))


@pytest.fixture(autouse=True)
def _poison_empty(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill the tensors of ``torch.empty`` and its relatives, so that a read of them always shows.

    The functions are replaced, not intercepted by a torch mode: modes belong to one thread, and the
    backward pass on a GPU runs in another.
    """
    if request.node.get_closest_marker("real_empty"):
        return
    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
        (torch.Tensor, "new_empty_strided"),
    ):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))


def _poisoned(allocate):
    def allocate_poisoned(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        if tensor.is_meta or tensor.is_quantized or tensor.layout is not torch.strided:
            return tensor
        with torch.no_grad():
            return tensor.fill_(_poison(tensor.dtype))

    return allocate_poisoned


def _poison(dtype: torch.dtype) -> float | int | bool:
    if dtype.is_floating_point or dtype.is_complex:
        return math.nan
    if dtype is torch.bool:
        return True
    # The value is out of range as an index and absurd as a count. It is near the top of the
    # range, but no power of two and not the maximum, because code may use these as sentinels.
    return torch.iinfo(dtype).max // 3 * 2 + 1
