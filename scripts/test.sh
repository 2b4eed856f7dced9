#!/usr/bin/env bash
# Run every check in order, stopping at the first that fails: lint, format, types, import layers, tests.
#
#   scripts/test.sh [pytest arguments...]     e.g. scripts/test.sh -k conv -x
#
# The first run sets up .venv-test; later runs reuse it until pyproject.toml changes.
#   PYTHON=python3.12   the interpreter that .venv-test is made with (default: python3)
#   MINKOWSKI_WHEELS=folder  a wheel of MinkowskiEngine made by build_minkowski.sh, for live parity
#   SKIP_INSTALL=1      use the environment of $PYTHON as it is: no .venv-test, no network
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
workers=(-n 2)

heading() { printf '\n== %s\n' "$*"; }

has_gpu() { nvidia-smi -L >/dev/null 2>&1 || [[ -e /dev/kfd ]]; }

install() {
    local venv=.venv-test
    local stamp=$venv/.installed
    if [[ ! -e $stamp || pyproject.toml -nt $stamp ]]; then
        heading "set up $venv"
        [[ -x $venv/bin/python ]] || "$python" -m venv "$venv"
        if ! has_gpu; then
            # Pinned, so that an index with CPU builds answers with its 2.13.0+cpu instead of a later
            # release with CUDA. PyPI has the CUDA build alone: it does as well, at 5 GB.
            "$venv/bin/python" -m pip install --quiet torch==2.13.0
        fi
        "$venv/bin/python" -m pip install --quiet --editable '.[test,cpu,parity-cpu,demo,scans,docs,onnx]'
        install_minkowski "$venv/bin/python"
        touch "$stamp"
    fi
    python=$venv/bin/python
}

# MinkowskiEngine has no wheels on the index. Where one is given that fits and can be imported, the
# parity tests run it; elsewhere they use what it did, as recorded.
install_minkowski() {
    local wheel
    for wheel in "${MINKOWSKI_WHEELS:-}"/minkowskiengine-*.whl; do
        [[ -e $wheel ]] || continue
        "$1" -m pip install --quiet --no-deps "$wheel" || continue
        "$1" -c 'import collections.abc as abc; import collections
collections.Sequence = abc.Sequence
import MinkowskiEngine' || "$1" -m pip uninstall --quiet --yes MinkowskiEngine
    done
}

# Run pytest; keep its last line for the end. A selection of the caller's may match no test in one of
# several runs (exit status 5); it is a mistake where it matches none in any.
summaries=()
selecting=$#
selected=
run_pytest() {
    local title=$1 log status=0
    shift
    heading "$title"
    log=$(mktemp)
    "$python" -m pytest "${workers[@]}" "$@" 2>&1 | tee "$log" || status=$?
    summaries+=("$title: $(tail -n 1 "$log")")
    rm -f "$log"
    if ((status != 5)); then selected=yes; fi
    if ((status == 5 && selecting > 0)); then status=0; fi
    return "$status"
}

# Compile the kernels for an H100 by the oldest Triton that a supported torch brings. Versions of
# Triton differ in the Python that they accept in kernels.
compile_by_oldest_triton() {
    local oldest folder
    oldest=$(sed -n 's/.*"triton>=\([0-9.]*\).*/\1/p' pyproject.toml)
    folder=.venv-test/triton-$oldest
    if [[ ! -d $folder/triton ]]; then
        "$python" -m pip install --quiet --no-deps --target "$folder" "triton==$oldest"
    fi
    PYTHONPATH=$folder run_pytest "pytest, kernels compiled by Triton $oldest" \
        tests/kernels/test_compile_targets.py -k "test_compiles and sm_90"
}

[[ -n ${SKIP_INSTALL:-} ]] || install
bin=$(dirname "$("$python" -c 'import sys; print(sys.executable)')")
unset TRITON_INTERPRET # set below, for the run that wants it
export PYTHONDONTWRITEBYTECODE=1

heading "ruff check"
"$python" -m ruff check .

heading "ruff format --check"
"$python" -m ruff format --check .

heading "pyright"
"$python" -m pyright --pythonpath "$python"

heading "lint-imports"
PYTHONPATH=. "$bin/lint-imports" --no-cache

if "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    workers=() # the tests share one GPU
    run_pytest "pytest, GPU and CPU" tests "$@"
else
    TRITON_INTERPRET=1 run_pytest "pytest, kernels in the interpreter" tests -m interpreter "$@"
    run_pytest "pytest, the rest on the CPU" tests -m "not interpreter and not gpu" "$@"
    if [[ -z ${SKIP_INSTALL:-} && $# == 0 ]]; then compile_by_oldest_triton; fi
fi

if [[ -z $selected ]]; then
    heading "no test was run: none is selected by $*"
    exit 5
fi
heading "all checks passed"
printf '%s\n' "${summaries[@]}"
