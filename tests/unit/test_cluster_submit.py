"""Submitting, with Slurm's commands replaced by programs that record their arguments."""

import json
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import psutil
import pytest
import yaml
from cells import write_cell
from fake_slurm import FakeSlurm, make_experiment

from sparsekv.cli import main
from sparsekv.cluster import slurm
from sparsekv.cluster.book import Book, Entry
from sparsekv.cluster.phases import make_phases
from sparsekv.cluster.pipeline import load_pipeline

EVIL = "tiny $(touch pwned1) `touch pwned2` \"a\" 'b'; touch pwned3 #"


@pytest.fixture
def site(tmp_path, monkeypatch) -> FakeSlurm:
    monkeypatch.chdir(tmp_path)
    make_experiment(tmp_path)
    return FakeSlurm(tmp_path / "bin", monkeypatch)


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return int(ended.value.code or 0)


def submit(*arguments: str) -> int:
    return run("submit", *arguments)


def failure(capsys, *arguments: str) -> str:
    capsys.readouterr()
    assert run(*arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def word(call: list[str], beginning: str) -> str:
    (found,) = [each for each in call if each.startswith(beginning)]
    return found


def after(call: list[str]) -> str:
    return call[call.index("-d") + 1] if "-d" in call else ""


def finish_training(name: str, **recorded: int) -> None:
    phase = make_phases(load_pipeline(Path("configs/pipeline.yaml")), "tiny")[name]
    final = phase.out / "final"
    final.mkdir(parents=True)
    record = {"config": json.loads(json.dumps(vars(phase.config), default=vars)), **recorded}
    (final / "eit_config.json").write_text(json.dumps(record))


def finish_cells(*runs: str) -> None:
    from sparsekv.fingerprint import fingerprint

    for name in runs:
        adapter = None if name == "base" else f"out/{name}/final"
        settings = {
            "adapter_fingerprint": adapter and fingerprint(Path(adapter)),
            "context_length": None,
            "tasks": None,
        }
        settings |= {"max_context_length": None, "enable_thinking": False, "num_generations": 1}
        settings |= {"temperature": 0.0, "top_p": 1.0, "top_k": 0}
        for press, ratio in (("no_press", 0.0), ("knorm", 0.5)):
            out = Path("results/tiny/matrix") / name
            cell = write_cell(out, press, ratio, {"a": [1]}, data=("ruler", "4096"), adapter=adapter, **settings)
            config = yaml.safe_load((cell / "config.yaml").read_text()) | {"seed": 0, "max_new_tokens": None}
            (cell / "config.yaml").write_text(yaml.safe_dump(config))


# ---- the chain ----


def test_the_chain(site, capsys):
    assert submit("pipeline", "--model", "tiny", "--yes") == 0
    calls = site.calls("sbatch")
    names = [word(call, "--job-name=").rpartition("-")[2] for call in calls]
    assert names == ["analyze", "baseline", "control", "train", "trained"]
    assert [after(call) for call in calls] == ["", "afterok:101", "afterok:102", "afterok:102", "afterok:103:104"]
    assert all({"--parsable", "--kill-on-invalid-dep=yes"} <= {*call} for call in calls)
    arrays = [[each for each in call if each.startswith("--array=")] for call in calls]
    assert arrays == [[], ["--array=0-0%1"], [], [], ["--array=0-0%1"]]
    for call in calls:
        log = Path(word(call, "--output=").partition("=")[2])
        assert log.parent.is_dir(), "made before submission"
        assert Path(next(each for each in call if each.endswith(".sh"))).is_file()
    assert calls[2][calls[2].index("scripts/slurm_phase2_train.sh") :] == [
        *("scripts/slurm_phase2_train.sh", "--config", "configs/train.yaml"),
        *("--output_dir", "out/control", "--control", "true"),
    ]


def test_text_that_is_not_there_is_missed_at_once(site, capsys):
    """And not when the phases before the training are done."""
    config = yaml.safe_load(Path("configs/train.yaml").read_text()) | {"data": {"out/notes.jsonl": 0.5, "recall": 0.5}}
    Path("configs/train.yaml").write_text(yaml.safe_dump(config))
    assert submit("pipeline", "--model", "tiny", "--dry_run") == 0
    assert "not yet to be submitted: phase 2 control: --data out/notes.jsonl: no such file" in capsys.readouterr().out
    line = failure(capsys, "submit", "pipeline", "--model", "tiny", "--yes")
    assert "phase 2 control: --data out/notes.jsonl: no such file; make it first" in line
    assert not site.calls("sbatch")
    Path("out").mkdir(exist_ok=True)
    Path("out/notes.jsonl").write_text('{"text": "a"}')
    assert submit("pipeline", "--model", "tiny", "--yes") == 0


def test_a_teacher_is_trained_before_what_is_held_to_it(site, capsys):
    pipeline = yaml.safe_load(Path("configs/pipeline.yaml").read_text())
    pipeline["models"]["tiny"]["teacher"] = "configs/teacher.yaml"
    Path("configs/pipeline.yaml").write_text(yaml.safe_dump(pipeline))
    Path("configs/teacher.yaml").write_text(Path("configs/train.yaml").read_text())
    assert submit("pipeline", "--model", "tiny", "--yes") == 0
    calls = site.calls("sbatch")
    names = [word(call, "--job-name=").rpartition("-")[2] for call in calls]
    assert names == ["analyze", "baseline", "teacher", "control", "train", "trained"]
    waits = ["", "afterok:101", "afterok:102", "afterok:103", "afterok:103", "afterok:104:105"]
    assert [after(call) for call in calls] == waits
    script = "scripts/slurm_phase2_train.sh"
    assert calls[2][calls[2].index(script) :] == [
        *(script, "--config", "configs/teacher.yaml", "--output_dir", "out/trained-teacher")
    ]
    assert calls[4][calls[4].index(script) :] == [
        *(script, "--config", "configs/train.yaml", "--output_dir", "out/trained"),
        *("--teacher_adapter", "out/trained-teacher/final"),
    ]
    finish_training("teacher")
    capsys.readouterr()
    assert submit("pipeline", "--model", "tiny", "--dry_run") == 0
    assert "phase 2 teacher: done (out/trained-teacher/final)" in capsys.readouterr().out


def test_a_teacher_that_no_phase_trains_is_missed_at_once(site, capsys):
    config = yaml.safe_load(Path("configs/train.yaml").read_text()) | {"teacher_adapter": "out/teacher/final"}
    Path("configs/train.yaml").write_text(yaml.safe_dump(config))
    line = failure(capsys, "submit", "pipeline", "--model", "tiny", "--yes")
    assert "phase 2 train: --teacher_adapter out/teacher/final: no such folder; make it first" in line
    assert not site.calls("sbatch")
    Path("out/teacher/final").mkdir(parents=True)
    assert submit("pipeline", "--model", "tiny", "--yes") == 0


def test_submit_names_the_experiment_file_for_what_it_holds(site, capsys):
    pipeline = yaml.safe_load(Path("configs/pipeline.yaml").read_text())
    pipeline["models"]["tiny"]["analyze"] = {"maxlen": 4096}
    Path("configs/pipeline.yaml").write_text(yaml.safe_dump(pipeline))
    line = failure(capsys, "submit", "pipeline", "--model", "tiny", "--yes")
    assert "models: tiny: analyze:" in line


def test_a_second_call_submits_nothing_twice(site, capsys):
    submit("pipeline", "--model", "tiny", "--yes")
    site.say("squeue", "".join(f"{number}|{number}|PENDING|Dependency\n" for number in range(101, 106)))
    assert submit("pipeline", "--model", "tiny", "--yes") == 0
    assert len(site.calls("sbatch")) == 5
    assert "nothing to submit" in capsys.readouterr().out


def test_only_living_jobs_are_waited_for(site):
    """The first has died and the second is alive: the others come after it, and not after the dead."""
    submit("pipeline", "--model", "tiny", "--yes")
    site.say("squeue", "102|102_0|RUNNING|None\n")
    submit("pipeline", "--model", "tiny", "--yes")
    assert [after(call) for call in site.calls("sbatch")[5:]] == ["", "afterok:102", "afterok:102", "afterok:107:108"]


def test_done_phases_drop_out(site, capsys):
    finish_cells("base")
    finish_training("train")
    assert submit("pipeline", "--model", "tiny", "--yes") == 0
    calls = site.calls("sbatch")
    names = [word(call, "--job-name=").rpartition("-")[2] for call in calls]
    assert names == ["analyze", "control", "trained"]
    assert [after(call) for call in calls] == ["", "afterok:101", "afterok:102:101"], "through what is done"
    assert "phase 1 baseline: done (2 of 2 cells done)" in capsys.readouterr().out


def test_a_training_of_a_version_without_some_option_is_done(site, capsys):
    """It had the default; another value than that is another training."""
    finish_training("train")
    record = Path("out/trained/final/eit_config.json")
    config = json.loads(record.read_text())["config"]
    del config["temperature"]
    record.write_text(json.dumps({"config": config}))
    assert submit("pipeline", "--model", "tiny", "--dry-run") == 0
    assert "phase 2 train: done" in capsys.readouterr().out
    record.write_text(json.dumps({"config": config | {"temperature": 2.0}}))
    assert "--temperature 2.0, now 1.0" in failure(capsys, "submit", "pipeline", "--model", "tiny", "--dry-run")


def test_cells_of_another_adapter_or_question_are_refused(site, capsys):
    """As the evaluation itself would, hours later."""
    for name in ("control", "train"):
        finish_training(name)
    finish_cells("base", "control")
    Path("out/trained/final/adapter_config.json").write_text("{}")
    finish_cells("trained")
    assert submit("tiny_trained", "--dry-run") == 0
    assert "phase 3 trained: done" in capsys.readouterr().out
    matrix = yaml.safe_load(Path("configs/matrix.yaml").read_text())
    Path("configs/matrix.yaml").write_text(yaml.safe_dump(matrix | {"max_context_length": 99}))
    line = failure(capsys, "submit", "tiny", "--yes")
    assert "results/tiny/matrix/base: was made with max_context_length None, now 99" in line
    Path("configs/matrix.yaml").write_text(yaml.safe_dump(matrix))
    Path("out/trained/final/adapter_config.json").write_text("[]")
    line = failure(capsys, "submit", "pipeline", "--model", "tiny", "--yes")
    assert "results/tiny/matrix/trained: was made with another adapter" in line
    assert not site.calls("sbatch")


def test_cells_of_other_benchmarks_presses_and_samples_are_left_alone(site, capsys):
    finish_cells("base")
    matrix = yaml.safe_load(Path("configs/matrix.yaml").read_text())
    for change in ({"ratios": [0.3]}, {"num_samples": 3}, {"benchmarks": [{"name": "ruler", "data_dir": "8192"}]}):
        Path("configs/matrix.yaml").write_text(yaml.safe_dump(matrix | change))
        assert submit("tiny", "--dry-run") == 0
        done = 1 if "ratios" in change else 0  # the full cache has none
        assert f"({done} of 2 cells done)" in capsys.readouterr().out


def test_a_queued_job_with_other_options_is_not_reused(site, capsys):
    submit("pipeline", "--model", "tiny", "--yes")
    site.say("squeue", "104|104|RUNNING|None\n")
    train = yaml.safe_load(Path("configs/train.yaml").read_text())
    Path("configs/train.yaml").write_text(yaml.safe_dump(train | {"lr": 0.5}))
    line = failure(capsys, "submit", "pipeline", "--model", "tiny", "--yes")
    assert "job 104" in line
    assert "sparsekv cancel --model tiny" in line
    assert len(site.calls("sbatch")) == 5


def test_a_job_whose_dependency_failed(site, capsys):
    """Nothing is added to a chain that will never run."""
    submit("pipeline", "--model", "tiny", "--yes")
    site.say("squeue", "105|105|PENDING|DependencyNeverSatisfied\n")
    line = failure(capsys, "submit", "pipeline", "--model", "tiny", "--yes")
    assert "job 105 waits for a job that failed" in line
    assert "scancel 105" in line
    assert len(site.calls("sbatch")) == 5


def test_a_job_that_is_just_ending(site, capsys):
    """Cancelled a moment ago, it is still saving: nothing may wait for it, and no other may write there yet."""
    submit("pipeline", "--model", "tiny", "--yes")
    site.say("squeue", "104|104|COMPLETING|None\n")
    assert "phase 2 train: job 104 is about to end" in failure(capsys, "submit", "pipeline", "--model", "tiny", "--yes")
    site.say("squeue", "102|102_0|COMPLETING|None\n102|102_1|RUNNING|None\n")
    submit("tiny", "--yes")
    assert "queued already, job 102" in capsys.readouterr().out
    assert len(site.calls("sbatch")) == 5


@pytest.mark.parametrize("executor", ["slurm", "local"])
def test_a_process_is_no_job(site, capsys, executor):
    """What is to wait for an id that Slurm does not know runs at once."""
    me = psutil.Process()
    phase = make_phases(load_pipeline(Path("configs/pipeline.yaml")), "tiny")["train"]
    entry = Entry("train", str(me.pid), phase.fingerprint, "local", "log", born=me.create_time())
    Book(Path("results/tiny")).add(entry)
    line = failure(capsys, "submit", "pipeline", "--model", "tiny", "--yes", "--executor", executor)
    assert f"phase 2 train: process {me.pid} is at work on it" in line
    assert line.endswith("sparsekv cancel --model tiny")
    assert not site.calls("sbatch")


def test_a_job_is_no_process(site, capsys):
    submit("pipeline", "--model", "tiny", "--yes")
    site.say("squeue", "104|104|RUNNING|None\n")
    line = failure(capsys, "submit", "pipeline", "--model", "tiny", "--yes", "--executor", "local")
    assert "phase 2 train: job 104 is at work on it" in line


def test_ctrl_c_leaves_no_half_of_a_chain(site, capsys):
    site.program("sbatch", "#!/bin/sh\nkill -INT $PPID\necho 101\n")
    assert submit("pipeline", "--model", "tiny", "--yes") == 130
    assert "stopped; cancelled again: job 101" in capsys.readouterr().err
    assert site.calls("scancel") == [["101"]]


def test_nor_does_an_impatient_one(site, capsys, monkeypatch):
    monkeypatch.setattr("sparsekv.signals.ECHO", 0.1)
    again = "kill -INT $PPID; sleep 0.5; kill -INT $PPID; sleep 30"  # while the second job is being submitted
    count = site.folder / "count"
    site.program("sbatch", f"#!/bin/sh\nif [ -e {count} ]; then {again}; fi\ntouch {count}\necho 101\n")
    assert submit("pipeline", "--model", "tiny", "--yes") == 130
    assert "stopped; cancelled again: job 101" in capsys.readouterr().err
    assert site.calls("scancel") == [["101"]]


def test_what_a_command_of_slurm_inherits(monkeypatch):
    """No Ctrl-C, which may leave a job that nobody knows; none of the variables that hide jobs."""
    monkeypatch.setenv("SQUEUE_STATES", "RUNNING")
    monkeypatch.setenv("SBATCH_ACCOUNT", "physics")
    said = slurm.call([sys.executable, "-S", "-c", "import os; print(os.getsid(0), *os.environ)"]).split()
    assert int(said[0]) != os.getsid(0)
    assert "SBATCH_ACCOUNT" in said
    assert "SQUEUE_STATES" not in said


def test_what_slurm_refuses_is_undone(site, capsys):
    site.refuse("train.sh")
    line = failure(capsys, "submit", "pipeline", "--model", "tiny", "--yes")
    assert "train.sh refused" in line
    assert "cancelled again: job 101, 102" in line
    assert site.calls("scancel") == [["101", "102"]]


# ---- one phase ----


def test_a_key_is_phase_1(site):
    submit("tiny", "--yes", "--batch", "2", "--gpus", "3")
    (call,) = site.calls("sbatch")
    assert {"--gres=gpu:3", "--only", "base", "scripts/slurm_phase1_baseline.sh"} <= {*call}
    assert after(call) == ""


def test_an_array_is_packed_and_throttled(site, capsys):
    pipeline = yaml.safe_load(Path("configs/pipeline.yaml").read_text())
    pipeline["models"]["tiny"]["billions"] = 100
    workloads = {"ruler:4096": {"rows": 6500}}
    pipeline |= {"throughput": {"workloads": workloads}, "resources": {"baseline": {"time": "2:00:00"}}}
    Path("configs/pipeline.yaml").write_text(yaml.safe_dump(pipeline))
    hours = 2 * 6500 * 4096 * 100e9 / 1.5e14 / 3600
    tasks = -(-hours // 1.6)
    submit("pipeline", "--model", "tiny", "--yes", "--batch", "3")
    assert word(site.calls("sbatch")[1], "--array=") == f"--array=0-{tasks - 1:.0f}%3"
    submit("tiny", "--yes", "--batch", "3")
    assert word(site.calls("sbatch")[-1], "--array=") == "--array=0-2%3", "at most BATCH jobs a call"
    assert "about 9.9 GPU-hours: ruler:4096: 2 cells × 4.9 h" in capsys.readouterr().out


def test_phase_3_needs_an_adapter(site, capsys):
    line = failure(capsys, "submit", "tiny_trained", "--yes")
    assert "out/control/final" in line
    assert line.endswith("sparsekv submit pipeline --model tiny")
    finish_training("control")
    assert "out/trained/final" in failure(capsys, "submit", "tiny_trained", "--yes")
    finish_training("train")
    assert submit("tiny_trained", "--yes") == 0
    assert "control,trained" in site.calls("sbatch")[0]


def test_submit_all(site, tmp_path):
    """The script of old is a thin call."""
    recorder = f"#!/bin/sh\nprintf '%s\\n' \"$@\" > {tmp_path}/said\n"
    site.program("sparsekv", recorder)
    environment = {"PATH": f"{site.folder}:/usr/bin:/bin", "BATCH": "2", "GPUS": "1"}
    script = ["bash", "scripts/submit_all.sh"]
    subprocess.run([*script, "qwen3_trained", "--dry-run"], env=environment, check=True)
    said = (tmp_path / "said").read_text().split()
    assert said == ["submit", "qwen3_trained", "--yes", "--batch", "2", "--gpus", "1", "--dry-run"]
    assert subprocess.run(script, env=environment, capture_output=True).returncode == 2
    nowhere = subprocess.run([*script, "qwen3"], env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True)
    assert nowhere.returncode == 2
    assert "sparsekv is not on the PATH" in nowhere.stderr


# ---- names that a shell would run ----


def test_a_name_runs_nothing(tmp_path, monkeypatch, capsys):
    """Neither on submission, nor when a shell runs the shown lines, nor in the job."""
    monkeypatch.chdir(tmp_path)
    make_experiment(tmp_path, EVIL, results="re sults/$(touch pwned4)")
    site = FakeSlurm(tmp_path / "bin", monkeypatch)
    assert submit("pipeline", "--model", "tiny", "--dry-run") == 0
    shown = [line.strip() for line in capsys.readouterr().out.splitlines() if "sbatch" in line]
    assert len(shown) == 5
    subprocess.run(["bash", "-euc", "\n".join(shown)], check=True)
    by_shell = site.calls("sbatch")
    (site.folder / "sbatch.calls").unlink()
    assert submit("pipeline", "--model", "tiny", "--yes") == 0
    assert site.calls("sbatch") == by_shell
    assert by_shell[0][by_shell[0].index("--model") + 1] == EVIL
    site.program("sparsekv", COMMAND_THAT_RECORDS.format(python=sys.executable, file=str(tmp_path / "job")))
    number = by_shell[0].index("scripts/slurm_phase0_analyze.sh")
    environment = {"PATH": f"{site.folder}:/usr/bin:/bin", "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "1"}
    subprocess.run(["bash", *by_shell[0][number:]], env=environment, check=True, timeout=60)
    assert json.loads((tmp_path / "job").read_text()) == ["analyze", *by_shell[0][number + 1 :]]
    assert not list(tmp_path.rglob("pwned*"))


COMMAND_THAT_RECORDS = """#!{python} -S
import json, sys
open({file!r}, "w").write(json.dumps(sys.argv[1:]))
"""


# ---- nothing is submitted ----


def test_dry_run_shows_everything_and_does_nothing(site, capsys):
    assert submit("pipeline", "--model", "tiny", "--dry-run", "--yes") == 0
    out = capsys.readouterr().out
    assert all(f"scripts/slurm_phase{phase}" in out for phase in ("0_analyze", "1_baseline", "2_train", "3_eval"))
    assert "-d afterok:$control:$train" in out
    assert "GPU-hours" in out
    assert "seconds of one GPU = parameters × tokens / rate" in out
    assert not site.calls("sbatch")
    assert not Path("results").exists()


def test_it_asks(site, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin.isatty", lambda: False)
    assert "--yes" in failure(capsys, "submit", "tiny")
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("builtins.input", lambda question: "n")
    assert "nothing was submitted" in failure(capsys, "submit", "tiny")
    monkeypatch.setattr("builtins.input", Mock(side_effect=EOFError))
    assert "nothing was submitted" in failure(capsys, "submit", "tiny")
    assert not site.calls("sbatch")
    monkeypatch.setattr("builtins.input", lambda question: "y")
    assert submit("tiny") == 0
    assert len(site.calls("sbatch")) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["qwen4", "--yes"], "known are pipeline, tiny, tiny_trained"),
        (["pipeline", "--yes"], "--model is missing"),
        (["pipeline", "--model", "qwen4"], "known are tiny"),
        (["tiny", "--batch", "0"], "--batch 0"),
        (["tiny", "--executor", "ssh"], "slurm, local"),
        (["tiny", "--pipeline", "nowhere.yaml"], "nowhere.yaml"),
        (["tiny", "--cluster", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_bad_input(site, capsys, arguments, said):
    assert said in failure(capsys, "submit", *arguments)
    assert not site.calls("sbatch")


def test_an_unwritable_folder_of_logs(site, capsys):
    Path("results").mkdir()
    Path("results/tiny").write_text("a file")
    line = failure(capsys, "submit", "tiny", "--yes")
    assert line == "sparsekv: logs results/tiny/logs: results/tiny is a file; name a folder"
    assert not site.calls("sbatch")


def test_work_of_another_configuration_is_refused(site, capsys):
    finish_training("train")
    train = yaml.safe_load(Path("configs/train.yaml").read_text())
    Path("configs/train.yaml").write_text(yaml.safe_dump(train | {"save_steps": 7}))
    assert submit("pipeline", "--model", "tiny", "--dry-run") == 0, "may change on resume"
    Path("configs/train.yaml").write_text(yaml.safe_dump(train | {"lr": 0.5}))
    line = failure(capsys, "submit", "pipeline", "--model", "tiny", "--yes")
    assert "out/trained: was made with --lr 0.0002, now 0.5" in line


def test_a_training_may_go_on_with_other_gpus_where_a_step_has_the_same_rows(site, capsys):
    finish_training("train", processes=1)
    train = yaml.safe_load(Path("configs/train.yaml").read_text())
    Path("configs/train.yaml").write_text(yaml.safe_dump(train | {"grad_accum": 4}))
    line = failure(capsys, "submit", "pipeline", "--model", "tiny", "--yes")
    assert "out/trained: was made with --grad_accum 8, now 4" in line
    pipeline = yaml.safe_load(Path("configs/pipeline.yaml").read_text())
    Path("configs/pipeline.yaml").write_text(yaml.safe_dump(pipeline | {"resources": {"train": {"gpus": 2}}}))
    assert submit("pipeline", "--model", "tiny", "--dry-run") == 0
    assert not site.calls("sbatch")


def test_slurms_own_words(site, capsys):
    site.fail("sbatch", "sbatch: error: invalid partition specified: gpu\n")
    line = failure(capsys, "submit", "tiny", "--yes")
    assert line.endswith("baseline: sbatch: error: invalid partition specified: gpu; nothing was submitted")


def test_no_controller(site, capsys, monkeypatch):
    site.program("sbatch", "#!/bin/sh\nexec sleep 30\n")
    monkeypatch.setattr(slurm, "TIMEOUT", 0.2)
    assert "is Slurm's controller up?" in failure(capsys, "submit", "tiny", "--yes")


def test_no_slurm(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_experiment(tmp_path)
    monkeypatch.setenv("PATH", "")
    assert "--executor local" in failure(capsys, "submit", "tiny"), "before it asks"
    assert submit("tiny", "--dry-run") == 0


def test_outside_of_the_repository(site, capsys):
    Path("scripts").unlink()
    assert "run this in the folder of the repository" in failure(capsys, "submit", "tiny", "--yes")


def test_a_script_with_a_configuration_of_its_own(site, capsys):
    pipeline = yaml.safe_load(Path("configs/pipeline.yaml").read_text())
    pipeline["models"]["tiny"]["train_script"] = "scripts/slurm_phase2_train_qwen.sh"
    Path("configs/pipeline.yaml").write_text(yaml.safe_dump(pipeline))
    line = failure(capsys, "submit", "pipeline", "--model", "tiny", "--yes")
    assert "trains by configs/qwen3_8b.yaml, not by configs/train.yaml" in line


def test_nothing_here_waits_for_torch():
    """A call of submit or status takes tenths of a second, not the seconds that importing torch takes."""
    modules = "sparsekv.cluster.submit, sparsekv.cluster.status"
    code = f"import sys, {modules}; sys.exit(bool({{'torch', 'transformers'}} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0
