"""scripts/self_chat.py: conversations in the model's own template, whole or not at all, resumed where it stopped."""

import argparse
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import make_tiny

from sparsekv.errors import UserError

SCRIPT = Path(__file__).parents[2] / "scripts/self_chat.py"


@pytest.fixture
def script(monkeypatch, tiny_tokenizer):
    spec = importlib.util.spec_from_file_location("self_chat", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "self_chat", module)
    spec.loader.exec_module(module)
    torch.manual_seed(0)
    model = make_tiny("llama").eval()
    monkeypatch.setattr(module, "load_model", lambda *_, **__: model)
    monkeypatch.setattr(module, "load_tokenizer", lambda _: tiny_tokenizer)
    tiny_tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    yield module
    tiny_tokenizer.chat_template = None


def options(output, **changes):
    values = {"model": "tiny", "conversations": 5, "answer_tokens": 400, "batch_size": 2, "device": "cpu", "seed": 0}
    return argparse.Namespace(output=output, **{**values, **changes})


def texts(path):
    return [json.loads(line)["text"] for line in path.read_text("utf-8").splitlines()]


def test_a_conversation_is_a_question_and_an_answer_in_the_template(script, tmp_path, monkeypatch):
    said = iter([["Why?", None, "Who?"], ["Because.", "Nothing.", None]])
    monkeypatch.setattr(script, "continuations", lambda *_: next(said))
    tokenizer = script.load_tokenizer("tiny")
    found = script.converse(None, tokenizer, 3, 20)
    assert found == [f"<user>Why?{tokenizer.eos_token}<assistant>Because.", None, None]


def test_what_does_not_end_is_left_out(script):
    model, tokenizer = script.load_model("tiny"), script.load_tokenizer("tiny")
    torch.manual_seed(0)
    found = script.continuations(model, tokenizer, ["hello", "a longer prompt"] * 8, 60)
    assert any(text is None for text in found)
    assert any(text is not None for text in found)
    assert not any(tokenizer.eos_token in text for text in found if text)


def test_a_stopped_call_is_gone_on_from(script, tmp_path, monkeypatch):
    script.main(options(tmp_path / "whole.jsonl"))
    wanted = texts(tmp_path / "whole.jsonl")
    assert 0 < len(wanted) <= 5
    plain, calls = script.converse, []

    def stop_at_the_second(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return plain(*args)

    monkeypatch.setattr(script, "converse", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        script.main(options(tmp_path / "stopped.jsonl"))
    assert not (tmp_path / "stopped.jsonl").exists()
    script.main(options(tmp_path / "stopped.jsonl"))
    assert texts(tmp_path / "stopped.jsonl") == wanted
    assert len(calls) == 2 + 2, "the first of three batches was kept"
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["stopped.jsonl", "whole.jsonl"]


def test_another_model_does_not_go_on_from_it(script, tmp_path, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "converse", stop)
    for model in ("one", "another"):
        with pytest.raises(KeyboardInterrupt):
            script.main(options(tmp_path / "chat.jsonl", model=model))
    assert len(list(tmp_path.glob("chat.jsonl.*.partial"))) == 2


def test_the_program_ends_with_status_2(tmp_path):
    (tmp_path / "there.jsonl").write_text("")
    command = [sys.executable, str(SCRIPT), "--output", str(tmp_path / "there.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        f"self_chat.py: --output {tmp_path}/there.jsonl: exists already; name a new file"
    ]


def test_one_line_for_what_cannot_be(script, tmp_path):
    (tmp_path / "there.jsonl").write_text("")
    with pytest.raises(UserError, match=r"--output .*there.jsonl: exists already"):
        script.main(options(tmp_path / "there.jsonl"))
    with pytest.raises(UserError, match="--conversations 0: a number of 1 or more"):
        script.main(options(tmp_path / "new.jsonl", conversations=0))
    with pytest.raises(UserError, match="--seed 100000000000000: a number from 0"):
        script.main(options(tmp_path / "new.jsonl", seed=10**14))
    with pytest.raises(UserError, match=r"--output .*new.txt: name a .jsonl file"):
        script.main(options(tmp_path / "new.txt"))
    with pytest.raises(UserError, match="--device gpu"):
        script.main(options(tmp_path / "new.jsonl", device="gpu"))
    with pytest.raises(UserError, match="--answer_tokens 1: no conversation came to its end"):
        script.main(options(tmp_path / "new.jsonl", answer_tokens=1, conversations=2))
    assert not (tmp_path / "new.jsonl").exists()
    script.load_tokenizer("tiny").chat_template = None
    with pytest.raises(UserError, match="--model tiny: its tokenizer has no chat template"):
        script.main(options(tmp_path / "new.jsonl"))
    assert not (tmp_path / "new.jsonl").exists()
