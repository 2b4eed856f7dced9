"""spconv and the adapter call the same methods, so users can override or patch them in either."""

import copy
from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tritonspconv.testing import assert_close, random_sites

pytest.importorskip("spconv", reason="the original, spconv 2.3.8, is not installed")

import spconv.pytorch as theirs
import spconv.pytorch.ops

import compat.spconv.pytorch as ours

pytestmark = [
    pytest.mark.parity,
    # The original may rely on the contents of `torch.empty`.
    pytest.mark.real_empty,
    pytest.mark.filterwarnings("ignore:Using a non-tuple sequence:UserWarning"),
]

SHAPE = [7, 6, 8]
LIBRARIES = {"spconv": theirs, "compat.spconv": ours}


@pytest.fixture(autouse=True)
def _no_stream(monkeypatch):
    monkeypatch.setattr(spconv.pytorch.ops, "get_current_stream", lambda: 0)


def tensor(sp, kind=None, channels=4):
    """Return a tensor whose rows are in the order of a strided layer's outputs."""
    torch.manual_seed(0)
    coords = random_sites(60, 3, extent=tuple(SHAPE)).coords
    feats = torch.randn(len(coords), channels, dtype=torch.float64)
    return (kind or sp.SparseConvTensor)(feats, coords, SHAPE, 2)


def layer(sp, kind, *args, **options):
    """Return a layer that has the same weights in both libraries."""
    torch.manual_seed(1)
    made = kind(*args, algo=sp.ConvAlgo.Native, **options)
    return made.double()


def in_order(x):
    """Return features and indices with rows in the order of their coordinates."""
    keys = x.indices.double() @ torch.tensor([1e6, 1e4, 1e2, 1.0], dtype=torch.float64)
    order = keys.argsort()
    return x.features[order], x.indices[order]


def compare(run):
    """Run a function on each library; compare the tensors and the notes."""
    found = {}
    for name, sp in LIBRARIES.items():
        notes = []
        x = run(sp, notes)
        found[name] = (*in_order(x), x.spatial_shape, sorted(x.indice_dict), notes)
    expected, got = found.values()
    assert_close(got[0], expected[0])
    assert got[1].tolist() == expected[1].tolist()
    assert got[2:] == expected[2:]
    assert got[4], "the override ran"


KINDS = {
    "submanifold": lambda sp: (sp.SubMConv3d, (4, 6, 3), {}),
    "strided": lambda sp: (sp.SparseConv3d, (4, 6, 3, 2, 1), {}),
    "1x1": lambda sp: (sp.SubMConv3d, (4, 6, 1), {}),
    "key": lambda sp: (sp.SubMConv3d, (4, 6, 3), {"indice_key": "k"}),
}


def doubled(original, notes):
    """Return a ``_conv_forward`` that doubles the weight and notes its arguments."""

    def _conv_forward(self, training, input, weight, bias, *args, **kwargs):
        notes.append((training, bias is not None, len(args), sorted(kwargs)))
        return original(self, training, input, weight * 2, bias, *args, **kwargs)

    return _conv_forward


@pytest.mark.parametrize("kind", KINDS)
def test_conv_forward_of_a_subclass(kind):
    def run(sp, notes):
        base, args, options = KINDS[kind](sp)
        derived = type(
            base.__name__, (base,), {"_conv_forward": doubled(base._conv_forward, notes)}
        )
        return sp.SparseSequential(layer(sp, derived, *args, **options))(tensor(sp))

    compare(run)


@pytest.mark.parametrize("kind", KINDS)
def test_conv_forward_patched_on_an_instance(kind):
    def run(sp, notes):
        base, args, options = KINDS[kind](sp)
        made = layer(sp, base, *args, **options)
        method = doubled(base._conv_forward, notes)
        made._conv_forward = lambda *args, **kwargs: method(made, *args, **kwargs)
        return made(tensor(sp))

    compare(run)


def test_conv_forward_patched_on_the_base(monkeypatch):
    """A norm and a ReLU follow the layer; the container must still call the patched method."""

    def run(sp, notes):
        base = sp.conv.SparseConvolution
        norm = nn.BatchNorm1d(6).double().eval()
        net = sp.SparseSequential(layer(sp, sp.SubMConv3d, 4, 6, 3), norm, nn.ReLU())
        with monkeypatch.context() as patch, torch.no_grad():
            patch.setattr(base, "_conv_forward", doubled(base._conv_forward, notes))
            return net(tensor(sp))

    compare(run)


def test_conv_forward_takes_what_it_is_handed():
    """Exporters and quantisation wrappers pass a weight, a bias and an addend of their own."""

    def run(sp, notes):
        made = layer(sp, sp.SubMConv3d, 4, 4, 3)
        x = tensor(sp)
        weight, bias = made.weight.detach() + 1, torch.arange(4, dtype=torch.float64)
        notes.append("called")
        return made._conv_forward(True, x, weight, bias, x, name="n", sparse_unique_name="")

    compare(run)


def test_a_layer_on_the_base_without_parameters():
    def run(sp, notes):
        class Frozen(sp.conv.SparseConvolutionBase, sp.SparseModule):
            def __init__(self, weight):
                sp.SparseModule.__init__(self, name="frozen")
                sp.conv.SparseConvolutionBase.__init__(
                    self, 3, 4, 6, 3, 2, 1, indice_key="k", algo=sp.ConvAlgo.Native
                )
                self.register_buffer("frozen_weight", weight)

            def forward(self, x):
                notes.append((self.weight_shape, self.is_inverseable(), self.conv1x1))
                return self._conv_forward(self.training, x, self.frozen_weight, None)

        torch.manual_seed(1)
        weight = torch.randn(6, 3, 3, 3, 4, dtype=torch.float64)
        return sp.SparseSequential(Frozen(weight))(tensor(sp))

    compare(run)


def test_checks_of_a_submanifold_key():
    """Without the check, a second layer of another dilation runs on the first one's pairs."""

    def run(sp, notes):
        class Trusting(sp.SubMConv3d):
            def _check_subm_reuse_valid(self, inp, spatial_shape, datas):
                notes.append((inp.spatial_shape, list(spatial_shape), datas.dilation, datas.ksize))

        first = layer(sp, sp.SubMConv3d, 4, 4, 3, indice_key="k")
        second = layer(sp, Trusting, 4, 4, 3, dilation=2, indice_key="k")
        return second(first(tensor(sp)))

    compare(run)


def test_checks_of_an_inverse():
    """Without the check, an inverse of another window reads the pairs of as many taps."""

    def run(sp, notes):
        class Trusting(sp.SparseInverseConv3d):
            def _check_inverse_reuse_valid(self, inp, spatial_shape, datas):
                notes.append((inp.spatial_shape, list(spatial_shape), datas.out_spatial_shape))

        down = layer(sp, sp.SparseConv3d, 4, 4, (1, 3, 3), 2, 1, indice_key="k")
        up = layer(sp, Trusting, 4, 4, (3, 1, 3), indice_key="k")
        return up(down(tensor(sp)))

    compare(run)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_checks_of_users_run_in_compiled_networks():
    class Submanifold(ours.SubMConv3d):
        def _check_subm_reuse_valid(self, *args):
            notes.append("submanifold")

    class Inverse(ours.SparseInverseConv3d):
        def _check_inverse_reuse_valid(self, *args):
            notes.append("inverse")

    notes = []
    torch.compiler.reset()
    net = ours.SparseSequential(
        ours.SubMConv3d(4, 4, 3, indice_key="k"),
        Submanifold(4, 4, 3, indice_key="k"),
        ours.SparseConv3d(4, 4, 3, 2, 1, indice_key="d"),
        Inverse(4, 4, 3, indice_key="d"),
    ).double()
    torch.compile(net, backend="eager")(tensor(ours))
    assert notes == ["submanifold", "inverse"]


@pytest.mark.parametrize("name", ["_check_subm_reuse_valid", "_check_inverse_reuse_valid"])
def test_checks_raise_for_any_object_with_the_fields(name):
    for sp in LIBRARIES.values():
        x = tensor(sp)
        made = layer(sp, sp.SubMConv3d, 4, 4, 3)
        fields = SimpleNamespace(
            is_subm=True, ksize=[3] * 3, dilation=[1] * 3, spatial_shape=SHAPE,
            out_spatial_shape=SHAPE, indices=x.indices, out_indices=x.indices,
        )  # fmt: skip
        getattr(made, name)(x, SHAPE, fields)
        for field, value in (
            ("ksize", [3, 1, 3]),
            ("spatial_shape" if "subm" in name else "out_spatial_shape", [9] * 3),
            ("indices" if "subm" in name else "out_indices", x.indices[:3]),
        ):
            wrong = copy.copy(fields)
            setattr(wrong, field, value)
            with pytest.raises(ValueError, match=r"same|another"):
                getattr(made, name)(x, SHAPE, wrong)


def test_layouts_of_saved_weights():
    def run(sp, notes):
        class Flipped(sp.SubMConv3d):
            def _load_weight_different_layout(self, state_dict, prefix, *args):
                notes.append((prefix, len(args)))
                state_dict[prefix + "weight"] = state_dict[prefix + "weight"].flip(1)

        net = sp.SparseSequential(layer(sp, Flipped, 4, 4, 3))
        net.load_state_dict(net.state_dict())
        return net(tensor(sp))

    compare(run)


@pytest.mark.parametrize("patched", ["_custom_kaiming_uniform_", "_calculate_correct_fan"])
def test_initial_weights(patched):
    def run(sp, notes):
        def ones(self, tensor, *args, **kwargs):
            notes.append(kwargs)
            return nn.init.ones_(tensor)

        def ninety(self, mode):
            notes.append(mode)
            return 90

        method = ones if "kaiming" in patched else ninety
        derived = type("Derived", (sp.SubMConv3d,), {patched: method})
        return layer(sp, derived, 4, 4, 3)(tensor(sp))

    compare(run)


def test_tensors_that_copy_themselves():
    """Layers, pools and containers keep the subclass and the note that it carries."""

    def run(sp, notes):
        class Noted(sp.SparseConvTensor):
            note = None

            def shadow_copy(self):
                copied = Noted(
                    self.features, self.indices, self.spatial_shape, self.batch_size,
                    indice_dict=self.indice_dict,
                )  # fmt: skip
                copied.note = self.note
                return copied

            def replace_feature(self, feature):
                copied = self.shadow_copy()
                copied._features = feature
                return copied

            def find_indice_pair(self, key):
                notes.append(key)
                return super().find_indice_pair(key)

        x = tensor(sp, Noted)
        x.note = "kept"
        options = {"algo": sp.ConvAlgo.Native}
        net = sp.SparseSequential(
            layer(sp, sp.SubMConv3d, 4, 4, 3, indice_key="k"),
            nn.ReLU(),
            layer(sp, sp.SubMConv3d, 4, 4, 1),
            layer(sp, sp.SparseConv3d, 4, 4, 3, 2, 1, indice_key="d"),
            sp.SparseReLU(),
            layer(sp, sp.SparseInverseConv3d, 4, 4, 3, indice_key="d"),
            sp.SparseMaxPool3d(2, indice_key="p", **options),
            sp.SparseIdentity(),
        )
        y = net(x)
        assert (type(y), y.note) == (Noted, "kept")
        seen = set(notes)
        notes[:] = sorted(seen)
        return y

    compare(run)


READERS = {
    "convolution": lambda sp: layer(sp, sp.SubMConv3d, 4, 4, 3),
    "1x1": lambda sp: layer(sp, sp.SubMConv3d, 4, 4, 1),
    "addend": lambda sp: lambda x: layer(sp, sp.SubMConv3d, 4, 4, 3)(tensor(sp), add_input=x),
    "pool": lambda sp: sp.SparseMaxPool3d(2, algo=sp.ConvAlgo.Native),
    "container": lambda sp: sp.SparseSequential(nn.ReLU()),
    "table": lambda sp: lambda x: sp.AddTable()([x, x]),
    "addition": lambda sp: lambda x: x + tensor(sp),
    "addition from the right": lambda sp: lambda x: tensor(sp) + x,
    "minus": lambda sp: lambda x: x.minus(),
    "shadow_copy": lambda sp: lambda x: x.shadow_copy(),
    "dense": lambda sp: lambda x: sp.SparseConvTensor.from_dense(x.dense(False)),
}


@pytest.mark.parametrize("reader", READERS)
def test_features_of_a_subclass(reader):
    """Everything reads the property, so a subclass may compute its features."""

    def run(sp, notes):
        class Doubled(sp.SparseConvTensor):
            @property
            def features(self):
                notes.append("read")
                return self._features * 2

        out = READERS[reader](sp)(tensor(sp, Doubled))
        notes[:] = sorted(set(notes))
        return out

    compare(run)


def test_what_a_user_attached_stays_behind():
    for sp in LIBRARIES.values():
        x = tensor(sp)
        x.mask = x.features > 0
        y = layer(sp, sp.SubMConv3d, 4, 4, 3)(x)
        assert not hasattr(y, "mask")
        assert not hasattr(x.replace_feature(x.features), "mask")
        assert type(y) is sp.SparseConvTensor


def test_containers_run_their_own_forward():
    def run(sp, notes):
        class Counting(sp.SparseSequential):
            def __len__(self):
                notes.append("len")
                return super().__len__()

            def add(self, module, name=None):
                notes.append(type(module).__name__)
                super().add(module, name)

        net = Counting(layer(sp, sp.SubMConv3d, 4, 4, 3))
        net.add(nn.ReLU())
        assert type(net[1]) is nn.ReLU
        taken = sp.SparseSequential(OrderedDict([("1", nn.ReLU())]))
        with pytest.raises(KeyError):
            taken.add(nn.ReLU())
        notes[:] = sorted(set(notes))
        return net(tensor(sp))

    compare(run)


@pytest.mark.parametrize("subm", [False, True])
def test_voxel_counts_follow_training_and_evaluation(subm):
    for sp in LIBRARIES.values():
        made = sp.conv.SparseConvolution(
            3, 4, 4, 3, 1 if subm else 2, 1, subm=subm, record_voxel_count=True, bias=False,
            algo=sp.ConvAlgo.Native,
        ).double()  # fmt: skip
        rows = made.eval()(tensor(sp)).features.shape[0]
        count = made.get_max_num_voxels()
        assert (None if count is None else count.tolist()) == (None if subm else [rows])
