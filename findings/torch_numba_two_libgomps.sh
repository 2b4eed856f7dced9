#!/usr/bin/env bash
# torch 2.13.0 and numba 0.68.1: one process has two copies of GNU's OpenMP, each with its own threads.
#
# Guess: numba's threading layer "omp" and torch both use GNU's OpenMP, so they share one team of
#   threads.
# What happens: torch's wheel loads the libgomp that it brings, and numba's layer loads the one of the
#   system. After each operation of torch, torch's idle threads spin for a while on the cores that
#   numba's threads need.
# Seen: numba says that its layer is omp, and two files of libgomp are mapped.
#
# Needs libgomp1 of the system (Debian: it comes with gcc). Exits with 1 if they behave otherwise.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "torch==2.13.0" "numba==0.68.1"
NUMBA_THREADING_LAYER=omp "$folder/venv/bin/python" - <<'PYTHON'
from pathlib import Path

import numba
import numpy as np
import torch

print("torch", torch.__version__, "numba", numba.__version__)


@numba.njit(parallel=True)
def add_one(values):
    for index in numba.prange(len(values)):
        values[index] += 1


values = np.zeros(1 << 20)
torch.from_numpy(values).add_(1)
add_one(values)
maps = Path("/proc/self/maps").read_text().split()
libraries = {entry for entry in maps if "libgomp" in entry}
print("layer of numba:", numba.threading_layer())
print("files of libgomp:", len(libraries))
assert "OpenMP" in torch.__config__.parallel_info()
assert numba.threading_layer() == "omp"
assert len(libraries) == 2, "fixed: one libgomp serves both"
PYTHON
