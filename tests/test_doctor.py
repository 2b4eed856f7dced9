"""The report on an installation."""

import pytest
import torch

from tests._process import run
from tritonspconv import __version__
from tritonspconv.cli import doctor, main


def test_it_reports_versions_devices_and_results(tmp_path):
    lines = run("-m", "tritonspconv", "doctor", cwd=tmp_path).stdout.splitlines()
    facts = dict(line.split(maxsplit=1) for line in lines if line and not line.startswith(" "))
    assert facts["tritonspconv"] == __version__
    assert facts["torch"].startswith(torch.__version__)
    assert "vectorised torch" in facts["cpu:"]
    assert lines[-1] == "All is well."
    checked = [line.split()[:2] for line in lines if line.endswith("right")]
    assert len(checked) == 9 * (1 + torch.cuda.device_count())
    assert ["strided", "bfloat16"] in checked


@pytest.mark.parametrize("what", ["value", "exception"])
def test_a_wrong_result_shows_in_the_exit_status(what, monkeypatch, capsys):
    right = doctor.ops.sparse_conv

    def wrong(feats, weight, kernel_map):
        if what == "exception":
            raise RuntimeError("no such kernel")
        return right(feats, weight, kernel_map) * (1 + torch.eye(1, weight.shape[2]) / 100)

    monkeypatch.setattr(doctor.ops, "sparse_conv", wrong)
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    expected = {"value": "WRONG: output[", "exception": "FAILED: RuntimeError: no such kernel"}
    assert expected[what] in out
    assert "please report it" in out
