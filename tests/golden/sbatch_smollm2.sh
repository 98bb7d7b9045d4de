# scripts/slurm_phase0_analyze.sh
analyze=$(env SPARSEKV_CONDA=sparsekv sbatch --parsable --kill-on-invalid-dep=yes --job-name=sparsekv-smollm2-analyze --output=results/smollm2/logs/analyze-%j.log --gres=gpu:1 --cpus-per-task=16 --mem=16G --time=01:00:00 scripts/slurm_phase0_analyze.sh --model smollm2-135m --output_dir results/smollm2/analysis --bf16 false --device null --max_len 1024)
# scripts/slurm_phase1_baseline.sh
baseline=$(env SPARSEKV_CONDA=sparsekv sbatch --parsable --kill-on-invalid-dep=yes --job-name=sparsekv-smollm2-baseline --output=results/smollm2/logs/baseline-%A_%a.log --gres=gpu:1 --cpus-per-task=8 --mem=32G --time=02:00:00 --array=0-0%1 -d afterok:$analyze scripts/slurm_phase1_baseline.sh --config configs/matrix_smollm2.yaml --only base --out results/smollm2/matrix)
# scripts/slurm_phase2_train.sh
control=$(env SPARSEKV_CONDA=sparsekv sbatch --parsable --kill-on-invalid-dep=yes --job-name=sparsekv-smollm2-control --output=results/smollm2/logs/control-%j.log --gres=gpu:1 --cpus-per-task=8 --mem=32G --time=02:00:00 -d afterok:$baseline scripts/slurm_phase2_train.sh --config configs/smollm2_135m.yaml --output_dir out/smollm2-control --control true)
# scripts/slurm_phase2_train.sh
train=$(env SPARSEKV_CONDA=sparsekv sbatch --parsable --kill-on-invalid-dep=yes --job-name=sparsekv-smollm2-train --output=results/smollm2/logs/train-%j.log --gres=gpu:1 --cpus-per-task=8 --mem=32G --time=02:00:00 -d afterok:$baseline scripts/slurm_phase2_train.sh --config configs/smollm2_135m.yaml --output_dir out/smollm2)
# scripts/slurm_phase3_eval_trained.sh
trained=$(env SPARSEKV_CONDA=sparsekv sbatch --parsable --kill-on-invalid-dep=yes --job-name=sparsekv-smollm2-trained --output=results/smollm2/logs/trained-%A_%a.log --gres=gpu:1 --cpus-per-task=8 --mem=32G --time=02:00:00 --array=0-0%1 -d afterok:$control:$train scripts/slurm_phase3_eval_trained.sh --config configs/matrix_smollm2.yaml --only control,trained --out results/smollm2/matrix)
