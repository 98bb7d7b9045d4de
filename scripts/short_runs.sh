#!/usr/bin/env bash
# Short runs of configs/short_runs.yaml, each with what differs in a line of configs/KIND.txt: train, evaluate, compare.
#
#   scripts/short_runs.sh ablations|pilots [NAME ...]        # GPUS=0,1: on these; all that there are
#                                                            # RUNS=4: at a time on each; PROCESSES=1: that evaluate a run
#
# Ablations say what matters, on the rows that docs/results.md reports; pilots choose a recipe, on validation rows.
# A line is a name, that of its control, which is trained with it, and options; without names all. One whose --teacher_adapter
# another line trains waits for it. The same rows are asked of the base. The same command once more goes on with what is not
# done, and compares what is. Logs lie in out/KIND/log.
# shellcheck disable=SC2329  # functions are for the shells that xargs starts
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/results_lib.sh
source scripts/results_lib.sh
kind=${1:-}
case $kind in
    ablations) steps=100 seed=0 text=out/held.jsonl rows=100 tasks=niah_single_2 ;;
    pilots) steps=250 seed=1000 text=out/val_text.jsonl rows=50 tasks=niah_single_2,niah_multikey_1 ;;
    *)
        echo "scripts/short_runs.sh '$kind': name what to run, ablations or pilots" >&2
        exit 2
        ;;
esac
shift
lines=configs/$kind.txt
failed=0

one() { # NAME CONTROL [option ...]
    local name=$1 mark=out/$kind/log/$1
    shift 2
    { wait_for_teacher "$@" && train "$name" "$@" && rm -f "$mark.due" &&
        evaluations "$name" | xargs -P "$PROCESSES" -L 1 sparsekv eval; } >> "$mark.log" 2>&1 &&
        touch "$mark.done" && return
    echo "scripts/short_runs.sh: $name failed: $mark.log" >&2
    touch "$mark.failed"
    return 1
}

wait_for_teacher() { # [option ...]: until the run that trains it has, if it is one of these
    local mark
    mark=out/$kind/log/$(teacher_of "$@")
    while [[ -e $mark.due ]]; do
        [[ ! -e $mark.failed ]] || { echo "its teacher failed: $mark.log" && return 1; }
        sleep 1
    done
}

teacher_of() { # [option ...]: the name of the run that trains it
    sed -nE 's:.*--teacher_adapter [^ ]*/([^/ ]+)/final.*:\1:p' <<< "$*"
}

train() { # NAME [option ...]
    local name=$1
    shift
    [[ $name == base ]] && return
    sparsekv train --config configs/short_runs.yaml --data '{out/debian_text.jsonl: 0.5, recall: 0.5}' --eval_steps 0 --compile true \
        --save_steps 50 --max_steps "$steps" --num_train_samples $((16 * steps)) --resume true --output_dir "out/$kind/$name" "$@"
}

evaluations() { # NAME: what `sparsekv eval` is asked, a line for each process
    evaluate "$1" "$presses" perplexity --data_dir "$text" --context_length 1024 --num_samples 100
    needles "$1" "$presses" 1024 "$rows"
    [[ $kind != pilots ]] || needles "$1" no_press 4096 200
}

needles() { # NAME PRESSES LENGTH ROWS
    evaluate "$1" "$2" ruler-local --context_length "$3" --tasks "$tasks" --num_samples "$4" --max_new_tokens 16
}

evaluate() { # NAME PRESSES BENCHMARK option ...: a line for each of the processes that share it
    local name=$1 asked=$2 adapter="--adapter out/$kind/$1/final" process
    shift 2
    [[ $name == base ]] && adapter=
    for ((process = 0; process < PROCESSES; process++)); do
        echo "--model smollm2-135m $adapter --presses $asked --ratios $ratios --dtype bfloat16 --memory_budget_gib 3" \
            "--view_tokens 0 --seed $seed --out out/$kind/eval/$name --benchmark $*"
    done
}

chosen() { # [NAME ...]: their lines after those of their controls, each once; without names all
    echo base -
    awk -v names="$*" -v lines="$lines" '
        function show(name) {
            if (!(name in line) || shown[name]++) return
            show(teacher[name])
            print line[name]
        }
        /^#/ { next }
        { line[$1] = $0; control[$1] = $2 }
        match($0, /--teacher_adapter out\/[a-z]+\/[^\/]+/) { split(substr($0, RSTART, RLENGTH), part, "/"); teacher[$1] = part[3] }
        names == "" { print }
        END {
            number = split(names, name, " ")
            for (i = 1; i <= number; i++) {
                if (!(name[i] in line)) {
                    print "scripts/short_runs.sh " name[i] ": is not in " lines > "/dev/stderr"
                    exit 2
                }
                show(control[name[i]])
                show(name[i])
            }
        }' "$lines"
}

list=$(chosen "$@")
find_gpus
mkdir -p "out/$kind/log"
while read -r name _ options; do
    teacher=$(teacher_of "$options")
    if [[ -n $teacher && ! -e out/$kind/$teacher/final ]] && ! grep -q "^$teacher " <<< "$list"; then
        echo "scripts/short_runs.sh $name: no line of $lines trains its teacher, $teacher" >&2
        exit 2
    fi
    rm -f "out/$kind/log/$name".{done,failed}
    touch "out/$kind/log/$name.due"
done <<< "$list"
make_texts
PROCESSES=${PROCESSES:-1}
number PROCESSES "$PROCESSES"
export -f wait_for_teacher teacher_of train evaluations needles evaluate
export PROCESSES kind steps seed text rows tasks presses ratios
each_on_a_gpu "${RUNS:-4}" <<< "$list" || failed=1
done_with() { [[ -e out/$kind/log/$1.done ]]; }
while read -r name control options; do
    if [[ $control == - ]] || ! { done_with base && done_with "$control" && done_with "$name"; }; then
        continue
    fi
    sparsekv compare "out/$kind/eval/"{base,"$control","$name"} --output "results/$kind/$name"
    keep_record "out/$kind/$name" "results/$kind/$name/training/$name"
    for other in "$control" $(teacher_of "$options"); do
        keep_record "out/$kind/$other" "results/$kind/training/$other"
    done
done <<< "$list"
exit "$failed"
