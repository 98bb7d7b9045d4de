"""benchmarks/train_step.py: its floor, its comparison with dense masks, and what it says of a row that does not fit."""

import argparse
import importlib
from pathlib import Path

import pytest
import torch
from tiny import attend_as_ever
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from sparsekv.errors import UserError

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def train_step(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("train_step")


def options(**changes):
    values = {
        "shape": "tiny",
        "device": "cpu",
        "batch_size": 2,
        "grad_accum": 2,
        "num_cuts": 4,
        "steps": 1,
        "warm_up": 2,
        "checkpointing": False,
        "profile": False,
        "check": True,
        "processes": 1,
        "distribution": "one process",
    }
    return argparse.Namespace(**{**values, **changes})


def test_the_floor_of_an_8b_is_the_sum_of_its_products(train_step):
    base = train_step.make_model("qwen3-8b", "bfloat16", "meta")
    head = 6 * 4096 * 151_936 * 4096
    layer = 4096 * 128 * (32 + 8 + 8 + 32) + 3 * 4096 * 12_288
    attention = 9 * 4096**2 * 32 * 128 * 36
    flops = train_step.step_flops(base, 1, 4096)
    assert flops == pytest.approx(6 * 36 * layer * 4096 + attention + head, rel=1e-3)
    assert flops / 787e12 == pytest.approx(0.268, rel=0.02)
    assert train_step.step_flops(base, 3, 4096) == pytest.approx(3 * flops)


def test_a_32b_has_its_parameters(train_step):
    base = train_step.make_model("qwen3-32b", "bfloat16", "meta")
    assert sum(weight.numel() for weight in base.parameters()) == pytest.approx(32.76e9, rel=1e-3)
    assert [layer.self_attn.layer_idx for layer in base.model.layers] == list(range(64))


@pytest.mark.parametrize("sharded", [False, True])
def test_every_layer_attends_as_the_model_is_told_to(sharded, train_step):
    base = train_step.make_model("tiny", "float32", "cpu", sharded)
    base.set_attn_implementation("eager")
    assert {layer.self_attn.config._attn_implementation for layer in base.model.layers} == {"eager"}


def test_a_step_that_evicts_in_some_layers_only_is_not_measured(train_step, tmp_path, monkeypatch):
    def part_of(*args):
        trainer = make_trainer(*args)
        attend_as_ever(trainer.base.model.layers[2].self_attn)
        return trainer

    make_trainer = train_step.make_trainer
    monkeypatch.setattr(train_step, "make_trainer", part_of)
    with pytest.raises(AssertionError, match="2 of 3 layers evicted"):
        train_step.measure(options(lengths=[128], compile=False), train_step.Row("mixture", 128, False))


def test_a_model_to_be_divided_begins_as_one_layer_and_ends_as_the_whole(train_step, tmp_path):
    models = []
    for sharded in (False, True):
        torch.manual_seed(0)
        models.append(train_step.make_model("tiny", "float32", "cpu", sharded))
    whole, divided = models
    places = [{weight.data_ptr() for weight in model.parameters()} for model in models]
    assert len(places[0]) - len(places[1]) == 2 * len(list(divided.model.layers[0].parameters()))
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        for layer in divided.model.layers:
            fully_shard(layer, mesh=init_device_mesh("cpu", (1,)))
        weights = [layer.mlp.up_proj.weight.to_local() for layer in divided.model.layers]
    finally:
        torch.distributed.destroy_process_group()
    assert len({weight.data_ptr() for weight in weights}) == 3
    assert all(torch.equal(weight, whole.model.layers[2].mlp.up_proj.weight) for weight in weights)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["control", "mixture"])
def test_a_step_equals_dense_masks_and_full_logits(name, checkpointing, train_step, tmp_path, monkeypatch):
    row = train_step.Row(name, 128, False)
    trainer = train_step.make_trainer(options(checkpointing=checkpointing), row, str(tmp_path))
    trainer.train()
    difference, cosine, *rounding = train_step.compare(trainer)
    assert difference < 1e-6
    assert cosine > 1 - 1e-6
    assert rounding == pytest.approx([0, 1]), "the model is in float32 already"
    everything_else = None
    if name == "control":
        cuts = trainer.current_plan(128).cuts
        everything_else = {layer: [torch.zeros(2, 2, cut, dtype=torch.bool) for cut in cuts] for layer in range(3)}
    plain = train_step.dense_loss
    monkeypatch.setattr(train_step, "dense_loss", lambda *args: plain(*args[:3], everything_else))
    assert train_step.compare(trainer)[1] < 1 - 1e-4, "what is kept makes no difference"


def test_float8_is_checked_against_dense_masks_without_it(train_step, tmp_path, monkeypatch):
    monkeypatch.setattr("sparsekv.training.float8._check_device", lambda device: None)
    row = train_step.Row("mixture", 128, False, float8=True)
    trainer = train_step.make_trainer(options(), row, str(tmp_path))
    trainer.train()
    difference, cosine, *rounding = train_step.compare(trainer)
    assert 1e-6 < difference < 0.02
    assert 0.9 < cosine < 1 - 1e-4
    assert rounding == pytest.approx([0, 1])
    assert train_step.title(row) == ["mixture, float8", "128"]


def test_a_row_that_does_not_fit_says_so(train_step):
    def out_of_memory():
        raise RuntimeError("CUDA out of memory. Tried to allocate 512 MiB")

    row = train_step.Row("mixture", 64, True)
    train_step.run(out_of_memory, row)
    assert row.seconds == "out of memory"
    timed = train_step.Row("mixture", 64, False, seconds=0.5)
    train_step.run(out_of_memory, timed)
    assert timed.seconds == 0.5, "only the comparison did not fit"
    with pytest.raises(RuntimeError, match="another"):
        train_step.run(lambda: (_ for _ in ()).throw(RuntimeError("another")), row)


def test_the_command_fills_its_block(train_step, tmp_path, monkeypatch, capsys):
    document = tmp_path / "page.md"
    document.write_text("before\n<!-- train_step cpu -->\n<!-- /train_step cpu -->\nafter\n")
    flags = (
        "--shape tiny --device cpu --lengths 96 --steps 1 --profile --baseline --check --variants control mixture --doc"
    )
    monkeypatch.setattr("sys.argv", ["train_step.py", *flags.split(), str(document)])
    decide = train_step.ForwardEviction.decide
    train_step.main()
    assert "Self CPU" in capsys.readouterr().out
    assert train_step.ForwardEviction.decide is decide
    text = document.read_text()
    assert all(text.count(f"\n| {name} | ") == 3 for name in ("control", "mixture"))
    assert text.count(f"\n| {train_step.DENSE} | 96 | ") == 1
    assert text.count("tiny, float32, 1 micro-batch of 1 a step, without checkpointing") == 1


@pytest.mark.parametrize("flag", ["--check", "--baseline", "--profile"])
def test_what_is_for_one_process_is_refused_beside_others(flag, train_step, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("sys.argv", ["train_step.py", "--shape", "tiny", "--device", "cpu", flag])
    with pytest.raises(UserError, match=f"^{flag}: is for one process"):
        train_step.main()
