#!/usr/bin/env bash
# Build MinkowskiEngine 0.5.4, CPU only, from its published source package: a wheel to compare with.
#
#   scripts/tools/build_minkowski.sh [FOLDER]     the wheel goes to FOLDER (default: dist)
#
# The build runs in an environment of its own, .venv-minkowski, because its setup.py uninstalls any
# MinkowskiEngine where it runs. The wheel fits the Python and the torch that it was built with.
# Needs a C++17 compiler and OpenBLAS with headers (Debian: apt-get install libopenblas-dev; where the
# wheel is used, libopenblas0 will do). Takes ten minutes on two cores, and about 2 GB for each job.
#   PYTHON=python3.11   the interpreter (default: python3; 3.11 is known to work)
#   TORCH=2.13.0        the release of torch to build for
#   MAX_JOBS=2          compilers side by side (default: 1)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
torch=${TORCH:-2.13.0}
venv=.venv-minkowski
folder=${1:-dist}

[[ -x $venv/bin/python ]] || "$python" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet "torch==$torch" numpy setuptools wheel ninja

# Without openblas and PEP 517 its setup.py asks numpy.distutils, which is gone, for a BLAS.
PATH="$PWD/$venv/bin:$PATH" MAX_JOBS=${MAX_JOBS:-1} CFLAGS=-g0 \
    "$venv/bin/python" -m pip wheel MinkowskiEngine==0.5.4 \
    --no-deps --no-build-isolation --use-pep517 --no-binary MinkowskiEngine \
    --config-settings="--global-option=--blas=openblas" --wheel-dir "$folder"

wheel=$(ls "$folder"/[Mm]inkowski[Ee]ngine-0.5.4-*.whl)
cat <<EOF
Built $wheel. To compare with it:
  $venv/bin/python -m pip install --no-deps $wheel
  tritonspconv parity --original MinkowskiEngine --device cpu --original-python $venv/bin/python
EOF
