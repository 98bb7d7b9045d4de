"""The folder of an analysis while it grows: which differences matter, and what is corrupt."""

import json

import pytest
import torch

from sparsekv.analysis.samples import SampleFolder
from sparsekv.errors import UserError

DESCRIPTION = {
    "schema_version": 1,
    "model": "a",
    "model_fingerprint": "f0",
    "adapter": None,
    "adapter_fingerprint": None,
    "data": {"pydoc": 0.5, "recall": 0.5},
    "data_subset": None,
    "data_fingerprint": "d0",
    "num_samples": 3,
    "max_len": 16,
    "seed": 0,
    "dtype": "float32",
    "runs": ("base",),
    "anchors": {"sink_size": 4, "recent_size": 64},
    "figures": ["x", "y"],
    "versions": {"torch": "1", "transformers": "2"},
}


def measured(number: int) -> dict:
    figures = torch.full((1, 2, 3, 2), float(number))
    figures[0, 0, 0, 0] = torch.nan
    return {
        "figures": figures,
        "classes": torch.zeros(16, dtype=torch.uint8),
        "static_anchors": torch.arange(16) < number,
    }


@pytest.fixture
def folder(tmp_path) -> SampleFolder:
    made = SampleFolder(tmp_path / "out", DESCRIPTION)
    made.check()
    assert not made.out.exists(), "checking writes nothing"
    made.begin()
    return made


def reopened(folder: SampleFolder, **changes) -> SampleFolder:
    return SampleFolder(folder.out, {**DESCRIPTION, **changes})


def test_what_was_written_is_read(folder):
    for number in (2, 0, 1):
        assert number in folder.missing()
        folder.write(number, measured(number))
    again = reopened(folder)
    again.check()
    assert again.missing() == []
    samples = again.read()
    assert samples.figures.shape == (3, 1, 2, 3, 2)
    assert [each[0, 1, 2, 1] for each in samples.figures] == [0, 1, 2]
    assert samples.static_anchors.sum(1).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"max_len": 32, "figures": ["x"], "data_fingerprint": "d1"}, "max_len 16, now 32"),
        ({"num_samples": 4, "data_fingerprint": "d1"}, "num_samples 3, now 4"),
        ({"model": "b", "model_fingerprint": "f1"}, "model 'a', now 'b'"),
        ({"model_fingerprint": "f1"}, "model_fingerprint 'f0', now 'f1'"),
        ({"adapter": "c", "adapter_fingerprint": "f1", "runs": ["base", "adapter"]}, "adapter None, now 'c'"),
        ({"data": "pydoc", "data_fingerprint": "d1"}, "now 'pydoc'"),
        ({"anchors": {"sink_size": 5, "recent_size": 64}}, "anchors.sink_size 4, now 5"),
        ({"dtype": "bfloat16"}, "dtype 'float32', now 'bfloat16'"),
        ({"versions": {"torch": "1", "transformers": "3"}}, "versions.transformers '2', now '3'"),
        ({"schema_version": 2}, "schema_version 1, now 2"),
        ({"figures": ["x", "z"]}, "figures"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_another_configuration_is_refused(folder, changes, said):
    before = sorted(folder.out.rglob("*"))
    with pytest.raises(UserError, match=f"^--output_dir {folder.out}: was made with ") as raised:
        reopened(folder, **changes).check()
    assert said in str(raised.value)
    assert sorted(folder.out.rglob("*")) == before


@pytest.mark.parametrize("changes", [{"model": "/moved/a"}, {"data": "copy.txt"}, {"data_subset": "same"}])
def test_another_path_to_the_same_is_no_other_analysis(folder, changes):
    reopened(folder, **changes).check()


@pytest.mark.parametrize("content", ["", "[]", "{", "\udcff"])
def test_a_corrupt_configuration(folder, content):
    (folder.out / "analysis_config.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=r"analysis_config.json: corrupt"):
        reopened(folder).check()


@pytest.mark.parametrize("damage", ["cut", "shape", "name"])
def test_a_corrupt_sample_is_named(folder, damage):
    sample = measured(0)
    if damage == "shape":
        sample["figures"] = torch.zeros(1, 2, 3, 5)
    if damage == "name":
        del sample["classes"]
    folder.write(0, sample)
    path = folder.out / "samples" / "00000.safetensors"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UserError, match=r"00000.safetensors: corrupt; delete this file"):
        reopened(folder).check()


def test_samples_of_unknown_origin_are_not_reused(folder):
    folder.write(1, measured(1))
    (folder.out / "analysis_config.json").unlink()
    with pytest.raises(UserError, match=f"^--output_dir {folder.out}: holds samples but no analysis_config.json"):
        reopened(folder, seed=1).check()


def test_the_description_is_plain_json(folder):
    assert json.loads((folder.out / "analysis_config.json").read_text()) == json.loads(json.dumps(DESCRIPTION))
