#!/usr/bin/env bash
# Runs the demonstration on a fresh machine: scripts/demo.sh [scan] [options].
# Makes a virtual environment in .venv, with $PYTHON (default: python3), and installs the project
# with its extras demo and cpu.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="$root/.venv"
stamp="$venv/.demo-installed"

if [[ ! -x "$venv/bin/python" ]]; then
  echo "making a virtual environment in $venv"
  "${PYTHON:-python3}" -m venv "$venv" || {
    echo "demo.sh: 'python3 -m venv' failed. Install Python 3.10 or newer with its venv module" \
      "(on Debian: apt-get install python3-venv), or name another one: PYTHON=... $0" >&2
    exit 1
  }
fi

if [[ ! "$stamp" -nt "$root/pyproject.toml" ]]; then
  if ! command -v nvidia-smi >/dev/null && ! command -v rocminfo >/dev/null &&
    ! "$venv/bin/python" -c 'import torch' 2>/dev/null; then
    # No GPU: a small torch will do. Where the package index offers only the plain Linux wheels,
    # this brings gigabytes of CUDA that stay unused; to avoid that, install the CPU build into
    # .venv first, as the PyTorch site says.
    echo "installing torch"
    "$venv/bin/python" -m pip install --quiet torch==2.13.0
  fi
  echo "installing tritonspconv with its extras demo and cpu"
  "$venv/bin/python" -m pip install --quiet -e "$root[demo,cpu]"
  touch "$stamp"
fi

exec "$venv/bin/python" -m tritonspconv demo "$@"
