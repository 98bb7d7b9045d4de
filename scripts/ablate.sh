#!/usr/bin/env bash
# Ablations of the recipe for smollm2-135m: train, evaluate, compare. Without names all of configs/ablations.txt.
#
#   scripts/ablate.sh [NAME ...]        # AT_ONCE=4 of them at a time, on one GPU
#
# Each is a short run of configs/smollm2_135m.yaml, with what differs in its line: a name, that of its control, which is trained
# with it, and options. The same rows are asked of the base. The same command once more goes on with what is not done, and
# compares what is.
# Logs lie in out/ablations/log.
# shellcheck disable=SC2329  # functions are for the shells that xargs starts
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/results_lib.sh
source scripts/results_lib.sh
steps=100
failed=0
runs=configs/ablations.txt

evaluate() { # NAME [option ...]
    local name=$1
    shift
    local common=(--model smollm2-135m "$@" --context_length 1024 --num_samples 100 --presses "$presses"
        --ratios "$ratios" --dtype bfloat16 --memory_budget_gib 5 --view_tokens 0 --out "out/ablations/eval/$name")
    sparsekv eval "${common[@]}" --benchmark perplexity --data_dir out/held.jsonl &&
        sparsekv eval "${common[@]}" --benchmark ruler-local --tasks niah_single_2 --max_new_tokens 16
}

train() { # NAME [option ...]
    local name=$1
    shift
    sparsekv train --config configs/smollm2_135m.yaml --data '{out/debian_text.jsonl: 0.5, recall: 0.5}' --eval_steps 0 --compile true \
        --save_steps 50 --max_steps "$steps" --num_train_samples $((16 * steps)) --resume true --output_dir "out/ablations/$name" "$@"
}

one() { # NAME CONTROL [option ...]
    local name=$1 log=out/ablations/log/$1.log
    shift 2
    rm -f "${log%.log}.done"
    if [[ $name == base ]]; then
        evaluate base
    else
        train "$name" "$@" && evaluate "$name" --adapter "out/ablations/$name/final"
    fi > "$log" 2>&1 && touch "${log%.log}.done" && return
    echo "scripts/ablate.sh: $name failed: $log" >&2
    return 1
}

chosen() { # [NAME ...]: their lines after those of their controls, each once; without names all
    echo base -
    awk -v names="$*" -v runs="$runs" '
        function show(name) { if (name in line && !shown[name]++) print line[name] }
        /^#/ { next }
        { line[$1] = $0; control[$1] = $2 }
        names == "" { print }
        END {
            number = split(names, name, " ")
            for (i = 1; i <= number; i++) {
                if (!(name[i] in line)) {
                    print "scripts/ablate.sh " name[i] ": is not in " runs > "/dev/stderr"
                    exit 2
                }
                show(control[name[i]])
                show(name[i])
            }
        }' "$runs"
}

list=$(chosen "$@")
mkdir -p out/ablations/log
make_texts
export -f one train evaluate
export steps presses ratios
# shellcheck disable=SC2016  # for the shell that xargs starts
xargs -P "${AT_ONCE:-4}" -L 1 bash -c 'one "$@"' _ <<< "$list" || failed=1
done_with() { [[ -e out/ablations/log/$1.done ]]; }
while read -r name control _; do
    if [[ $control == - ]] || ! { done_with base && done_with "$control" && done_with "$name"; }; then
        continue
    fi
    sparsekv compare out/ablations/eval/{base,"$control","$name"} --output "results/ablations/$name"
    keep_record "out/ablations/$name" "results/ablations/$name/training/$name"
    keep_record "out/ablations/$control" "results/ablations/training/$control"
done <<< "$list"
exit "$failed"
