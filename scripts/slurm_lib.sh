# shellcheck shell=bash
# What the jobs of scripts/slurm_*.sh share: find the environment, start one process a GPU, stop and queue again.
# They source it from the folder in which sbatch was called; Slurm runs a copy of the script elsewhere. bash 4.4 or newer.
#
# Read from the environment:
#   SPARSEKV_MODULES    environment modules to load first, with spaces between them
#   SPARSEKV_ENV        virtual environment (its folder), conda environment or module to use (also: SPARSEKV_VENV);
#                       default: the active one if it has sparsekv, .venv here, the first of SPARSEKV_CONDA that has it
#   SPARSEKV_CONDA      conda environments to try, with spaces between them; default: sparsekv
#   SPARSEKV_PROCESSES  processes on a node without GPUs; default: one process a GPU, at least one
#
# Signals. Slurm sends USR1 to the batch shell alone, before the time limit (--signal=B:USR1@120), and on some sites before
# preemption: the processes get TERM, save and end, and the job queues again. With TERM (scancel, preemption at once) Slurm
# reaches every process of the job by itself, and srun passes it on to its own once more; they save once, however often.
# No launcher stands between: torchrun and accelerate launch give their processes 30 seconds to save, whatever the site does.

PIDS=()               # processes of this shell that have not ended
NODES=1 NODE=0        # nodes of a training, and which of them this is
MASTER_NODE=localhost # where its first process is
ASKED=""              # yes: Slurm wants the node
TOGETHER=""           # yes: no process can go on without the others
PAUSE=0.5             # seconds between looks at them
GRACE=30              # seconds that they have to end when one has failed
trap 'ASKED=yes' USR1
trap ':' TERM

say() { printf '%s %s\n' "$(date '+%F %T')" "$*" >&2; }

fail() {
    say "FAILED: $*"
    exit 1
}

# ---- environment ----

has_sparsekv() { command -v sparsekv >/dev/null; }

# Other people's scripts, which may use unset variables.
lenient() {
    local status=0
    set +u
    "$@" || status=$?
    set -u
    return "$status"
}

load_module() {
    if ! command -v module >/dev/null && [ -r "${MODULESHOME:-}/init/bash" ]; then lenient . "$MODULESHOME/init/bash"; fi
    command -v module >/dev/null && lenient module load "$1" 2>/dev/null
}

load_conda() {
    local hook conda
    conda=$(type -P "${CONDA_EXE:-conda}") && hook=$("$conda" shell.bash hook) && lenient eval "$hook" &&
        lenient conda activate "$1" 2>/dev/null
}

# Use a virtual environment, a conda environment or a module, whichever it is; true when it has sparsekv.
use() {
    if [ -f "$1/bin/activate" ]; then lenient . "$1/bin/activate"; else load_conda "$1" || load_module "$1"; fi && has_sparsekv
}

activate_environment() {
    local name wanted=${SPARSEKV_ENV:-${SPARSEKV_VENV:-}}
    for name in ${SPARSEKV_MODULES:-}; do
        load_module "$name" || fail "SPARSEKV_MODULES: no module $name here"
    done
    if [ -n "$wanted" ]; then
        use "$wanted" || fail "SPARSEKV_ENV=$wanted: no virtual environment, conda environment or module with sparsekv"
        return
    fi
    if has_sparsekv; then return; fi
    for name in "$PWD/.venv" ${SPARSEKV_CONDA:-sparsekv}; do
        if use "$name"; then return; fi
    done
    fail "no environment with sparsekv: activate one before sbatch, make $PWD/.venv (make demo does), or set SPARSEKV_ENV"
}

# ---- processes ----

# GPUS that the job was given, as PyTorch sees them, and how many processes to start (COUNT).
count_gpus() {
    GPUS=0
    if [ -z "${SPARSEKV_PROCESSES:-}" ]; then
        GPUS=$(python -c 'import torch; print(torch.cuda.device_count())') || fail "PyTorch does not start here"
    fi
    COUNT=${SPARSEKV_PROCESSES:-$((GPUS > 0 ? GPUS : 1))}
}

start() {
    "$@" &
    PIDS+=("$!")
}

# One process.
run_one() {
    start sparsekv "$@"
    finish "$@"
}

# One process a GPU, each for itself: they share the work through the folder of results. --device means one process.
run_apart() {
    local number device
    count_gpus
    case " $* " in *" --device"*) COUNT=1 ;; esac
    for ((number = 0; number < COUNT; number++)); do
        device=()
        if ((GPUS > 1 && COUNT > 1)); then device=(--device "cuda:$number"); fi
        start sparsekv "$@" "${device[@]}"
    done
    finish "$@"
}

# One process a GPU, all of them one training: what torchrun and accelerate launch would set, without them (see above).
run_together() {
    local number
    count_gpus
    TOGETHER=yes
    if ((NODES * COUNT == 1)); then
        start sparsekv "$@"
    else
        say "node $((NODE + 1)) of $NODES: processes $((NODE * COUNT)) to $((NODE * COUNT + COUNT - 1))"
        for ((number = 0; number < COUNT; number++)); do
            start env RANK=$((NODE * COUNT + number)) WORLD_SIZE=$((NODES * COUNT)) LOCAL_RANK="$number" \
                LOCAL_WORLD_SIZE="$COUNT" MASTER_ADDR="$MASTER_NODE" MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000)) \
                OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" sparsekv "$@"
        done
    fi
    finish "$@"
}

# `run_together` on every node of the job.
run_on_nodes() {
    MASTER_NODE=$(hostname)
    export MASTER_NODE
    # shellcheck disable=SC2016  # expands on the nodes
    start srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --mpi=none \
        --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --kill-on-bad-exit=1 bash -c '
            set -euo pipefail
            master=$MASTER_NODE
            . scripts/slurm_lib.sh
            NODES=$SLURM_STEP_NUM_NODES NODE=$SLURM_NODEID MASTER_NODE=$master
            run_together "$@"' on-a-node "$@"
    finish "$@"
}

# ---- the end ----

ask_to_stop() {
    say "Slurm wants the node: saving, then this job queues again"
    if [ "${SLURM_JOB_NUM_NODES:-1}" -gt 1 ]; then
        timeout 60 scancel --signal=TERM "$SLURM_JOB_ID" # the steps; srun itself would kill them
    else
        kill -TERM "${PIDS[@]}"
    fi || true
}

# Wait for all processes; the status of the first that failed.
wait_for_all() {
    local index status failed=0 asked="" last=""
    while [ ${#PIDS[@]} -gt 0 ]; do
        sleep "$PAUSE"
        if [ -n "$ASKED" ] && [ -z "$asked" ]; then
            asked=yes
            ask_to_stop
        fi
        for index in "${!PIDS[@]}"; do
            if kill -0 "${PIDS[index]}" 2>/dev/null; then continue; fi
            status=0
            wait "${PIDS[index]}" || status=$?
            unset "PIDS[index]"
            if ((failed == 0 && status != 0)); then failed=$status last=$((SECONDS + GRACE)); fi
        done
        if [ -n "$TOGETHER" ] && [ -n "$last" ] && ((SECONDS >= last)); then kill -KILL "${PIDS[@]}" 2>/dev/null || true; fi
    done
    return "$failed"
}

# End the job as its processes ended, or queue it again.
finish() {
    local status=0 job=${SLURM_JOB_ID}
    wait_for_all || status=$?
    if ((status == 0)); then exit 0; fi
    if [ -n "$ASKED" ]; then
        # the id of an array's last task is that of the whole array
        if [ -n "${SLURM_ARRAY_JOB_ID:-}" ]; then job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID; fi
        timeout 60 scontrol requeue "$job" && exit 0
        say "FAILED: job $job cannot be queued again; submit it once more, it continues"
    elif ((status == 143)); then
        say "stopped by a signal; the same sbatch continues"
    else
        say "FAILED: sparsekv $1 ended with status $status"
    fi
    exit "$status"
}
