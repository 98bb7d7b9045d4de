#!/usr/bin/env bash
# Submit what is missing of a model's matrix: phase 1 of the untrained model, phase 3 of the trained one.
#   [BATCH=4] [GPUS=1] bash scripts/submit_all.sh qwen3 | llama | qwen3_trained | llama_trained [options of sparsekv submit]
# BATCH jobs a call share the matrix, each with GPUS GPUs; what is finished or queued is not submitted again.
set -euo pipefail
if [ $# -eq 0 ]; then
    echo "usage: [BATCH=4] [GPUS=1] bash scripts/submit_all.sh qwen3 | llama | qwen3_trained | llama_trained" >&2
    exit 2
fi
if ! type -P sparsekv > /dev/null; then
    echo "submit_all.sh: sparsekv is not on the PATH; activate its environment, such as . .venv/bin/activate" >&2
    exit 2
fi
exec sparsekv submit "$1" --yes ${BATCH:+--batch "$BATCH"} ${GPUS:+--gpus "$GPUS"} "${@:2}"
