"""``compat.install`` of MinkowskiEngine: import names, a training script, spawned workers."""

from pathlib import Path

from tests._process import ROOT, run, write

TRAIN = """
import pickle

import torch

import MinkowskiEngine as ME
import MinkowskiEngine.MinkowskiFunctional as MF
import MinkowskiEngine.MinkowskiOps as me
import MinkowskiEngineBackend._C as MEB
from MinkowskiCommon import convert_to_int_list
from MinkowskiEngine.MinkowskiPooling import MinkowskiAvgPooling
from MinkowskiEngine.MinkowskiSparseTensor import SparseTensor
from MinkowskiEngine.modules.resnet_block import BasicBlock
from MinkowskiEngine.utils import SparseCollation, sparse_quantize

class Scans(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        points = torch.rand(50, 3, generator=torch.Generator().manual_seed(index))
        return sparse_quantize(points, points, torch.arange(50), quantization_size=0.2)

class Net(ME.MinkowskiNetwork):
    def __init__(self):
        super().__init__(D=3)
        self.stem = ME.MinkowskiConvolution(3, 4, kernel_size=3, dimension=3)
        self.block = BasicBlock(4, 4, dimension=3)
        self.down = ME.MinkowskiConvolution(4, 4, kernel_size=2, stride=2, dimension=3)
        self.up = ME.MinkowskiConvolutionTranspose(4, 4, kernel_size=2, stride=2, dimension=3)

    def forward(self, x):
        x = self.block(MF.relu(self.stem(x)))
        return me.cat(x, self.up(self.down(x)))

if __name__ == "__main__":
    assert ME.__version__ == "0.5.4"
    assert SparseTensor is ME.SparseTensor and MinkowskiAvgPooling is ME.MinkowskiAvgPooling
    assert MEB.RegionType is ME.RegionType and ME.RegionType(1) == MEB.RegionType.HYPER_CROSS
    assert convert_to_int_list(2, 3) == [2, 2, 2]
    pickled = b"cMinkowskiEngine.MinkowskiOps\\nMinkowskiLinear\\n."
    assert pickle.loads(pickled) is ME.MinkowskiLinear
    torch.manual_seed(0)
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    loader = torch.utils.data.DataLoader(
        Scans(), 4, num_workers=1, multiprocessing_context="spawn", collate_fn=SparseCollation()
    )
    losses = []
    for _ in range(2):
        for coords, feats, _ in loader:
            loss = net(ME.SparseTensor(feats, coordinates=coords)).F.square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[1] < losses[0], losses
    print("trained")
"""


def test_script_trains_without_edits(tmp_path: Path):
    script = write(tmp_path, "tools/train.py", TRAIN)
    # An installed original changes nothing.
    write(tmp_path, "tools/MinkowskiEngine/__init__.py", '__version__ = "1.0"\n')
    process = run("-m", "compat", "--as", "MinkowskiEngine", "--", script, cwd=ROOT, PYTHONPATH="")
    assert (process.stdout, process.stderr) == ("trained\n", "")


def test_modules_are_the_adapters_by_both_kinds_of_name(tmp_path: Path):
    code = """
import sys
import compat
with compat.install("MinkowskiEngine"):
    assert "torch" not in sys.modules
    import MinkowskiEngine, MinkowskiOps, MinkowskiEngineBackend._C
    import MinkowskiEngine.modules.senet_block, MinkowskiEngine.diagnostics
    import compat.minkowski
    assert MinkowskiEngine is compat.minkowski
    assert MinkowskiOps is MinkowskiEngine.MinkowskiOps is compat.minkowski.MinkowskiOps
    assert MinkowskiOps.__spec__.name == MinkowskiOps.__name__ == "compat.minkowski.MinkowskiOps"
assert [name for name in sys.modules if name.startswith("Minkowski")] == []
"""
    run("-c", code, cwd=tmp_path)
