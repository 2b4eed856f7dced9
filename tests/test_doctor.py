"""The report on an installation."""

import re

import pytest
import torch

from tests._process import run
from tritonspconv import __version__, _self_check, kernels
from tritonspconv.cli import doctor, main
from tritonspconv.testing import random_sites


def test_it_reports_versions_devices_and_results(tmp_path):
    lines = run("-m", "tritonspconv", "doctor", cwd=tmp_path).stdout.splitlines()
    facts = dict(line.split(maxsplit=1) for line in lines if line and not line.startswith(" "))
    assert facts["tritonspconv"] == __version__
    assert facts["torch"].startswith(torch.__version__)
    has_numba = kernels.has_numba(torch.device("cpu"))
    assert facts["cpu:"].endswith("numba kernels" if has_numba else "vectorised torch")
    assert lines[-1] == "All is well."
    kinds = [line[2:16].strip() for line in lines if line.endswith("right")]
    assert set(kinds) == set(_self_check.CHECKS)
    assert len(kinds) == 4 * len(_self_check.CHECKS) * (1 + torch.cuda.device_count())


@pytest.mark.parametrize("kind", _self_check.CHECKS)
@pytest.mark.parametrize("fault", ["output", "gradient"])
def test_each_check_finds_a_fault_of_one_in_a_hundred(kind, fault, monkeypatch):
    """Give every operation of a check, in turn, a wrong output and a wrong gradient."""
    for name in ("sparse_conv", "sparse_channelwise_conv", "sparse_pool", "global_pool"):
        right = getattr(_self_check.ops, name)

        def wrong(feats, *args, right=right):
            if fault == "output":
                return right(feats, *args) * 1.01
            # The right value of the features with a gradient that is too large.
            feats = feats.detach() + (feats - feats.detach()) * 1.01
            return right(feats, *args)

        monkeypatch.setattr(_self_check.ops, name, wrong)
    torch.manual_seed(0)
    with pytest.raises(AssertionError, match="output" if fault == "output" else "of the features"):
        _self_check.CHECKS[kind](random_sites(200, extent=9), torch.float32)


@pytest.mark.parametrize("what", ["value", "exception"])
def test_a_wrong_result_shows_in_the_exit_status(what, monkeypatch, capsys):
    right = _self_check.ops.sparse_conv

    def wrong(feats, weight, kernel_map, bias):
        if what == "exception":
            raise RuntimeError("no such kernel")
        return right(feats, weight, kernel_map, bias) * (1 + torch.eye(1, weight.shape[2]) / 100)

    monkeypatch.setattr(_self_check.ops, "sparse_conv", wrong)
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    expected = {"value": "WRONG: output[", "exception": "FAILED: RuntimeError: no such kernel"}
    assert expected[what] in out
    assert "please report it" in out
    assert ("Traceback (most recent call last)" in out) == (what == "exception")


def test_a_failure_is_the_last_line_of_its_innermost_cause():
    outer = RuntimeError("at 67:4:\n  _look_up(\n  ^")
    outer.__cause__ = ValueError("at 47:16:\n  plane = moved(\n  ^\nno such type\n  ^")
    assert doctor._reason(outer) == "ValueError: no such type"
    assert doctor._reason(ValueError()) == "ValueError: no message"


@pytest.mark.parametrize(
    ("setting", "what", "advice"),
    [
        ("0", "TRITONSPCONV_NUMBA=0 switches the numba kernels off", "Unset the variable"),
        ("", "numba is not installed, or cannot", r"pip install 'tritonspconv\[cpu\]'"),
    ],
)
def test_a_cpu_without_numba_is_a_finding(setting, what, advice, monkeypatch):
    monkeypatch.setattr(doctor, "has_numba", lambda device: False)
    monkeypatch.setenv(kernels.NUMBA_VARIABLE, setting)
    (finding,) = doctor.examine([torch.device("cpu")])
    assert finding.what.startswith(what)
    assert re.search(advice, finding.advice)
    monkeypatch.setattr(doctor, "has_numba", lambda device: True)
    assert doctor.examine([torch.device("cpu")]) == []
