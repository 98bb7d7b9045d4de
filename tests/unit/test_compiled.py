"""Compiled layers: the same numbers, and as many compilations as there are kinds of forward pass."""

import shutil

import pytest
import torch
import torch._dynamo
from datasets import Dataset
from safetensors.torch import load_file
from tiny import make_tiny, run_options, train_config
from transformers import TrainingArguments

from sparsekv.adapters import attach_lora
from sparsekv.errors import UserError
from sparsekv.training import run
from sparsekv.training.anchor import AnchorConfig
from sparsekv.training.compiled import compile_layers, compile_logit_sums
from sparsekv.training.config import EITConfig
from sparsekv.training.eit_trainer import EITTrainer
from sparsekv.training.kv_dropout import KVDropoutContext
from sparsekv.training.loss import distillation_loss

LENGTH, ROWS = 96, 4
SLOW = pytest.mark.slow
RULES = dict.fromkeys(("snapkv", "knorm", "expected_attention", "random", "anchor_random"), 1.0)


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch._dynamo.reset()


@pytest.fixture
def trainer_of(tmp_path, tiny_tokenizer):
    """A trainer of a tiny model with an adapter that changes its output."""

    def make(family="llama", layers=2, checkpointing=False, **options):
        torch.manual_seed(0)
        model = attach_lora(make_tiny(family, num_hidden_layers=layers), 4, 8, ["q_proj", "k_proj", "v_proj", "o_proj"])
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.1)
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(5, 320, (4 * ROWS, LENGTH), generator=generator).tolist()
        args = TrainingArguments(
            output_dir=str(tmp_path / "out"),
            use_cpu=True,
            max_steps=4,
            per_device_train_batch_size=ROWS,
            per_device_eval_batch_size=1,
            gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        data = Dataset.from_dict({"input_ids": ids})
        plain = {
            "rules": RULES,
            "min_cut": 0.7,
            "num_cuts": 2,
            "lambda_context": 0,
            "lambda_ce_context": 0,
            "lambda_selection": 0,
        }
        config = EITConfig(anchors=AnchorConfig(recent_size=8), **plain | options)
        return EITTrainer(model, config, tiny_tokenizer, args, train_dataset=data, eval_dataset=data.select([0, 1]))

    return make


def gradients(trainer):
    """Loss and gradients of one training step, by name."""
    inputs = {"input_ids": torch.tensor(trainer.train_dataset[:ROWS]["input_ids"])}
    trainer.model.zero_grad()
    loss = trainer.training_step(trainer.model, inputs, trainer._count_tokens([inputs]))
    return {"loss": loss} | {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}


# ---- the same numbers ----


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        pytest.param("llama", {"checkpointing": True}, marks=SLOW),
        pytest.param("llama", {"control": True}, marks=SLOW),
        pytest.param("llama", {"lambda_selection": 0.5}, marks=SLOW),
        pytest.param("qwen3", {}, marks=SLOW),
        pytest.param("gemma3", {}, marks=SLOW),
        pytest.param("gemma3", {"lambda_selection": 0.5}, marks=SLOW),
    ],
)
def test_losses_gradients_and_evaluations_are_the_same(family, options, trainer_of):
    plain, compiled = trainer_of(family, **options), trainer_of(family, **options)
    compile_layers(compiled.base, "aot_eager")
    compiled.logit_sums = compile_logit_sums("aot_eager")
    wanted = gradients(plain)
    torch.testing.assert_close(gradients(compiled), wanted, atol=1e-5, rtol=1e-5)
    assert any(bool(gradient.any()) for name, gradient in wanted.items() if "lora_A" in name)
    assert compiled.evaluate() == pytest.approx(plain.evaluate(), rel=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def head_loss(tokens, trainable=False, **options):
    """Sums and gradients of the loss head over so many tokens, in chunks of 16."""
    torch.manual_seed(tokens)
    student, teacher = torch.randn(2, tokens, 8)
    student.requires_grad_()
    head = torch.nn.Linear(8, 199, bias=False).requires_grad_(trainable)
    context = torch.arange(tokens) < tokens // 3
    labels = torch.randint(199, (tokens,)).masked_fill(context, -100)
    options = {"context_mask": context, "lambda_context": 0.5, "lambda_kl": 0.7, "chunk_size": 16, **options}
    got = distillation_loss(student, teacher, labels, head, head, **options)
    (got.loss + got.context_loss).backward()
    gradients = [x.grad for x in (student, head.weight) if x.grad is not None]
    assert all(bool(gradient.any()) for gradient in gradients)
    return [got.loss.detach(), got.context_loss.detach(), got.ce, got.kl, got.kl_context, *gradients]


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=SLOW)])
@pytest.mark.parametrize(
    "options", [{}, {"direction": "reverse"}, {"direction": "js", "temperature": 2.0}, {"temperature": 0.5}]
)
def test_the_compiled_loss_is_the_plain_one(options, backend, trainable):
    compiled = head_loss(100, trainable, **options, logit_sums=compile_logit_sums(backend))
    torch.testing.assert_close(compiled, head_loss(100, trainable, **options), atol=1e-6, rtol=1e-6)


# ---- how often ----


def test_the_loss_is_compiled_once_for_any_number_of_tokens():
    """Once with the next token and once without, for the context, whose last chunk here is a single token."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    logit_sums = compile_logit_sums(backend)
    for tokens in (100, 75, 48, 30, 101):
        torch.testing.assert_close(head_loss(tokens, logit_sums=logit_sums), head_loss(tokens))
        assert len(graphs) == 2


def compilations(trainer):
    """Number of graphs after each of four steps, each with an evaluation."""
    graphs, seen = [], []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compile_layers(trainer.base, backend)
    trainer.logit_sums = compile_logit_sums(backend)
    graphs.clear()
    for _ in range(4):
        gradients(trainer)
        trainer.evaluate()
        trainer.state.global_step += 1  # other cuts, rules and ratios
        seen.append(len(graphs))
    return seen


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        pytest.param("qwen3", {}, marks=SLOW),
        pytest.param("qwen3", {"lambda_selection": 0.5}, marks=SLOW),
        pytest.param("llama", {"checkpointing": True}, marks=SLOW),
    ],
)
def test_neither_more_layers_nor_more_steps_compile_more(family, options, trainer_of):
    shallow = compilations(trainer_of(family, layers=2, **options))
    torch._dynamo.reset()
    deep = compilations(trainer_of(family, layers=4, **options))
    assert shallow == deep == [deep[0]] * 4


def test_attention_without_eviction_is_part_of_its_layers_graph(trainer_of, monkeypatch):
    trainer = trainer_of("qwen3", layers=4, control=True)
    monkeypatch.setattr(trainer, "evaluate", lambda: None)
    assert compilations(trainer) == [4] * 4  # the teacher, the student's first layer and its others, the loss


@pytest.mark.skipif(torch.__version__ < "2.11", reason="older ones leave the graph of a call, not of a layer")
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_an_evicted_layer_is_two_graphs(family, trainer_of):
    trainer, called = trainer_of(family, layers=3), []

    def backend(graph, inputs):
        def run(*args):
            called.append(graph)
            return graph.forward(*args)

        return run

    compile_layers(trainer.base, backend)
    ids = torch.tensor(trainer.train_dataset[:ROWS]["input_ids"])
    with torch.no_grad(), KVDropoutContext(trainer.base, trainer.current_plan(LENGTH), trainer.selector) as eviction:
        called.clear()  # of the machine's own trial
        trainer.base.get_decoder()(input_ids=ids)
    assert len(eviction.last.keeps) == 3
    assert len(called) == 2 * 3


# ---- runs ----


@SLOW
def test_a_compiled_run_writes_the_adapter_of_a_plain_one_and_resumes(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "compile_layers", lambda model: compile_layers(model, "aot_eager"))
    options = run_options(tmp_path)

    def adapter(name, **changes):
        final = run.train(train_config(options, tmp_path / name, **changes))
        assert final is not None
        return load_file(final / "adapter_model.safetensors")

    plain, compiled = adapter("plain"), adapter("compiled", compile=True)
    torch.testing.assert_close(compiled, plain, atol=1e-3, rtol=0)  # a tenth of a step of Adam
    for name in ("final", "checkpoint-4"):
        shutil.rmtree(tmp_path / "compiled" / name)
    resumed = adapter("compiled", compile=True, resume=True)
    torch.testing.assert_close(resumed, compiled, atol=0, rtol=0)


# ---- refusals ----


def test_a_machine_without_a_compiler_is_told_in_one_line(trainer_of):
    def backend(graph, inputs):
        raise RuntimeError("no compiler\nwith details")

    with pytest.raises(UserError, match=r"--compile: torch.compile does not work here: .*no compiler$"):
        compile_layers(make_tiny("llama"), backend)


def test_a_run_goes_on_without_it(tmp_path, monkeypatch, caplog):
    def refuse(model):
        raise UserError("--compile: torch.compile does not work here: no compiler")

    monkeypatch.setattr(run, "compile_layers", refuse)
    assert run.train(train_config(run_options(tmp_path), tmp_path / "out", compile=True)) is not None
    (line,) = [record.getMessage() for record in caplog.records if "--compile" in record.getMessage()]
    assert line == "--compile: torch.compile does not work here: no compiler; going on without it"


def test_a_model_spread_over_devices_is_refused():
    model = make_tiny("llama")
    model.hf_device_map = {"model.layers.0": 0, "model.layers.1": 1}
    with pytest.raises(UserError, match=r"--compile: .*--device_map"):
        compile_layers(model)


def test_a_model_that_cannot_be_compiled_ends_in_one_line(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise torch._dynamo.exc.TorchDynamoException("no such kernel\nwith details")

    monkeypatch.setattr(EITTrainer, "train", fail)
    with pytest.raises(UserError, match=r"^--compile: LlamaForCausalLM cannot be compiled here, .*: no such kernel$"):
        run.train(train_config(run_options(tmp_path), tmp_path / "out"))
