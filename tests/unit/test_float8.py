"""Frozen layers in float8: close to float32 in values and gradients, and nothing else changed.

`torch._scaled_mm` computes float8 on a CPU too, slowly, so only the check of the device is left out here.
"""

import json
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo
from datasets import Dataset
from safetensors.torch import load_file
from tiny import make_tiny, run_options, train_config
from torch import nn
from transformers import TrainingArguments

from sparsekv.adapters import attach_lora
from sparsekv.errors import UserError
from sparsekv.training import float8, run
from sparsekv.training.anchor import AnchorConfig
from sparsekv.training.compiled import compile_layers
from sparsekv.training.config import EITConfig, TrainConfig
from sparsekv.training.eit_trainer import EITTrainer
from sparsekv.training.float8 import FrozenLinear, drop_float8, float8_weight, use_float8

LENGTH, ROWS, LAYERS = 96, 2, 2
TARGETS = ["q_proj", "v_proj", "down_proj"]
ROUNDED = (0.02, 0.06)  # relative error of a product: of float8's two factors 0.035 to 0.038; of bfloat16's 0.003


@pytest.fixture
def any_device(monkeypatch):
    monkeypatch.setattr(float8, "_check_device", lambda device: None)


def with_adapter(**changes):
    """A tiny model with an adapter that changes its output."""
    torch.manual_seed(0)
    model = attach_lora(make_tiny("llama", num_hidden_layers=LAYERS, **changes), 4, 8, TARGETS)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.1)
    return model


@pytest.fixture
def trainer_of(tmp_path, tiny_tokenizer, any_device):
    def make(convert=True, checkpointing=False, **options):
        args = TrainingArguments(
            output_dir=str(tmp_path / "out"),
            use_cpu=True,
            per_device_train_batch_size=ROWS,
            gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            report_to=[],
            disable_tqdm=True,
        )
        ids = torch.randint(5, 320, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1)).tolist()
        plain = {"anchors": AnchorConfig(recent_size=8), "rules": {"streaming_llm": 1}, "lambda_selection": 0}
        config = EITConfig(**plain | options)
        data = Dataset.from_dict({"input_ids": ids})
        trainer = EITTrainer(with_adapter(), config, tiny_tokenizer, args, train_dataset=data)
        if convert:
            use_float8(trainer.base)
        return trainer

    return make


def gradients(trainer):
    """Loss and gradients of one training step, by name."""
    inputs = {"input_ids": torch.tensor(trainer.train_dataset["input_ids"])}
    trainer.model.zero_grad()
    loss = trainer.training_step(trainer.model, inputs, trainer._count_tokens([inputs]))
    return {"loss": loss} | {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}


def error(found, wanted, dim=None):
    """Norm of the difference over the norm, of the whole or of each slice."""
    if dim is None:
        found, wanted, dim = found.flatten(), wanted.flatten(), 0
    return (found.float() - wanted).norm(dim=dim) / wanted.norm(dim=dim)


# ---- one layer ----


def layer_and_reference(bias=False, weight=None):
    """A converted layer of 128 to 64 features, and the layer that it was."""
    torch.manual_seed(0)
    plain = nn.Linear(128, 64, bias=bias)
    if weight is not None:
        plain.weight.data.copy_(weight)
    converted = nn.Linear(128, 64, bias=bias).requires_grad_(False)
    converted.load_state_dict(plain.state_dict())
    converted.__class__ = FrozenLinear
    converted.float8 = float8_weight(converted.weight)
    return converted, plain


def output_and_gradient(layer, x, output_gradient):
    x = x.clone().requires_grad_()
    output = layer(x)
    output.backward(output_gradient.to(output.dtype))
    return output.detach(), x.grad


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_are_those_of_float32_but_for_rounding(dtype, bias):
    converted, plain = layer_and_reference(bias)
    x, output_gradient = torch.randn(2, 3, 50, 128), torch.randn(2, 3, 50, 64)
    wanted = output_and_gradient(plain, x, output_gradient)
    found = output_and_gradient(converted, x.to(dtype), output_gradient)
    for ours, reference in zip(found, wanted, strict=True):
        assert ours.dtype == dtype
        assert ours.shape == reference.shape
        assert ROUNDED[0] < error(ours, reference) < ROUNDED[1]


def test_every_token_and_every_channel_has_a_scale_of_its_own():
    """Each of them is right by itself, however small beside the others."""
    tokens, channels = 10 ** torch.linspace(-3, 3, 50)[:, None], 10 ** torch.linspace(-3, 3, 64)[:, None]
    converted, plain = layer_and_reference(weight=channels * torch.randn(64, 128))
    x, output_gradient = tokens * torch.randn(50, 128), tokens * torch.randn(50, 64) / channels.t()
    (output, x_gradient), wanted = (output_and_gradient(layer, x, output_gradient) for layer in (converted, plain))
    assert (error(output / tokens, wanted[0] / tokens, 0) < ROUNDED[1]).all()
    assert (error(output / channels.t(), wanted[0] / channels.t(), 1) < ROUNDED[1]).all()
    assert (error(x_gradient, wanted[1], 1) < ROUNDED[1]).all()


def test_nothing_and_next_to_nothing_stay_what_they_are():
    converted, plain = layer_and_reference()
    x, output_gradient = torch.randn(3, 128), torch.randn(3, 64) * 1e-20
    x[0], output_gradient[0] = 0, 0
    found = output_and_gradient(converted, x, output_gradient)
    for ours, reference in zip(found, output_and_gradient(plain, x, output_gradient), strict=True):
        assert not ours[0].any()
        assert (error(ours[1:], reference[1:], 1) < ROUNDED[1]).all()


def test_autocast_decides_what_leaves():
    converted, _ = layer_and_reference(bias=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert converted(torch.randn(2, 128)).dtype == torch.bfloat16


def test_the_two_layouts_hold_the_same_numbers_row_by_row():
    weight = float8_weight(torch.randn(32, 64))
    assert torch.equal(weight.rows.float(), weight.columns.float().t())
    assert weight.rows.is_contiguous()
    assert weight.columns.is_contiguous()


# ---- a model ----


def test_frozen_layers_of_the_decoder_are_converted_and_names_stay(any_device):
    model = with_adapter()
    names, weights = list(model.state_dict()), [id(weight) for weight in model.parameters()]
    kinds = {name: type(module) for name, module in model.named_modules()}
    buffers = list(model.named_buffers())
    use_float8(model.get_base_model())
    assert list(model.state_dict()) == names
    assert [id(weight) for weight in model.parameters()] == weights
    assert len(list(model.named_buffers())) == len(buffers), "DDP sends buffers at every step"
    changed = {name for name, module in model.named_modules() if type(module) is not kinds[name]}
    assert len(changed) == 7 * LAYERS
    assert not [name for name in changed if "lora_" in name or "lm_head" in name]
    assert sum(name.endswith("base_layer") for name in changed) == len(TARGETS) * LAYERS


def test_odd_sizes_are_left_alone(any_device):
    base = with_adapter(intermediate_size=120).get_base_model()
    use_float8(base)
    assert {name.split(".")[-2] for name, module in base.named_modules() if type(module) is FrozenLinear} == {
        "q_proj",
        "v_proj",
        "self_attn",  # k_proj and o_proj, which have no adapter
    }


def test_it_can_be_undone(any_device):
    model, ids = with_adapter(), torch.arange(5, 69)[None]
    wanted = model(input_ids=ids).logits
    use_float8(model.get_base_model())
    assert error(model(input_ids=ids).logits, wanted) > 0.01
    drop_float8(model)
    assert torch.equal(model(input_ids=ids).logits, wanted)


def test_a_model_that_trains_whole_has_nothing_to_convert(any_device):
    with pytest.raises(UserError, match="--float8: LlamaForCausalLM has no frozen linear layer"):
        use_float8(make_tiny("llama").requires_grad_(True))


# ---- a step ----


@pytest.mark.parametrize("options", [{}, {"control": True}])
def test_a_step_is_near_the_exact_one(options, trainer_of):
    wanted, found = gradients(trainer_of(convert=False, **options)), gradients(trainer_of(**options))
    assert found.keys() == wanted.keys(), "only the adapter has gradients"
    assert found["loss"] == pytest.approx(wanted["loss"].item(), rel=0.02)
    ours, exact = (torch.cat([g.flatten() for n, g in x.items() if n != "loss"]) for x in (found, wanted))
    assert 0.01 < error(ours, exact) < 0.3
    assert torch.cosine_similarity(ours, exact, dim=0) > 0.97


def test_teacher_and_student_and_the_gradient_multiply_in_float8(trainer_of, monkeypatch):
    trainer, products = trainer_of(), []
    product = float8._product

    def counted(x, rows, scale):
        products.append(rows)
        return product(x, rows, scale)

    monkeypatch.setattr(float8, "_product", counted)
    gradients(trainer)
    # teacher, student and gradient; nothing below the first layer's q, k and v is trained
    assert len(products) == 3 * 7 * LAYERS - 3


def test_checkpointing_gives_the_same_gradients(trainer_of):
    torch.testing.assert_close(gradients(trainer_of(checkpointing=True)), gradients(trainer_of()), atol=0, rtol=0)


# ---- compiled ----


def graphs(trainer):
    """How many are made and how many called in a step of compiled layers; the step's gradients."""
    torch._dynamo.reset()
    made, called = [], []

    def backend(graph, inputs):
        made.append(graph)
        return lambda *args: called.append(graph) or graph.forward(*args)

    compile_layers(trainer.base, backend)
    made.clear()
    called.clear()  # of the machine's own trial
    found = gradients(trainer)
    return len(made), len(called), found


@pytest.mark.parametrize("options", [{}, {"control": True}])
def test_compiled_layers_are_as_many_graphs_as_without_it(options, trainer_of):
    *wanted, _ = graphs(trainer_of(convert=False, **options))
    *counted, found = graphs(trainer_of(**options))
    assert counted == wanted
    torch.testing.assert_close(found, gradients(trainer_of(**options)), atol=1e-5, rtol=1e-4)
    if options:
        assert counted == [3, 2 * LAYERS], "the teacher, the student's first layer and its others"


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_layer_compiles_whole_with_its_gradient(backend):
    torch._dynamo.reset()
    converted, plain = layer_and_reference(bias=True)
    x, output_gradient = torch.randn(50, 128), torch.randn(50, 64)
    found = output_and_gradient(torch.compile(converted, backend=backend, fullgraph=True), x, output_gradient)
    for ours, reference in zip(found, output_and_gradient(plain, x, output_gradient), strict=True):
        assert error(ours, reference) < ROUNDED[1]


# ---- runs ----


def test_a_run_trains_every_adapter_weight_and_saves_the_same_names(tmp_path, any_device):
    options = run_options(tmp_path)

    def adapter(name, **changes):
        final = run.train(train_config(options, tmp_path / name, **changes))
        return load_file(final / "adapter_model.safetensors")

    plain, converted = adapter("plain"), adapter("float8", float8=True)
    assert {name: weight.dtype for name, weight in converted.items()} == {n: w.dtype for n, w in plain.items()}
    assert all(weight.any() for name, weight in converted.items() if "lora_B" in name), "they begin as zeros"
    assert not all(torch.equal(weight, plain[name]) for name, weight in converted.items())


def test_a_run_without_such_a_gpu_goes_on(tmp_path, caplog, monkeypatch):
    tried = []
    monkeypatch.setattr(run, "use_newest_for", tried.append)
    assert run.train(train_config(run_options(tmp_path), tmp_path / "out", float8=True)) is not None
    (line,) = [record.getMessage() for record in caplog.records if "--float8" in record.getMessage()]
    assert line == (
        "--float8: needs a GPU of compute capability 8.9 or above (Ada, Hopper or later); the model is on the CPU; "
        "going on without it"
    )
    record = json.loads((tmp_path / "out" / "final" / "eit_config.json").read_text("utf-8"))
    assert record["config"]["float8"] is True
    assert record["float8"] is False
    assert record["flash_attention"] == "torch"
    assert len(tried) == 1


# ---- refusals ----


def test_a_divided_model_goes_on_without_it(caplog):
    run._use_float8(SimpleNamespace(is_fsdp_enabled=True, base=make_tiny("llama"), teacher=None))
    assert caplog.messages == ["--float8: does not work with FSDP; start with DDP, or on one GPU; going on without it"]


@pytest.mark.parametrize("fails", [None, 0, 1])
def test_a_teacher_of_its_own_is_changed_with_the_student_or_neither(monkeypatch, fails):
    """Whichever of the two cannot be."""
    networks = [make_tiny("llama").requires_grad_(False) for _ in range(2)]
    plain = float8.use_float8

    def use(network):
        plain(network)
        if fails is not None and network is networks[fails]:
            raise UserError("--float8: cannot be")

    monkeypatch.setattr(float8, "_check_device", lambda device: None)
    monkeypatch.setattr(run, "use_float8", use)
    trainer = SimpleNamespace(is_fsdp_enabled=False, base=networks[0], teacher=networks[1])
    assert run._use_float8(trainer) == (fails is None)
    for network in networks:
        kinds = {type(module).__name__ for module in network.modules()}
        assert ("FrozenLinear" in kinds) == (fails is None)


def test_an_older_gpu_is_told_in_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(
        UserError, match=r"^--float8: needs a GPU of compute capability 8\.9 or above .*this one has 8\.0$"
    ):
        float8._check_device(torch.device("cuda"))


def test_a_model_spread_over_devices_is_refused():
    model = make_tiny("llama")
    model.hf_device_map = {"model.layers.0": 0, "model.layers.1": 1}
    with pytest.raises(UserError, match=r"--float8: .*--device_map"):
        use_float8(model)


def test_training_every_weight_is_refused():
    with pytest.raises(UserError, match=r"^--float8: .*--lora_r 0"):
        TrainConfig(model="m", output_dir="o", lora_r=0, float8=True)
