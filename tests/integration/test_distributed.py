"""Two processes train what one does.

This file is also the program that the processes run: the tests write a list of runs, start it twice, and look at what
it has left.
"""

import faulthandler
import json
import os
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
from tiny import run_options, train_config
from transformers import AutoModelForCausalLM, TrainerCallback

from sparsekv.training import run
from sparsekv.training.run import train

pytestmark = pytest.mark.slow

TIMEOUT = 240  # seconds


# ---- what the two processes run ----


class StopOne(TrainerCallback):
    """Only the second process gets a signal."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1 and args.process_index == 1:
            os.kill(os.getpid(), signal.SIGTERM)


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
                trainer.add_callback(StopOne())
            return trainer

        run._make_trainer = make_trainer
        final = train(train_config(job["options"], job["output_dir"]))
        assert (final is None) == job.get("stop", False), "a process went on alone"
        for name in job.get("environment", {}):
            del os.environ[name]


def launch(jobs: list[dict], folder: Path):
    jobs_file = folder / "jobs.json"
    jobs_file.write_text(json.dumps(jobs))
    tests = Path(__file__).parents[1]
    path = os.pathsep.join([str(tests), str(tests.parent), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__, jobs_file],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=TIMEOUT + 60,
    )
    assert done.returncode == 0, done.stderr[-5000:]


# ---- what is left ----


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Folders of the same run by one process and by two: plain, stopped and resumed, sharded, and all parameters."""
    folder = tmp_path_factory.mktemp("distributed")
    options = {**run_options(folder), "grad_accum": 2, "num_cuts": 2, "lr": 1e-3}
    options |= {"lambda_context": 0.5, "lambda_selection": 0.3}
    one, two, every = {**options, "batch_size": 2}, {**options, "batch_size": 1}, {"lora_r": 0, "lr": 1e-4}
    train(train_config(one, folder / "one"))
    train(train_config({**one, **every}, folder / "one_every"))
    half = {"dtype": "bfloat16"}  # of the base, as in the real runs; the adapter stays in float32
    train(train_config({**one, **half}, folder / "one_half"))
    ddp, fsdp = (fsdp_environment(ACCELERATE / f"{name}.yaml") for name in ("ddp", "fsdp2"))
    jobs = [
        {"output_dir": "ddp", "options": two, "environment": ddp},
        {"output_dir": "stopped", "options": two, "stop": True},
        {"output_dir": "stopped", "options": {**two, "resume": True}},
        {"output_dir": "fsdp", "options": two, "environment": fsdp},
        {"output_dir": "fsdp_bf16", "options": two, "environment": fsdp, "bf16": True},
        {"output_dir": "fsdp_stopped", "options": two, "environment": fsdp, "stop": True},
        {"output_dir": "fsdp_stopped", "options": {**two, "resume": True}, "environment": fsdp},
        {"output_dir": "ddp_every", "options": {**two, **every}},
        {"output_dir": "fsdp_every", "options": {**two, **every}, "environment": fsdp},
        {"output_dir": "fsdp_half", "options": {**two, **half}, "environment": fsdp},
    ]
    launch([{**job, "output_dir": str(folder / job["output_dir"])} for job in jobs], folder)
    return folder


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text("utf-8").splitlines()]


def adapter(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "final" / "adapter_model.safetensors")


@pytest.mark.parametrize(("one", "name"), [("one", "ddp"), ("one", "fsdp"), ("one_half", "fsdp_half")])
def test_two_processes_equal_one(runs, one, name):
    wanted, found = metrics(runs / one), metrics(runs / name)
    selection = [line["selection"] for line in wanted if "loss" in line]
    assert sum(figure > 0 for figure in selection) > 1, "all but the steps that draw no rule with a score"
    for line, other in zip(wanted, found, strict=True):
        assert line.keys() == other.keys()
        for figure in line.keys() - {"tokens_per_second"}:
            assert other[figure] == pytest.approx(line[figure], rel=1e-5, abs=1e-5), figure
    weights, others = adapter(runs / one), adapter(runs / name)
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
    work(json.loads(Path(sys.argv[1]).read_text()))
