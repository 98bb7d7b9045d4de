# scripts/slurm_phase0_analyze.sh
analyze=$(env SPARSEKV_CONDA=sparsekv sbatch --parsable --kill-on-invalid-dep=yes --job-name=sparsekv-qwen3-analyze --output=results/qwen3/logs/analyze-%j.log --gres=gpu:2 --cpus-per-task=16 --mem=80G --time=12:00:00 scripts/slurm_phase0_analyze.sh --model Qwen/Qwen3-8B --output_dir results/qwen3/analysis --bf16 true --device auto --max_len 4096)
# scripts/slurm_phase1_baseline.sh
baseline=$(env SPARSEKV_CONDA=sparsekv sbatch --parsable --kill-on-invalid-dep=yes --job-name=sparsekv-qwen3-baseline --output=results/qwen3/logs/baseline-%A_%a.log --gres=gpu:1 --cpus-per-task=8 --mem=80G --time=24:00:00 --array=0-9%4 -d afterok:$analyze scripts/slurm_phase1_baseline.sh --config configs/matrix.yaml --only qwen3-8b-base --out results/qwen3/matrix)
# scripts/slurm_phase2_train_qwen.sh
control=$(env SPARSEKV_CONDA=sparsekv sbatch --parsable --kill-on-invalid-dep=yes --job-name=sparsekv-qwen3-control --output=results/qwen3/logs/control-%j.log --gres=gpu:1 --cpus-per-task=8 --mem=80G --time=24:00:00 -d afterok:$baseline scripts/slurm_phase2_train_qwen.sh --config configs/qwen3_8b.yaml --output_dir out/qwen3-8b-control --control true)
# scripts/slurm_phase2_train_qwen.sh
train=$(env SPARSEKV_CONDA=sparsekv sbatch --parsable --kill-on-invalid-dep=yes --job-name=sparsekv-qwen3-train --output=results/qwen3/logs/train-%j.log --gres=gpu:1 --cpus-per-task=8 --mem=80G --time=24:00:00 -d afterok:$baseline scripts/slurm_phase2_train_qwen.sh --config configs/qwen3_8b.yaml --output_dir out/qwen3-8b)
# scripts/slurm_phase3_eval_trained.sh
trained=$(env SPARSEKV_CONDA=sparsekv sbatch --parsable --kill-on-invalid-dep=yes --job-name=sparsekv-qwen3-trained --output=results/qwen3/logs/trained-%A_%a.log --gres=gpu:1 --cpus-per-task=8 --mem=80G --time=24:00:00 --array=0-18%4 -d afterok:$control:$train scripts/slurm_phase3_eval_trained.sh --config configs/matrix.yaml --only qwen3-8b-control,qwen3-8b-trained --out results/qwen3/matrix)
