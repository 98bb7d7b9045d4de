# Shared by the scripts that make what results/ keeps; sourced from the project's root.
# shellcheck shell=bash disable=SC2034  # the variables are for who sources this
presses=snapkv,streaming_llm,critical_snapkv,kvzip,knorm,keydiff,expected_attention,random,anchor
ratios=0.3,0.5,0.7

# GPUS, where it is not set: those that CUDA_VISIBLE_DEVICES leaves, or all that there are.
find_gpus() {
    if [[ -z ${GPUS:-} ]]; then
        GPUS=${CUDA_VISIBLE_DEVICES-$(nvidia-smi --query-gpu=index --format=csv,noheader 2> /dev/null | paste -sd,)} || GPUS=
    fi
    [[ -n $GPUS ]] && return
    echo "scripts/${0##*/}: no GPU is found; name those to use, such as GPUS=0,1" >&2
    exit 2
}

number() { # NAME VALUE: of a variable
    [[ $2 =~ ^[1-9][0-9]*$ ]] && return
    echo "scripts/${0##*/}: $1=$2: a number of 1 or more is needed" >&2
    exit 2
}

use_gpu() { # NUMBER: that of $GPUS, round and round
    local gpus
    IFS=, read -ra gpus <<< "$GPUS"
    export CUDA_VISIBLE_DEVICES=${gpus[$1 % ${#gpus[@]}]}
}

# Lines of standard input to `one`, RUNS on each of $GPUS at a time; fails if one of them does.
each_on_a_gpu() { # RUNS
    local gpus
    number RUNS "$1"
    IFS=, read -ra gpus <<< "$GPUS"
    export GPUS
    export -f one use_gpu
    # shellcheck disable=SC2016  # for the shell that xargs starts
    xargs -P $(($1 * ${#gpus[@]})) --process-slot-var=SLOT -L 1 bash -c 'use_gpu "$SLOT"; one "$@"' _
}

# Text to train on, out/debian_text.jsonl; to choose a recipe by, out/val_text.jsonl; to report, out/held.jsonl.
make_texts() {
    [[ -e out/debian_text.jsonl && -e out/debian_held_out.jsonl ]] ||
        python scripts/debian_text.py --output out/debian_text.jsonl --held_out out/debian_held_out.jsonl
    part '==' out/val_text.jsonl
    part '!=' out/held.jsonl
}

part() { # COMPARISON FILE: appears whole, as another script may read it
    [[ $2 -nt out/debian_held_out.jsonl ]] || { awk "NR % 4 $1 1" out/debian_held_out.jsonl > "$2.$$" && mv "$2.$$" "$2"; }
}

keep_record() { # RUN FOLDER: what is kept of a training
    mkdir -p "$2"
    cp "$1/eit_config.json" "$1/metrics.jsonl" "$2/"
}
