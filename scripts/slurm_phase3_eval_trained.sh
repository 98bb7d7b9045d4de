#!/usr/bin/env bash
# Phase 3: the same matrix for control and trained. Arguments go to `sparsekv eval`; without any, those of Qwen3-8B.
#   sbatch scripts/slurm_phase3_eval_trained.sh --model NAME --adapter out/NAME/final --out results/NAME/trained
# With several GPUs (--gres=gpu:4), or as an array (--array=0-7%4), the processes share the matrix: nothing is done twice.
#SBATCH --job-name=eval-trained
#SBATCH --output=logs/%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=8
#SBATCH --mem=80G
#SBATCH --time=24:00:00
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?run this with sbatch, from the root of the repository}"
. scripts/slurm_lib.sh
activate_environment
if [ $# -eq 0 ]; then
    set -- --config configs/matrix.yaml --only qwen3-8b-control,qwen3-8b-trained --out results/qwen3/matrix
fi
run_apart eval "$@"
