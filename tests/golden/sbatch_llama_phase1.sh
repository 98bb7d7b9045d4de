# scripts/slurm_phase1_baseline.sh
baseline=$(env SPARSEKV_CONDA=sparsekv sbatch --parsable --kill-on-invalid-dep=yes --job-name=sparsekv-llama-baseline --output=results/llama/logs/baseline-%A_%a.log --gres=gpu:2 --cpus-per-task=8 --mem=80G --time=24:00:00 --array=0-4%5 scripts/slurm_phase1_baseline.sh --config configs/matrix.yaml --only llama31-8b-base --out results/llama/matrix)
