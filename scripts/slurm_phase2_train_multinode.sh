#!/usr/bin/env bash
# Phase 2 on several nodes, with FSDP. The first argument is a configuration, the others go to `sparsekv train`.
#   sbatch --nodes=4 scripts/slurm_phase2_train_multinode.sh configs/qwen3_8b.yaml --output_dir out/qwen3-8b --grad_accum 1
# An optimizer step has batch_size x grad_accum x GPUs rows. A checkpoint in the folder is continued, by as many GPUs.
# The FSDP_ variables are those that `accelerate launch` sets; give others with sbatch's --export.
#SBATCH --job-name=train-multinode
#SBATCH --output=logs/%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gres=gpu:4
#SBATCH --cpus-per-task=32
#SBATCH --mem=320G
#SBATCH --time=24:00:00
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?run this with sbatch, from the root of the repository}"
. scripts/slurm_lib.sh
activate_environment
if [ $# -eq 0 ]; then set -- configs/qwen3_8b.yaml --output_dir out/qwen3-8b --grad_accum 1; fi
export ACCELERATE_USE_FSDP=${ACCELERATE_USE_FSDP:-true} FSDP_VERSION=${FSDP_VERSION:-2}
export FSDP_AUTO_WRAP_POLICY=${FSDP_AUTO_WRAP_POLICY:-TRANSFORMER_BASED_WRAP}
run_on_nodes train --config "$1" --resume true "${@:2}"
