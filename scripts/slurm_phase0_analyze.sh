#!/usr/bin/env bash
# Phase 0: what a model attends to. Arguments go to `sparsekv analyze`; without any, Qwen3-8B over both GPUs.
#   sbatch scripts/slurm_phase0_analyze.sh --model NAME --bf16 true --device auto --output_dir results/NAME/analysis
# A job that was stopped continues when it is submitted again with the same arguments.
#SBATCH --job-name=analyze
#SBATCH --output=logs/%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gres=gpu:2
#SBATCH --cpus-per-task=16
#SBATCH --mem=80G
#SBATCH --time=12:00:00
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?run this with sbatch, from the root of the repository}"
. scripts/slurm_lib.sh
activate_environment
if [ $# -eq 0 ]; then set -- --model Qwen/Qwen3-8B --bf16 true --device auto --output_dir results/qwen3/analysis; fi
run_one analyze "$@"
