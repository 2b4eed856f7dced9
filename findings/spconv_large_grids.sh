#!/usr/bin/env bash
# spconv 2.3.8 (CPU build): layers mix up cells in grids of more than 2^32 cells.
#
# One would guess: a grid may be as large as its coordinates allow (int32), because spconv keeps
# only active sites and counts cells in 64 bits on a GPU.
# What happens: two cells whose numbers differ by a multiple of 2^32 are one cell. SubMConv3d adds
# rows that are no neighbours, and SparseConv3d drops output rows. No error, no warning.
# Seen: five rows in a grid of 2^11 cells an axis: sums [3, 3, 3, 9, 9] (right); of 2^20:
# [9, 9, 19, 9, 15]. Two rows that are 2^9 cells apart in a grid of 2^11 cells an axis: 26 output
# rows of a 3x3x3 window (right); 2^10 cells apart, which is 2^32 numbers: 18.
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


def outputs(distance):
    """Number of sites that a 3x3x3 window of stride 1 reaches from two rows."""
    rows = torch.tensor([[0, 0, 0, 0], [0, distance, 0, 1]]).int()
    layer = spconv.SparseConv3d(1, 1, 3, 1, 1, bias=False, algo=spconv.ConvAlgo.Native)
    x = spconv.SparseConvTensor(torch.ones(2, 1), rows, [2**11] * 3, 1)
    with torch.no_grad():
        return len(layer(x).indices)


near, far = outputs(2**9), outputs(2**10)
print("2^9 cells apart:", near, "outputs")
print("2^10 cells apart:", far, "outputs")
assert near == 26
assert far != 26, "spconv now tells the cells apart: the finding no longer holds"
PYTHON_CODE
echo "as described"
