import json
import shutil
import subprocess
import sys
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
from tiny import FAMILIES, make_tiny, save_tiny

from sparsekv import models
from sparsekv.errors import UserError
from sparsekv.models import (
    attach_lora,
    check_adapter,
    check_ids,
    load_adapter,
    load_config,
    load_model,
    load_tokenizer,
    merge_adapter,
    resolve_model,
)

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
IDS = torch.randint(0, 320, (2, 40), generator=torch.Generator().manual_seed(1))


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.fixture
def base(tmp_path, tiny_llama, tiny_tokenizer) -> Path:
    """A whole model folder."""
    tiny_llama().save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


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


def folder_with(tmp_path: Path, **files: str | dict | list) -> str:
    """A folder of JSON or text files; `__` in a name stands for the dot."""
    folder = tmp_path / "broken"
    folder.mkdir()
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(content if isinstance(content, str) else json.dumps(content))
    return str(folder)


# --- loading --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_tiny_models_survive_saving(family, tmp_path):
    model = make_tiny(family)
    model.save_pretrained(tmp_path / family)
    loaded = load_model(str(tmp_path / family))
    assert not loaded.training
    assert torch.equal(logits(loaded), logits(model))
    assert torch.equal(logits(make_tiny(family)), logits(model))


def test_a_folder_is_its_own_resolution(base, monkeypatch):
    assert resolve_model(str(base)) == str(base)
    monkeypatch.setenv("HOME", str(base.parent))
    assert resolve_model("~/base") == str(base)
    assert resolve_model("Qwen/Qwen3-8B") == "Qwen/Qwen3-8B"


def test_the_demo_name_is_its_folder(base, monkeypatch):
    monkeypatch.setattr(models, "demo_model_folder", lambda: base)
    assert resolve_model("smollm2-135m") == str(base)
    assert load_model("smollm2-135m").name_or_path == str(base)


def test_dtype(base):
    assert load_model(str(base)).dtype == torch.float32
    assert load_model(str(base), dtype="bfloat16").dtype == torch.bfloat16


def test_tokenizer_round_trip(base, tiny_tokenizer):
    text = "The “quoted” value is 12, isn't it?\n"
    tokenizer = load_tokenizer(str(base))
    assert tokenizer(text).input_ids == tiny_tokenizer(text).input_ids
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<|user|>Hi<|eos|><|assistant|>"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nobody/no-such-model", "--model nobody/no-such-model: the Hub cannot be reached and nothing is cached"),
        ("./no/such/folder", "--model ./no/such/folder: no such folder, and not a Hub id"),
    ],
)
@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_unknown_name(load, name, message):
    with pytest.raises(UserError, match=message):
        load(name)


CUSTOM = {"model_type": "x", "auto_map": {"AutoConfig": "c.C", "AutoModelForCausalLM": "c.M"}}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds no model"),
        ({"adapter_config__json": {}}, "holds an adapter; pass the base model"),
        ({"config__json": "{"}, "not a valid JSON"),
        ({"config__json": {"model_type": "x"}}, "model type `x`"),
        ({"config__json": {"model_type": "t5"}}, "T5Config"),
        ({"config__json": {"model_type": "llama"}}, "no file named model.safetensors"),
        ({"config__json": {"model_type": "llama"}, "pytorch_model__bin": "pickle"}, "no file named model.safetensors"),
        ({"config__json": {"model_type": "llama"}, "model__safetensors": "damaged"}, "deserializing header"),
        ({"config__json": CUSTOM, "c__py": "raise SystemExit"}, "pass --trust_remote_code true"),
        (
            {"config__json": []},
            r"cannot be loaded \(TypeError: list .*\); look at its config.json and generation_config",
        ),
        ({"config__json": {"model_type": "llama", "hidden_size": "64"}}, "TypeError: .* 'str' and 'int'"),
    ],
)
def test_folder_that_is_no_model(files, message, tmp_path):
    folder = folder_with(tmp_path, **files)
    with pytest.raises(UserError, match=message) as error:
        load_model(folder)
    assert str(error.value).startswith(f"--model {folder}: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("load", "file", "changes", "message"),
    [
        (load_model, "config.json", {"num_attention_heads": 0, "head_dim": None}, "ZeroDivisionError"),
        (load_model, "generation_config.json", [], "TypeError"),
        (load_tokenizer, "tokenizer_config.json", [], "TypeError"),
        (load_tokenizer, "tokenizer.json", {"added_tokens": None}, "TypeError"),
    ],
)
def test_json_that_holds_something_else(base, load, file, changes, message):
    content = json.loads((base / file).read_text())
    (base / file).write_text(json.dumps({**content, **changes} if isinstance(changes, dict) else changes))
    with pytest.raises(
        UserError, match=rf"--model .*base: cannot be loaded \({message}: .*\); look at .*{file}"
    ) as error:
        load(str(base))
    assert "\n" not in str(error.value)


def test_a_configuration_that_no_model_can_be_built_from(base, adapter):
    config = load_config(str(base))
    config.hidden_act = "nope"
    with pytest.raises(
        UserError, match=r"--model .*base: cannot be loaded \(KeyError: 'nope'\); look at its config.json"
    ):
        check_adapter(config, adapter)


def test_only_tokens_that_occur_need_an_embedding(tiny_llama):
    config = tiny_llama().config
    for ids in ([[0, 319]], []):
        check_ids(torch.tensor(ids), config, "m")
    with pytest.raises(UserError, match="--model m: its tokenizer makes token 320, and the model knows 320 of them"):
        check_ids(torch.tensor([[320, 5]]), config, "m")


def test_folder_without_tokenizer(tmp_path, tiny_llama):
    tiny_llama().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="holds no tokenizer"):
        load_tokenizer(str(tmp_path))


def test_incomplete_weights_are_not_filled_with_random_ones(base):
    weights = load_file(base / "model.safetensors")
    del weights["model.norm.weight"]
    weights["lm_head.weight"] = weights["lm_head.weight"][:-1].clone()
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"2 weights are missing or of another shape, e\.g\. lm_head"):
        load_model(str(base))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "--dtype int8: choose auto"),
        ({"device_map": "cuda:99"}, "--device_map cuda:99: this machine has"),
        ({"device_map": "banana"}, "--device_map banana: choose cpu"),
    ],
)
def test_bad_options(base, options, message):
    with pytest.raises(UserError, match=message):
        load_model(str(base), **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without GPU")
def test_gpu_that_is_not_there(base):
    with pytest.raises(UserError, match="--device_map cuda: this machine has 0"):
        load_model(str(base), device_map="cuda")


def test_cached_model_loads_offline_under_its_own_name(base, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--somebody--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(base, repository / "snapshots" / ("0" * 40))
    assert load_model("somebody/tiny").name_or_path == "somebody/tiny"
    assert len(load_tokenizer("somebody/tiny")) == 320


@pytest.mark.slow
def test_unreachable_hub_fails_at_once(tmp_path):
    """transformers on its own retries each of several files for half a minute."""
    code = "from sparsekv.models import load_model; load_model('nobody/no-such-model')"
    proxy = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=proxy, capture_output=True, text=True, timeout=120)
    assert done.stderr.strip().splitlines()[-1].endswith("nothing is cached; pass a local folder or smollm2-135m")
    assert "Retry" not in done.stderr


# --- adapters -------------------------------------------------------------------------------------------------------


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


def test_the_demo_model_is_named_as_typed(base, adapter, tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSEKV_CACHE", str(tmp_path / "cache"))
    make_tiny("llama", num_hidden_layers=1).save_pretrained(models.demo_model_place())
    with pytest.raises(UserError, match="does not fit smollm2-135m: "):
        load_adapter(load_model("smollm2-135m"), adapter)


def test_folder_that_is_no_adapter(base, tiny_llama):
    with pytest.raises(UserError, match=r"--adapter .*base: this folder holds no adapter \(no adapter_config\.json\)"):
        load_adapter(tiny_llama(), base)


def test_generation_settings_that_cannot_be_saved(base, adapter, tmp_path):
    """transformers loads such a model with a warning, and raises when it is saved."""
    shutil.copytree(base, tmp_path / "model")
    (tmp_path / "model/generation_config.json").write_text('{"temperature": 0.5}')
    with pytest.raises(UserError, match=r"--model .*model: its generation_config.json is not valid \(.*temperature"):
        merge_adapter(str(tmp_path / "model"), adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
