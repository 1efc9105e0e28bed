#!/usr/bin/env bash
# Everything that needs a GPU, in one call of less than nine minutes: every kernel at
# many shapes against its reference, then device times against the bfloat16 product.
#
#   bash benchmarks/gpu.sh [FOLDER]
#
# Needs a Hopper GPU and a Python whose JAX sees it (PYTHON, default python3); without
# one it makes .venv-gpu and installs qjax with its [cuda] extra. Writes a JSON file and
# a log per operation to FOLDER, by default benchmarks/results. Nothing has to be
# watched: a kernel that fails is reported and the next one runs; after QJAX_GPU_SECONDS
# (default 500) what is left is listed as not run.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

folder="${1:-benchmarks/results}"
mkdir -p "$folder"
sees_gpu='import jax, sys; sys.exit(not any(d.platform == "gpu" for d in jax.devices()))'
python="${PYTHON:-python3}"
if ! "$python" -c "$sees_gpu" 2>/dev/null; then
    python=.venv-gpu/bin/python
    if ! "$python" -c "$sees_gpu" 2>/dev/null; then
        echo "benchmarks/gpu.sh: building .venv-gpu" >&2
        "${PYTHON:-python3}" -m venv .venv-gpu &&
            "$python" -m pip install --quiet --editable '.[cuda]' || exit 2
        if ! "$python" -c "$sees_gpu"; then
            echo "benchmarks/gpu.sh: JAX sees no GPU" >&2
            exit 2
        fi
    fi
fi

seconds="${QJAX_GPU_SECONDS:-500}"
export XLA_PYTHON_CLIENT_PREALLOCATE=false PYTHONUNBUFFERED=1
# A kernel that hangs must not take the report with it: operations run one by one, each
# in a process of its own with a share of the time.
status=0
# What an operation may take, in percent; what it leaves goes to those after it.
shares=(quantize 5 optimizer 5 attention 15 grouped_matmul 15 matmul_a8 20 matmul 40)
left=100
start=$SECONDS
for ((i = 0; i < ${#shares[@]}; i += 2)); do
    name=${shares[i]}
    seconds_left=$((seconds - (SECONDS - start)))
    share=$((seconds_left * shares[i + 1] / left))
    left=$((left - shares[i + 1]))
    timeout --signal=KILL $((share + 20)) "$python" benchmarks/kernels.py \
        --backend gpu --operation "cases_$name" --seconds "$share" \
        --json "$folder/kernels-$name.json" 2>&1 |
        tee "$folder/kernels-$name.log"
    code=${PIPESTATUS[0]}
    if [[ $code -ne 0 ]]; then
        echo "benchmarks/gpu.sh: $name ended with status $code" >&2
        status=1
    fi
done
exit $status
