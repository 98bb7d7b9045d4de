"""A teacher that was trained before: the student begins as its adapter."""

import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import logits, run_options, save_tiny, train_config
from transformers import TrainerCallback

from sparsekv.adapters import load_adapter, merge_adapter
from sparsekv.errors import UserError
from sparsekv.models import load_model
from sparsekv.training import run
from sparsekv.training.run import train

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
    assert torch.equal(seen["teacher"], adapted)
    assert torch.equal(logits(trainer.teacher), seen["teacher"])
    assert not any(weight.requires_grad for weight in trainer.teacher.parameters())
    assert all(("lora_" in name) == weight.requires_grad for name, weight in trainer.model.named_parameters())
    before, after = load_file(first / WEIGHTS), load_file(final / WEIGHTS)
    assert before.keys() == after.keys()
    assert not any(torch.equal(before[name], after[name]) for name in before)
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(load_model(options["model"]), final)), logits(trainer.model)
    )
    settings = json.loads((final / "adapter_config.json").read_text("utf-8"))
    assert settings["base_model_name_or_path"] == options["model"]
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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("targets", [["q_proj", "k_proj", "v_proj", "o_proj"], ["q_proj", "lm_head"], ["embed_tokens"]])
def test_a_control_begins_at_its_teacher(options, tmp_path, dtype, targets):
    """In either dtype; also where an adapter changes one end of a model whose embeddings are one weight."""
    model = save_tiny(tmp_path / "base", tie_word_embeddings=True)
    changes = {"model": model, "lora_targets": targets, "dtype": dtype, "control": True}
    if targets == ["embed_tokens"]:  # no option makes one
        kind = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False)
        first = tmp_path / "first"
        get_peft_model(load_model(model), kind).save_pretrained(first)
    else:
        first = train(train_config(options, tmp_path / "first", **changes))
    train(second(options, tmp_path / "out", first, **changes, max_steps=1))
    line = figures(tmp_path / "out")[1]
    assert line["kl"] == pytest.approx(0, abs=1e-6)
    assert line["kl_context"] == pytest.approx(0, abs=1e-6)
    apart = load_adapter(load_model(model), first), load_model(model)
    assert not torch.allclose(*map(logits, apart), atol=1e-2)


def test_without_a_loss_that_needs_one_there_is_no_teacher(options, first, tmp_path, monkeypatch):
    teachers, plain = [], run._make_trainer
    monkeypatch.setattr(
        run, "_make_trainer", lambda model, teacher, *a: teachers.append(teacher) or plain(model, teacher, *a)
    )
    losses = {"lambda_kl": 0.0, "lambda_context": 0.0, "lambda_selection": 0.0}
    train(second(options, tmp_path / "out", first, max_steps=1, **losses))
    assert teachers == [None]


def test_a_shipped_adapter_in_half_precision_is_trained_in_full(options, adapter, tmp_path):
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


def test_resumed_it_ends_as_if_it_had_not_stopped(options, half, adapter, tmp_path):
    train(second(options, tmp_path / "whole", adapter))
    train(second(options, half, adapter, resume=True))
    one, other = (load_file(out / "final" / WEIGHTS) for out in (tmp_path / "whole", half))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert figures(tmp_path / "whole") == figures(half)


def test_another_teacher_is_not_resumed_with(options, first, half, adapter):
    """Another folder or none, as with any option; and another adapter in the same."""
    before = {path: path.stat().st_mtime_ns for path in half.rglob("*")}
    for given, said in ((str(first), f"'{first}'"), (None, "None")):
        changed = f"was trained with other options: --teacher_adapter {said} (was '{adapter}')"
        with pytest.raises(UserError, match="^" + re.escape(f"--resume: {half} {changed}")):
            train(train_config(options, half, teacher_adapter=given, resume=True))
    weights = load_file(adapter / WEIGHTS)
    save_file({name: weight + 1e-3 for name, weight in weights.items()}, adapter / WEIGHTS, {"format": "pt"})
    with pytest.raises(
        UserError, match=f"^--resume: {half} began as another adapter than lies in .* {adapter} now: begin"
    ):
        train(second(options, half, adapter, resume=True))
    assert {path: path.stat().st_mtime_ns for path in half.rglob("*")} == before


def test_a_finished_run_is_that_of_its_teacher(options, adapter, first, tmp_path):
    """And needs it no more."""
    final = train(second(options, tmp_path / "out", adapter, max_steps=1))
    shutil.rmtree(adapter)
    assert train(second(options, tmp_path / "out", adapter, max_steps=1, resume=True)) == final
    with pytest.raises(UserError, match=r"other options: --teacher_adapter None \(was "):
        train(train_config(options, tmp_path / "out", max_steps=1, resume=True))


# ---- refusals ----


@pytest.mark.parametrize(
    ("changes", "made"),
    [
        ({"lora_r": 8, "lora_alpha": 4}, "--lora_r 4, --lora_alpha 8"),
        ({"lora_dropout": 0.1}, "--lora_dropout 0.0"),
        ({"lora_targets": ["v_proj", "q_proj"]}, "--lora_targets [k_proj, o_proj, q_proj, v_proj]"),
    ],
)
def test_other_lora_options_are_refused(options, first, tmp_path, changes, made):
    with pytest.raises(UserError) as error:
        train(second(options, tmp_path / "out", first, **changes))
    assert str(error.value) == f"--teacher_adapter {first}: was made with {made}; give the same"
    assert not (tmp_path / "out").exists()


def test_a_pattern_in_place_of_names(options, adapter, tmp_path):
    """peft allows it; no option could ask for the same."""
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"target_modules": ".*(q|k|v|o)_proj"}))
    with pytest.raises(UserError) as error:
        train(second(options, tmp_path / "out", adapter))
    said = "was made for .*(q|k|v|o)_proj; one is wanted whose target_modules are names"
    assert str(error.value) == f"--teacher_adapter {adapter}: {said}"
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
