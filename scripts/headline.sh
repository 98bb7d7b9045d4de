#!/usr/bin/env bash
# The headline of docs/results.md, and what lies beyond it: trainings and controls of configs/smollm2_135m.yaml with three
# seeds, held to teachers that are trained first, each evaluated as soon as it is trained, then compared.
#
#   scripts/headline.sh        # GPUS=0,1,2,3: on these; all that there are
#                              # RUNS=1: at a time on each; PROCESSES=4: that evaluate a run. Under MPS 4 and 8
#
# The same command once more goes on with what is not done. Logs lie in out/headline.
# shellcheck disable=SC2329  # functions are for the shells that xargs starts
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/results_lib.sh
source scripts/results_lib.sh
share=4 # processes of one evaluation

one() { # RUN
    local run=$1 log=out/headline/$1.log
    { train "$run" && evaluations "$run" | xargs -r -P "$PROCESSES" -L 1 sparsekv eval; } >> "$log" 2>&1 && return
    echo "scripts/headline.sh: failed: $log" >&2
    return 1
}

train() { # RUN
    local run=$1 seed=${1#*-} part
    case $run in
        base) return ;;
        teacher-*) part="--config configs/smollm2_135m_teacher.yaml" ;;
        control-*) part="--config configs/smollm2_135m.yaml --teacher_adapter out/teacher-$seed/final --control true" ;;
        *) part="--config configs/smollm2_135m.yaml --teacher_adapter out/teacher-$seed/final" ;;
    esac
    # shellcheck disable=SC2086  # words
    sparsekv train $part --eval_steps 0 --compile true --resume true --seed "$seed" --output_dir "out/$run" || return
    if [[ $run == trained-0 && ! out/shipped/eit_config.json -nt out/$run/final/adapter_model.safetensors ]]; then
        rm -rf out/shipped
        python scripts/ship_adapter.py "out/$run/final" out/shipped
    fi
}

evaluations() { # RUN: what `sparsekv eval` is asked, a line for each process
    local run=$1 two=niah_single_1,niah_single_2
    [[ $run == teacher-* ]] && return
    evaluate "$run" eval --context_length 1024 --benchmark perplexity --data_dir out/held.jsonl --num_samples 100
    needles "$run" eval 1024 200 16 $two,niah_multikey_1
    if [[ $run == base || $run == *-0 ]]; then
        needles "$run" lengths 2048 100 16 $two,niah_multikey_1
        needles "$run" lengths 4096 100 16 niah_single_2
        needles "$run" tasks 1024 100 48 niah_multikey_2,niah_multivalue,niah_multiquery,fwe
    fi
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
        echo "--model smollm2-135m $adapter --presses $presses --ratios $ratios --dtype bfloat16" \
            "--memory_budget_gib 3 --view_tokens 0 --out out/$folder/$run $*"
    done
}

list() { # FOLDER KIND: its three runs as `sparsekv compare` takes them
    echo "out/$1/$2-0,out/$1/$2-1,out/$1/$2-2"
}

find_gpus
mkdir -p out/headline
PROCESSES=${PROCESSES:-4}
number PROCESSES "$PROCESSES"
export PROCESSES share presses ratios
export -f train evaluations needles evaluate
make_texts
[[ -e out/self_chat.jsonl ]] ||
    (use_gpu 0 && python scripts/self_chat.py --output out/self_chat.jsonl --conversations 2560 --batch_size 1280)
printf '%s\n' teacher-{0,1,2} | each_on_a_gpu "${RUNS:-1}"
printf '%s\n' {trained,control}-{0,1,2} base | each_on_a_gpu "${RUNS:-1}"
sparsekv compare out/eval/base "$(list eval control)" "$(list eval trained)" --output results/headline
sparsekv compare out/lengths/{base,control-0,trained-0} --output results/beyond/lengths
sparsekv compare out/tasks/{base,control-0,trained-0} --output results/beyond/tasks
for run in {trained,control,teacher}-{0,1,2}; do
    keep_record "out/$run" "results/headline/training/$run"
done
