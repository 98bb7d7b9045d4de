import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import (
    AdaptionPromptConfig,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from tiny import logits, make_tiny, save_tiny

from sparsekv.adapters import attach_lora, check_adapter, load_adapter, merge_adapter
from sparsekv.demo_model import demo_model_place
from sparsekv.errors import UserError
from sparsekv.models import load_config, load_model, load_tokenizer, model_fingerprint

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


@pytest.fixture
def base(tmp_path) -> Path:
    """A whole model folder."""
    return Path(save_tiny(tmp_path / "base"))


@pytest.fixture
def adapter(tmp_path, base) -> Path:
    """An adapter that changes the logits of `base`."""
    torch.manual_seed(0)
    model = attach_lora(load_model(str(base)), 4, 8, ATTENTION)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(generator=torch.Generator().manual_seed(len(name)))
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_lora_sits_on_the_targets_and_changes_nothing_yet(tiny_qwen3):
    plain = logits(tiny_qwen3())
    model = attach_lora(tiny_qwen3(), 4, 8, ["q_proj", "v_proj"])
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert len(trained) == 2 * 2 * 2  # layers, targets, A and B
    assert all("lora_" in name and ("q_proj" in name or "v_proj" in name) for name in trained)
    assert torch.equal(logits(model), plain)


@pytest.mark.parametrize(
    ("r", "targets", "message"),
    [
        (0, ATTENTION, "--lora_r 0: must be at least 1"),
        (4, ["q_proj", "query"], "--lora_targets query: no such layer in this model; it has down_proj, gate_proj"),
        (4, ["proj"], "--lora_targets proj: no such layer"),
        (4, [], r"--lora_targets \[\]: name a layer; it has down_proj"),
    ],
)
def test_bad_lora(tiny_llama, r, targets, message):
    with pytest.raises(UserError, match=message):
        attach_lora(tiny_llama(), r, 8, targets)


def test_merged_model_equals_the_adapted_one(base, adapter, tmp_path, tiny_tokenizer):
    merge_adapter(str(base), adapter, tmp_path / "merged")
    adapted = logits(PeftModel.from_pretrained(load_model(str(base)), adapter).eval())
    merged = load_model(str(tmp_path / "merged"))
    assert not torch.allclose(adapted, logits(load_model(str(base))), atol=1e-2)
    torch.testing.assert_close(logits(merged), adapted, atol=1e-5, rtol=1e-5)
    assert merged.dtype == torch.float32
    assert load_tokenizer(str(tmp_path / "merged")).get_vocab() == tiny_tokenizer.get_vocab()
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter", "merged"}
    assert not list((tmp_path / "merged").glob("adapter*"))


@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens"], ["q_proj", "lm_head", "embed_tokens"]])
def test_embeddings_that_are_one_weight_are_merged_apart(tmp_path, targets):
    model = save_tiny(tmp_path / "base", tie_word_embeddings=True)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=targets, init_lora_weights=False)
    get_peft_model(load_model(model), config).save_pretrained(tmp_path / "adapter")
    merge_adapter(model, tmp_path / "adapter", tmp_path / "merged")
    adapted = logits(PeftModel.from_pretrained(load_model(model), tmp_path / "adapter").eval())
    torch.testing.assert_close(logits(load_model(str(tmp_path / "merged"))), adapted, atol=1e-5, rtol=1e-5)


def test_merge_overwrites_nothing(base, adapter, tmp_path):
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "precious").touch()
    with pytest.raises(UserError, match=r"--output_dir .*merged: exists already"):
        merge_adapter(str(base), adapter, tmp_path / "merged")
    assert [path.name for path in (tmp_path / "merged").iterdir()] == ["precious"]


def test_merge_that_fails_leaves_nothing(base, adapter, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--output_dir .*file is a file; name a folder"):
        merge_adapter(str(base), adapter, tmp_path / "file" / "merged")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter", "file"}


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"hidden_size": 32}, "size mismatch"),
        ({"num_hidden_layers": 1}, r"layers\.1\."),  # peft alone would take these two silently
        ({"num_hidden_layers": 3}, r"layers\.2\."),
    ],
)
def test_adapter_of_another_base(base, adapter, tmp_path, changes, why):
    make_tiny("llama", **changes).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match=f"--adapter .*does not fit .*other: .*{why}") as error:
        merge_adapter(str(tmp_path / "other"), adapter, tmp_path / "merged")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "merged").exists()


def refusal(base: Path, adapter: Path) -> str:
    """What is said of an adapter, alike with the base's weights and without."""
    with pytest.raises(UserError) as without:
        check_adapter(load_config(str(base)), adapter)
    with pytest.raises(UserError) as error:
        merge_adapter(str(base), adapter, adapter.parent / "merged")
    assert str(error.value) == str(without.value)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "config",
    [
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=3, adapter_layers=1),
    ],
)
def test_adapter_that_adds_tokens(base, tmp_path, config):
    get_peft_model(load_model(str(base)), config).save_pretrained(tmp_path / "tokens")
    assert f"--adapter {tmp_path / 'tokens'}: adds tokens, not weights" in refusal(base, tmp_path / "tokens")


def test_adapter_that_depends_on_the_text(base, tmp_path):
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], alora_invocation_tokens=[5])
    get_peft_model(load_model(str(base)), config).save_pretrained(tmp_path / "alora")
    with pytest.raises(UserError, match=r"--adapter .*alora: cannot be merged into its base: aLoRA does not support"):
        merge_adapter(str(base), tmp_path / "alora", tmp_path / "merged")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "cannot be read (Expecting property name"),
        ("[]", "has peft_type None; it must be one of peft's, as LORA is"),
        ("{}", "has peft_type None"),
        ('{"peft_type": "NOPE"}', "has peft_type NOPE"),
        ('{"peft_type": []}', "has peft_type []"),
        ('{"peft_type": "LORA", "r": "x"}', "cannot be used (TypeError: "),
        ('{"peft_type": "LORA", "r": 4, "target_modules": 5}', "cannot be used (TypeError: "),
    ],
)
def test_adapter_config_that_is_none(base, adapter, content, said):
    (adapter / "adapter_config.json").write_text(content)
    assert f"--adapter {adapter}: adapter_config.json {said}" in refusal(base, adapter)


@pytest.mark.parametrize("size", [0, 100, -10])
def test_damaged_adapter_weights(base, adapter, size):
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:size])
    assert f"--adapter {adapter}: adapter_model.safetensors cannot be read (" in refusal(base, adapter)


def test_an_adapter_that_has_diverged(base, adapter):
    weights = load_file(adapter / "adapter_model.safetensors")
    name = sorted(weights)[3]
    weights[name][0, 0] = float("nan")
    save_file(weights, adapter / "adapter_model.safetensors", {"format": "pt"})
    assert f"--adapter {adapter}: {name} is not finite; give an adapter that has not" in refusal(base, adapter)
    with pytest.raises(UserError, match=f"--teacher_adapter .*{name} is not finite"):
        load_adapter(load_model(str(base)), adapter, "--teacher_adapter")


def test_an_adapter_of_other_weights_of_the_same_shapes_is_said(base, adapter, tmp_path, caplog):
    model = load_model(str(base))
    record = {"model_fingerprint": model_fingerprint(str(base), model.config)}
    (adapter / "eit_config.json").write_text(json.dumps(record))
    load_adapter(model, adapter)
    assert caplog.messages == []
    other = make_tiny("llama")
    other.lm_head.weight.data += 1
    other.save_pretrained(tmp_path / "other")
    load_adapter(load_model(str(tmp_path / "other")), adapter)
    assert caplog.messages == [f"--adapter {adapter}: was trained from other weights than {tmp_path / 'other'} has"]


def test_the_demo_model_is_named_as_typed(base, adapter, tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSEKV_CACHE", str(tmp_path / "cache"))
    make_tiny("llama", num_hidden_layers=1).save_pretrained(demo_model_place())
    with pytest.raises(UserError, match="does not fit smollm2-135m: "):
        load_adapter(load_model("smollm2-135m"), adapter)


def test_folder_that_is_no_adapter(base, tiny_llama):
    with pytest.raises(UserError, match=r"--adapter .*base: this folder holds no adapter \(no adapter_config\.json\)"):
        load_adapter(tiny_llama(), base)


def test_the_folder_of_a_run_is_told_where_its_adapter_is(base, adapter, tmp_path):
    (tmp_path / "run").mkdir()
    shutil.copytree(adapter, tmp_path / "run" / "final")
    assert "this folder holds no adapter (no adapter_config.json); give its final/" in refusal(base, tmp_path / "run")


def test_generation_settings_that_cannot_be_saved(base, adapter, tmp_path):
    """transformers loads such a model with a warning, and raises when it is saved."""
    shutil.copytree(base, tmp_path / "model")
    (tmp_path / "model/generation_config.json").write_text('{"temperature": 0.5}')
    with pytest.raises(UserError, match=r"--model .*model: its generation_config.json is not valid \(.*temperature"):
        merge_adapter(str(tmp_path / "model"), adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_configuration_that_no_model_can_be_built_from(base, adapter):
    config = load_config(str(base))
    config.hidden_act = "nope"
    with pytest.raises(
        UserError, match=r"--model .*base: cannot be loaded \(KeyError: 'nope'\); look at its config.json"
    ):
        check_adapter(config, adapter)
