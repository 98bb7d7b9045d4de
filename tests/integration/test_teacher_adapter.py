"""A teacher that was trained before: the student begins as its adapter."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from peft import IA3Config, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import run_options, train_config
from transformers import TrainerCallback

from sparsekv.errors import UserError
from sparsekv.models import load_adapter, load_model, merge_adapter
from sparsekv.training import run
from sparsekv.training.run import train

IDS = torch.randint(5, 320, (2, 40), generator=torch.Generator().manual_seed(1))
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> dict:
    rules = dict.fromkeys(("anchor", "random", "knorm"), 1.0)
    return run_options(tmp_path_factory.mktemp("inputs")) | {"rules": rules, "num_cuts": 2, "eval_steps": 0}


@pytest.fixture(scope="module")
def first(options, tmp_path_factory) -> Path:
    """An adapter that a control has made: full cache only."""
    return train(train_config(options, tmp_path_factory.mktemp("first") / "out", control=True))


@pytest.fixture
def adapter(first, tmp_path) -> Path:
    """A copy of it, to change."""
    return Path(shutil.copytree(first, tmp_path / "adapter"))


def second(options: dict, out: Path, teacher: Path, **changes):
    return train_config(options, out, teacher_adapter=str(teacher), **changes)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def figures(out: Path) -> list[dict]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text("utf-8").splitlines()]
    return [{k: v for k, v in line.items() if k not in ("tokens_per_second", "mfu")} for line in lines]


def test_the_student_begins_as_the_adapter_and_the_teacher_stays_it(options, first, tmp_path, monkeypatch):
    seen, run_plainly = {}, run._run

    def remember(trainer, *args):
        seen.update(trainer=trainer, student=logits(trainer.model), teacher=logits(trainer.teacher))
        trainer.model.train()
        return run_plainly(trainer, *args)

    monkeypatch.setattr(run, "_run", remember)
    final = train(second(options, tmp_path / "out", first))
    trainer = seen["trainer"]
    adapted = logits(load_adapter(load_model(options["model"]), first))
    assert not torch.allclose(adapted, logits(load_model(options["model"])), atol=1e-2)
    assert torch.equal(seen["student"], adapted)
    torch.testing.assert_close(seen["teacher"], adapted, atol=1e-5, rtol=1e-5)
    assert torch.equal(logits(trainer.teacher), seen["teacher"])
    assert not any(weight.requires_grad for weight in trainer.teacher.parameters())
    assert all(("lora_" in name) == weight.requires_grad for name, weight in trainer.model.named_parameters())
    before, after = load_file(first / WEIGHTS), load_file(final / WEIGHTS)
    assert before.keys() == after.keys()
    assert not any(torch.equal(before[name], after[name]) for name in before)
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(load_model(options["model"]), final)), logits(trainer.model)
    )
    assert f"`{first}`" in (final / "README.md").read_text("utf-8")


def test_its_first_step_is_that_of_a_new_adapter_on_the_merged_model(options, first, tmp_path):
    """Another way to the same student and teacher: every figure of the step's loss is the same, evicted ones too."""
    merge_adapter(options["model"], first, tmp_path / "merged")
    changes = {"max_steps": 1, "rules": {"knorm": 1.0}, "initial_keep_ratio": 0.3, "ratio_draw": "ceiling"}
    train(second(options, tmp_path / "one", first, **changes))
    train(train_config(options, tmp_path / "other", model=str(tmp_path / "merged"), **changes))
    for line, other in zip(figures(tmp_path / "one")[:2], figures(tmp_path / "other")[:2], strict=True):
        found = {name: line[name] for name in other if name != "grad_norm"}  # A and B are others
        assert found == pytest.approx({name: other[name] for name in found}, rel=1e-4, abs=1e-6)
    assert min(figures(tmp_path / "one")[1][name] for name in ("kl", "selection")) > 1e-4


def test_a_control_begins_at_its_teacher(options, first, tmp_path):
    train(second(options, tmp_path / "out", first, control=True, max_steps=1))
    line = figures(tmp_path / "out")[1]
    assert line["kl"] == pytest.approx(0, abs=1e-6)
    assert line["kl_context"] == pytest.approx(0, abs=1e-6)


def test_without_a_loss_that_needs_one_there_is_no_teacher(options, first, tmp_path, monkeypatch):
    teachers, plain = [], run._make_trainer
    monkeypatch.setattr(
        run, "_make_trainer", lambda model, teacher, *a: teachers.append(teacher) or plain(model, teacher, *a)
    )
    losses = {"lambda_kl": 0.0, "lambda_context": 0.0, "lambda_selection": 0.0}
    train(second(options, tmp_path / "out", first, max_steps=1, **losses))
    assert teachers == [None]


def test_a_shipped_adapter_in_half_precision_is_trained_in_full(options, adapter, tmp_path, monkeypatch):
    weights = load_file(adapter / WEIGHTS)
    save_file({name: weight.bfloat16() for name, weight in weights.items()}, adapter / WEIGHTS, {"format": "pt"})
    final = train(second(options, tmp_path / "out", adapter, dtype="bfloat16", max_steps=1))
    assert {weight.dtype for weight in load_file(final / WEIGHTS).values()} == {torch.float32}


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture
def half(options, adapter, tmp_path, monkeypatch) -> Path:
    """A run that was stopped after two steps."""
    plain = run._make_trainer

    def make_trainer(*args):
        trainer = plain(*args)
        trainer.add_callback(StopAt(2))
        return trainer

    with monkeypatch.context() as patch:
        patch.setattr(run, "_make_trainer", make_trainer)
        assert train(second(options, tmp_path / "half", adapter)) is None
    return tmp_path / "half"


def test_resumed_it_ends_as_if_it_had_not_stopped(options, first, half, adapter, tmp_path):
    """The folder of the first adapter may have moved."""
    adapter.rename(tmp_path / "elsewhere")
    train(second(options, tmp_path / "whole", first))
    train(second(options, half, tmp_path / "elsewhere", resume=True))
    one, other = (load_file(out / "final" / WEIGHTS) for out in (tmp_path / "whole", half))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert figures(tmp_path / "whole") == figures(half)


@pytest.mark.parametrize("now", ["changed", None])
def test_another_adapter_is_not_resumed_from(options, half, adapter, now):
    weights = load_file(adapter / WEIGHTS)
    save_file({name: weight + 1e-3 for name, weight in weights.items()}, adapter / WEIGHTS, {"format": "pt"})
    before = {path: path.stat().st_mtime_ns for path in half.rglob("*")}
    given = str(adapter) if now else None
    message = (
        f"^--resume: {half} began as another adapter than is in --teacher_adapter {given or 'null'} now; give what"
    )
    with pytest.raises(UserError, match=message):
        train(train_config(options, half, teacher_adapter=given, resume=True))
    assert {path: path.stat().st_mtime_ns for path in half.rglob("*")} == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_r": 8}, "--lora_r 8: --teacher_adapter {adapter} has 4; give that"),
        ({"lora_alpha": 4}, "--lora_alpha 4: --teacher_adapter {adapter} has 8; give that"),
        ({"lora_dropout": 0.1}, "--lora_dropout 0.1: --teacher_adapter {adapter} has 0.0; give that"),
        (
            {"lora_targets": ["v_proj", "q_proj"]},
            r"--lora_targets \[q_proj, v_proj\]: --teacher_adapter {adapter} has \[k_proj, o_proj, q_proj, v_proj\]",
        ),
    ],
)
def test_other_lora_options_are_refused(options, first, tmp_path, changes, message):
    with pytest.raises(UserError, match=f"^{message.format(adapter=first)}"):
        train(second(options, tmp_path / "out", first, **changes))
    assert not (tmp_path / "out").exists()


def test_a_folder_without_an_adapter(options, tmp_path):
    with pytest.raises(UserError, match=f"^--teacher_adapter {tmp_path}: this folder holds no adapter"):
        train(second(options, tmp_path / "out", tmp_path))
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_another_kind(options, tmp_path):
    kind = IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj", "v_proj"], feedforward_modules=[])
    get_peft_model(load_model(options["model"]), kind).save_pretrained(tmp_path / "ia3")
    with pytest.raises(UserError, match=f"^--teacher_adapter {tmp_path}/ia3: holds no LoRA adapter, but one of IA3$"):
        train(second(options, tmp_path / "out", tmp_path / "ia3"))
    assert not (tmp_path / "out").exists()


def test_every_parameter_cannot_begin_as_an_adapter(options, tmp_path):
    with pytest.raises(UserError, match=r"^--teacher_adapter a: --lora_r 0 trains no adapter; give its rank$"):
        second(options, tmp_path, Path("a"), lora_r=0)
