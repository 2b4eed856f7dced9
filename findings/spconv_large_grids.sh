#!/usr/bin/env bash
# spconv 2.3.8 (CPU build): submanifold convolutions give wrong sums in grids of 2^20 cells an axis.
#
# One would guess: a grid may be as large as its coordinates allow (int32), because spconv keeps
# only active sites and counts cells in 64 bits on a GPU.
# What happens: with 2^20 or more cells an axis, SubMConv3d adds rows that are no neighbours. With
# 2^11 cells an axis the sums are right; strided layers are right in both. No error, no warning.
# Seen: 2^11: [3, 3, 3, 9, 9] (right); 2^20: [9, 9, 19, 9, 15].
#
# Versions: spconv 2.3.8 (CPU wheel), torch 2.13.0, Python 3.11. PYTHON names an interpreter that has
# them; without it they are installed into a temporary folder. Fails if the behaviour changes.
set -euo pipefail
python=${PYTHON:-}
if [[ -z $python ]]; then
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
    python3 -m venv "$folder/venv"
    python=$folder/venv/bin/python
    "$python" -m pip install --quiet spconv==2.3.8 torch==2.13.0 numpy
fi
OMP_NUM_THREADS=1 "$python" - <<'PYTHON_CODE'
import importlib.metadata
import warnings

warnings.simplefilter("ignore")
import torch

torch.set_num_threads(1)
import spconv.pytorch as spconv

for name, expected in (("spconv", "2.3.8"), ("torch", "2.13.0")):
    found = importlib.metadata.version(name).partition("+")[0]
    assert found == expected, f"{name} {found} is installed; this script is about {expected}"


def sums(extent):
    """Sums over 3x3x3 windows of the values 1 to 5: rows 0 and 1 touch, and rows 3 and 4."""
    last = extent - 1
    rows = [[0, 1, 2, 3], [0, 1, 2, 4], [3, 5, 6, 7], [3, last, 5, 5], [3, last, 5, 6]]
    layer = spconv.SubMConv3d(1, 1, 3, bias=False, algo=spconv.ConvAlgo.Native)
    torch.nn.init.ones_(layer.weight)
    values = torch.arange(1.0, 6.0)[:, None]
    x = spconv.SparseConvTensor(values, torch.tensor(rows).int(), [extent] * 3, 4)
    with torch.no_grad():
        return layer(x).features.flatten().tolist()


small, large = sums(2**11), sums(2**20)
print("2^11 cells an axis:", small)
print("2^20 cells an axis:", large)
assert small == [3, 3, 3, 9, 9]
assert large != [3, 3, 3, 9, 9], "spconv now adds neighbours only: the finding no longer holds"
PYTHON_CODE
echo "as described"
