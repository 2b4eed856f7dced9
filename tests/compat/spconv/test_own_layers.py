"""Layers that users write on spconv's parts, as spconv writes its own."""

import pickle

import pytest
import torch
from torch import nn

import compat.spconv.pytorch as spconv
from compat.spconv import constants, debug_utils
from compat.spconv.algo import ConvAlgo
from compat.spconv.cppconstants import CPU_ONLY_BUILD
from compat.spconv.pytorch import functional, ops
from compat.spconv.pytorch.core import ImplicitGemmIndiceData, IndiceData
from compat.spconv.tools import CUDAKernelTimer


class Depthwise(spconv.SparseModule):
    """A depthwise strided convolution, written as spconv writes its own layers."""

    def __init__(self, channels, indice_key, algo):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(27, channels))
        self.indice_key = indice_key
        self.algo = algo
        assert not CPU_ONLY_BUILD

    def forward(self, x):
        window = [3] * 3, [2] * 3, [1] * 3, [1] * 3
        shape = ops.get_conv_output_size(x.spatial_shape, *window)
        record = x.find_indice_pair(self.indice_key)
        if record is None:
            with x._timer.namespace("gen_pairs"), x._timer.record("pairs", 0):
                record = self.make_record(x, shape, *window)
        rows = record.pair_fwd if self.algo is not ConvAlgo.Native else self.table(record)
        present = (rows >= 0)[..., None]
        taken = torch.where(present, x.features[rows.clamp(min=0).long()], 0)
        out = x.shadow_copy().replace_feature((taken * self.weight[:, None]).sum(0))
        out.indices = record.out_indices
        out.indice_dict = x.indice_dict.copy()
        out.indice_dict[self.indice_key] = record
        out.spatial_shape = shape
        return out

    def make_record(self, x, shape, ksize, stride, padding, dilation):
        site = x.indices, x.batch_size, x.spatial_shape, self.algo
        layer = {
            "spatial_shape": x.spatial_shape, "out_spatial_shape": shape, "is_subm": False,
            "algo": self.algo, "ksize": ksize, "stride": stride, "dilation": dilation,
            "padding": padding,
        }  # fmt: skip
        if self.algo is ConvAlgo.Native:
            found = ops.get_indice_pairs(*site, ksize, stride, padding, dilation, [0] * 3)
            return IndiceData(found[0], x.indices, *found[1:], **layer)
        found = ops.get_indice_pairs_implicit_gemm(
            *site, ksize, stride, padding, dilation, [0] * 3, timer=x._timer
        )
        return ImplicitGemmIndiceData(found[0], x.indices, *found[2:], **layer)

    @staticmethod
    def table(record):
        pairs, counts = record.indice_pairs, record.indice_pair_num
        rows = torch.full((27, len(record.out_indices)), -1, device=pairs.device)
        for tap, count in enumerate(counts.tolist()):
            fine, coarse = pairs[:, tap, :count].long()
            rows[tap, coarse] = fine
        return rows


@pytest.mark.parametrize("algo", [ConvAlgo.Native, ConvAlgo.MaskImplicitGemm])
def test_own_layer_records_a_key_that_an_inverse_undoes(make, device, algo):
    torch.manual_seed(0)
    net = spconv.SparseSequential(
        Depthwise(4, "down", algo),
        nn.ReLU(),
        spconv.SubMConv3d(4, 4, 3, indice_key="subm", algo=algo),
        spconv.SparseInverseConv3d(4, 5, 3, indice_key="down", algo=algo),
    ).to(device)
    x = make(n=60, shape=(7, 7, 7))
    out = net(x)
    assert out.indices is x.indices
    assert out.spatial_shape == [7, 7, 7]

    depthwise, subm, inverse = net[0], net[2], net[3]
    own = spconv.SparseConv3d(4, 4, 3, 2, 1, bias=False, indice_key="down", algo=algo).to(device)
    own.weight = nn.Parameter(
        torch.diag_embed(depthwise.weight.detach()).reshape(3, 3, 3, 4, 4).permute(3, 0, 1, 2, 4)
    )
    expected = inverse(subm(spconv.SparseSequential(own, nn.ReLU())(x)))
    torch.testing.assert_close(out.features, expected.features)
    ours, theirs = (
        torch.autograd.grad(y.features.square().sum(), x.features) for y in (out, expected)
    )
    torch.testing.assert_close(ours, theirs)


def test_own_submanifold_layer_reads_the_table_again(make, device):
    x = make(n=60, shape=(7, 7, 7))
    layer = spconv.SubMConv3d(4, 6, 3, bias=False, indice_key="subm").to(device)
    y = layer(x)
    record = y.find_indice_pair("subm")
    again = functional.implicit_gemm(
        x.features, layer.weight, record.pair_fwd, record.pair_bwd, record.pair_mask_fwd_splits,
        record.pair_mask_bwd_splits, record.mask_argsort_fwd_splits,
        record.mask_argsort_bwd_splits, 60, record.masks, True, True,
    )  # fmt: skip
    torch.testing.assert_close(again, y.features)


def test_timer_takes_no_times(make):
    timer = make()._timer
    assert isinstance(timer, CUDAKernelTimer)
    assert not timer.enable
    assert timer.get_all_pair_time() == {}
    assert CUDAKernelTimer.collect_by_name("b", {"a.b": 1.0, "a.bc": 2.0}) == {"a.b": 1.0}


def test_debug_data_are_saved_where_asked(tmp_path, monkeypatch):
    debug_utils.spconv_save_debug_data(1)
    monkeypatch.setattr(constants, "SPCONV_DEBUG_SAVE_PATH", str(tmp_path / "data"))
    debug_utils.spconv_save_debug_data({"n": 3})
    assert pickle.loads((tmp_path / "data").read_bytes()) == {"n": 3}
