# Shared by the scripts that make what results/ keeps; sourced from the project's root.
# shellcheck shell=bash disable=SC2034  # the variables are for who sources this
presses=snapkv,streaming_llm,critical_snapkv,kvzip,knorm,keydiff,expected_attention,random,anchor
ratios=0.3,0.5,0.7

# Text to train on, out/debian_text.jsonl; to choose a recipe by, out/val_text.jsonl; to report, out/held.jsonl.
make_texts() {
    [[ -e out/debian_text.jsonl && -e out/debian_held_out.jsonl ]] ||
        python scripts/debian_text.py --output out/debian_text.jsonl --held_out out/debian_held_out.jsonl
    awk 'NR % 4 == 1' out/debian_held_out.jsonl > out/val_text.jsonl
    awk 'NR % 4 != 1' out/debian_held_out.jsonl > out/held.jsonl
}

keep_record() { # RUN FOLDER: what is kept of a training
    mkdir -p "$2"
    cp "$1/eit_config.json" "$1/metrics.jsonl" "$2/"
}
