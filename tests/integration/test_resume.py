"""A run that was stopped or killed, anywhere, and resumed is the run that never was: to the bit."""

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import as_flags, messages, run_options, train_config
from transformers import TrainerCallback

from sparsekv.cli import main
from sparsekv.errors import UserError
from sparsekv.signals import ECHO
from sparsekv.training import run
from sparsekv.training.eit_trainer import EITTrainer
from sparsekv.training.run import train

TIMING = {"tokens_per_second", "epoch"}
STEPS = 7  # of 4 an epoch: the second epoch's order of rows must be found again too


class Killed(BaseException):
    """Ends a run as SIGKILL would: nothing in the package catches it."""


class At(TrainerCallback):
    """Does something at the end of a step."""

    def __init__(self, step: int, action) -> None:
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.action()


def kill():
    raise Killed


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> dict:
    """Dropout, a mixture of rules and several cuts: all that is drawn must be drawn again."""
    options = run_options(tmp_path_factory.mktemp("inputs"))
    return {**options, "max_steps": STEPS, "save_steps": 2, "eval_steps": 3, "lora_dropout": 0.2, "num_cuts": 2}


@pytest.fixture(scope="module")
def uninterrupted(options, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "uninterrupted"
    train(train_config(options, out))
    return out


def train_with(callback: TrainerCallback, config, monkeypatch) -> Path | None:
    with monkeypatch.context() as patch:
        add_callback(callback, patch)
        return train(config)


def add_callback(callback: TrainerCallback, monkeypatch):
    plain = run._make_trainer

    def make_trainer(*args):
        trainer = plain(*args)
        trainer.add_callback(callback)
        return trainer

    monkeypatch.setattr(run, "_make_trainer", make_trainer)


def metrics(out: Path) -> list[dict]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text("utf-8").splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMING} for line in lines]


def assert_same_run(one: Path, other: Path):
    for folder in ("final", f"checkpoint-{STEPS}"):
        wanted, found = (load_file(out / folder / "adapter_model.safetensors") for out in (one, other))
        assert wanted.keys() == found.keys()
        assert all(torch.equal(wanted[name], found[name]) for name in wanted), folder
        assert (one / folder / "adapter_model.safetensors").read_bytes() == (
            other / folder / "adapter_model.safetensors"
        ).read_bytes()
        assert (one / folder / "scheduler_state.json").read_text() == (
            other / folder / "scheduler_state.json"
        ).read_text()
    assert metrics(one) == metrics(other)
    assert not (other / ".staging").exists()


@pytest.mark.parametrize("step", [1, 2, 5])
def test_terminated(options, uninterrupted, tmp_path, monkeypatch, step):
    """Before the first save, at a save, and after one; the handlers of before are back afterwards."""
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    out = tmp_path / "out"
    assert train_with(At(step, terminate), train_config(options, out), monkeypatch) is None
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert (out / f"checkpoint-{step}").is_dir()
    assert not (out / "final").exists()
    assert train(train_config(options, out, resume=True)) == out / "final"
    assert_same_run(uninterrupted, out)


@pytest.mark.parametrize("step", [1, 4, 5, 7])
def test_killed_between_saves(options, uninterrupted, tmp_path, monkeypatch, step):
    out = tmp_path / "out"
    with pytest.raises(Killed):
        train_with(At(step, kill), train_config(options, out), monkeypatch)
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "loss')  # a line cut off
    train(train_config(options, out, resume=True))
    assert_same_run(uninterrupted, out)


def test_killed_twice_and_terminated(options, uninterrupted, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with pytest.raises(Killed):
        train_with(At(3, kill), train_config(options, out), monkeypatch)
    assert train_with(At(5, terminate), train_config(options, out, resume=True), monkeypatch) is None
    with pytest.raises(Killed):
        train_with(At(6, kill), train_config(options, out, resume=True), monkeypatch)
    train(train_config(options, out, resume=True))
    assert_same_run(uninterrupted, out)


@pytest.mark.parametrize(
    "moment", ["_save_optimizer_and_scheduler", "_save_rng_state", "save_model", "_save_checkpoint", "save_final"]
)
def test_killed_during_a_save(options, uninterrupted, tmp_path, monkeypatch, moment):
    """Whichever file is the last one written: what is half there is not taken for a checkpoint or a final model."""
    out = tmp_path / "out"
    owner = run if moment == "save_final" else EITTrainer
    plain, calls = getattr(owner, moment), []

    def save_and_die(*args, **kwargs):
        calls.append(moment)
        plain(*args, **kwargs)
        if len(calls) == 2 or owner is run:
            # a killed process cleans nothing up
            monkeypatch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)
            raise Killed

    monkeypatch.setattr(owner, moment, save_and_die)
    with pytest.raises(Killed):
        train(train_config(options, out))
    monkeypatch.undo()
    whole = moment in ("_save_checkpoint", "save_final")
    assert (out / "checkpoint-4").exists() == whole
    assert (out / ".staging").exists() == (not whole)
    train(train_config(options, out, resume=True))
    assert_same_run(uninterrupted, out)


def test_killed_before_the_end_is_written(options, uninterrupted, tmp_path, monkeypatch):
    """After the checkpoint of the last step nothing is left to train."""
    out = tmp_path / "out"

    def die(*args):
        raise Killed

    monkeypatch.setattr(run, "save_final", die)
    with pytest.raises(Killed):
        train(train_config(options, out))
    monkeypatch.undo()
    assert (out / f"checkpoint-{STEPS}").is_dir()
    assert not (out / "final").exists()
    train(train_config(options, out, resume=True))
    assert_same_run(uninterrupted, out)


def test_a_killed_process(options, uninterrupted, tmp_path):
    """The real thing: SIGKILL while a checkpoint is being written, and SIGTERM with its status and message."""
    out = tmp_path / "out"
    script = tmp_path / "killed.py"
    script.write_text(
        "import os, signal, sys\n"
        "from sparsekv.cli import main\n"
        "from sparsekv.training.eit_trainer import EITTrainer\n"
        "plain = EITTrainer._save_rng_state\n"
        "def save_and_die(self, folder):\n"
        "    plain(self, folder)\n"
        "    if self.state.global_step == 4: os.kill(os.getpid(), signal.SIGKILL)\n"
        "EITTrainer._save_rng_state = save_and_die\n"
        "main(sys.argv[1:])\n"
    )
    arguments = ["train", *as_flags({**options, "output_dir": str(out)})]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}  # as here
    killed = subprocess.run([sys.executable, script, *arguments], capture_output=True, env=environment, timeout=300)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert sorted(path.name for path in out.glob("*point-*")) == ["checkpoint-2"]
    assert (out / ".staging" / "checkpoint-4" / "optimizer.pt").exists()
    train(train_config(options, out, resume=True))
    assert_same_run(uninterrupted, out)


SAVES_SLOWLY = """
import sys, time
from pathlib import Path
from sparsekv.cli import main
from sparsekv.training.eit_trainer import EITTrainer
plain = EITTrainer._save_rng_state
def save(self, folder):
    Path("saving").touch()
    end = time.monotonic() + float(sys.argv[1])
    while time.monotonic() < end:
        time.sleep(0.01)
    plain(self, folder)
EITTrainer._save_rng_state = save
main(sys.argv[2:])
"""


@pytest.mark.parametrize(
    ("again", "seconds", "status"),
    [(signal.SIGTERM, 3, 128 + signal.SIGTERM), (signal.SIGINT, 60, 128 + signal.SIGINT)],
)
def test_another_signal_while_a_checkpoint_is_written(options, uninterrupted, tmp_path, again, seconds, status):
    """A repeated SIGTERM does no harm, an impatient Ctrl-C ends the run; both can be resumed."""
    out = tmp_path / "out"
    (tmp_path / "slow.py").write_text(SAVES_SLOWLY)
    arguments = ["train", *as_flags({**options, "output_dir": str(out)})]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}  # as here
    process = subprocess.Popen([sys.executable, "slow.py", str(seconds), *arguments], cwd=tmp_path, env=environment)
    while not (tmp_path / "saving").exists():
        time.sleep(0.05)
        assert process.poll() is None
    process.terminate()
    time.sleep(ECHO + 0.2)
    process.send_signal(again)
    assert process.wait(60) == status
    saved = {path.name for path in out.glob("checkpoint-*")}
    assert saved == ({"checkpoint-2", "checkpoint-3"} if again == signal.SIGTERM else set())
    train(train_config(options, out, resume=True))
    assert_same_run(uninterrupted, out)


def test_status_and_message_of_a_stop(options, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    add_callback(At(2, terminate), monkeypatch)
    with pytest.raises(SystemExit) as stopped:
        main(["train", *as_flags({**options, "output_dir": str(out)})])
    assert stopped.value.code == 143
    (message,) = messages(capsys.readouterr().err)
    assert "--resume" in message


def test_the_adaptive_schedule(options, tmp_path, monkeypatch):
    """Its reference, ratio and patience are found again, and an evaluation is not observed twice."""
    options = {**options, "scheduler_mode": "adaptive", "ppl_threshold": 0.0, "step_size": 0.1, "patience": 2}
    options = {**options, "eval_steps": 1}
    train(train_config(options, tmp_path / "whole"))
    ratios = {line["schedule_keep_ratio"] for line in metrics(tmp_path / "whole") if "loss" in line}
    assert len(ratios) > 1, "the ratio never changes: nothing is at stake"
    with pytest.raises(Killed):
        train_with(At(5, kill), train_config(options, tmp_path / "out"), monkeypatch)
    train(train_config(options, tmp_path / "out", resume=True))
    assert_same_run(tmp_path / "whole", tmp_path / "out")


def test_a_finished_run_stays(options, uninterrupted, tmp_path, capsys):
    out = shutil.copytree(uninterrupted, tmp_path / "out")
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.rglob("*") if path.is_file()}
    assert train(train_config(options, out, resume=True)) == out / "final"
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.rglob("*") if path.is_file()} == before


def test_a_new_interval_of_saves_holds(options, uninterrupted, tmp_path):
    """What may change on resuming does change."""
    out = tmp_path / "out"
    shutil.copytree(uninterrupted, out)
    for folder in ("final", "checkpoint-4", "checkpoint-6", "checkpoint-7"):
        shutil.rmtree(out / folder)
    train(train_config(options, out, resume=True, save_steps=5))
    assert {path.name for path in out.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-5", "checkpoint-7"}
    assert_same_run(uninterrupted, out)


# ---- what cannot be resumed ----


@pytest.fixture
def half(options, uninterrupted, tmp_path) -> Path:
    """A run whose end is missing."""
    out = shutil.copytree(uninterrupted, tmp_path / "half")
    shutil.rmtree(out / "final")
    return out


def contents(out: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("name", "value"),
    [("lr", 0.02), ("rules", {"tova": 1.0}), ("max_steps", 9), ("anchors", {"sink_size": 3}), ("control", True)],
)
def test_other_options_are_refused(options, half, name, value):
    before = contents(half)
    with pytest.raises(UserError, match=f"^--resume: {half} .*--{name}"):
        train(train_config(options, half, resume=True, **{name: value}))
    assert contents(half) == before


def test_rules_in_another_order_are_refused(options, half):
    """They are drawn by their places."""
    rules = dict(reversed(train_config(options, half).rules.items()))
    before = contents(half)
    with pytest.raises(UserError, match=f"^--resume: {half} .*--rules in another order"):
        train(train_config(options, half, resume=True, rules=rules))
    assert contents(half) == before


def test_an_adaptive_schedule_keeps_its_evaluations(options, tmp_path):
    """It moves at them."""
    options = {**options, "scheduler_mode": "adaptive", "ppl_threshold": 9.0, "max_steps": 3}
    train(train_config(options, tmp_path / "out"))
    shutil.rmtree(tmp_path / "out" / "final")
    with pytest.raises(UserError, match=r"--eval_steps 2 \(was 3\)"):
        train(train_config(options, tmp_path / "out", resume=True, eval_steps=2))


def test_other_weights_are_refused(options, half, tmp_path):
    folder = shutil.copytree(options["model"], tmp_path / "model")
    record = json.loads((half / "eit_config.json").read_text("utf-8"))
    record["config"]["model"] = str(folder)
    (half / "eit_config.json").write_text(json.dumps(record), "utf-8")
    weights = load_file(folder / "model.safetensors")
    save_file({name: weight * 1.01 for name, weight in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    before = contents(half)
    with pytest.raises(UserError, match=f"^--resume: {half} began from other weights than lie in --model {folder} now"):
        train(train_config(options, half, resume=True, model=str(folder)))
    assert contents(half) == before


def test_a_run_from_before_an_option_existed_has_its_default(options, uninterrupted, half):
    file = half / "eit_config.json"
    record = json.loads(file.read_text("utf-8"))
    del record["config"]["temperature"], record["config"]["compile"]
    del record["model_fingerprint"], record["rules_in_order"]
    file.write_text(json.dumps(record), "utf-8")
    with pytest.raises(UserError, match=rf"^--resume: {half} .*: --temperature 2.0 \(was 1.0\)$"):
        train(train_config(options, half, resume=True, temperature=2.0))
    shutil.rmtree(half / "checkpoint-7")
    train(train_config(options, half, resume=True))
    assert_same_run(uninterrupted, half)


def test_a_run_from_before_cross_entropy_on_the_context_had_none(options, half):
    file = half / "eit_config.json"
    record = json.loads(file.read_text("utf-8"))
    del record["config"]["lambda_ce_context"]
    file.write_text(json.dumps(record), "utf-8")
    with pytest.raises(UserError, match=rf"^--resume: {half} .*: --lambda_ce_context 1.0 \(was 0.0\)$"):
        train(train_config(options, half, resume=True))


def test_other_data_are_refused(options, half, tmp_path):
    text = Path(options["data"])
    plain = text.read_text("utf-8")
    before = contents(half)
    text.write_text(plain.replace("the", "a"), "utf-8")
    try:
        with pytest.raises(UserError, match="--data"):
            train(train_config(options, half, resume=True))
    finally:
        text.write_text(plain, "utf-8")
    assert contents(half) == before


def test_without_resume_a_run_is_left_alone(options, half):
    before = contents(half)
    with pytest.raises(UserError, match=f"^--output_dir {half}: .*--resume"):
        train(train_config(options, half))
    assert contents(half) == before


def test_a_folder_of_other_things(options, tmp_path):
    (tmp_path / "thesis.txt").write_text("...")
    with pytest.raises(UserError, match=f"^--resume: {tmp_path} holds no run"):
        train(train_config(options, tmp_path, resume=True))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_resuming_nothing_begins(options, tmp_path):
    """A job script may always say --resume."""
    with contextlib.redirect_stdout(io.StringIO()):
        assert train(train_config(options, tmp_path / "out", resume=True, max_steps=1)) == tmp_path / "out" / "final"


DAMAGES = {  # file of a checkpoint → what has become of it
    "trainer_state.json": "cut",
    "scheduler_state.json": "gone",
    "optimizer.pt": "gone",
    "scheduler.pt": "cut",
    "rng_state.pth": "gone",
    "adapter_model.safetensors": "cut",
}


@pytest.mark.parametrize(("name", "damage"), [*DAMAGES.items(), ("optimizer.pt", "cut")])
def test_a_checkpoint_that_is_not_whole_is_named(options, uninterrupted, half, name, damage):
    """Without the optimizer's state transformers would go on, as another run."""
    file = half / f"checkpoint-{STEPS}" / name
    whole = file.read_bytes()
    file.unlink()
    if damage == "cut":
        file.write_bytes(whole[: len(whole) // 2])
    before = contents(half)
    with pytest.raises(UserError, match=rf"^--resume: {file.parent}: .*missing or damaged; delete this folder"):
        train(train_config(options, half, resume=True))
    assert contents(half) == before
    shutil.rmtree(file.parent)
    (half / "checkpoint-99").write_text("no folder")
    train(train_config(options, half, resume=True))
    assert_same_run(uninterrupted, half)


@pytest.mark.parametrize("text", ["", "[]", '{"config": {', '{"config": 1}', '{"config": {}}'])
def test_a_record_that_is_none_is_named(options, half, text):
    (half / "eit_config.json").write_text(text)
    with pytest.raises(UserError, match=f"^--resume: {half / 'eit_config.json'}: is no record"):
        train(train_config(options, half, resume=True))


def test_a_kill_at_the_very_first_write(options, tmp_path):
    (tmp_path / ".eit_config.json.abc123").write_text("{")
    with contextlib.redirect_stdout(io.StringIO()):
        assert train(train_config(options, tmp_path, resume=True, max_steps=1)) == tmp_path / "final"


def test_another_run_that_ended_meanwhile(options, tmp_path, monkeypatch):
    """What was found at the beginning no longer holds when the folder is free."""
    out, plain = tmp_path / "out", run._check_architecture
    config = train_config(options, out, resume=True, max_steps=1)

    def slow(*args):
        monkeypatch.setattr(run, "_check_architecture", plain)
        assert train(config) == out / "final"
        plain(*args)

    monkeypatch.setattr(run, "_check_architecture", slow)
    with pytest.raises(UserError, match=f"^--output_dir {out}: another sparsekv train wrote there meanwhile"):
        train(config)
    assert [line["step"] for line in metrics(out) if "loss" in line] == [1]


def test_two_at_once_in_one_folder(options, tmp_path, monkeypatch):
    out, refused = tmp_path / "out", []

    def another():
        with pytest.raises(UserError, match=f"^--output_dir {out}: another sparsekv train is at work") as error:
            train(train_config(options, out, resume=True, max_steps=3))
        refused.append(error)

    train_with(At(2, another), train_config(options, out, max_steps=3), monkeypatch)
    assert len(refused) == 1
    assert [line["step"] for line in metrics(out) if "loss" in line] == [1, 2, 3]
