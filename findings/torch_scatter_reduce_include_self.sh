#!/usr/bin/env bash
# torch 2.13.0: the gradient of scatter_reduce("amax", include_self=False) still counts self.
#
# Guess: with include_self=False, the values of `self` take no part, so the one source value that is
#   the maximum gets the whole gradient.
# What happens: if the maximum equals what `self` held before, the source gets half of the gradient,
#   and the other half is lost. The output is right.
# Seen: grad [0.5, 0.0] where [1.0, 0.0] is right; with another value in `self`, grad [1.0, 0.0].
#
# Exits with 1 if torch behaves otherwise.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "torch==2.13.0" "numpy<3"
"$folder/venv/bin/python" - <<'PYTHON'
import torch

print("torch", torch.__version__)


def gradient(before: float) -> list[float]:
    source = torch.tensor([5.0, -1.0], requires_grad=True)
    index = torch.tensor([0, 0])
    out = torch.full((1,), before).scatter_reduce(0, index, source, "amax", include_self=False)
    assert out.item() == 5.0
    return torch.autograd.grad(out.sum(), source)[0].tolist()


print("self held the maximum: ", gradient(5.0))
print("self held another value:", gradient(4.0))
assert gradient(5.0) == [0.5, 0.0], "fixed: self no longer counts"
assert gradient(4.0) == [1.0, 0.0]
PYTHON
