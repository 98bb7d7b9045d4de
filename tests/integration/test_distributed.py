"""Two processes train what one does.

This file is also the program that the processes run: the tests write a list of runs, start it twice, and look at what
it has left. As `test_distributed.py train …` it is `sparsekv train`, killed in the last process.
"""

import faulthandler
import json
import os
import shutil
import signal
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from launching import ACCELERATE, fsdp_environment
from safetensors.torch import load_file
from tiny import as_flags, run_options, train_config
from transformers import AutoModelForCausalLM, TrainerCallback

from sparsekv import cli
from sparsekv.errors import UserError
from sparsekv.training import run
from sparsekv.training.peers import LOST
from sparsekv.training.run import train

pytestmark = pytest.mark.slow

TIMEOUT = 240  # seconds
RANKED = {"eval_evicted_ppl": 1e-4}  # rounding may rank two entries at the border the other way round


# ---- what the two processes run ----


class SignalOne(TrainerCallback):
    """Only the last process gets a signal."""

    def __init__(self, step: int, number: int) -> None:
        self.step, self.number = step, number

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step and args.process_index == args.world_size - 1:
            os.kill(os.getpid(), self.number)


def add_callback(callback: TrainerCallback, patch: pytest.MonkeyPatch):
    plain = run._make_trainer

    def make_trainer(*args):
        trainer = plain(*args)
        trainer.add_callback(callback)
        return trainer

    patch.setattr(run, "_make_trainer", make_trainer)


def allow_fsdp_on_cpu():
    """accelerate turns to FSDP only beside GPUs, and silently to DDP elsewhere, though torch can do both."""
    plain = AcceleratorState.__init__

    def with_fsdp(self, *args, fsdp_plugin=None, **kwargs):
        plain(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = with_fsdp


def work(jobs: list[dict]):
    faulthandler.dump_traceback_later(TIMEOUT, exit=True)  # shows where processes wait for each other, if they do
    torch.set_num_threads(1)
    allow_fsdp_on_cpu()
    plain = run._make_trainer
    for job in jobs:
        os.environ.update(job.get("environment", {}))

        def make_trainer(*args, job=job):
            trainer = plain(*args)
            assert trainer.is_fsdp_enabled == bool(job.get("environment"))
            if job.get("bf16"):
                trainer.accelerator.state.fsdp_plugin.set_mixed_precision("bf16")
            if job.get("stop"):
                trainer.add_callback(SignalOne(1, signal.SIGTERM))
            return trainer

        run._make_trainer = make_trainer
        final = train(train_config(job["options"], job["output_dir"]))
        assert (final is None) == job.get("stop", False), "a process went on alone"
        for name in job.get("environment", {}):
            del os.environ[name]


def launch(jobs: list[dict], folder: Path, processes: int = 2):
    jobs_file = folder / "jobs.json"
    jobs_file.write_text(json.dumps(jobs))
    done = start("torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", __file__, str(jobs_file))
    assert done.returncode == 0, done.stderr[-5000:]


def start(*arguments: str) -> subprocess.CompletedProcess:
    tests = Path(__file__).parents[1]
    path = os.pathsep.join([str(tests), str(tests.parent), *filter(None, sys.path)])
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=TIMEOUT + 60,
    )


# ---- what is left ----


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Folders of the same run by one process and by two: plain, stopped and resumed, sharded, with a teacher, whole.

    The run that gets `more` processes is stopped by one and resumed by two.
    """
    folder = tmp_path_factory.mktemp("distributed")
    options = {**run_options(folder), "grad_accum": 2, "num_cuts": 2, "lr": 1e-3}
    options |= {"lambda_context": 0.5, "lambda_selection": 0.3}
    options |= {"num_validation_samples": 3}  # of two processes one reads a row again
    one, two, every = {**options, "batch_size": 2}, {**options, "batch_size": 1}, {"lora_r": 0, "lr": 1e-4}
    train(train_config(one, folder / "one"))
    train(train_config({**one, **every}, folder / "one_every"))
    with pytest.MonkeyPatch.context() as patch:
        add_callback(SignalOne(1, signal.SIGTERM), patch)
        assert train(train_config(one, folder / "more")) is None
    half = {"dtype": "bfloat16"}  # of the base, as in the real runs; the adapter stays in float32
    train(train_config({**one, **half}, folder / "one_half"))
    taught = {"teacher_adapter": str(folder / "one" / "final")}
    train(train_config({**one, **taught}, folder / "one_taught"))
    ddp, fsdp = (fsdp_environment(ACCELERATE / f"{name}.yaml") for name in ("ddp", "fsdp2"))
    jobs = [
        {"output_dir": "ddp", "options": two, "environment": ddp},
        {"output_dir": "stopped", "options": two, "stop": True},
        {"output_dir": "stopped", "options": {**two, "resume": True}},
        {"output_dir": "more", "options": {**two, "resume": True}},
        {"output_dir": "fsdp", "options": two, "environment": fsdp},
        {"output_dir": "fsdp_bf16", "options": two, "environment": fsdp, "bf16": True},
        {"output_dir": "fsdp_stopped", "options": two, "environment": fsdp, "stop": True},
        {"output_dir": "fsdp_stopped", "options": {**two, "resume": True}, "environment": fsdp},
        {"output_dir": "ddp_every", "options": {**two, **every}},
        {"output_dir": "fsdp_every", "options": {**two, **every}, "environment": fsdp},
        {"output_dir": "fsdp_half", "options": {**two, **half}, "environment": fsdp},
        {"output_dir": "ddp_taught", "options": {**two, **taught}},
        {"output_dir": "fsdp_taught", "options": {**two, **taught}, "environment": fsdp},
    ]
    launch([{**job, "output_dir": str(folder / job["output_dir"])} for job in jobs], folder)
    return folder


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text("utf-8").splitlines()]


def adapter(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "final" / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("one", "name"),
    [
        *(("one", name) for name in ("ddp", "more", "fsdp")),
        ("one_half", "fsdp_half"),
        *(("one_taught", name) for name in ("ddp_taught", "fsdp_taught")),
    ],
)
def test_two_processes_equal_one(runs, one, name):
    assert_same(runs / one, runs / name)


def assert_same(one: Path, two: Path):
    wanted, found = metrics(one), metrics(two)
    selection = [line["selection"] for line in wanted if "loss" in line]
    assert sum(figure > 0 for figure in selection) > 1, "all but the steps that draw no rule with a score"
    for line, other in zip(wanted, found, strict=True):
        assert line.keys() == other.keys()
        for figure in line.keys() - {"tokens_per_second"}:
            assert other[figure] == pytest.approx(line[figure], rel=RANKED.get(figure, 1e-5), abs=1e-5), figure
    weights, others = adapter(one), adapter(two)
    assert weights.keys() == others.keys()
    for key in weights:
        torch.testing.assert_close(weights[key], others[key], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["", "fsdp_"])
def test_a_signal_to_one_stops_both(runs, name):
    """And the run resumes to the same bits."""
    assert (runs / f"{name}stopped" / "checkpoint-2").is_dir()
    whole, resumed = adapter(runs / (name.rstrip("_") or "ddp")), adapter(runs / f"{name}stopped")
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    steps = [[line["step"] for line in metrics(runs / out)] for out in ("one", f"{name}stopped")]
    assert steps[0] == steps[1]


def test_one_that_is_killed_ends_all_and_one_process_goes_on(runs, tmp_path):
    options = json.loads((runs / "jobs.json").read_text())[0]["options"]
    out = tmp_path / "killed"
    launcher = ["accelerate.commands.launch", "--config_file", str(ACCELERATE / "ddp.yaml"), "--num_processes", "2"]
    flags = [*as_flags(options), "--output_dir", str(out)]
    done = start(*launcher, "--main_process_port", "0", __file__, "train", *flags)
    assert done.returncode == 1
    ours = [line for line in done.stderr.splitlines() if line.startswith("sparsekv: ")]
    assert ours == [f"sparsekv: {LOST}"]
    assert "(SIGKILL)" in done.stderr, "the launcher's words"
    assert "pair.cc" not in done.stderr, "nobody asked how processes talk to each other"
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-2"]
    one = {**options, "batch_size": 2, "resume": True}
    with pytest.raises(UserError, match=r"trained with 4 rows a step; .* × 1 processes are 2: change --grad_accum"):
        train(train_config({**options, "resume": True}, out))
    train(train_config(one, out))
    assert_same(runs / "one", out)


def test_a_divided_run_goes_on_with_another_number_and_not_undivided(runs, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(runs / "fsdp_stopped", out)
    shutil.rmtree(out / "final")
    shutil.rmtree(out / "checkpoint-4")
    jobs = json.loads((runs / "jobs.json").read_text())
    (job,) = (job for job in jobs if job["output_dir"].endswith("fsdp_stopped") and not job.get("stop"))
    options = {**job["options"], "batch_size": 2}
    with pytest.raises(UserError, match=r"checkpoint-2 was written with FSDP"):
        train(train_config(options, out))
    launch([{**job, "options": options, "output_dir": str(out)}], tmp_path, processes=1)
    assert_same(runs / "one", out)


@pytest.mark.parametrize("name", ["ddp_every", "fsdp_every"])
def test_every_parameter(runs, name):
    """The final model is whole, though with FSDP each process held half of it."""
    one, other = (AutoModelForCausalLM.from_pretrained(runs / out / "final") for out in ("one_every", name))
    for (name, weight), found in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(weight, found, atol=1e-5, rtol=0, msg=lambda text, n=name: f"{n}: {text}")


def test_sharding_in_bf16_evicts_and_keeps_the_loss_in_fp32(runs):
    """Its policy casts what goes into a layer and rounds what comes out of the model: neither may reach ours."""
    for line, other in zip(metrics(runs / "one"), metrics(runs / "fsdp_bf16"), strict=True):
        for figure in line.keys() & {"loss", "ce", "actual_keep_ratio", "eval_full_ppl", "eval_evicted_ppl"}:
            assert other[figure] == pytest.approx(line[figure], rel=1e-2), figure
        for figure in other.keys() & {"loss", "eval_full_ppl"}:
            assert torch.tensor(other[figure]).bfloat16().item() != other[figure], figure


def test_nothing_holds_the_group_that_is_left(tmp_path):
    """A group that lives until the interpreter ends aborts there one time in six."""
    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    holders: list = [torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))]
    holders.append(holders)  # as a Trainer and its model hold each other
    wrapped = weakref.ref(holders[0])
    del holders
    run._leave_group(SimpleNamespace(destroy_process_group=torch.distributed.destroy_process_group))
    assert wrapped() is None
    assert not torch.distributed.is_initialized()


if __name__ == "__main__":
    if sys.argv[1] == "train":
        add_callback(SignalOne(3, signal.SIGKILL), pytest.MonkeyPatch())
        cli.main(sys.argv[1:])
    work(json.loads(Path(sys.argv[1]).read_text()))
