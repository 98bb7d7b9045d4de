"""The trainer's arithmetic: its loss is the plain formula, however the step is cut into micro-batches."""

import math

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from tiny import make_sharp, make_tiny
from transformers import AttentionInterface, TrainingArguments

from sparsekv.adapters import attach_lora
from sparsekv.errors import UserError
from sparsekv.training import eit_trainer
from sparsekv.training.anchor import AnchorConfig
from sparsekv.training.choices import SKETCHING_RULES, SMOOTH_RULES
from sparsekv.training.config import EITConfig, default_rules
from sparsekv.training.eit_trainer import EITTrainer
from sparsekv.training.kv_dropout import KVDropoutContext

LENGTH = 48
ANCHORS = AnchorConfig(sink_size=2, recent_size=4)
BY_HAND = "by_hand"


def rows(count: int, padded: bool = False) -> Dataset:
    """Random rows; if padded, each with another number of real tokens, on either side."""
    generator = torch.Generator().manual_seed(3)
    columns = {"input_ids": torch.randint(5, 320, (count, LENGTH), generator=generator)}
    if padded:
        index = torch.arange(LENGTH)
        right = index < torch.randint(LENGTH - 8, LENGTH, (count, 1), generator=generator)
        left = index >= torch.randint(1, 8, (count, 1), generator=generator)
        columns["attention_mask"] = torch.where(torch.arange(count)[:, None] % 2 == 0, left, right).long()
    return Dataset.from_dict({name: column.tolist() for name, column in columns.items()})


def make_trainer(tmp_path, tokenizer, config, *, data=None, model=None, dropout=0.0, **arguments) -> EITTrainer:
    """A trainer of a tiny Llama with a LoRA adapter that already changes its output."""
    model = model or make_tiny("llama")
    if dropout is not None:
        torch.manual_seed(0)
        model = attach_lora(model, 4, 8, ["q_proj", "k_proj", "v_proj", "o_proj"], dropout)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.1)
    defaults = {
        "output_dir": str(tmp_path / "out"),
        "use_cpu": True,
        "max_steps": 3,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 8,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
    }
    args = TrainingArguments(**{**defaults, **arguments})
    return EITTrainer(model, config, tokenizer, args, train_dataset=data or rows(32))


def one_step(trainer: EITTrainer, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Forward and backward of an optimizer step of one micro-batch; returns the loss."""
    return trainer.training_step(trainer.model, inputs, trainer._count_tokens([inputs]))


def trained_weights(trainer: EITTrainer) -> dict[str, torch.Tensor]:
    trainer.train()
    return {name: weight.detach() for name, weight in trainer.model.named_parameters() if weight.requires_grad}


def assert_equal_weights(one, other, atol=1e-6):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], atol=atol, rtol=0, msg=lambda text, n=name: f"{n}: {text}")


# ---- the plain formula ----


def attend_by_hand(module, query, key, value, attention_mask, scaling, allowed=None, **kwargs):
    """Attention written out, [B, H, L, D], with a mask for each layer: Bool[B, H, L, L]."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * scaling
    scores = scores.masked_fill(~allowed[module.layer_idx], -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None


def logits_by_hand(base, input_ids, real, keeps, cuts):
    """All logits, [B, L, V], under allowed(q, k) = (k <= q) and (q < cut or k >= cut or keep[k])."""
    index = torch.arange(LENGTH)
    causal = index <= index[:, None]
    allowed = {}
    for layer in range(base.config.num_hidden_layers):
        mask = (causal & real[:, None, None, :]).expand(-1, base.config.num_key_value_heads, -1, -1).clone()
        for number, cut in enumerate(cuts):
            stop = cuts[number + 1] if number + 1 < len(cuts) else LENGTH
            if keeps is not None:
                mask[:, :, cut:stop, :cut] &= keeps[layer][number][:, :, None, :]
        mask |= torch.eye(LENGTH, dtype=torch.bool)  # a padding's own row is not empty; nobody reads it
        allowed[layer] = mask.repeat_interleave(2, 1)
    AttentionInterface.register(BY_HAND, attend_by_hand)
    before = base.config._attn_implementation
    base.set_attn_implementation(BY_HAND)
    try:
        return base(input_ids, allowed=allowed, use_cache=False).logits
    finally:
        base.set_attn_implementation(before)


def loss_by_hand(model, teacher_logits, inputs, plan, keeps, config):
    """CE + λ·T²·KL per predicted token after the first cut, plus the context's own weights of both per token of it."""
    ids, real = inputs["input_ids"], inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    logits = logits_by_hand(model.get_base_model(), ids, real, keeps, plan.cuts)
    log_p, log_t = (F.log_softmax(x / config.temperature, -1) for x in (logits, teacher_logits))
    kl = config.temperature**2 * (log_t.exp() * (log_t - log_p)).sum(-1)

    def ce(row, q):
        return -F.log_softmax(logits[row, q], -1)[ids[row, q + 1]]

    loss = context_loss = tokens = context_tokens = 0.0
    for row in range(len(ids)):
        for q in range(LENGTH):
            if q < plan.cuts[0]:
                if real[row, q]:
                    context_loss, context_tokens = context_loss + config.lambda_context * kl[row, q], context_tokens + 1
                    if real[row, q + 1]:
                        context_loss = context_loss + config.lambda_ce_context * ce(row, q)
            elif q + 1 < LENGTH and real[row, q] and real[row, q + 1]:
                loss, tokens = loss + ce(row, q) + config.lambda_kl * kl[row, q], tokens + 1
    return loss / tokens + context_loss / context_tokens


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("num_cuts", [1, 2])
def test_loss_and_gradient_equal_the_plain_formula(tmp_path, tiny_tokenizer, padded, num_cuts):
    """Also for a mean over tokens: λ = 1 weighs a token's KL as its CE, whatever the length and padding."""
    config = EITConfig(
        num_cuts=num_cuts,
        lambda_kl=0.7,
        lambda_context=0.3,
        lambda_ce_context=0.2,
        lambda_selection=0,
        temperature=2.0,
        anchors=ANCHORS,
        ratio_draw="ceiling",
    )
    data = rows(4, padded)
    trainer = make_trainer(tmp_path, tiny_tokenizer, config, data=data, gradient_accumulation_steps=1)
    inputs = {name: torch.tensor(data[name]) for name in data.column_names}
    model, plan = trainer.model, trainer.current_plan(LENGTH)
    loss = one_step(trainer, inputs)
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}
    model.zero_grad()
    keeps = trainer.eviction.last.keeps
    real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    with torch.no_grad():
        teacher = logits_by_hand(make_tiny("llama"), inputs["input_ids"], real, None, plan.cuts)
    wanted = loss_by_hand(model, teacher, inputs, plan, keeps, config)
    wanted.backward()
    torch.testing.assert_close(loss, wanted.detach(), atol=1e-5, rtol=0)
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            torch.testing.assert_close(gradients[name], weight.grad, atol=1e-6, rtol=1e-4)
    full = loss_by_hand(model, teacher, inputs, plan, None, config)
    assert abs(full - wanted) > 1e-4, "the eviction changes nothing: this test would not see it missing"


def test_which_tokens_carry_loss():
    """No padding is predicted, nor predicts; the last token predicts nothing."""
    ids = torch.arange(12).reshape(2, 6)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    labels, context, context_labels = eit_trainer.loss_tokens(ids, mask, 0)
    assert labels.tolist() == [[-100, -100, 3, 4, 5, -100], [7, 8, 9, -100, -100, -100]]
    assert not context.any()
    assert (context_labels == -100).all()
    labels, context, context_labels = eit_trainer.loss_tokens(ids, mask, 3)
    assert labels.tolist() == [[-100, -100, -100, 4, 5, -100], [-100] * 6]
    assert context.tolist() == [[False, False, True, False, False, False], [True, True, True, False, False, False]]
    assert context_labels.tolist() == [[-100, -100, 3, -100, -100, -100], [7, 8, 9, -100, -100, -100]]


@pytest.mark.parametrize("first_query", [0, 1, 4, 5, 6])
def test_their_numbers_are_known_where_nothing_is_padded(first_query):
    ids = torch.arange(18).reshape(3, 6)
    labels, context, _ = eit_trainer.loss_tokens(ids, None, first_query)
    numbers = eit_trainer.unpadded_tokens(ids.shape, first_query)
    assert numbers == ((labels != -100).sum(), context.sum())


@pytest.mark.parametrize("padded", [False, True])
def test_the_loss_asks_the_device_for_them_only_where_something_is(tmp_path, tiny_tokenizer, monkeypatch, padded):
    told, plain = [], eit_trainer.distillation_loss
    monkeypatch.setattr(
        eit_trainer,
        "distillation_loss",
        lambda *args, **kwargs: told.append(kwargs["numbers"]) or plain(*args, **kwargs),
    )
    make_trainer(tmp_path, tiny_tokenizer, mixture(), data=rows(2, padded), max_steps=1).train()
    assert told
    assert all((numbers is None) == padded for numbers in told)


# ---- the same step, cut differently ----


def mixture(**changes) -> EITConfig:
    """Every default rule as often; without the selection loss, which has neither padding nor another geometry."""
    plain = {
        "num_cuts": 2,
        "lambda_context": 0.5,
        "lambda_ce_context": 0.2,
        "lambda_selection": 0,
        "rules": dict.fromkeys(default_rules(), 1.0),
    }
    return EITConfig(**plain | {"anchors": ANCHORS, "min_keep_ratio": 0.2} | changes)


@pytest.mark.parametrize("padded", [False, True])
def test_accumulation_changes_nothing(tmp_path, tiny_tokenizer, padded):
    """1 x 8 = 8 x 1, with a mixture of rules, and with clipping that binds."""
    runs = []
    for batch, accumulation in ((8, 1), (1, 8)):
        trainer = make_trainer(
            *(tmp_path, tiny_tokenizer, mixture()),
            data=rows(24, padded),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            max_grad_norm=0.05,
        )
        runs.append((trained_weights(trainer), [line for line in trainer.state.log_history if "loss" in line]))
    assert all(line["grad_norm"] > 0.1 for line in runs[0][1]), "the clipping does not bind"
    assert_equal_weights(runs[0][0], runs[1][0])
    for line, wanted in zip(runs[0][1], runs[1][1], strict=True):
        for figure in ("loss", "ce", "kl", "ce_context", "kl_context", "grad_norm"):
            assert line[figure] == pytest.approx(wanted[figure], rel=1e-4), figure


@pytest.mark.parametrize("rule", [name for name in SMOOTH_RULES if name not in SKETCHING_RULES])
def test_accumulation_changes_no_selection_loss(tmp_path, tiny_tokenizer, rule):
    """Whatever a press makes its scores relative to."""
    plain = {"lambda_kl": 0.0, "lambda_context": 0.0, "lambda_ce_context": 0.0}
    norms = []
    for batch, accumulation in ((4, 1), (1, 4)):
        trainer = make_trainer(
            *(tmp_path, tiny_tokenizer, mixture(rules={rule: 1.0}, lambda_selection=3.0, **plain)),
            data=rows(8),
            max_steps=2,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
        )
        trainer.train()
        norms.append([line["grad_norm"] for line in trainer.state.log_history if "loss" in line])
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)


def test_padded_rows_have_no_selection_loss(tmp_path, tiny_tokenizer):
    trainer = make_trainer(tmp_path, tiny_tokenizer, mixture(lambda_selection=0.3), data=rows(4, padded=True))
    with pytest.raises(ValueError, match="needs rows without padding; without it, set lambda_selection=0"):
        trainer.train()


def test_selection_loss_beside_a_rule_that_keeps_unlike_numbers(tmp_path, tiny_tokenizer):
    """More anchors than fit, in rows that have unlike many: the layer's attention is by the dense mask."""
    rules = {"anchor_random": 1.0, "knorm": 1.0}
    config = mixture(
        lambda_selection=0.3, rules=rules, scheduler_mode="fixed", ratio_draw="ceiling", min_keep_ratio=0.05
    )
    trainer = make_trainer(tmp_path, tiny_tokenizer, config, per_device_train_batch_size=4, max_steps=8)
    trainer.train()
    assert any(line["selection"] > 0 for line in trainer.state.log_history if "loss" in line)


def test_logged_parts_add_up(tmp_path, tiny_tokenizer):
    """The figures are of the whole step and not of its last micro-batch."""
    config = mixture(lambda_kl=0.7, lambda_ce_context=0.2, lambda_selection=0.3, rules={"knorm": 1.0, "tova": 1.0})
    trainer = make_trainer(
        *(tmp_path, tiny_tokenizer, config), per_device_train_batch_size=2, gradient_accumulation_steps=4
    )
    trainer.train()
    for line in trainer.state.log_history:
        parts = line["ce"] + config.lambda_kl * line["kl"] + config.lambda_context * line["kl_context"]
        parts += config.lambda_ce_context * line["ce_context"] + config.lambda_selection * line["selection"]
        assert line["selection"] > 0
        assert line["loss"] == pytest.approx(parts, rel=1e-5)


@pytest.mark.parametrize("geometry", ["two_region", "streaming", "global"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_changes_nothing(tmp_path, tiny_tokenizer, use_reentrant, geometry):
    config = mixture(geometry=geometry, **({"rules": {"anchor_random": 1.0}} if geometry != "two_region" else {}))
    plain = trained_weights(make_trainer(tmp_path, tiny_tokenizer, config))
    trainer = make_trainer(
        *(tmp_path, tiny_tokenizer, config),
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": use_reentrant},
    )
    assert_equal_weights(plain, trained_weights(trainer))
    assert trainer.base.is_gradient_checkpointing


# ---- the teacher ----


def spy_on_teacher(monkeypatch) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(student, teacher) hidden states of every loss, [N, D]."""
    seen, plain = [], eit_trainer.distillation_loss

    def spy(student, teacher, *args, **kwargs):
        seen.append((student.detach().clone(), None if teacher is None else teacher.clone()))
        return plain(student, teacher, *args, **kwargs)

    monkeypatch.setattr(eit_trainer, "distillation_loss", spy)
    return seen


def test_the_teacher_is_the_base_and_holds_still(tmp_path, tiny_tokenizer, monkeypatch):
    """Though the student has dropout in adapter and attention, and the adapter has moved."""
    seen = spy_on_teacher(monkeypatch)
    model = make_tiny("llama", attention_dropout=0.3)
    trainer = make_trainer(tmp_path, tiny_tokenizer, mixture(), model=model, dropout=0.3)
    batch = torch.tensor(rows(8)["input_ids"])
    for _ in range(2):
        one_step(trainer, {"input_ids": batch})
    with torch.no_grad():
        base = make_tiny("llama", attention_dropout=0.3).get_decoder()(batch).last_hidden_state.flatten(0, 1)
    (first_student, first), (second_student, second) = seen
    assert torch.equal(first, base)
    assert torch.equal(second, base)
    assert not torch.equal(first_student, second_student), "the student has no dropout: nothing was at stake"
    assert all(module.training for module in trainer.model.modules()), "the student is left in eval mode"


def test_a_control_evicts_nothing(tmp_path, tiny_tokenizer, monkeypatch):
    """Its student is the plain model, on the same labelled tokens."""
    seen = spy_on_teacher(monkeypatch)
    batch = {"input_ids": torch.tensor(rows(8)["input_ids"])}
    evicted, control = (make_trainer(tmp_path, tiny_tokenizer, mixture(control=control)) for control in (False, True))
    for trainer in (evicted, control):
        one_step(trainer, batch)
    with torch.no_grad():
        plain = control.base.get_decoder()(batch["input_ids"]).last_hidden_state.flatten(0, 1)
    assert not torch.allclose(seen[0][0], plain, atol=1e-4)
    torch.testing.assert_close(seen[1][0], plain, atol=1e-5, rtol=0)
    assert torch.equal(seen[0][1], seen[1][1])
    assert torch.equal(evicted._count_tokens([batch]), control._count_tokens([batch]))


def test_a_process_that_sees_several_gpus_uses_one(tmp_path, tiny_tokenizer):
    args = TrainingArguments(str(tmp_path), use_cpu=True, per_device_train_batch_size=2, report_to=[])
    assert args.n_gpu == 0
    args._n_gpu = 2  # what two GPUs and no launcher come to
    assert args.train_batch_size == 4
    trainer = EITTrainer(attach_lora(make_tiny("llama"), 4, 8, ["q_proj"]), mixture(), tiny_tokenizer, args)
    assert trainer.args.n_gpu == 1
    assert trainer.args.train_batch_size == 2


def test_every_parameter_needs_a_teacher_of_its_own(tmp_path, tiny_tokenizer):
    with pytest.raises(ValueError, match="teacher"):
        make_trainer(tmp_path, tiny_tokenizer, mixture(), dropout=None)


def test_logits_scaled_after_the_head_are_refused(tmp_path, tiny_tokenizer):
    model = make_tiny("gemma3", final_logit_softcapping=30.0)
    with pytest.raises(UserError, match="final_logit_softcapping"):
        make_trainer(tmp_path, tiny_tokenizer, mixture(), model=model)
    assert not (tmp_path / "out").exists()


# ---- evaluation ----


def test_perplexity_is_that_of_the_suffix(tmp_path, tiny_tokenizer):
    data = rows(6)
    trainer = make_trainer(tmp_path, tiny_tokenizer, mixture(), dropout=0.3, per_device_eval_batch_size=2)
    trainer.eval_dataset = data
    metrics = trainer.evaluate()
    ids = torch.tensor(data["input_ids"])
    cut = math.floor(LENGTH * (trainer.config.min_cut + trainer.config.max_cut) / 2)
    model = trainer.model.eval()
    with torch.no_grad():
        full = model(ids).logits
        evicted = []
        for number, pair in enumerate(ids.split(2)):
            with KVDropoutContext(model, trainer._eval_plan(number, cut, 0.2), trainer.selector):
                evicted.append(model(pair).logits)
    for name, logits in (("full", full), ("evicted", torch.cat(evicted))):
        nll = F.cross_entropy(logits[:, cut:-1].flatten(0, 1), ids[:, cut + 1 :].flatten())
        assert metrics[f"eval_{name}_ppl"] == pytest.approx(math.exp(nll), rel=1e-5)
    assert metrics["eval_full_ppl"] != pytest.approx(metrics["eval_evicted_ppl"], rel=1e-4)


def test_evaluation_leaves_training_as_it_was(tmp_path, tiny_tokenizer):
    """Weights after three steps do not depend on how often the model was evaluated."""
    plain, evaluated = (make_trainer(tmp_path, tiny_tokenizer, mixture()) for _ in range(2))
    evaluated.eval_dataset = rows(3)
    evaluated.args.eval_strategy, evaluated.args.eval_steps, evaluated.args.eval_on_start = "steps", 1, True
    one, other = trained_weights(plain), trained_weights(evaluated)
    assert sum("eval_full_ppl" in line for line in evaluated.state.log_history) == 4
    assert all(torch.equal(one[name], other[name]) for name in one)


SELECTING = {"lambda_ce_context": 0.0, "lambda_selection": 0.5, "rules": {"knorm": 1.0, "tova": 1.0, "keydiff": 1.0}}


def test_selection_does_not_depend_on_accumulation_or_checkpointing(tmp_path, tiny_tokenizer):
    variants = [
        {"per_device_train_batch_size": 8},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        {
            "per_device_train_batch_size": 8,
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": False},
        },
    ]
    first, *others = (
        trained_weights(make_trainer(tmp_path, tiny_tokenizer, mixture(**SELECTING), **variant)) for variant in variants
    )
    for other in others:
        assert_equal_weights(first, other, atol=1e-5)
    without = trained_weights(make_trainer(tmp_path, tiny_tokenizer, mixture(**SELECTING | {"lambda_selection": 0.0})))
    assert any(not torch.allclose(first[name], without[name], atol=1e-4) for name in first)


@pytest.mark.parametrize("rule", ["knorm", "keydiff"])
def test_training_on_the_selection_loss_alone_lowers_it(tmp_path, tiny_tokenizer, rule):
    """CE is there too, and has little to say about random tokens."""
    config = mixture(
        rules={rule: 1.0},
        lambda_kl=0.0,
        lambda_context=0.0,
        lambda_selection=20.0,
        num_cuts=1,
        min_cut=0.8,
        max_cut=0.8,
        scheduler_mode="fixed",
        min_keep_ratio=0.4,
        ratio_draw="ceiling",
    )
    generator = torch.Generator().manual_seed(3)
    data = Dataset.from_dict({"input_ids": torch.randint(5, 320, (4, 120), generator=generator).tolist()})
    trainer = make_trainer(
        *(tmp_path, tiny_tokenizer, config),
        data=data,
        model=make_sharp("llama", num_hidden_layers=1),
        max_steps=40,
        learning_rate=5e-3,
        per_device_train_batch_size=4,
    )
    trainer.train()
    values = [line["selection"] for line in trainer.state.log_history if "selection" in line]
    assert all(math.isfinite(value) for value in values)
    assert sum(values[-5:]) < 0.9 * sum(values[:5])
