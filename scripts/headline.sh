#!/usr/bin/env bash
# The headline of docs/results.md, and what lies beyond it: trainings and controls of configs/smollm2_135m.yaml with three
# seeds, evaluated and compared.
#
#   scripts/headline.sh        # GPUS=0,1,2,3: on these; all that there are
#                              # TRAININGS=1, PER_GPU=4: trainings, evaluations on each at a time; 3 and 12 under MPS
#
# The same command once more goes on with what is not done. Logs lie in out/headline.
# shellcheck disable=SC2329  # functions are for the shells that xargs starts
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/results_lib.sh
source scripts/results_lib.sh
share=4 # processes of one evaluation
per_gpu=${PER_GPU:-4}
if [[ -z ${GPUS:-} ]]; then
    GPUS=$(nvidia-smi --query-gpu=index --format=csv,noheader 2> /dev/null | paste -sd,) || {
        echo "scripts/headline.sh: nvidia-smi finds no GPU; name those to use, such as GPUS=0,1" >&2
        exit 2
    }
fi
IFS=, read -ra gpus <<< "$GPUS"

run_on_gpu() { # LOG COMMAND [argument ...]: on the GPU of this xargs slot
    local log=out/headline/$1.log
    shift
    IFS=, read -ra gpus <<< "$GPUS"
    # shellcheck disable=SC2153  # xargs sets it
    CUDA_VISIBLE_DEVICES=${gpus[SLOT % ${#gpus[@]}]} "$@" >> "$log" 2>&1 && return
    echo "scripts/headline.sh: failed: $log" >&2
    return 1
}

on_gpus() { # PROCESSES: a line of standard input each, a log's name and a command; xargs would join one that ends in a blank
    # shellcheck disable=SC2016  # for the shell that xargs starts
    xargs -r -P "$1" --process-slot-var=SLOT -L 1 bash -c 'run_on_gpu "$@"' _
}

trainings() {
    local kind seed common="--config configs/smollm2_135m.yaml --eval_steps 0 --compile true --resume true"
    for kind in trained control; do
        for seed in 0 1 2; do
            [[ -e out/$kind-$seed/final/adapter_model.safetensors ]] && continue
            echo "$kind-$seed sparsekv train $common --seed $seed --output_dir out/$kind-$seed" \
                "--control $([[ $kind == control ]] && echo true || echo false)"
        done
    done
}

evaluations() {
    local run two=niah_single_1,niah_single_2
    for run in base {trained,control}-{0,1,2}; do
        evaluate "$run" eval --context_length 1024 --benchmark perplexity --data_dir out/held.jsonl --num_samples 100
        needles "$run" eval 1024 200 16 $two,niah_multikey_1
        if [[ $run == base || $run == *-0 ]]; then
            needles "$run" lengths 2048 100 16 $two,niah_multikey_1
            needles "$run" lengths 4096 100 16 niah_single_2
            needles "$run" tasks 1024 100 48 niah_multikey_2,niah_multivalue,niah_multiquery,fwe
        fi
    done
}

needles() { # RUN FOLDER LENGTH ROWS NEW_TOKENS TASKS
    evaluate "$1" "$2" --context_length "$3" --benchmark ruler-local --num_samples "$4" --max_new_tokens "$5" --tasks "$6"
}

evaluate() { # RUN FOLDER option ...: a line for each of the processes that share it
    local run=$1 folder=$2 adapter process
    shift 2
    case $run in
        base) adapter= ;;
        trained-0) adapter="--adapter out/shipped" ;;
        *) adapter="--adapter out/$run/final" ;;
    esac
    for ((process = 0; process < share; process++)); do
        echo "$folder-$run sparsekv eval --model smollm2-135m $adapter --presses $presses --ratios $ratios --dtype bfloat16" \
            "--memory_budget_gib 3 --view_tokens 0 --out out/$folder/$run $*"
    done
}

list() { # FOLDER KIND: its three runs as `sparsekv compare` takes them
    echo "out/$1/$2-0,out/$1/$2-1,out/$1/$2-2"
}

mkdir -p out/headline
export GPUS
export -f run_on_gpu
make_texts
[[ -e out/self_chat.jsonl ]] ||
    python scripts/self_chat.py --output out/self_chat.jsonl --conversations 2560 --batch_size 1280
trainings | on_gpus $((${TRAININGS:-1} * ${#gpus[@]}))
[[ -e out/shipped ]] || python scripts/ship_adapter.py out/trained-0/final out/shipped
evaluations | on_gpus $((per_gpu * ${#gpus[@]}))
sparsekv compare out/eval/base "$(list eval control)" "$(list eval trained)" --output results/headline
sparsekv compare out/lengths/{base,control-0,trained-0} --output results/beyond/lengths
sparsekv compare out/tasks/{base,control-0,trained-0} --output results/beyond/tasks
for run in {trained,control}-{0,1,2}; do
    keep_record "out/$run" "results/headline/training/$run"
done
