import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, logits, make_tiny, save_tiny, save_with_ends
from transformers import DynamicCache

from sparsekv import models
from sparsekv.errors import UserError
from sparsekv.models import check_ids, load_generation_config, load_model, load_tokenizer, resolve_model
from sparsekv.presses import make_press


@pytest.fixture
def base(tmp_path) -> Path:
    """A whole model folder."""
    return Path(save_tiny(tmp_path / "base"))


def folder_with(tmp_path: Path, **files: str | dict | list) -> str:
    """A folder of JSON or text files; `__` in a name stands for the dot."""
    folder = tmp_path / "broken"
    folder.mkdir()
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(content if isinstance(content, str) else json.dumps(content))
    return str(folder)


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


@pytest.mark.parametrize("there", [True, False])
def test_generation_settings_are_those_of_the_loaded_model(tmp_path, there):
    folder = Path(save_with_ends(tmp_path, "a b"))
    if not there:
        (folder / "generation_config.json").unlink()
    found, loaded = load_generation_config(str(folder)), load_model(str(folder)).generation_config
    assert isinstance(loaded.eos_token_id, list) == there
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    assert [getattr(found, name) for name in ids] == [getattr(loaded, name) for name in ids]


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


def test_critical_presses_on_a_configuration_without_head_dim(tmp_path):
    """Qwen2's leave it out, and kvpress reads it."""
    folder = Path(save_tiny(tmp_path / "base", "qwen2"))
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config.pop("head_dim", None)
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    model, cache = load_model(str(folder)), DynamicCache()
    with torch.no_grad(), make_press("critical_snapkv", 0.5)(model):
        model(torch.arange(100)[None], past_key_values=cache)
    assert cache.get_seq_length() == 50


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
