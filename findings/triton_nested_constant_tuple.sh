#!/usr/bin/env bash
# Triton 3.6.0: a tuple inside a constant tuple cannot be an argument of a kernel's function.
#
# Guess: `first_of(PAIR[1])` and `SECOND: tl.constexpr = PAIR[1]` with `first_of(SECOND)` are the same,
#   because PAIR is a constexpr and so is the parameter of first_of.
# What happens: Triton 3.6.0, which torch 2.11.0 brings, refuses the first spelling when it compiles
#   the kernel, with an AttributeError that names neither the tuple nor the argument. Triton 3.9.0
#   takes both. A kernel that is compiled by the newest Triton alone may fail for users of torch 2.11.
# Seen: 3.6.0: by_element: AttributeError("'int' object has no attribute 'type'"), by_name: compiles;
#   3.9.0: both compile.
#
# The kernels are compiled for sm_90, without a GPU. Exits with 1 if Triton behaves otherwise.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat >"$folder/nested.py" <<'PYTHON'
import sys

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def first_of(NUMBERS: tl.constexpr):
    return NUMBERS[0]


@triton.jit
def by_element(out_ptr, PAIR: tl.constexpr):
    tl.store(out_ptr, first_of(PAIR[1]))


@triton.jit
def by_name(out_ptr, PAIR: tl.constexpr):
    SECOND: tl.constexpr = PAIR[1]
    tl.store(out_ptr, first_of(SECOND))


def outcome(kernel) -> str:
    signature = {"out_ptr": "*i32", "PAIR": "constexpr"}
    source = ASTSource(kernel, signature, {"PAIR": (0, (7, 8))})
    options = {"enable_fp_fusion": True}
    try:
        triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    except Exception as error:
        while error.__cause__ is not None:
            error = error.__cause__
        return str(error).strip().splitlines()[-1]
    return "compiles"


found = [outcome(kernel) for kernel in (by_element, by_name)]
print(triton.__version__, found)
assert triton.__version__ == sys.argv[1]
refusal = """AttributeError("'int' object has no attribute 'type'")"""
expected = [refusal if triton.__version__ == "3.6.0" else "compiles", "compiles"]
assert found == expected, f"Triton {triton.__version__} behaves otherwise: {found}"
PYTHON
export TRITON_CACHE_DIR=$folder/cache
for version in 3.6.0 3.9.0; do
    python3 -m pip install --quiet --no-deps --target "$folder/$version" "triton==$version"
    PYTHONPATH=$folder/$version python3 "$folder/nested.py" "$version"
done
