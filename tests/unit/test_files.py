import json
import os
import stat
from pathlib import Path

import pytest
from safetensors import SafetensorError

from sparsekv.errors import UserError
from sparsekv.files import new_folder, write_json, write_text, writing


def test_written_whole_and_readable_by_others(tmp_path):
    file = tmp_path / "new" / "folder" / "a.txt"
    write_text(file, "“quoted”\n")
    assert file.read_bytes() == "“quoted”\n".encode()
    assert stat.S_IMODE(file.stat().st_mode) == 0o644
    write_text(file, "again")
    assert file.read_text() == "again"
    assert os.listdir(file.parent) == ["a.txt"]


def test_json_is_the_same_for_the_same_value(tmp_path):
    for name, value in (("a", {"b": [1.5, None], "a": "é"}), ("b", {"a": "é", "b": [1.5, None]})):
        write_json(tmp_path / name, value)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert json.loads((tmp_path / "a").read_text("utf-8")) == {"b": [1.5, None], "a": "é"}


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("moment", ["fdopen", "replace"])
def test_a_write_that_breaks_off_leaves_the_old_file(tmp_path, monkeypatch, moment, error):
    """Whenever: before the text is there, and when it is to take the old one's place."""
    file = tmp_path / "a.json"
    write_json(file, "old")

    def break_off(*args, **kwargs):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(f"sparsekv.files.os.{moment}", break_off)
        with pytest.raises(type(error)):
            write_json(file, "new")
    assert json.loads(file.read_text()) == "old"
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_value_that_is_no_json_leaves_the_old_file(tmp_path):
    write_json(tmp_path / "a.json", "old")
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"new": object()})
    assert json.loads((tmp_path / "a.json").read_text()) == "old"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(28, "No space left on device"), r"\(No space left on device\)$"),
        (OSError("the share is gone"), r"\(the share is gone\)$"),
        (SafetensorError("I/O error: No space left"), r"\(I/O error: No space left\)$"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 1 vs 2"), "is the disk full"),
    ],
)
def test_failures_to_write_name_the_flag(tmp_path, error, said):
    with pytest.raises(UserError, match=f"^--output_dir {tmp_path}: .*{said}") as raised, writing(tmp_path):
        raise error
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("error", [RuntimeError("CUDA out of memory"), KeyError("bug"), KeyboardInterrupt()])
def test_other_failures_stay_what_they_are(tmp_path, error):
    with pytest.raises(type(error)) as raised, writing(tmp_path):
        raise error
    assert raised.value is error


def test_a_new_folder_is_whole_or_not_there(tmp_path, monkeypatch):
    with new_folder(tmp_path / "a" / "made") as folder:
        (folder / "file").touch()
        assert not (tmp_path / "a" / "made").exists()
    assert os.listdir(tmp_path / "a") == ["made"]
    with pytest.raises(KeyError), new_folder(tmp_path / "b"):
        raise KeyError
    assert os.listdir(tmp_path) == ["a"]
    with pytest.raises(UserError, match="exists already"), new_folder(tmp_path / "a"):
        pass
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(UserError, match=r"--output_dir \.: is the working directory"), new_folder(Path(".")):
        pass
