import shutil

import pytest

import sparsekv.fingerprint as module
from sparsekv.fingerprint import fingerprint

TEXTS = (
    "tokenizer.json",
    "chat_template.jinja",
    "more/tool.jinja",
    "vocab.txt",
    "merges.txt",
    "spm.model",
    "modeling.py",
)


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 64)
    for name in TEXTS:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"content of {name}")
    return folder


def test_a_copy_is_the_same(model, tmp_path):
    shutil.copytree(model, tmp_path / "copy")
    (tmp_path / "copy" / "README.md").write_text("a card says nothing about the weights")
    assert fingerprint(model) == fingerprint(tmp_path / "copy")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", *TEXTS])
def test_every_byte_of_a_small_file_counts(model, name):
    before = fingerprint(model)
    data = bytearray((model / name).read_bytes())
    for place in (0, len(data) // 2, len(data) - 1):
        data[place] ^= 1
        (model / name).write_bytes(data)
        assert fingerprint(model) != before
        data[place] ^= 1
    (model / name).write_bytes(data)
    assert fingerprint(model) == before


def test_a_large_file_is_read_in_pieces_from_its_begin_to_its_end(model, monkeypatch):
    monkeypatch.setattr(module, "WHOLE", 1024)
    monkeypatch.setattr(module, "PIECES", 8)
    read = list(module._pieces(model / "model.safetensors"))
    assert [len(piece) for piece in read] == [128] * 8
    data = bytearray((model / "model.safetensors").read_bytes())
    assert read[0] == data[:128]
    assert read[-1] == data[-128:]
    before = fingerprint(model)
    (model / "model.safetensors").write_bytes(bytes(len(data)))
    assert fingerprint(model) != before
