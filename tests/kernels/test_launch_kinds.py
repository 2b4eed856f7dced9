"""Which launches share a compiled kernel: those, and only those, that Triton compiles alike."""

import itertools

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import triton
import triton.language as tl

from tests.kernels._record import record_launches
from tritonspconv.kernels.triton import _launch

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


@pytest.mark.parametrize(("first", "second"), list(itertools.combinations(ARGUMENTS, 2)))
def test_arguments_share_a_compiled_kernel_where_triton_compiles_them_alike(
    first, second, monkeypatch
):
    monkeypatch.setattr(_launch, "_is_known_version", True)
    monkeypatch.setattr(_launch, "_runner", lambda compiled, constants: lambda *_: None)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0, raising=False)
    bound = _launch.BoundKernel(kernel, {"BLOCK": 16})
    with record_launches() as apart:
        for name in (first, second):
            kernel[(1,)](*ARGUMENTS[name], BLOCK=16, enable_fp_fusion=True)
    with record_launches():
        for name in (first, second):
            bound._launch((1,), torch.device("cuda", 0), ARGUMENTS[name])
    assert len(bound.compiled) == len(apart)
