"""`sparsekv export`: what it writes works where this package is not, and says the same."""

import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import make_sharp, make_tiny_tokenizer, messages

from sparsekv.adapters import attach_lora, load_adapter
from sparsekv.anchors import AnchorConfig
from sparsekv.cli import main
from sparsekv.errors import UserError
from sparsekv.inference.anchor_cache import AnchorCache
from sparsekv.inference.bundle import bundle
from sparsekv.inference.config import ExportConfig
from sparsekv.inference.export import export, runs
from sparsekv.models import load_model, load_tokenizer
from sparsekv.tokens import TokenClass, classify_vocabulary

ANCHORS = AnchorConfig(sink_size=2, recent_size=4, extra_punctuation="e")
CALLS = [
    {},
    {"context_length": 20},
    {"context_length": 20, "num_beams": 3},
    {"mode": "streaming"},
    {"mode": "streaming", "budget": 12},
    {"budget": 9},
]

# A finder refuses this package and all that stock transformers does not bring.
WITHOUT = """
import importlib.abc, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("sparsekv", "kvpress", "platformdirs", "jsonargparse"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
"""
# What a user does there.
USE = """
import json
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, ids, mask, calls = json.loads(sys.argv[1])
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
inputs = {"attention_mask": torch.tensor(mask), "max_new_tokens": 8, "do_sample": False}
inputs |= {"eos_token_id": None, "pad_token_id": 0, "return_dict_in_generate": True}
found = []
for call in calls:
    own = {"custom_generate": folder, "trust_remote_code": True}
    out = model.generate(input_ids=torch.tensor(ids), **inputs, **own, **call)
    found.append([out.sequences.tolist(), out.past_key_values.kept.tolist(), out.past_key_values.nbytes])
trusted = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
out = trusted.generate(input_ids=torch.tensor(ids), **inputs)
found.append([out.sequences.tolist(), out.past_key_values.kept.tolist(), out.past_key_values.nbytes])
assert "sparsekv" not in sys.modules
print(json.dumps(found))
"""


def save(model, folder: Path) -> str:
    model.save_pretrained(folder)
    make_tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save(make_sharp("llama"), tmp_path_factory.mktemp("base"))


def elsewhere(code: str, argument: str, tmp_path: Path) -> str:
    """What a process prints that has neither this package nor this folder on its path."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules"), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", WITHOUT + code, argument]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()[-1]


def by_hand(folder: Path, ids, mask, mode="prefill", budget=None, context_length=None, **more) -> list:
    model, tokenizer = load_model(str(folder)), load_tokenizer(str(folder))
    cache = AnchorCache(model, tokenizer, ANCHORS, mode=mode, budget=budget, context_length=context_length)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **more}
    out = model.generate(ids, attention_mask=mask, past_key_values=cache, **options)
    return [out.tolist(), cache.kept.tolist(), cache.nbytes]


def test_without_this_package_the_tokens_are_the_same(base, tmp_path):
    folder = export(ExportConfig(base, str(tmp_path / "exported"), budget=16, anchors=ANCHORS))
    ids = torch.randint(5, 300, (2, 40), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(40) >= torch.tensor([[0], [7]])).long()
    found = json.loads(elsewhere(USE, json.dumps([str(folder), ids.tolist(), mask.tolist(), CALLS]), tmp_path))
    for call, each in zip([*CALLS, {}], found, strict=True):
        assert each == by_hand(folder, ids, mask, **{"budget": 16, **call}), call
    assert len({json.dumps(each[0]) for each in found}) >= 3, "the options must matter"


def test_a_merged_adapter_and_one_apart(base, tmp_path):
    adapted = attach_lora(load_model(base), 4, 8, ["q_proj", "v_proj"])
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(generator=torch.Generator().manual_seed(0))
    adapted.save_pretrained(tmp_path / "adapter")
    merged = export(ExportConfig(base, str(tmp_path / "merged"), adapter=str(tmp_path / "adapter")))
    apart = export(ExportConfig(base, str(tmp_path / "apart"), adapter=str(tmp_path / "adapter"), merge=False))
    ids = torch.randint(5, 300, (1, 20), generator=torch.Generator().manual_seed(0))
    wanted = adapted(ids).logits
    for found in (load_model(str(merged)), load_adapter(load_model(base), apart)):
        torch.testing.assert_close(found(ids).logits, wanted, atol=1e-4, rtol=1e-4)
    assert (wanted - load_model(base)(ids).logits).abs().max() > 1e-2
    for folder in (merged, apart):
        names = {path.name for path in folder.rglob("*")}
        assert {"generate.py", "tokenizer.json", "README.md"} <= names
        assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl"))]
        assert {stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*") if path.is_file()} == {0o666 & ~umask()}
    assert "PeftModel" in (apart / "README.md").read_text("utf-8")
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "merged", "apart"}


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize(
    ("options", "chat"),
    [({}, True), ({}, False), ({"mode": "streaming", "budget": 12}, True), ({"merge": False}, True)],
)
def test_the_example_of_the_card_runs(tmp_path, options, chat):
    base, tokenizer = save(make_sharp("llama"), tmp_path / "base"), make_tiny_tokenizer()
    if not chat:
        tokenizer.chat_template = None
        tokenizer.save_pretrained(base)
        (tmp_path / "base" / "chat_template.jinja").unlink(missing_ok=True)
    if "merge" in options:
        attach_lora(load_model(base), 4, 8, ["q_proj", "v_proj"]).save_pretrained(tmp_path / "adapter")
        options = {**options, "adapter": str(tmp_path / "adapter")}
    folder = export(ExportConfig(base, str(tmp_path / "exported"), anchors=ANCHORS, **options))
    (tmp_path / "long.txt").write_text("\nOne and two.\n" * 5, "utf-8")
    (code,) = re.findall(r"```python\n(.+?)```", (folder / "README.md").read_text("utf-8"), re.DOTALL)
    assert ("messages" in code) == chat
    asked = "past = model.generate(**inputs, **options, return_dict_in_generate=True).past_key_values\n"
    code += f"{asked}print(past.seen, past.kept.item(), options.get('context_length'), inputs.input_ids.shape[1])"
    seen, kept, context, prompt = elsewhere(code.replace("path/to/this/folder", str(folder)), "", tmp_path).split()
    if "budget" in options:
        assert (kept, context) == ("12", "None")
    else:
        assert int(prompt) - 40 < int(context) < int(prompt)
        assert int(kept) < int(seen)


def test_a_further_turn(base, tmp_path, monkeypatch):
    folder = export(ExportConfig(base, str(tmp_path / "exported"), budget=16, anchors=ANCHORS))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    ids = torch.randint(5, 300, (1, 40), generator=torch.Generator().manual_seed(0))
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    own = {"custom_generate": str(folder), "trust_remote_code": True}
    said = []
    for by_hand in (False, True):
        model, text = load_model(base), ids
        cache = AnchorCache(model, load_tokenizer(base), ANCHORS, budget=16)
        more = {"past_key_values": cache} if by_hand else own
        for _ in range(2):
            mask = torch.ones_like(text)
            out = model.generate(text, attention_mask=mask, return_dict_in_generate=True, **options, **more)
            more = {**more, "past_key_values": out.past_key_values}
            text = torch.cat([out.sequences, ids[:, :5]], dim=1)
        said.append((text.tolist(), out.past_key_values.kept.tolist()))
    assert said[0] == said[1]
    assert said[0][1][0] < out.past_key_values.seen - 20, "the context was evicted, once"


def test_the_exported_classes_are_the_tokenizers(base, tmp_path, monkeypatch):
    folder = export(ExportConfig(base, str(tmp_path / "exported"), anchors=ANCHORS))
    text = (folder / "custom_generate" / "generate.py").read_text("utf-8")
    names: dict = {"__name__": "exported"}
    monkeypatch.setitem(sys.modules, "exported", sys)  # dataclasses look their module up
    exec(compile(text, "generate.py", "exec"), names)
    found = names["classify_vocabulary"]()
    wanted = classify_vocabulary(load_tokenizer(base), load_model(base).config, ANCHORS.extra_punctuation)
    for kind in (TokenClass.SPECIAL, TokenClass.PUNCTUATION):
        assert torch.equal(found == kind, wanted == kind)
    assert "sparsekv" not in {line.split()[1].split(".")[0] for line in text.splitlines() if line.startswith("from ")}


@pytest.mark.parametrize(("ids", "text"), [([], ""), ([0], "0"), ([0, 1, 2, 7, 9, 10], "0-2 7 9-10")])
def test_runs(ids, text):
    chosen = torch.zeros(12, dtype=torch.bool)
    chosen[ids] = True
    assert runs(chosen) == text


# ---- bundles ----


def test_a_bundle_has_what_is_needed_and_nothing_else(tmp_path, monkeypatch):
    (tmp_path / "sparsekv_x").mkdir()
    files = {
        "__init__": "",
        "one": "import math as m\nimport os\n\n\n# Why.\nLIMIT: int = 3\nUNUSED = 4\n\n\n"
        "def f(x):\n    return m.sqrt(x)\n",
        "two": "from sparsekv_x.one import LIMIT, f\n\n\nclass A:\n    def g(self):\n        return f(LIMIT) + h()\n"
        "\n\ndef h():\n    return 1\n",
        "three": "from sparsekv_x.two import A\n\n\ndef f():\n    return A()\n",
    }
    for name, text in files.items():
        (tmp_path / "sparsekv_x" / f"{name}.py").write_text(text, "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("sparsekv.inference.bundle.PACKAGE", "sparsekv_x")
    found = bundle("sparsekv_x.two", "A", "Head.", {"sparsekv_x.two.h": "def h():\n    return LIMIT"})
    assert found.startswith('"""Head."""\n\nfrom __future__ import annotations\n\nimport math as m\n')
    assert "# Why.\nLIMIT: int = 3" in found
    assert "UNUSED" not in found
    assert "import os" not in found
    assert "sparsekv_x" not in found
    names: dict = {}
    exec(found, names)
    assert names["A"]().g() == 3**0.5 + 3
    with pytest.raises(ValueError, match=r"f is defined in sparsekv_x\.\w+ and in sparsekv_x\.\w+"):
        bundle("sparsekv_x.three", "f", "Head.", {})


# ---- bad input ----


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--format", "gguf"], "--format gguf: must be hf"),
        (["--budget", "9"], "--budget 9: must be 68 tokens or more, sink_size 4 + recent_size 64"),
        (["--merge", "false"], "--merge false: there is no --adapter to leave apart"),
        (["--adapter", "nowhere"], "--adapter nowhere: no such folder; give that of a trained adapter"),
        (["--mode", "ring"], "--mode ring: must be prefill or streaming"),
    ],
)
def test_one_line_status_2_and_nothing_written(base, tmp_path, capsys, more, said):
    with pytest.raises(SystemExit) as ended:
        main(["export", "--model", base, "--output_dir", str(tmp_path / "out"), *more])
    assert ended.value.code == 2
    (line,) = messages(capsys.readouterr().err)
    assert said in line
    assert not any(tmp_path.iterdir())


def test_the_demo_model_goes_with_its_adapter(tmp_path):
    with pytest.raises(UserError, match="--merge false: transformers alone cannot load smollm2-135m; merge"):
        export(ExportConfig("smollm2-135m", str(tmp_path / "out"), adapter=str(tmp_path), merge=False))
    assert not any(tmp_path.iterdir())


def test_a_folder_that_holds_something(base, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match=r"--output_dir .*: exists already; name a new folder"):
        ExportConfig(base, str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_layers_that_cannot_be_served(tmp_path):
    base = save(make_sharp("gemma3"), tmp_path / "base")
    with pytest.raises(UserError, match="gemma3_text: has sliding_attention layers"):
        export(ExportConfig(base, str(tmp_path / "out")))
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_failure_leaves_nothing(base, tmp_path, monkeypatch):
    monkeypatch.setattr("sparsekv.inference.export.export_card", lambda config, chat: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export(ExportConfig(base, str(tmp_path / "out")))
    assert not any(tmp_path.iterdir())


def test_another_models_file_is_refused(base, tmp_path, monkeypatch):
    folder = export(ExportConfig(base, str(tmp_path / "out")))
    other = make_sharp("llama", vocab_size=400)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    with pytest.raises(Exception, match=r"a model of 400 tokens: this generate.py is of one with 320"):
        other.generate(torch.ones(1, 4, dtype=torch.long), custom_generate=str(folder), trust_remote_code=True)
