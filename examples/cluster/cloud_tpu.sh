#!/bin/bash
# A Cloud TPU slice: the same command on all of its hosts.
#   TPU=my-slice ZONE=us-east5-b ./cloud_tpu.sh
set -euo pipefail
: "${TPU:?name of the TPU}" "${ZONE:?its zone}"
: "${MODEL:=/mnt/models/llama-3-70b-nf4}" "${OUT:=/mnt/runs/llama-3-70b}"

here="$(cd "$(dirname "$0")" && pwd)"
tpu=(gcloud compute tpus tpu-vm)
"${tpu[@]}" ssh "$TPU" --zone "$ZONE" --worker=all \
    --command "pip install -q 'qjax-llm[tpu]'"
"${tpu[@]}" scp "$here"/{launch.py,llama-3-70b.json} "$TPU": --zone "$ZONE" --worker=all
"${tpu[@]}" ssh "$TPU" --zone "$ZONE" --worker=all --command \
    "python launch.py finetune $MODEL --config llama-3-70b.json --to $OUT --resume"
