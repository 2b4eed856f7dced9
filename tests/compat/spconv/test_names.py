"""Names beside layers and tensors that exporters and tests of downstream projects import."""

import importlib

import numpy as np
import pytest
import torch
from torch import nn

import compat.cumm.tensorview as tv
import compat.spconv.pytorch as spconv
from compat.spconv import constants
from compat.spconv.core import Activation
from compat.spconv.pytorch import cppcore, interpreter
from compat.spconv.test_utils import TestCase, generate_sparse_data, params_grid


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (Activation.None_, [-2.0, 3.0]),
        (Activation.ReLU, [0.0, 3.0]),
        (Activation.Sigmoid, [1 / (1 + np.exp(2)), 1 / (1 + np.exp(-3))]),
        (Activation.LeakyReLU, [-0.5, 3.0]),
    ],
)
def test_apply_act(kind, expected):
    got = spconv.conv._apply_act(torch.tensor([-2.0, 3.0]), kind, 0.25, 0.0)
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float32))


def test_modules_that_print(make, capsys):
    x = make()
    assert spconv.modules.PrintTensorMeta()(x) is x
    assert str(x.features.min()) in capsys.readouterr().out
    clock = spconv.modules.PrintCurrentTime()
    clock.first_time -= 100
    assert clock(x, "now") is x
    name, seconds = capsys.readouterr().out.split()
    assert name == "now"
    assert float(seconds) > 100
    clock(x, "now", reset=True)
    assert float(capsys.readouterr().out.split()[1]) < 100


def test_maximum_value_int():
    count = torch.tensor([3], dtype=torch.int32)
    for value, expected in ((2, 3), (7, 7)):
        spconv.ops.maximum_value_int_(count, value)
        assert count.tolist() == [expected]


def test_tensors_as_cumm_has_them():
    x = torch.arange(6, dtype=torch.int32)
    seen = cppcore.torch_tensor_to_tv(x, shape=[2, 3])
    assert isinstance(seen, tv.Tensor)
    copied = seen.numpy()
    x[0] = 9
    assert seen.numpy_view().tolist() == [[9, 1, 2], [3, 4, 5]]
    assert copied.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert cppcore.torch_tensor_to_tv(x - 10, tv.uint32).dtype == torch.uint32
    assert cppcore.torch_tensor_to_tv(x, stride=[2], shape=[3]).tolist() == [9, 2, 4]
    assert [t.shape for t in cppcore.torch_tensors_to_tv(x, x[:2])] == [(6,), (2,)]
    with pytest.raises(ValueError, match=r"dtype must be a type of cumm\.tensorview"):
        cppcore.torch_tensor_to_tv(x, 99)


@pytest.mark.gpu
def test_streams_and_devices():
    assert cppcore.get_current_stream() == torch.cuda.current_stream().cuda_stream
    assert cppcore.get_arch() == torch.cuda.get_device_capability()


def test_a_cpu_has_no_stream():
    if not torch.cuda.is_available():
        assert cppcore.get_current_stream() == 0


def test_settings_can_be_reached_through_pytorch(monkeypatch):
    """Users may read and write ``spconv.constants``, and layers see the new values."""
    assert spconv.constants.PYTORCH_VERSION >= [2, 6, 0]
    assert spconv.constants.is_amp_enabled() is torch.is_autocast_enabled()
    monkeypatch.setattr(constants, "SPCONV_ALLOW_TF32", False)
    spconv.constants.SPCONV_ALLOW_TF32 = True
    assert constants.SPCONV_ALLOW_TF32
    assert spconv.constants.SPCONV_ALLOW_TF32
    spconv.constants.new_setting = 1
    assert constants.new_setting == 1
    del spconv.constants.new_setting
    assert not hasattr(constants, "new_setting")
    with pytest.raises(AttributeError, match="'nonsense'"):
        _ = spconv.constants.nonsense


def test_an_interpreter_runs_handlers(capsys, monkeypatch):
    monkeypatch.setattr(interpreter, "REGISTERED_NODE_HANDLERS", {})
    calls = []

    @interpreter.register_node_handler(nn.ReLU)
    def relu(context, module, args, kwargs, name):
        calls.append((context, type(module), name))
        return args[0].relu()

    @interpreter.register_node_handler(torch.add)
    def add(context, target, args, kwargs, name):
        calls.append(target)
        return args[0] + args[1]

    @interpreter.register_method_handler("neg", [torch.Tensor])
    def neg(context, target, args, kwargs, name):
        calls.append(target)
        return -args[0]

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.relu = nn.ReLU()

        def forward(self, x):
            return torch.add(self.relu(x), x).neg()

    traced = torch.fx.symbolic_trace(Net())
    x = torch.tensor([-1.0, 2.0])
    (out,) = interpreter.NetworkInterpreter("net", traced, [x], verbose=True).run()
    assert out.tolist() == [1.0, -4.0]
    assert calls == [("net", nn.ReLU, "relu"), torch.add, "neg"]
    assert "[Module.ReLU relu]" in capsys.readouterr().out
    with pytest.raises(AssertionError, match=r"no handler is registered for .*Tanh"):
        interpreter.get_node_handler(nn.Tanh)


def test_helpers_of_tests():
    assert params_grid([1, 2], [3, 4, 5]) == [[1, 3], [1, 4], [1, 5], [2, 3], [2, 4], [2, 5]]
    data = generate_sparse_data([4, 6], [3, 5], 2, shape_scale=2)
    indices, features = data["indices"], data["features"]
    assert (indices.shape, indices.dtype, features.shape) == ((8, 3), np.int32, (8, 2))
    assert indices[:, 2].tolist() == [0] * 3 + [1] * 5
    assert not (indices[:, :2] % 2).any()
    dense = data["features_dense"]
    assert dense.shape == (2, 2, 4, 6)
    y, x, sample = indices.T
    np.testing.assert_array_equal(dense[sample, :, y, x], features)
    assert (dense != 0).sum() == 16
    whole = generate_sparse_data([4, 6], [3], 2, integer=True, data_range=(0, 9), with_dense=False)
    assert "features_dense" not in whole
    assert (whole["features"] % 1 == 0).all()


def test_comparisons_of_tests():
    case = TestCase()
    case.assertAllEqual([1.0, np.nan], np.array([1.0, np.nan]))
    case.assertAllClose({"a": [1.0]}, {"a": [1.0 + 1e-7]})
    for wrong in ([1.0, 2.0], [[1.0, np.nan]]):
        with pytest.raises(AssertionError):
            case.assertAllEqual([1.0, np.nan], wrong)
    for left, right in (([1.0], [1.1]), ([1.0], [[1.0]]), ({"a": 1}, {"b": 1})):
        with pytest.raises(AssertionError):
            case.assertAllClose(left, right)
    with pytest.raises(ValueError, match="two dicts or none"):
        case.assertAllClose({"a": 1}, 1)


@pytest.mark.parametrize(
    "name",
    ["algocore", "benchmark", "build", "core_cc", "csrc", "gencode", "pytorch.quantization"],
)
def test_modules_that_are_not_provided_say_so(name):
    with pytest.raises(ImportError, match=rf"^spconv\.{name} is not provided\. [A-Z].*\.$"):
        importlib.import_module(f"compat.spconv.{name}")
