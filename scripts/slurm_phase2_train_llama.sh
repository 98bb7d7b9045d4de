#!/usr/bin/env bash
# Phase 2: train Llama-3.1-8B-Instruct with configs/llama31_8b.yaml. Arguments go to `sparsekv train` and win over that file.
#   sbatch scripts/slurm_phase2_train_llama.sh
#   sbatch scripts/slurm_phase2_train_llama.sh --output_dir out/llama31-8b-control --control true
# With several GPUs (--gres=gpu:4) divide --grad_accum by their number. A checkpoint in the folder is continued.
#SBATCH --job-name=train-llama
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
if [ $# -eq 0 ]; then set -- --output_dir out/llama31-8b; fi
run_together train --config configs/llama31_8b.yaml --resume true "$@"
