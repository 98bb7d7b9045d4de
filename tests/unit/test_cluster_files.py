"""The site file and the experiment file: what they mean, and that bad ones end in one line."""

from pathlib import Path

import pytest
import yaml

from sparsekv.cluster.artefacts import state
from sparsekv.cluster.book import Book
from sparsekv.cluster.phases import make_phases
from sparsekv.cluster.pipeline import load_pipeline
from sparsekv.cluster.plan import check_scripts, make_plan
from sparsekv.cluster.site import Site, load_site
from sparsekv.errors import UserError

ROOT = Path(__file__).parents[2]
KEYS = ("qwen3", "llama", "smollm2")


@pytest.fixture
def file(tmp_path):
    """Function from text or a mapping to a file."""

    def write(content: str | dict) -> Path:
        path = tmp_path / "file.yaml"
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return path

    return write


def refusal(function, *arguments) -> str:
    with pytest.raises(UserError) as refused:
        function(*arguments)
    message = str(refused.value)
    assert "\n" not in message
    return message


# ---- the site ----


def test_the_shipped_site_asks_for_nothing():
    assert load_site(ROOT / "configs" / "cluster.yaml", {}) == Site()
    assert Site().options() == []
    assert Site().environment() == {"SPARSEKV_CONDA": "sparsekv"}


def test_a_site(file):
    site = load_site(file("account: me\nqos: high\nmodules: [cuda/12, gcc]\nsbatch: [--exclude=n 1]\n"), {})
    assert site.options() == ["--account=me", "--qos=high", "--exclude=n 1"]
    assert site.environment()["SPARSEKV_MODULES"] == "cuda/12 gcc"


def test_the_environment_wins(file):
    given = {"SPARSEKV_ACCOUNT": "you", "SPARSEKV_CONDA": "a b", "SPARSEKV_QOS": "", "SPARSEKV_CACHE": "elsewhere"}
    site = load_site(file("account: me\nqos: high\npartition: gpu\n"), given)
    assert (site.account, site.conda, site.qos, site.partition) == ("you", ["a", "b"], None, "gpu")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("acount: me", "unknown key 'acount'; known are account, partition"),
        ("account: 12", "account: must be text or empty, not 12"),
        ("conda: sparsekv", "conda: must be a list"),
        ("- account", "must hold `key: value` lines"),
        ("a: [", "is not YAML"),
        ("account: a\nconda: [x]\naccount: b", "gives account twice, again in line 3; keep one"),
        ("sbatch: [exclude=n1]", "is no --option"),
        ("sbatch: [--dependency=singleton]", "is set by sparsekv submit"),
        ("sbatch: ['--wrap=rm']", "is set by sparsekv submit"),
    ],
)
def test_a_bad_site(file, content, said):
    path = file(content)
    message = refusal(load_site, path, {})
    assert said in message
    assert str(path) in message


def test_no_site(tmp_path):
    assert "nowhere.yaml: cannot be read" in refusal(load_site, tmp_path / "nowhere.yaml", {})


# ---- the experiment ----


@pytest.mark.parametrize("key", KEYS)
def test_the_shipped_experiment(key, monkeypatch, tmp_path):
    """Every phase of every model has its script, and a command that its schema accepts."""
    monkeypatch.chdir(ROOT)
    pipeline = load_pipeline(Path("configs/pipeline.yaml"))
    phases = make_phases(pipeline, key)
    teachers = ["teacher"] if key == "smollm2" else []
    assert list(phases) == ["analyze", "baseline", *teachers, "control", "train", "trained"]
    assert [phases[name].config.control for name in ("control", "train")] == [True, False]
    assert len({phase.fingerprint for phase in phases.values()}) == len(phases)
    folders = {phases["control"].out, phases["train"].out}
    adapters = {Path(run.adapter).parent for run in phases["trained"].config.folders().values() if run.adapter}
    assert folders == adapters
    steps = make_plan(pipeline, phases, list(phases), Book(tmp_path), 4, None, None)
    check_scripts(steps)
    workloads = pipeline.rates().workloads
    assert {cell.benchmark for cell in state(phases["baseline"]).cells} <= workloads.keys()


def test_the_matrix_of_the_8b_models(monkeypatch):
    monkeypatch.chdir(ROOT)
    for key in ("qwen3", "llama"):
        cells = state(make_phases(load_pipeline(Path("configs/pipeline.yaml")), key)["baseline"]).cells
        assert len(cells) == 4 * 13
        assert {cell.benchmark for cell in cells} == {"ruler:4096", "ruler:16384", "longbench", "aime25"}


@pytest.mark.parametrize(
    ("where", "value", "said"),
    [
        (["models"], {}, "name at least one"),
        (["models", "a b"], {}, "cannot be a key"),
        (["models", "a_trained"], {}, "take another key"),
        (["models", "qwen3", "trian"], "x", "unknown key 'trian'"),
        (["models", "qwen3", "billions"], None, "billions: must be a number"),
        (["models", "qwen3", "results"], "a%b", "without %"),
        (["models", "qwen3", "results"], "a\\b", "without %"),
        (["models", "qwen3", "resources"], {"training": {}}, "unknown phase training"),
        (["resources", "train"], {"time": 43200}, "time: must be text"),
        (["resources", "train"], {"time": "12h"}, "must be [D-]HH:MM:SS"),
        (["resources", "train"], {"mem": "80 GB"}, "such as 80G"),
        (["resources", "train"], {"gpus": 0}, "gpus 0: must be at least 1"),
        (["batch"], 0, "batch 0"),
        (["throughput", "train"], 0, "train 0: must be above 0"),
        (["throughput", "workloads"], {"ruler": {"row": 1}}, "unknown key 'row'"),
    ],
)
def test_a_bad_experiment(file, where, value, said):
    content = yaml.safe_load((ROOT / "configs" / "pipeline.yaml").read_text())
    part = content
    for name in where[:-1]:
        part = part[name]
    part[where[-1]] = value
    assert said in refusal(load_pipeline, file(content))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"base": "other"}, "configs/matrix.yaml has no run 'other'"),
        ({"base": "qwen3-8b-trained"}, "must be different runs"),
        ({"base": "qwen3-8b-trained", "trained": "llama31-8b-trained"}, "base must have none"),
        ({"base": "llama31-8b-base", "trained": "qwen3-8b-base"}, "is of 'meta-llama"),
        ({"control": "qwen3-8b-base", "base": "llama31-8b-base"}, "is of 'meta-llama"),
        ({"model": "other"}, "is of 'Qwen/Qwen3-8B', not 'other'"),
        ({"train": "configs/llama31_8b.yaml"}, "configs/llama31_8b.yaml trains 'meta-llama/Llama-3.1-8B-Instruct'"),
        ({"teacher": "configs/llama31_8b.yaml"}, "configs/llama31_8b.yaml trains 'meta-llama/Llama-3.1-8B-Instruct'"),
        ({"teacher": "configs/none.yaml"}, "models: qwen3: teacher: "),
        ({"analyze": {"num_samples": 1}}, "--num_samples 1"),
    ],
)
def test_files_that_do_not_fit_together(file, monkeypatch, changes, said):
    monkeypatch.chdir(ROOT)
    content = yaml.safe_load(Path("configs/pipeline.yaml").read_text())
    content["models"]["qwen3"] |= changes
    assert said in refusal(make_phases, load_pipeline(file(content)), "qwen3")


def test_a_model_without_a_control(file, monkeypatch):
    monkeypatch.chdir(ROOT)
    content = yaml.safe_load(Path("configs/pipeline.yaml").read_text())
    content["models"]["qwen3"]["control"] = None
    phases = make_phases(load_pipeline(file(content)), "qwen3")
    assert list(phases) == ["analyze", "baseline", "train", "trained"]
    assert phases["trained"].after == ("train",)
    assert "qwen3-8b-trained" in phases["trained"].arguments
