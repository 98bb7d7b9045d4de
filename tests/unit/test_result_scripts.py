"""The scripts that make what results/ keeps: headline.sh, short_runs.sh. `sparsekv` and `python` are stand-ins."""

import shlex
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SPARSEKV = """#!/usr/bin/env bash
echo "${CUDA_VISIBLE_DEVICES:-} $*" >> calls
[[ -n ${FAIL:-} && "$*" == *"$FAIL"* ]] && { echo "no memory" >&2; exit 1; }
if [[ -n ${TOGETHER:-} && $1 == train ]]; then # ends well only beside so many others
    for ((tenth = 0; tenth < 100; tenth++)); do
        (($(grep -c ' train ' calls) >= TOGETHER)) && break
        sleep 0.1
    done
    ((tenth < 100)) || exit 1
fi
while (($#)); do
    if [[ $1 == --output_dir ]]; then
        mkdir -p "$2/final"
        [[ -e $2/metrics.jsonl ]] ||
            touch "$2"/{final/adapter_model.safetensors,final/eit_config.json,eit_config.json,metrics.jsonl}
    fi
    shift
done
true
"""
PYTHON = """#!/usr/bin/env bash
echo "python $*" >> calls
case $1 in
    scripts/debian_text.py) printf '1\\n2\\n3\\n4\\n5\\n' | tee "$3" > "$5" ;;
    scripts/self_chat.py) touch "$3" ;;
    scripts/ship_adapter.py) mkdir "$3" && cp "$2/eit_config.json" "$3" ;;
esac
"""


@pytest.fixture
def project(tmp_path):
    """The scripts and what they read, with stand-ins that note how they are called."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    (tmp_path / "bin").mkdir()
    for name, text in {"sparsekv": SPARSEKV, "python": PYTHON}.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


def run(project, script, *arguments, **environment):
    """The ended script and the calls it made, in their order."""
    (project / "calls").write_text("")
    environment = {"PATH": f"{project / 'bin'}:/usr/bin:/bin", **environment}
    command = ["bash", str(project / "scripts" / script), *arguments]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    return ended, (project / "calls").read_text().splitlines()


def value(call, option):
    words = call.split()
    return words[words.index(option) + 1] if option in words else None


def test_headline_trains_on_every_gpu_and_evaluates_and_compares_all(project):
    ended, calls = run(project, "headline.sh", GPUS="5,7", RUNS="2", PROCESSES="3")
    assert ended.returncode == 0, ended.stderr
    trained = [call for call in calls if " train " in call]
    assert {value(call, "--output_dir") for call in trained[:3]} == {f"out/teacher-{seed}" for seed in range(3)}
    assert sorted(
        tuple(value(call, option) or "" for option in ("--output_dir", "--seed", "--teacher_adapter", "--control"))
        for call in trained
    ) == [
        (f"out/{kind}-{seed}", str(seed), "" if kind == "teacher" else f"out/teacher-{seed}/final", control)
        for kind, control in (("control", "true"), ("teacher", ""), ("trained", ""))
        for seed in range(3)
    ]
    evaluated = [call for call in calls if " eval " in call]
    assert {call.split()[0] for call in trained} == {call.split()[0] for call in evaluated} == {"5", "7"}
    kinds = Counter(
        (value(call, "--out"), value(call, "--context_length"), value(call, "--benchmark")) for call in evaluated
    )
    assert set(kinds.values()) == {4}  # processes share each
    assert len(kinds) == 7 * 2 + 3 * 3
    adapters = {(value(call, "--out"), value(call, "--adapter")) for call in evaluated}
    assert adapters >= {
        ("out/eval/base", None),
        ("out/tasks/trained-0", "out/shipped"),
        ("out/eval/control-2", "out/control-2/final"),
    }
    assert len({out for out, _ in adapters}) == len(adapters) == 7 + 2 * 3
    control, shipped = (",".join(f"out/eval/{kind}-{seed}" for seed in range(3)) for kind in ("control", "trained"))
    assert [call.strip() for call in calls[-3:]] == [
        f"compare out/eval/base {control} {shipped} --output results/headline",
        "compare out/lengths/base out/lengths/control-0 out/lengths/trained-0 --output results/beyond/lengths",
        "compare out/tasks/base out/tasks/control-0 out/tasks/trained-0 --output results/beyond/tasks",
    ]
    assert (project / "results/headline/training/control-1/metrics.jsonl").exists()
    assert (project / "out/held.jsonl").read_text().split() == ["2", "3", "4"]
    assert (project / "out/val_text.jsonl").read_text().split() == ["1", "5"]

    again, calls = run(project, "headline.sh", GPUS="5", PROCESSES="3")
    assert again.returncode == 0
    assert len([call for call in calls if " eval " in call]) == len(evaluated)  # they find what is done
    assert len([call for call in calls if " train " in call]) == len(trained)
    assert not [call for call in calls if "python" in call]  # neither text nor adapter is made again
    shutil.rmtree(project / "out/trained-0")  # and trained anew
    _, calls = run(project, "headline.sh", GPUS="5")
    assert [call for call in calls if "ship_adapter" in call], "what is evaluated is what was trained"


def test_headline_compares_nothing_when_a_run_fails_and_goes_on_later(project):
    ended, calls = run(project, "headline.sh", GPUS="0", FAIL="out/trained-1")
    assert ended.returncode != 0
    assert ended.stderr.strip() == "scripts/headline.sh: failed: out/headline/trained-1.log"
    assert "no memory" in (project / "out/headline/trained-1.log").read_text()
    assert sum(" train " in call for call in calls) == 9
    assert len({value(call, "--out") for call in calls if " eval " in call}) == 12  # of all runs but that one
    assert not any("compare" in call for call in calls)
    ended, calls = run(project, "headline.sh", GPUS="0")
    assert ended.returncode == 0
    assert calls[-1].split()[0] == "compare"


def test_headline_compares_nothing_when_an_evaluation_fails(project):
    ended, calls = run(project, "headline.sh", GPUS="0", FAIL="--out out/eval/base")
    assert ended.returncode != 0
    assert ended.stderr.strip() == "scripts/headline.sh: failed: out/headline/base.log"
    assert not any("compare" in call for call in calls)


def test_headline_evaluates_a_run_once_it_is_trained(project):
    _, calls = run(project, "headline.sh", GPUS="0")
    first = [call for call in calls if "out/trained-0" in call or "out/shipped" in call]
    assert [" train " in first[0], "ship_adapter" in first[1], " eval " in first[2]] == [True] * 3
    before = calls.index(next(call for call in calls if "out/trained-1" in call))
    assert all(calls.index(call) < before for call in first)


@pytest.mark.parametrize(("runs", "together", "status"), [("3", "3", 0), ("1", "2", 1)])
def test_so_many_trainings_share_a_gpu(project, runs, together, status):
    ended, calls = run(project, "headline.sh", GPUS="0", RUNS=runs, TOGETHER=together)
    assert (ended.returncode != 0) == status, ended.stderr
    assert {call.split()[0] for call in calls if " train " in call} == {"0"}


@pytest.mark.parametrize("script", [("headline.sh",), ("short_runs.sh", "pilots")])
def test_a_gpu_is_needed(project, script):
    (project / "bin/nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    (project / "bin/nvidia-smi").chmod(0o755)
    ended, calls = run(project, *script)
    assert ended.returncode == 2
    assert ended.stderr == f"scripts/{script[0]}: no GPU is found; name those to use, such as GPUS=0,1\n"
    assert not calls


def test_short_runs_are_of_what_is_named_beside_its_control(project):
    ended, calls = run(project, "short_runs.sh", "ablations", "one_cut", GPUS="3", RUNS="1")
    assert ended.returncode == 0, ended.stderr
    assert [value(call, "--output_dir") for call in calls if " train " in call] == [
        "out/ablations/control",
        "out/ablations/one_cut",
    ]
    assert calls[-1].split()[-2:] == ["--output", "results/ablations/one_cut"]
    assert (project / "results/ablations/one_cut/training/one_cut/eit_config.json").exists()
    assert (project / "results/ablations/training/control/eit_config.json").exists()


def test_so_many_processes_share_an_evaluation_of_a_short_run(project):
    _, calls = run(project, "short_runs.sh", "pilots", "two", GPUS="3", PROCESSES="3")
    asked = Counter(call for call in calls if " eval " in call)
    assert len(asked) == 3 * 3  # base, control and run: text, needles at two lengths
    assert set(asked.values()) == {3}


def test_short_runs_take_the_control_that_a_line_names(project):
    ended, calls = run(project, "short_runs.sh", "ablations", "one_cut", "steps_50", "two_cuts", GPUS="3", RUNS="1")
    assert ended.returncode == 0, ended.stderr
    trained = [value(call, "--output_dir").removeprefix("out/ablations/") for call in calls if " train " in call]
    assert trained == ["control", "one_cut", "control_steps_50", "steps_50", "two_cuts"]
    compared = [call.split()[1:4] for call in calls if " compare " in call]
    assert compared == [
        [f"out/ablations/eval/{run}" for run in ("base", control, name)]
        for control, name in (("control", "one_cut"), ("control_steps_50", "steps_50"), ("control", "two_cuts"))
    ]


@pytest.mark.parametrize("kind", ["ablations", "pilots"])
def test_short_runs_are_of_every_line_with_its_options(project, kind):
    ended, calls = run(project, "short_runs.sh", kind, GPUS="3,4")
    assert ended.returncode == 0, ended.stderr
    lines = [shlex.split(line) for line in (project / f"configs/{kind}.txt").read_text().splitlines()[1:]]
    trained = {value(call, "--output_dir").removeprefix(f"out/{kind}/"): call for call in calls if " train " in call}
    assert sorted(trained) == sorted(name for name, *_ in lines)
    assert all(trained[name].endswith(" ".join([f"out/{kind}/{name}", *options])) for name, _, *options in lines)
    assert sum(" compare " in call for call in calls) == sum(control != "-" for _, control, *_ in lines)


def test_short_runs_compare_nothing_that_failed_this_time(project):
    run(project, "short_runs.sh", "ablations", "one_cut", GPUS="3")
    ended, calls = run(
        project, "short_runs.sh", "ablations", "one_cut", GPUS="3", FAIL="--out out/ablations/eval/one_cut"
    )
    assert ended.returncode != 0
    assert "scripts/short_runs.sh: one_cut failed: out/ablations/log/one_cut.log" in ended.stderr
    assert not any(" compare " in call for call in calls)


def test_a_short_run_waits_for_the_one_that_trains_its_teacher(project):
    ended, calls = run(project, "short_runs.sh", "pilots", "taught", GPUS="3", RUNS="4")
    assert ended.returncode == 0, ended.stderr
    trained = [value(call, "--output_dir").removeprefix("out/pilots/") for call in calls if " train " in call]
    assert trained[0] == "control1_lr2"
    assert sorted(trained[1:]) == ["control10_taught", "taught"]
    kept = {path.parent.name for path in (project / "results/pilots/training").glob("*/eit_config.json")}
    assert kept == {"control1_lr2", "control10_taught"}


@pytest.mark.parametrize("again", [False, True])
def test_a_short_run_whose_teacher_failed(project, again):
    """Also where an earlier call has left one."""
    if again:
        run(project, "short_runs.sh", "pilots", "taught10", GPUS="3")
    failing = "--output_dir out/pilots/control1_lr2_500 "
    ended, calls = run(project, "short_runs.sh", "pilots", "taught10", GPUS="3", RUNS="4", FAIL=failing)
    assert ended.returncode != 0
    assert [value(call, "--output_dir") for call in calls if " train " in call] == ["out/pilots/control1_lr2_500"]
    said = "its teacher failed: out/pilots/log/control1_lr2_500.log"
    assert said in (project / "out/pilots/log/taught10.log").read_text()
    assert not any(" compare " in call for call in calls)


def test_a_teacher_that_no_line_trains(project):
    file = project / "configs/pilots.txt"
    file.write_text(file.read_text() + "new - --teacher_adapter out/pilots/typo/final\n")
    ended, calls = run(project, "short_runs.sh", "pilots", "new", GPUS="3")
    said = "scripts/short_runs.sh new: no line of configs/pilots.txt trains its teacher, typo\n"
    assert (ended.returncode, ended.stderr) == (2, said)
    assert not calls
    (project / "out/pilots/typo/final").mkdir(parents=True)
    ended, calls = run(project, "short_runs.sh", "pilots", "new", GPUS="3")
    assert ended.returncode == 0, ended.stderr


def test_pilots_are_asked_other_rows_than_ablations(project):
    """What chooses a recipe shares no row with what reports it."""
    rows = {}
    for kind in ("ablations", "pilots"):
        ended, calls = run(project, "short_runs.sh", kind, "one_cut" if kind == "ablations" else "two", GPUS="3")
        assert ended.returncode == 0, ended.stderr
        evaluated = [call for call in calls if " eval " in call]
        asked = [
            tuple(value(call, f"--{name}") for name in ("data_dir", "context_length", "seed")) for call in evaluated
        ]
        rows[kind] = {row: asked.count(row) for row in asked}
    three = 3  # the base, a control and one beside it
    ablations = [("out/held.jsonl", "1024", "0"), (None, "1024", "0")]
    pilots = [("out/val_text.jsonl", "1024", "1000"), (None, "1024", "1000"), (None, "4096", "1000")]
    assert rows == {"ablations": dict.fromkeys(ablations, three), "pilots": dict.fromkeys(pilots, three)}


def test_short_runs_share_the_gpus(project):
    ended, calls = run(project, "short_runs.sh", "pilots", GPUS="3,4", RUNS="2", TOGETHER="4")
    assert ended.returncode == 0, ended.stderr
    assert {call.split()[0] for call in calls if " train " in call} == {"3", "4"}


@pytest.mark.parametrize(("environment", "gpus"), [({"CUDA_VISIBLE_DEVICES": "6"}, {"6"}), ({}, {"0", "1"})])
def test_which_gpus_there_are(project, environment, gpus):
    """Those that a cluster leaves, or all."""
    (project / "bin/nvidia-smi").write_text("#!/bin/sh\nprintf '0\\n1\\n'\n")
    (project / "bin/nvidia-smi").chmod(0o755)
    _, calls = run(project, "short_runs.sh", "pilots", **environment)
    assert {call.split()[0] for call in calls if " train " in call} == gpus


@pytest.mark.parametrize("script", [("headline.sh",), ("short_runs.sh", "pilots")])
@pytest.mark.parametrize("variable", ["RUNS", "PROCESSES"])
@pytest.mark.parametrize("value", ["0", "all"])
def test_so_many_at_a_time_is_a_number(project, script, variable, value):
    ended, calls = run(project, *script, GPUS="0", **{variable: value})
    assert (ended.returncode, ended.stderr) == (
        2,
        f"scripts/{script[0]}: {variable}={value}: a number of 1 or more is needed\n",
    )
    assert not [call for call in calls if " train " in call or " eval " in call]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("ablations", "no_such_line"), "no_such_line: is not in configs/ablations.txt"),
        (("ablation",), "'ablation': name what to run, ablations or pilots"),
        ((), "'': name what to run, ablations or pilots"),
    ],
)
def test_short_runs_refuse_what_they_do_not_know(project, arguments, line):
    ended, calls = run(project, "short_runs.sh", *arguments, GPUS="3")
    assert (ended.returncode, ended.stderr) == (2, f"scripts/short_runs.sh {line}\n")
    assert not calls
