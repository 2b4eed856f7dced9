#!/usr/bin/env bash
# Triton 3.9.0: its interpreter lists triton.language again at each call of a function in a kernel.
#
# Guess: with TRITON_INTERPRET=1 a launch replaces the functions of triton.language once, and a kernel
#   that calls a function of its own costs one Python call more for each program.
# What happens: each such call lists all members of four modules and classes by inspect.getmembers
#   and replaces the built-in ones again, in each program of the launch. On small kernels this takes
#   half of the time of the interpreter. A suite of tests that interprets kernels gets twice as
#   quick if it keeps the lists, or if kernels call few functions.
# Seen: a kernel without functions lists members 4 times, with 1 program and with 16; a kernel with
#   one call lists them 8 and 68 times.
#
# Exits with 1 if Triton behaves otherwise.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --target "$folder/torch" torch==2.13.0 numpy==2.4.1
python3 -m pip install --quiet --no-deps --target "$folder/triton" triton==3.9.0
cat >"$folder/lists.py" <<'PYTHON'
import inspect

import torch
import triton
import triton.language as tl


@triton.jit
def doubled(x):
    return 2 * x


@triton.jit
def flat(ptr):
    at = ptr + tl.program_id(0)
    tl.store(at, 2 * tl.load(at))


@triton.jit
def calling(ptr):
    at = ptr + tl.program_id(0)
    tl.store(at, doubled(tl.load(at)))


calls = 0
getmembers = inspect.getmembers


def counted(*args):
    global calls
    calls += 1
    return getmembers(*args)


inspect.getmembers = counted
found = []
for kernel in (flat, calling):
    for programs in (1, 16):
        calls, x = 0, torch.ones(16)
        kernel[(programs,)](x)
        assert x[:programs].eq(2).all()
        assert x[programs:].eq(1).all()
        found.append((kernel.fn.__name__, programs, calls))
print(triton.__version__, found)
expected = [("flat", 1, 4), ("flat", 16, 4), ("calling", 1, 8), ("calling", 16, 68)]
assert triton.__version__ == "3.9.0"
assert found == expected, f"Triton {triton.__version__} behaves otherwise: {found}"
PYTHON
TRITON_INTERPRET=1 PYTHONPATH=$folder/triton:$folder/torch python3 "$folder/lists.py"
