"""An adapter as it is shipped, and the one that is."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import run_options, train_config

from scripts.ship_adapter import main
from sparsekv.cli import parse
from sparsekv.demo import SHIPPED
from sparsekv.errors import UserError
from sparsekv.training.config import TrainConfig
from sparsekv.training.record import changed_options
from sparsekv.training.run import train


@pytest.fixture(scope="module")
def final(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    return train(train_config(run_options(folder) | {"max_steps": 1}, folder / "out"))


def test_the_same_weights_in_half_the_bytes(final, tmp_path):
    main(final, tmp_path / "shipped")
    plain, shipped = (load_file(folder / "adapter_model.safetensors") for folder in (final, tmp_path / "shipped"))
    assert plain.keys() == shipped.keys()
    assert all(torch.equal(plain[name].bfloat16(), shipped[name]) for name in plain)
    assert any(weight.abs().max() > 0 for name, weight in shipped.items() if "lora_B" in name)
    settings = json.loads((tmp_path / "shipped/adapter_config.json").read_text("utf-8"))
    assert settings["base_model_name_or_path"] is None, "a path of this machine"
    record = (tmp_path / "shipped/eit_config.json").read_bytes()
    assert record == (final / "eit_config.json").read_bytes()
    assert (tmp_path / "shipped/tokenizer.json").is_file(), "its card loads it"
    assert "Licence" in (tmp_path / "shipped/README.md").read_text("utf-8")


def test_the_demo_model_has_its_own_tokenizer(final, tmp_path):
    shutil.copytree(final, tmp_path / "final")
    record = json.loads((final / "eit_config.json").read_text("utf-8"))
    record["config"]["model"] = "smollm2-135m"
    (tmp_path / "final/eit_config.json").write_text(json.dumps(record), "utf-8")
    main(tmp_path / "final", tmp_path / "shipped")
    assert not list((tmp_path / "shipped").glob("*token*"))


@pytest.mark.parametrize("record", ["[]", '{"config": 3}', "{"])
def test_a_corrupt_record_is_named(final, tmp_path, record):
    shutil.copytree(final, tmp_path / "final")
    (tmp_path / "final/eit_config.json").write_text(record, "utf-8")
    with pytest.raises(UserError, match=r"eit_config\.json is corrupt"):
        main(tmp_path / "final", tmp_path / "shipped")
    assert not (tmp_path / "shipped").exists()


def test_one_line_and_nothing_written(final, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no folder of a trained adapter"):
        main(tmp_path / "empty", tmp_path / "shipped")
    assert not (tmp_path / "shipped").exists()
    with pytest.raises(UserError, match="exists already"):
        main(final, final)


def test_what_is_shipped_is_small_and_of_the_recipe(tmp_path):
    assert sum(file.stat().st_size for file in SHIPPED.iterdir()) < 8e6
    record = json.loads((SHIPPED / "eit_config.json").read_text("utf-8"))
    recipe = Path(__file__).parents[2] / "configs/smollm2_135m.yaml"
    _, values = parse(["train", "--config", str(recipe), "--output_dir", str(tmp_path / "out")])
    changed = changed_options(record["config"], TrainConfig(**values))
    assert changed.pop("teacher_adapter") == (
        "out/teacher-0/final",
        "out/teacher/final",
    )
    assert changed == {}


def test_what_is_shipped_can_be_shipped_again(tmp_path):
    main(SHIPPED, tmp_path / "again")
    assert (tmp_path / "again/adapter_model.safetensors").read_bytes() == (
        SHIPPED / "adapter_model.safetensors"
    ).read_bytes()


def test_corrupt_weights(final, tmp_path):
    shutil.copytree(final, tmp_path / "final")
    (tmp_path / "final/adapter_model.safetensors").write_bytes(b"no weights")
    with pytest.raises(UserError, match="corrupt"):
        main(tmp_path / "final", tmp_path / "shipped")
    assert not (tmp_path / "shipped").exists()
