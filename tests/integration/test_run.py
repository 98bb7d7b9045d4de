"""From options to the files of a run."""

import json
import math
import resource
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny import attend_as_ever, logits, make_tiny_tokenizer, run_options, save_tiny, train_config
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
)

from sparsekv.adapters import merge_adapter
from sparsekv.errors import UserError
from sparsekv.training import anchor, run
from sparsekv.training.config import default_rules
from sparsekv.training.eviction import ForwardEviction
from sparsekv.training.kv_dropout import KVDropoutContext
from sparsekv.training.run import train

RULES = dict.fromkeys(("anchor", "random", "streaming_llm", "knorm", "keydiff", "expected_attention"), 1.0)


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> dict:
    """With presses that evict from contexts as short as these, which one with an observation window does not."""
    return run_options(tmp_path_factory.mktemp("inputs")) | {"rules": RULES}


@pytest.fixture(scope="module")
def finished(options, tmp_path_factory):
    """A finished run's folder and the trainer that made it, left as it was."""
    out, trainers, plain = tmp_path_factory.mktemp("runs") / "out", [], run._make_trainer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "_make_trainer", lambda *args: trainers.append(plain(*args)) or trainers[0])
        assert train(train_config(options, out)) == out / "final"
    return out, trainers[0]


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text("utf-8").splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


# ---- what is left on disk ----


def test_files(finished):
    out, _ = finished
    assert {path.name for path in out.iterdir()} == {
        *("checkpoint-2", "checkpoint-4", "eit_config.json", "final", "metrics.jsonl")
    }
    assert {path.name for path in (out / "final").iterdir()} == {
        *("adapter_config.json", "adapter_model.safetensors", "README.md", "eit_config.json", "scheduler_state.json"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    }


def test_the_adapter_is_the_trained_model(finished, options):
    out, trainer = finished
    base = AutoModelForCausalLM.from_pretrained(options["model"])
    before = logits(base)
    model = PeftModel.from_pretrained(base, out / "final")
    assert torch.equal(logits(model), logits(trainer.model))
    assert not torch.allclose(logits(model), before, atol=1e-3), "training has changed nothing"
    tokenizer = AutoTokenizer.from_pretrained(out / "final")
    assert tokenizer("a word")["input_ids"] == trainer.processing_class("a word")["input_ids"]


def test_merge_equals_the_adapter(finished, options, tmp_path):
    out, trainer = finished
    merge_adapter(options["model"], out / "final", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(trainer.model), atol=1e-5, rtol=0)


def test_every_trainable_parameter_moves(options, tmp_path, monkeypatch):
    """Also of the MLP and of the head, when they are asked for; and nothing else does."""
    started = {}

    def remember(trainer, *args):
        started.update({name: weight.detach().clone() for name, weight in trainer.model.named_parameters()})
        run_plainly(trainer, *args)
        for name, weight in trainer.model.named_parameters():
            assert torch.equal(weight, started[name]) != weight.requires_grad, name

    run_plainly = run._run
    monkeypatch.setattr(run, "_run", remember)
    train(train_config(options, tmp_path / "out", lora_targets=["q_proj", "v_proj", "up_proj", "lm_head"]))
    assert sum("lora_" in name for name in started) == 2 * (2 * 3 + 1)


def test_metrics(finished):
    out, _ = finished
    steps = [line for line in lines(out) if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    for line in steps:
        figures = ("ce", "kl", "loss", "requested_keep_ratio", "actual_keep_ratio", "anchor_share", "tokens_per_second")
        assert all(math.isfinite(line[name]) for name in (*figures, "schedule_keep_ratio", "learning_rate"))
        assert 0 < line["anchor_share"] < line["actual_keep_ratio"] < 1
        assert line["requested_keep_ratio"] >= 0.3
        assert line["actual_keep_ratio"] == pytest.approx(line["requested_keep_ratio"], abs=0.1)
    assert steps[-1]["schedule_keep_ratio"] == pytest.approx(0.3)
    evaluations = [line for line in lines(out) if "eval_full_ppl" in line]
    assert [line["step"] for line in evaluations] == [0, 2, 4], "once a step, also at the end"
    assert all(1 < line["eval_evicted_ppl"] < 1000 for line in evaluations)


def test_the_record(finished, options):
    out, _ = finished
    record = json.loads((out / "final" / "eit_config.json").read_text("utf-8"))
    assert record["config"]["seed"] == 0
    assert record["config"]["anchors"]["recent_size"] == 4
    assert record["config"]["rules"] == RULES
    assert {"sparsekv", "torch", "transformers", "peft", "kvpress", "accelerate", "datasets"} == set(record["versions"])
    assert "commit" in record
    assert len(record["data_fingerprint"]) == 64
    assert record["steps"] == 4
    state = json.loads((out / "final" / "scheduler_state.json").read_text("utf-8"))
    assert state == {"mode": "curriculum", "global_step": 4}


def test_the_model_card_has_the_runs_figures(finished):
    out, _ = finished
    card = (out / "final" / "README.md").read_text("utf-8")
    evaluations = [line for line in lines(out) if "eval_full_ppl" in line]
    for name, line in (("before training", evaluations[0]), ("after 4 steps", evaluations[-1])):
        assert f"| {name} | {line['eval_full_ppl']:.3f} | {line['eval_evicted_ppl']:.3f} |" in card


def test_a_checkpoint_is_an_adapter_too(finished, options):
    out, trainer = finished
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(options["model"]), out / "checkpoint-4")
    assert torch.equal(logits(model), logits(trainer.model))


def test_the_same_seed_gives_the_same_weights(finished, options, tmp_path):
    out, _ = finished
    train(train_config(options, tmp_path / "same"))
    train(train_config(options, tmp_path / "other", seed=1))
    first, same, other = (weights(folder / "final") for folder in (out, tmp_path / "same", tmp_path / "other"))
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


# ---- kinds of runs ----


def test_a_control_evicts_nothing(finished, options, tmp_path, monkeypatch):
    """And nothing else about it differs: data, labelled tokens, learning rate."""

    def without_eviction(model, plan, selector):
        assert plan is None or not model.training, "a control's training step was evicted"
        return KVDropoutContext(model, plan, selector)

    monkeypatch.setattr("sparsekv.training.eit_trainer.KVDropoutContext", without_eviction)
    final = train(train_config(options, tmp_path / "control", control=True))
    trained, control = ([line for line in lines(out) if "loss" in line] for out in (finished[0], tmp_path / "control"))
    for line, other in zip(trained, control, strict=True):
        assert other["requested_keep_ratio"] == other["actual_keep_ratio"] == 1
        assert all(line[name] == other[name] for name in ("learning_rate", "anchor_share", "epoch"))
    assert "control" in (final / "README.md").read_text("utf-8").lower()
    records = [json.loads((out / "eit_config.json").read_text("utf-8")) for out in (finished[0], tmp_path / "control")]
    assert records[0]["data_fingerprint"] == records[1]["data_fingerprint"]


def test_full_fine_tuning(options, tmp_path, monkeypatch):
    """Every parameter moves; the teacher is a second model, which does not."""
    seen, run_plainly = {}, run._run

    def remember(trainer, *args):
        seen["teacher"] = trainer.teacher
        return run_plainly(trainer, *args)

    monkeypatch.setattr(run, "_run", remember)
    final = train(train_config(options, tmp_path / "out", lora_r=0))
    base = AutoModelForCausalLM.from_pretrained(options["model"])
    trained = AutoModelForCausalLM.from_pretrained(final)
    for (name, before), after in zip(base.named_parameters(), trained.parameters(), strict=True):
        assert not torch.equal(before, after), name
    assert torch.equal(logits(seen["teacher"]), logits(base))
    assert not any(weight.requires_grad for weight in seen["teacher"].parameters())
    assert not (final / "training_args.bin").exists()
    assert "from_pretrained(base" not in (final / "README.md").read_text("utf-8")
    assert all(line["kl"] >= 0 for line in lines(tmp_path / "out") if "loss" in line)


def test_full_fine_tuning_of_half_precision_weights_starts_at_its_teacher(options, tmp_path):
    """Without autocast a teacher in bfloat16 would differ from a student in float32 by rounding alone."""
    AutoModelForCausalLM.from_pretrained(options["model"]).bfloat16().save_pretrained(tmp_path / "half")
    AutoTokenizer.from_pretrained(options["model"]).save_pretrained(tmp_path / "half")
    changes = {"model": str(tmp_path / "half"), "lora_r": 0, "control": True, "max_steps": 1}
    train(train_config(options, tmp_path / "out", **changes))
    assert next(line["kl"] for line in lines(tmp_path / "out") if "loss" in line) == pytest.approx(0, abs=1e-9)


def test_full_fine_tuning_on_the_selection_loss_alone(options, tmp_path):
    changes = {"lora_r": 0, "lambda_kl": 0.0, "lambda_selection": 0.5, "max_steps": 1, "rules": {"knorm": 1.0}}
    assert train(train_config(options, tmp_path / "out", **changes)).is_dir()
    assert next(line["selection"] for line in lines(tmp_path / "out") if "loss" in line) > 0


@pytest.mark.parametrize("geometry", ["streaming", "global"])
def test_other_geometries(options, tmp_path, geometry):
    changes = {"geometry": geometry, "rules": default_rules(), "lambda_selection": 0, "max_steps": 2}
    final = train(train_config(options, tmp_path / "out", **changes))
    assert (final / "adapter_model.safetensors").exists()
    assert all(line["actual_keep_ratio"] < 1 for line in lines(tmp_path / "out") if "loss" in line)


@pytest.mark.parametrize(("changes", "passes"), [({}, 3), ({"lm": True}, 2), ({"lora_r": 0}, 4)])
def test_flops_are_of_the_passes_that_run(options, tmp_path, monkeypatch, changes, passes):
    """Student, activations' gradient, weights' gradient where all are trained, and a teacher where one is asked."""
    trainers, plain = [], run._make_trainer
    monkeypatch.setattr(run, "_make_trainer", lambda *args: trainers.append(plain(*args)) or trainers[0])
    if changes.pop("lm", False):
        changes = {"lambda_kl": 0.0, "lambda_context": 0.0, "lambda_selection": 0.0}
    train(train_config(options, tmp_path / "out", max_steps=1, **changes))
    (trainer,) = trainers
    embedding = trainer.base.get_input_embeddings().weight.numel()
    tied = trainer.base.config.tie_word_embeddings
    parameters = sum(p.numel() for p in trainer.base.parameters()) - (0 if tied else embedding)
    assert trainer.meter.flops_per_token == 2 * parameters * passes


def test_the_adaptive_schedule(options, tmp_path):
    """Lowered at every evaluation, which all are within so wide a threshold; and saved with the run."""
    final = train(train_config(options, tmp_path / "out", scheduler_mode="adaptive", ppl_threshold=10.0, step_size=0.1))
    current = [line["schedule_keep_ratio"] for line in lines(tmp_path / "out") if "loss" in line]
    assert current == pytest.approx([0.8, 0.8, 0.7, 0.7])
    state = json.loads((final / "scheduler_state.json").read_text("utf-8"))
    assert state["keep_ratio"] == pytest.approx(0.6)
    evaluations = [line for line in lines(tmp_path / "out") if "eval_current_ppl" in line]
    assert [line["step"] for line in evaluations] == [0, 2, 4]
    assert state["reference"] == evaluations[0]["eval_full_ppl"]


def test_epochs_and_a_mixture_of_sources(options, tmp_path):
    data = {options["data"]: 0.5, "recall": 0.5}
    changes = {"max_seq_len": 160, "num_train_samples": 10, "grad_accum": 1}
    final = train(train_config(options, tmp_path / "out", data=data, max_steps=-1, num_train_epochs=1.0, **changes))
    record = json.loads((final / "eit_config.json").read_text("utf-8"))
    assert record["steps"] == 5
    assert json.loads((final / "scheduler_state.json").read_text("utf-8"))["global_step"] == 5


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"max_steps": 3}, "rows: 16, each 1.5 times; 8 an optimizer step"),
        ({"max_steps": -1, "num_train_epochs": 0.5}, "rows: 16, each 0.5 times; 8 an optimizer step"),
    ],
)
def test_how_often_the_rows_are_used_is_said(options, tmp_path, capsys, changes, said):
    train(train_config(options, tmp_path / "out", num_train_samples=16, batch_size=4, grad_accum=2, **changes))
    assert said in capsys.readouterr().out.splitlines()


def test_the_latest_cut_that_is_allowed_has_an_evaluation(options, tmp_path):
    changes = {"min_cut": 0.97, "max_cut": 0.97, "num_cuts": 1, "max_seq_len": 48, "rules": {"knorm": 1.0}}
    train(train_config(options, tmp_path / "out", max_steps=1, lambda_selection=0.0, **changes))
    assert all(line["eval_evicted_ppl"] > 0 for line in lines(tmp_path / "out") if "eval_evicted_ppl" in line)


def test_only_before_and_after(options, tmp_path):
    """--eval_steps 0 still gives the model card its figures."""
    train(train_config(options, tmp_path / "out", eval_steps=0, max_steps=3))
    assert [line["step"] for line in lines(tmp_path / "out") if "eval_full_ppl" in line] == [0, 3]


def test_tensorboard(options, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(train_config(options, tmp_path / "out", report_to=["tensorboard"], max_steps=2))
    (file,) = (tmp_path / "out").rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file)).Reload()
    assert {"train/kl", "train/actual_keep_ratio", "eval/evicted_ppl"} <= set(events.Tags()["scalars"])


# ---- nothing left behind ----


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"report_to": ["nope"]}, "--report_to nope"),
        ({"max_seq_len": 2049}, "--max_seq_len 2049"),
        ({"lora_targets": ["nope"]}, "--lora_targets nope"),
    ],
)
def test_wrong_input_is_found_before_anything_is_written(options, tmp_path, changes, flag):
    with pytest.raises(UserError, match=flag):
        train(train_config(options, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_of_a_larger_model(options, tmp_path):
    model = save_tiny(tmp_path / "base", vocab_size=100)
    with pytest.raises(UserError, match=f"--model {model}: its tokenizer makes token .* and the model knows 100"):
        train(train_config(options, tmp_path / "out", model=model))
    assert not (tmp_path / "out").exists()


def test_a_model_with_capped_logits_is_refused(options, tmp_path):
    model = save_tiny(tmp_path / "base", "gemma3", final_logit_softcapping=30.0)
    with pytest.raises(UserError, match=f"--model {model}"):
        train(train_config(options, tmp_path / "out", model=model))
    assert not (tmp_path / "out").exists()


def test_a_training_that_diverges_ends(options, tmp_path):
    with pytest.raises(UserError, match=r"^--lr 1e\+30: the loss is not finite at step [2-4]; .* a lower one$"):
        train(train_config(options, tmp_path / "out", lr=1e30, max_steps=9))
    assert not (tmp_path / "out" / "final").exists()


def test_a_training_that_diverges_between_log_lines_ends_too(options, tmp_path):
    """The last loss is logged before the update that breaks the model."""
    with pytest.raises(UserError, match=r"^--lr 1e\+30: eval_full_ppl is not finite at step 1; .* a lower one$"):
        train(train_config(options, tmp_path / "out", lr=1e30, max_steps=1, lr_warmup_fraction=0.0, logging_steps=10))
    assert not (tmp_path / "out" / "final").exists()


@pytest.mark.parametrize(
    ("kilobytes", "reason"),
    [
        (1, r"cannot be written \(File too large\)$"),  # the record
        (8, r"cannot be written \(.*\(os error 27\)\)$"),  # the adapter, by safetensors
        (24, r"torch.save failed there; is the disk full\?$"),  # the optimizer's state
    ],
)
def test_a_full_disk(options, tmp_path, kilobytes, reason):
    """No file can grow beyond so many KiB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (kilobytes * 1024, hard))
    try:
        with pytest.raises(UserError, match=rf"^--output_dir {tmp_path / 'out'}: {reason}"):
            train(train_config(options, tmp_path / "out"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    left = {path.name for path in tmp_path.rglob("*") if path.name != "out"}
    assert left == (set() if kilobytes == 1 else {"eit_config.json", "metrics.jsonl"}), "no half-written checkpoint"
    assert (tmp_path / "out").exists() == bool(left)


def test_the_selection_loss_is_that_of_the_layers_that_evict(options, tmp_path, monkeypatch):
    """Of a Gemma 3 those without a sliding window, of a Llama all."""
    options = {**options, "rules": {"knorm": 1.0}, "max_steps": 1}
    asked: list[set[int]] = []
    plain = ForwardEviction.selection_loss
    monkeypatch.setattr(ForwardEviction, "selection_loss", lambda self: asked.append(set(self.ranked)) or plain(self))
    for name, layers in (("gemma3", {1}), ("llama", {0, 1})):
        train(train_config(options, tmp_path / name, model=save_tiny(tmp_path / f"base-{name}", name)))
        assert asked
        assert all(found == layers for found in asked), name
        assert all(line["selection"] > 0 for line in lines(tmp_path / name) if "loss" in line)
        asked.clear()


def test_a_model_whose_attention_cannot_be_observed_takes_no_selection_loss(options, tmp_path, monkeypatch):
    def looking_ahead(*args):
        trainer = make_trainer(*args)
        trainer.base.model.layers[1].self_attn.is_causal = False
        return trainer

    make_trainer = run._make_trainer
    monkeypatch.setattr(run, "_make_trainer", looking_ahead)
    line = rf"^--lambda_selection 3: .*--model {options['model']}, give 0: attention that looks ahead"
    with pytest.raises(UserError, match=line):
        train(train_config(options, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_layers_that_evict_nothing_are_named(options, tmp_path, monkeypatch, caplog):
    def part_of(*args):
        trainer = make_trainer(*args)
        attend_as_ever(trainer.base.model.layers[1].self_attn)
        return trainer

    make_trainer = run._make_trainer
    monkeypatch.setattr(run, "_make_trainer", part_of)
    line = f"--model {options['model']}: layers 1 evict nothing"
    for control, warned in ((False, True), (True, False)):
        caplog.clear()
        train(train_config(options, tmp_path / f"out-{control}", control=control, max_steps=1))
        assert (line in caplog.text) == warned


@pytest.mark.parametrize("length", [100, 120])
def test_rows_as_long_as_every_window_are_refused_before_anything_is_written(options, tmp_path, length):
    """96 tokens, with which the rules are tried, are within the window."""
    model = save_tiny(tmp_path / "model", "mistral", sliding_window=100)
    with pytest.raises(UserError, match=rf"--max_seq_len {length}: every layer of .* has a sliding window.*; give sho"):
        train(train_config(options, tmp_path / "out", model=model, max_seq_len=length))
    assert not (tmp_path / "out").exists()


def test_rows_within_the_window_are_trained_on(options, tmp_path):
    model = save_tiny(tmp_path / "model", "mistral", sliding_window=100)
    assert train(train_config(options, tmp_path / "out", model=model, max_seq_len=99, max_steps=1)) is not None


def test_an_architecture_that_cannot_evict_is_refused_before_anything_is_written(options, tmp_path):
    """GPT-2's attention is no Llama's: this press of kvpress cannot compute its queries."""
    config = GPT2Config(vocab_size=320, n_embd=64, n_layer=2, n_head=4, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    make_tiny_tokenizer().save_pretrained(tmp_path / "gpt2")
    changes = {"model": str(tmp_path / "gpt2"), "lora_targets": ["c_attn"], "rules": {"non_causal_attention": 1.0}}
    with pytest.raises(UserError, match=r"--rules non_causal_attention: does not work with --model .*GPT2LMHeadModel"):
        train(train_config(options, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("model", "target"),
    [
        (BloomForCausalLM(BloomConfig(vocab_size=320, hidden_size=64, n_layer=2, n_head=4)), "query_key_value"),
        (GPTNeoForCausalLM(GPTNeoConfig(320, 64, 64, 2, [[["global"], 2]], 4, 128)), "q_proj"),
    ],
)
def test_attention_layers_without_what_eviction_needs_are_refused_before_anything_is_written(
    options, tmp_path, model, target
):
    """Those of Bloom have no configuration, those of GPT-Neo no layer_idx."""
    model.save_pretrained(tmp_path / "base")
    make_tiny_tokenizer().save_pretrained(tmp_path / "base")
    changes = {"model": str(tmp_path / "base"), "lora_targets": [target]}
    with pytest.raises(UserError, match=r"^--model: (Bloom|GPTNeo)Model has no attention layers with a layer_idx and"):
        train(train_config(options, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("ratio", "warned"), [(0.9, False), (0.6, True)])
def test_anchors_are_counted_against_the_cuts_of_the_run(options, tmp_path, monkeypatch, caplog, ratio, warned):
    """The row that an architecture is tried with keeps half, where 32 anchors are too many."""
    monkeypatch.setattr(anchor, "_overflow_reported", False)
    anchors = {"use_special": False, "use_punctuation": False, "sink_size": 2, "recent_size": 30}
    changes = {"rules": {"anchor_random": 1.0}, "lambda_selection": 0.0, "max_steps": 1, "num_cuts": 1}
    changes |= {"min_cut": 0.87, "scheduler_mode": "fixed", "initial_keep_ratio": 1.0, "ratio_draw": "ceiling"}
    train(train_config(options, tmp_path / "out", anchors=anchors, min_keep_ratio=ratio, **changes))
    reported = [record.getMessage() for record in caplog.records if "anchors alone exceed" in record.getMessage()]
    assert len(reported) == warned
    assert all(f"keep ratio {ratio} of 4" in line for line in reported)
