"""The command line: what it understands, and that bad input ends in one line, status 2, and nothing written."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny import as_flags, messages, run_options, save_tiny

from sparsekv import cli
from sparsekv.cli import main, make_parser
from sparsekv.training.config import TrainConfig

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> dict:
    return run_options(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def train_values(monkeypatch):
    """Function from arguments to the TrainConfig that `sparsekv train` would run with."""

    def values(*arguments: str) -> TrainConfig:
        seen = []
        monkeypatch.setattr("sparsekv.training.run.train", lambda config: seen.append(config) or Path("final"))
        with pytest.raises(SystemExit) as ended:
            main(["train", *arguments])
        assert ended.value.code == 0
        return seen[0]

    return values


def failure(capsys, *arguments: str) -> str:
    """The one line of a command that must fail."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    captured = capsys.readouterr()
    (line,) = messages(captured.err)
    assert line.startswith("sparsekv: ")
    assert "Traceback" not in captured.out
    return line


# ---- options ----


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configurations(config, train_values, tmp_path):
    found = train_values("--config", str(config), "--output_dir", str(tmp_path / "out"))
    for name, value in yaml.safe_load(config.read_text("utf-8")).items():
        assert getattr(found, name) == value, name


@pytest.mark.parametrize("name", ["qwen3_8b", "llama31_8b"])
def test_the_real_runs(name, train_values):
    """10,000 rows of 4,096 tokens, one epoch, batch 1 x 8, r = 64, λ = 1, 0.9 → 0.3, a checkpoint every 500 steps."""
    found = train_values("--config", str(ROOT / "configs" / f"{name}.yaml"), "--output_dir", "out")
    expected = {
        "num_train_samples": 10_000,
        "max_seq_len": 4096,
        "num_train_epochs": 1,
        "max_steps": -1,
        "save_steps": 500,
        "batch_size": 1,
        "grad_accum": 8,
        "lora_r": 64,
        "lora_alpha": 128,
        "lambda_kl": 1,
        "scheduler_mode": "curriculum",
        "initial_keep_ratio": 0.9,
        "min_keep_ratio": 0.3,
        "data_subset": "sample-10BT",
        "trust_remote_code": False,
    }
    assert {name: getattr(found, name) for name in expected} == expected


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_print_config_can_be_read_again(config, capsys, tmp_path, train_values):
    arguments = ["--config", str(config), "--output_dir", "out", "--anchors.recent_size", "32"]
    with pytest.raises(SystemExit) as ended:
        main(["train", *arguments, "--print_config"])
    assert ended.value.code == 0
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out, "utf-8")
    assert train_values("--config", str(tmp_path / "printed.yaml")) == train_values(*arguments)


def test_flags_beat_the_file(tmp_path, train_values):
    """Wherever they stand."""
    (tmp_path / "run.yaml").write_text(
        "model: m\noutput_dir: o\nlr: 1e-3\nseed: 5\nanchors: {sink_size: 7, recent_size: 9}\n"
    )
    config = ["--config", str(tmp_path / "run.yaml")]
    for arguments in (
        [*config, "--seed", "6", "--anchors.sink_size=8"],
        ["--seed=6", "--anchors.sink_size", "8", *config],
    ):
        found = train_values(*arguments)
        assert (found.seed, found.anchors.sink_size, found.anchors.recent_size, found.lr) == (6, 8, 9, 0.001)


def test_flags_that_scripts_rely_on(train_values):
    given = {"model": "m", "data": "pydoc", "output_dir": "o", "max_seq_len": 256, "max_steps": 7, "save_steps": 3}
    given |= {"lora_r": 8, "initial_keep_ratio": 0.8, "min_keep_ratio": 0.4, "seed": 11}
    found = train_values(*as_flags(given), "--resume", "--control")
    assert {name: getattr(found, name) for name in given} == given
    assert found.resume
    assert found.control


@pytest.mark.parametrize(
    ("arguments", "resume", "control"),
    [
        (["--resume", "--control"], True, True),
        (["--control", "--seed", "1"], False, True),
        (["--resume", "true", "--control", "false"], True, False),
        (["--resume=false"], False, False),
        ([], False, False),
    ],
)
def test_switches(train_values, arguments, resume, control):
    found = train_values("--model", "m", "--output_dir", "o", *arguments)
    assert (found.resume, found.control) == (resume, control)


def test_a_mixture_as_a_flag(train_values):
    found = train_values("--model", "m", "--output_dir", "o", "--data", "{pydoc: 0.5, recall: 0.5}")
    assert found.data == {"pydoc": 0.5, "recall": 0.5}


def test_flat_names_of_the_script(train_values, monkeypatch):
    spec = importlib.util.spec_from_file_location("train_eit", ROOT / "scripts" / "train_eit.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    given = {"model": "m", "output_dir": "o", "num_train_samples": 9, "lambda_kl": 0.5, "initial_keep_ratio": 0.8}
    given |= {"min_keep_ratio": 0.2, "scheduler_mode": "fixed", "lora_r": 8, "lr": 0.001, "max_seq_len": 512}
    given |= {"grad_accum": 4}
    flat = [*as_flags(given), "--sink_size", "2", "--recent_size=16"]
    found = train_values(*map(script.rename, flat))
    assert {name: getattr(found, name) for name in given} == given
    assert (found.anchors.sink_size, found.anchors.recent_size) == (2, 16)


def test_every_option_is_explained():
    with pytest.raises(SystemExit) as ended:
        main(["train", "--help"])
    assert ended.value.code == 0
    for name, command in make_parser()._subcommands_action._name_parser_map.items():
        for action in command._actions:
            assert action.help, f"{name} --{action.dest}"


# ---- bad input ----


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": "no-such-model"}, "--model no-such-model"),
        ({"model": "/no/such/folder"}, "--model /no/such/folder"),
        ({"data": "no/such-dataset"}, "--data no/such-dataset"),
        ({"data": "no-such-file.txt"}, "--data no-such-file.txt"),
        ({"data": "{pydoc: -1}"}, "--data pydoc"),
        ({"max_seq_len": 3}, "--max_seq_len 3"),
        ({"max_seq_len": 4096}, "--max_seq_len 4096"),
        ({"initial_keep_ratio": 1.5}, "--initial_keep_ratio 1.5"),
        ({"initial_keep_ratio": 0.2}, "--initial_keep_ratio 0.2"),
        ({"min_keep_ratio": 0}, "--min_keep_ratio 0"),
        ({"min_keep_ratio": "nan"}, "--min_keep_ratio"),
        ({"max_cut": 1}, "--max_cut 1"),
        ({"min_cut": 0.95}, "--min_cut 0.95"),
        ({"num_cuts": 50}, "--num_cuts 50"),
        ({"lora_targets": "[nope]"}, "--lora_targets nope"),
        ({"lora_targets": "[]"}, "--lora_targets"),
        ({"lora_r": -1}, "--lora_r -1"),
        ({"lora_alpha": 0}, "--lora_alpha 0"),
        ({"lora_dropout": 1}, "--lora_dropout 1"),
        ({"rules": "{nope: 1}"}, "--rules names 'nope'"),
        ({"rules": "{anchor: 0}"}, "--rules gives 'anchor'"),
        ({"rules": "{}"}, "--rules is empty"),
        ({"geometry": "streaming", "rules": "{snapkv: 1}"}, "--rules"),
        ({"device_map": "cuda:7"}, "--device_map cuda:7"),
        ({"device_map": "nowhere"}, "--device_map nowhere"),
        ({"dtype": "int8"}, "--dtype int8"),
        ({"report_to": "[nope]"}, "--report_to nope"),
        ({"seed": -1}, "--seed -1"),
        ({"seed": "one"}, "--seed"),
        ({"max_steps": 1.5}, "--max_steps"),
        ({"max_steps": 0}, "--max_steps 0"),
        ({"lr": "fast"}, "--lr"),
        ({"lr": 0}, "--lr 0"),
        ({"lr_warmup_fraction": 2}, "--lr_warmup_fraction 2"),
        ({"weight_decay": -1}, "--weight_decay -1"),
        ({"max_grad_norm": -1}, "--max_grad_norm -1"),
        ({"temperature": 0}, "--temperature 0"),
        ({"lambda_kl": -1}, "--lambda_kl -1"),
        ({"geometry": "round"}, "--geometry"),
        ({"scheduler_mode": "hopeful"}, "--scheduler_mode"),
        ({"control": "maybe"}, "--control"),
        ({"anchors": {"sink_size": -1}}, "--anchors.sink_size -1"),
        ({"anchors": {"use_sink": "perhaps"}}, "--anchors.use_sink"),
        ({"no_such_option": 1}, "--no_such_option"),
        ({"anchors": {"no_such_option": 1}}, "--anchors.no_such_option"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_bad_values(options, tmp_path, capsys, changes, said):
    out = tmp_path / "out"
    line = failure(capsys, "train", *as_flags({**options, "output_dir": str(out), **changes}))
    assert said in line
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["empty.txt", "latin.txt", "short.txt", "broken.jsonl", "text.doc", "no_text.jsonl"])
def test_bad_data(options, tmp_path, capsys, name):
    content = {
        "empty.txt": b"",
        "latin.txt": "Ærø ".encode("latin-1") * 5000,
        "short.txt": b"Too few words.",
        "broken.jsonl": b'{"text": ',
        "text.doc": b"of a kind that is not known",
        "no_text.jsonl": b'{"body": "..."}',
    }
    file = tmp_path / name
    file.write_bytes(content[name])
    arguments = as_flags({**options, "data": str(file), "output_dir": str(tmp_path / "out")})
    assert f"--data {file}" in failure(capsys, "train", *arguments)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    "content",
    [
        "model: [",
        "no_such_option: 1",
        "model: m\nanchors: {no_such_option: 1}",
        "lr: fast",
        "- a list",
        "max_steps: 1.5",
    ],
)
def test_bad_configurations(options, tmp_path, capsys, content):
    file = tmp_path / "run.yaml"
    file.write_text(content)
    arguments = as_flags({**options, "output_dir": str(tmp_path / "out")})
    line = failure(capsys, "train", *arguments, "--config", str(file))
    names = [name for name in ("no_such_option", "lr", "max_steps") if name in content]
    assert all(name in line for name in names or ["--config"])
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


def test_configurations_that_cannot_be_read(options, tmp_path, capsys):
    (tmp_path / "latin.yaml").write_bytes("model: Ærø".encode("latin-1"))
    for file in (tmp_path / "none.yaml", tmp_path, tmp_path / "latin.yaml"):
        assert "--config" in failure(capsys, "train", *as_flags(options), "--config", str(file))


def test_missing_options(options, capsys):
    assert "--model is missing" in failure(capsys, "train", "--output_dir", "o")
    assert "--output_dir is missing" in failure(capsys, "train", "--model", "m")
    assert "command" in failure(capsys, "trian")
    assert "command" in failure(capsys)


def test_an_output_folder_that_is_a_file(options, tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("mine")
    for out in (file, file / "out"):
        line = failure(capsys, "train", *as_flags({**options, "output_dir": str(out)}))
        assert f"--output_dir {out}: {file} is a file" in line
    assert file.read_text() == "mine"


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a file system that nobody can write to")
def test_an_output_folder_that_cannot_be_written(options, capsys):
    assert "--output_dir /proc/out" in failure(capsys, "train", *as_flags({**options, "output_dir": "/proc/out"}))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_output_folder_without_permission(options, tmp_path, capsys):
    tmp_path.chmod(0o500)
    line = failure(capsys, "train", *as_flags({**options, "output_dir": str(tmp_path / "out")}))
    tmp_path.chmod(0o700)
    assert f"{tmp_path} is not writable" in line


def test_a_full_disk(options, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 2**20}))
    line = failure(capsys, "train", *as_flags({**options, "output_dir": str(tmp_path / "out")}))
    assert "--output_dir" in line
    assert not any(tmp_path.iterdir())


def test_an_output_folder_that_holds_something(options, tmp_path, capsys):
    (tmp_path / "eit_config.json").write_text(json.dumps({"config": {}}))
    arguments = as_flags({**options, "output_dir": str(tmp_path)})
    assert f"--output_dir {tmp_path}: is not empty; give --resume" in failure(capsys, "train", *arguments)
    line = failure(capsys, "train", *arguments, "--resume")
    assert line.startswith("sparsekv: --resume: ")
    assert [path.name for path in tmp_path.iterdir()] == ["eit_config.json"]


def test_code_of_its_own_is_not_run(options, tmp_path, capsys):
    """A model that brings Python code: a line that says how to allow it, and the code was not run."""
    folder = Path(save_tiny(tmp_path / "base"))
    config = json.loads((folder / "config.json").read_text())
    auto_map = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "unheard_of", "auto_map": auto_map}))
    (folder / "code.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')\n")
    arguments = as_flags({**options, "model": str(folder), "output_dir": str(tmp_path / "out")})
    assert "--trust_remote_code" in failure(capsys, "train", *arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_merge(options, tmp_path, capsys):
    arguments = ["--model", options["model"], "--output_dir", str(tmp_path / "merged")]
    assert "--adapter" in failure(capsys, "merge", *arguments, "--adapter", str(tmp_path))
    assert "adapter" in failure(capsys, "merge", *arguments)
    assert not any(tmp_path.iterdir())


# ---- as a process ----


def test_as_a_process(options, tmp_path):
    """The whole of stderr is that line: no warning of a library beside it, no traceback."""
    (tmp_path / "latin.txt").write_bytes("Ærø ".encode("latin-1") * 5000)
    arguments = as_flags({**options, "data": str(tmp_path / "latin.txt"), "output_dir": str(tmp_path / "out")})
    done = subprocess.run(
        [sys.executable, "-m", "sparsekv.cli", "train", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2
    assert done.stderr.splitlines() == [f"sparsekv: --data {tmp_path / 'latin.txt'}: it is not UTF-8 text (byte 0xc6)"]
    assert not (tmp_path / "out").exists()


def test_status_of_a_stop(monkeypatch, capsys):
    monkeypatch.setattr("sparsekv.training.run.train", lambda config: None)
    with pytest.raises(SystemExit) as ended:
        main(["train", "--model", "m", "--output_dir", "o"])
    assert ended.value.code == cli.STOPPED == 143
    (line,) = messages(capsys.readouterr().err)
    assert "--resume" in line


def test_the_switches_of_anchors_stand_alone_too():
    assert cli.spell_out_switches(["train", "--anchors.use_recent", "--resume"]) == [
        *("train", "--anchors.use_recent", "true"),
        *("--resume", "true"),
    ]
