"""scripts/tools/scale.py at a size for a CPU: it passes, and a wrong result fails it."""

import pytest
import torch

from scripts.tools import scale


@pytest.mark.parametrize("problem", scale.PROBLEMS, ids=lambda problem: problem.title)
def test_layers_are_right_at_sampled_rows(problem, capsys):
    assert scale.run(problem, 600, torch.device("cpu"))
    assert f"| {problem.title} | 600 |" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", ["output", "gradient of other rows"])
def test_a_wrong_result_fails(wrong, monkeypatch):
    right = scale.ops.sparse_conv

    def sparse_conv(feats, weight, kernel_map):
        out = right(feats, weight, kernel_map)
        if wrong == "output":
            return out * 1.02
        return out + 1e-3 * (feats - feats.detach()).roll(1, 0)

    monkeypatch.setattr(scale.ops, "sparse_conv", sparse_conv)
    assert not scale.run(scale.PROBLEMS[0], 600, torch.device("cpu"))
