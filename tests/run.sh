#!/usr/bin/env bash
# Runs the checks and the tests in an environment of their own.
#
#   bash tests/run.sh [PYTEST ARGUMENTS]            lint, types and the test suite
#   bash tests/run.sh --peers [PYTEST ARGUMENTS]    comparisons with other libraries
#
# Needs Python >= 3.11 and a package index; set PYTHON to choose the interpreter.
# The environment, .venv-test, is built on the first run and again when
# pyproject.toml changes; the CPU kernels when their source does. --peers adds PyTorch
# and the other libraries to it. Where the default index serves PyTorch with CUDA and
# that is unwelcome, set PIP_INDEX_URL or PIP_EXTRA_INDEX_URL to an index of CPU builds
# first.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

peers=false
if [[ "${1:-}" == --peers ]]; then
    peers=true
    shift
fi

python="${PYTHON:-python3}"
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "tests/run.sh: '$python' is missing or older than Python 3.11;" \
        "set PYTHON to a newer interpreter" >&2
    exit 2
fi

venv=.venv-test
bin="$venv/bin"
stamp="$("$python" -c 'import hashlib, pathlib, sys
print(sys.version, hashlib.sha256(pathlib.Path("pyproject.toml").read_bytes()).hexdigest())')"

if [[ ! -x "$bin/python" || "$(cat "$venv/stamp" 2>/dev/null)" != "$stamp" ]]; then
    echo "tests/run.sh: building $venv" >&2
    rm -rf "$venv"
    "$python" -m venv "$venv"
    "$bin/pip" install --quiet --upgrade 'pip>=25.1'
    "$bin/pip" install --quiet --editable '.[test,plot]' --group dev
    printf '%s\n' "$stamp" >"$venv/stamp"
fi

# An editable install builds the CPU kernels once; later changes of their source must too.
sources="$(cat setup.py pallas_kernels/native/*.{cc,h} | cksum)"
if [[ "$(cat "$venv/stamp-native" 2>/dev/null)" != "$sources" ]]; then
    "$bin/python" setup.py --quiet build_ext --inplace
    printf '%s\n' "$sources" >"$venv/stamp-native"
fi

# The tests of a file share what they compile, so one worker runs them.
spread=(-n "${QJAX_TEST_WORKERS:-2}" --dist loadfile --no-loadscope-reorder)
if $peers; then
    if [[ "$(cat "$venv/stamp-peers" 2>/dev/null)" != "$stamp" ]]; then
        echo "tests/run.sh: adding the peers to $venv" >&2
        DISABLE_CUDA=1 "$bin/pip" install --quiet 'torch==2.13.0'
        DISABLE_CUDA=1 "$bin/pip" install --quiet --editable '.[peers]'
        printf '%s\n' "$stamp" >"$venv/stamp-peers"
    fi
    "$bin/pytest" "${spread[@]}" -m peer "$@"
else
    "$bin/ruff" check .
    "$bin/ruff" format --check .
    "$bin/pyright" --pythonpath "$bin/python"
    "$bin/pytest" "${spread[@]}" -m 'not peer' --ignore=tests/peers "$@"
fi
