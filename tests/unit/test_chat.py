"""`sparsekv chat`: turns on one cache, from a pipe; how it ends."""

import io
import os
import signal
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

import pytest
from tiny import make_sharp, make_tiny_tokenizer, messages

from sparsekv.cli import main
from sparsekv.inference import chat as chat_module
from sparsekv.inference.chat import chat
from sparsekv.inference.config import ChatConfig
from sparsekv.inference.session import Session
from sparsekv.models import load_tokenizer

ROOT = Path(__file__).parents[2]
DOCUMENT = topics["if"][:600]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_sharp("llama").save_pretrained(folder)
    make_tiny_tokenizer().save_pretrained(folder)
    (folder / "long.txt").write_text(DOCUMENT, "utf-8")
    return folder


@pytest.fixture
def talk(folder, monkeypatch, capsys):
    """Function from lines and options to the answers, the lines about them, and the session."""

    def talk(*lines: str, **changes):
        sessions = []
        monkeypatch.setattr(chat_module, "Session", lambda config: sessions.append(Session(config)) or sessions[0])
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
        chat(ChatConfig(**{"model": str(folder), "device": "cpu", "max_new_tokens": 6, **changes}))
        printed = capsys.readouterr()
        return printed.out, messages(printed.err), sessions[0]

    return talk


def test_the_text_is_what_the_template_makes_of_the_whole_conversation(talk, folder):
    lines = ["Hello.", "", "  And then? ", "Why?"]
    _, said, session = talk(*lines)
    tokenizer = load_tokenizer(str(folder))
    text = tokenizer.decode(session.ids[0])
    answers = [part.split("<|eos|>")[0] for part in text.split("<|assistant|>")[1:]]
    turns = [
        {"role": role, "content": content}
        for pair in zip(("Hello.", "And then?", "Why?"), answers, strict=True)
        for role, content in zip(("user", "assistant"), pair, strict=True)
    ]
    assert text == tokenizer.apply_chat_template(turns, tokenize=False).removesuffix("<|eos|>")
    assert len(said) == 3
    assert session.cache.get_seq_length() >= session.ids.shape[1] - 1


def test_nothing_is_read_twice(talk):
    """The cache has each token once, and a later turn sees the earlier ones: with a full cache the text is whole."""
    _, said, session = talk("Hello.", "Why?", keep="full")
    assert session.cache.layers[0].keys.shape[2] == session.cache.get_seq_length()
    assert all("(100.0%)" in line for line in said)


def test_a_document_first(talk):
    _, said, session = talk("What?", "Why?", prompt_file=None, keep="full")
    alone = session.ids.shape[1]
    for keep in ({}, {"keep": "knorm", "ratio": 0.5}, {"mode": "streaming"}):
        out, said, session = talk("What?", "Why?", prompt_file=str(Path(session.config.model) / "long.txt"), **keep)
        assert len(said) == 3
        assert session.ids.shape[1] > alone + 100
        assert "(100.0%)" not in said[0]
        assert out.strip()


def test_without_a_template(talk, folder):
    _, _, session = talk("Hello.", "Why?", chat_template=False)
    text = load_tokenizer(str(folder)).decode(session.ids[0])
    assert text.startswith("<|bos|>Hello.\n")
    assert "\nWhy?\n" in text


@pytest.mark.parametrize("lines", [[], [""], ["Hi."]])
def test_the_end_of_the_input_is_the_end(folder, monkeypatch, lines):
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    with pytest.raises(SystemExit) as ended:
        main(["chat", "--model", str(folder), "--max_new_tokens", "2"])
    assert ended.value.code == 0


def test_a_pipe_and_an_interrupt(folder):
    """Answers come turn by turn; Ctrl-C ends it with 130 and without a traceback."""
    command = [sys.executable, "-m", "sparsekv.cli", "chat", "--model", str(folder), "--max_new_tokens", "3"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(command, env=environment, text=True, **pipes) as process:
        process.stdin.write("Hello.\n")
        process.stdin.flush()
        assert "tokens kept" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        _, rest = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in rest


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--mode", "prefill"], "--mode prefill: it evicts a context once; name the context's file with --prompt_file"),
        (["--keep", "knorm", "--ratio", "0.5"], "--keep knorm: it evicts a context once; name the context's file"),
        (["--prompt_file", "-"], "--prompt_file -: a chat reads its turns there; name a file"),
        (["--max_new_tokens", "2048"], "this turn: "),
        (["--question", "What?"], "question"),
    ],
)
def test_one_line_and_status_2(folder, monkeypatch, capsys, options, said):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello.\n"))
    with pytest.raises(SystemExit) as ended:
        main(["chat", "--model", str(folder), *options])
    assert ended.value.code == 2
    (line,) = messages(capsys.readouterr().err)
    assert said in line


def test_input_that_is_not_text(folder, monkeypatch, capsys):
    lenient = {"encoding": "utf-8", "errors": "surrogateescape"}  # as in the locale C.UTF-8
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xc6\n"), **lenient))
    with pytest.raises(SystemExit) as ended:
        main(["chat", "--model", str(folder)])
    assert ended.value.code == 2
    assert "standard input: it is not UTF-8 text" in capsys.readouterr().err
