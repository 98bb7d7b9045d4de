#!/usr/bin/env bash
# Phase 2 of any model, on one node. Arguments go to `sparsekv train`; without any, the first part
# of the demo model's recipe; the second begins when that has ended:
#   sbatch scripts/slurm_phase2_train.sh
#   sbatch --dependency=afterok:JOB scripts/slurm_phase2_train.sh --config configs/smollm2_135m.yaml --output_dir out/smollm2
# With several GPUs (--gres=gpu:4) divide --grad_accum by their number. A checkpoint in the folder is continued.
#SBATCH --job-name=train
#SBATCH --output=logs/%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=8
#SBATCH --mem=32G
#SBATCH --time=12:00:00
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?run this with sbatch, from the root of the repository}"
. scripts/slurm_lib.sh
activate_environment
if [ $# -eq 0 ]; then set -- --config configs/smollm2_135m_teacher.yaml --output_dir out/teacher; fi
run_together train --resume true "$@"
