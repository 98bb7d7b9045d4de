"""The command line: what it understands, and that bad input ends in one line, status 2, and nothing written."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml
from tiny import as_flags, messages, run_options, save_tiny

from sparsekv import cli
from sparsekv.cli import main, make_parser
from sparsekv.commands import STOPPED
from sparsekv.evaluation.matrix.config import EvalConfig, RunConfig
from sparsekv.presses import is_decoding, make_press
from sparsekv.report.config import ReportConfig
from sparsekv.training.anchor import AnchorConfig
from sparsekv.training.config import TrainConfig

ROOT = Path(__file__).parents[2]
MATRIX = ROOT / "configs" / "matrix.yaml"
OTHER = {ROOT / "configs" / f"{name}.yaml" for name in ("matrix", "matrix_smollm2", "pipeline", "cluster")}
CONFIGS = sorted({*(ROOT / "configs").glob("*.yaml")} - OTHER)


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


@pytest.fixture
def eval_values(monkeypatch):
    """Function from arguments to the EvalConfig that `sparsekv eval` would run with."""

    def values(*arguments: str) -> EvalConfig:
        seen = []
        monkeypatch.setattr("sparsekv.evaluation.matrix.run.evaluate", seen.append)
        with pytest.raises(SystemExit) as ended:
            main(["eval", *arguments])
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
    """10,000 rows of 4,096 tokens, one epoch, batch 1 x 8, r = 64, λ = 30, 0.9 → 0.3, a checkpoint every 500 steps."""
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
        "lambda_kl": 30,
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


def test_anchors_from_a_file(tmp_path, train_values):
    """Single flags win over it wherever they stand, and it wins over --config, which may name it too."""
    (tmp_path / "anchors.yaml").write_text("# why\nsink_size: 7\nuse_punctuation: false\n")
    (tmp_path / "run.yaml").write_text("anchors: {sink_size: 1, recent_size: 2}\n")
    (tmp_path / "naming.yaml").write_text("anchors: anchors.yaml\n")
    required = ["--model", "m", "--output_dir", "o"]
    file, config = ["--anchors", str(tmp_path / "anchors.yaml")], ["--config", str(tmp_path / "run.yaml")]
    for arguments, wanted in (
        (file, AnchorConfig(use_punctuation=False, sink_size=7)),
        ([f"--anchors={file[1]}"], AnchorConfig(use_punctuation=False, sink_size=7)),
        ([*file, "--anchors.sink_size", "8"], AnchorConfig(use_punctuation=False, sink_size=8)),
        (["--anchors.sink_size=8", *file], AnchorConfig(use_punctuation=False, sink_size=8)),
        ([*file, *config], AnchorConfig(use_punctuation=False, sink_size=7, recent_size=2)),
        (["--config", str(tmp_path / "naming.yaml")], AnchorConfig(use_punctuation=False, sink_size=7)),
    ):
        assert train_values(*required, *arguments).anchors == wanted, arguments


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"sink_sise: 7", "no option 'sink_sise'; did you mean sink_size?"),
        (b"sink_size: few", "sink_size"),
        (b"sink_size: -1", "--anchors.sink_size -1"),
        (b"sink_size: [", "not YAML"),
        (b"- a list", "key: value"),
        (b"", "no options"),
        (b"extra_punctuation: \xc6", "not UTF-8"),
        (b"sink_size: " + b"[" * 5000, "nested too deeply"),
        (None, "No such file"),
    ],
)
def test_a_bad_file_of_anchors_is_named(tmp_path, capsys, content, said):
    file = tmp_path / "anchors.yaml"
    if content is not None:
        file.write_bytes(content)
    line = failure(capsys, "train", "--model", "m", "--output_dir", str(tmp_path / "out"), "--anchors", str(file))
    assert line.startswith(f"sparsekv: --anchors {file}: ")
    assert said in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flag", ["--anchors", "--config"])
def test_a_missing_file_is_no_other_flag(capsys, tmp_path, flag):
    required = ["--model", "m", "--output_dir", str(tmp_path / "out")]
    for arguments in ([flag, *required], [*required, flag]):
        line = failure(capsys, "train", *arguments)
        assert f"{flag}" in line
        assert "expected one argument" in line
        assert "--model" not in line


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "--max_seq", "77"], "unrecognized arguments: --max_seq 77; did you mean --max_seq_len?"),
        (["train", "--anchors.recent_siz", "3"], "did you mean --anchors.recent_size?"),
        (["eval", "--ratio=0.5"], "did you mean --ratios?"),
        (["eval", "--conf", "run.yaml"], "unrecognized arguments: --conf run.yaml"),
        (["compare"], "the following arguments are required: folders"),
        (["train", "--model", "m"], "--output_dir"),
        (["train", "--lora_targets", "q_proj,v_proj"], "--lora_targets q_proj,v_proj: must be a list such as [a, b]"),
        (["train", "--rules", "snapkv"], "--rules snapkv: must be a mapping such as {a: 1, b: 2}"),
    ],
)
def test_a_line_says_what_would_be_right(capsys, arguments, said):
    """Half of a flag is none: the file of an abbreviated --config would win over flags."""
    assert said in failure(capsys, *arguments)


@pytest.mark.parametrize(
    ("command", "content", "said"),
    [
        ("train", b"maxlen: 7", "train has no option 'maxlen'; did you mean max_seq_len?"),
        ("eval", b"zzz: 7", "eval has no option 'zzz'"),
        ("analyze", b"maxlen: 7", "analyze has no option 'maxlen'; did you mean max_len?"),
        ("merge", b"modle: m", "merge has no option 'modle'; did you mean model?"),
        ("eval", b"model: m\ndata: x.jsonl", "eval has no option 'data'; it is of train, analyze"),
        ("train", b"anchors: {sink_sise: 3}", "anchors has no option 'sink_sise'; did you mean sink_size?"),
        ("train", b"anchors.sink_sise: 3", "train has no option 'anchors.sink_sise'; did you mean anchors.sink_size?"),
        ("train", b"7: 3", "train has no option '7'"),
        ("train", b"lr: fast", "--lr fast: must be a number"),
        ("eval", b"runs: {a: {model: m, adpater: x}}", "runs: a has no option 'adpater'; did you mean adapter?"),
        ("eval", b"runs: {a: m}", "runs: a: must be a mapping of model, adapter, not 'm'"),
        ("eval", b"runs: {a: {model: [m]}}", "runs: a: --model ['m']: must be text"),
        (
            "eval",
            b"benchmarks: [{name: ruler, context_lenght: 5}]",
            "benchmarks: ruler has no option 'context_lenght'; did you mean context_length?",
        ),
        ("eval", b"benchmarks: [{nam: b}]", "benchmarks: entry 1 has no option 'nam'; did you mean name?"),
        ("eval", b"benchmarks: [{name: b, top_k: x}]", "benchmarks: b: --top_k x: must be a whole number"),
        ("train", b"a: [1,\nb: {", "is not YAML: expected the node content, but found '<stream end>' (line 2)"),
        ("train", b"seed: 2020-13-45", "is not YAML: month must be in 1..12"),
        ("train", b"- model", "must hold `key: value` lines"),
        ("train", b"# nothing", "the file holds no options"),
        ("train", b"model: \xc6", "is not UTF-8 text (byte 0xc6)"),
        ("train", None, "cannot be read (No such file or directory)"),
    ],
)
def test_a_bad_file_of_options_is_named(capsys, tmp_path, command, content, said):
    file = tmp_path / "run.yaml"
    if content is not None:
        file.write_bytes(content)
    for words in (["--config", str(file)], [f"--config={file}", "--model", "m"]):
        assert failure(capsys, command, *words) == f"sparsekv: --config {file}: {said}"


def test_a_file_of_anchors_that_a_file_names(capsys, tmp_path):
    (tmp_path / "anchors.yaml").write_text("sink_sise: 3")
    (tmp_path / "run.yaml").write_text("anchors: anchors.yaml")
    line = failure(capsys, "train", "--config", str(tmp_path / "run.yaml"))
    assert line == f"sparsekv: --config {tmp_path / 'run.yaml'}: anchors has no option 'sink_sise'"


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


# ---- eval and compare ----


def test_the_matrix(eval_values):
    """Two models, three runs each, four benchmarks, 13 cells of each."""
    found = eval_values("--config", str(MATRIX), "--out", "results")
    folders, suites = found.folders(), found.suites()
    assert [str(folder) for folder in folders] == [f"results/{name}" for name in found.runs]
    assert Counter(run.model for run in folders.values()) == {
        "Qwen/Qwen3-8B": 3,
        "meta-llama/Llama-3.1-8B-Instruct": 3,
    }
    assert len({run.adapter for run in folders.values()}) == 5
    assert [(suite.name, suite.data_dir) for suite in suites] == [
        *(("ruler", 4096), ("ruler", 16384), ("longbench", None), ("aime25", None))
    ]
    for suite in suites:
        assert len(suite.cells()) == 13
        for press, ratio in suite.cells()[1:]:
            make_press(press, ratio)
            assert is_decoding(press) == (suite.name == "aime25")
    assert (suites[0].num_generations, suites[3].num_generations) == (1, 8)
    chosen = eval_values("--config", str(MATRIX), "--out", "o", "--only", "qwen3-8b-base,llama31-8b-base").folders()
    assert [run.adapter for run in chosen.values()] == [None, None]


EVAL = ("--model", "m", "--out", "o")


def test_lists_as_flags_and_in_files(eval_values, tmp_path):
    flags = eval_values(
        *EVAL, "--presses", "snapkv:window_size=32,knorm", "--ratios", "0.3,0.5", "--benchmark", "ruler"
    )
    file = tmp_path / "eval.yaml"
    file.write_text("presses: [snapkv:window_size=32, knorm]\nratios: [0.3, 0.5]\nbenchmark: [ruler]\ndtype: float16\n")
    filed = eval_values("--config", str(file), *EVAL)
    assert flags.cells() == filed.cells()
    assert flags.cells() == [
        *(("no_press", 0.0), ("snapkv:window_size=32", 0.3), ("snapkv:window_size=32", 0.5)),
        *(("knorm", 0.3), ("knorm", 0.5)),
    ]
    assert filed.dtype == "float16"
    assert eval_values("--config", str(file), *EVAL, "--dtype", "bfloat16").dtype == "bfloat16"
    assert eval_values(*EVAL, "--ratios", "0.3", "--presses", "no_press,knorm,knorm").cells() == [
        *(("no_press", 0.0), ("knorm", 0.3))
    ]


def test_each_benchmark_has_its_own_part(eval_values, tmp_path):
    """A data_dir is never handed to another benchmark; other options are, unless an entry has its own."""
    (tmp_path / "a:b.jsonl").write_text("")
    file = str(tmp_path / "a:b.jsonl")
    suites = eval_values(*EVAL, "--benchmark", f"ruler:4096,longbench,{file}", "--num_samples", "3").suites()
    assert [(suite.name, suite.data_dir) for suite in suites] == [
        *(("ruler", "4096"), ("longbench", None), (file, None))
    ]
    assert {suite.num_samples for suite in suites} == {3}
    (alone,) = eval_values(*EVAL, "--benchmark", "ruler", "--data_dir", "4096").suites()
    assert alone.data_dir == "4096"
    entries = "[{name: ruler, data_dir: 4096, num_samples: 5}, {name: longbench, chat_template: false}]"
    suites = eval_values(*EVAL, "--num_samples", "3", "--benchmarks", entries).suites()
    assert [(s.data_dir, s.num_samples, s.chat_template) for s in suites] == [(4096, 5, True), (None, 3, False)]


def test_switches_of_eval(eval_values):
    found = eval_values(*EVAL, "--enable_thinking", "--query_aware", "--chat_template", "false", "--shard", "0/2")
    assert (found.enable_thinking, found.query_aware, found.chat_template) == (True, True, False)
    assert eval_values(*EVAL).folders() == {Path("o"): RunConfig("m", None)}
    assert [suite.name for suite in eval_values(*EVAL).suites()] == ["ruler-local"]
    assert len(eval_values(*EVAL).cells()) == 13


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--out", "o"], "--model or runs"),
        (["--model", "m"], "--out is missing"),
        ([*EVAL, "--runs", "{a: {model: m}}"], "--model or runs"),
        (["--out", "o", "--runs", "{a: {adapter: m}}"], "runs: a lacks its model"),
        (["--out", "o", "--runs", "{a: {model: m}, b: {model: m}}"], "runs: two have the same model"),
        ([*EVAL, "--ratios", ""], "--ratios is empty"),
        ([*EVAL, "--presses", ""], "--presses is empty"),
        ([*EVAL, "--presses", ","], "--presses is empty"),
        ([*EVAL, "--benchmarks", "[{name: b, ratios: 2}]"], "benchmarks: b: --ratios 2"),
        ([*EVAL, "--query_aware", "--max_context_length", "9"], "--max_context_length 9"),
        (["--out", "o", "--runs", "{../a: {model: m}}"], "runs: '../a'"),
        (["--out", "o", "--runs", "{a: {model: m}}", "--adapter", "x"], "--adapter"),
        (["--out", "o", "--runs", "{a: {model: m}}", "--only", "b"], "--only b: no such run; there are a"),
        ([*EVAL, "--ratios", "0.3,1"], "--ratios 1:"),
        ([*EVAL, "--ratios", "-0.1"], "--ratios -0.1"),
        ([*EVAL, "--ratios", "half"], "--ratios half"),
        ([*EVAL, "--ratios", "nan"], "--ratios nan"),
        ([*EVAL, "--shard", "3/2"], "--shard 3/2"),
        ([*EVAL, "--shard", "2/2"], "--shard 2/2"),
        ([*EVAL, "--shard", "one"], "--shard one"),
        ([*EVAL, "--num_samples", "0"], "--num_samples 0"),
        ([*EVAL, "--num_samples", "many"], "--num_samples"),
        ([*EVAL, "--context_length", "0"], "--context_length 0"),
        ([*EVAL, "--temperature", "-1"], "--temperature -1"),
        ([*EVAL, "--top_p", "0"], "--top_p 0"),
        ([*EVAL, "--top_k", "-1"], "--top_k -1"),
        ([*EVAL, "--num_generations", "4"], "--num_generations 4"),
        ([*EVAL, "--memory_budget_gib", "0"], "--memory_budget_gib 0"),
        ([*EVAL, "--seed", "-1"], "--seed -1"),
        ([*EVAL, "--benchmark", "a,b", "--data_dir", "4096"], "--data_dir 4096"),
        ([*EVAL, "--benchmark", "a", "--benchmarks", "[{name: b}]"], "--benchmark or benchmarks"),
        (
            [*EVAL, "--benchmarks", "[{name: b, num_sampels: 3}]"],
            "--benchmarks: b has no option 'num_sampels'; did you mean num_samples?",
        ),
        (["--out", "o", "--runs", "{a: {modle: m}}"], "--runs: a has no option 'modle'; did you mean model?"),
        ([*EVAL, "--benchmarks", "[{name: b, num_samples: many}]"], "benchmarks: b: "),
        ([*EVAL, "--benchmarks", "[{data_dir: b}]"], "benchmarks: "),
        ([*EVAL, "--no_such_option", "1"], "--no_such_option"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_bad_values_of_eval(capsys, tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    assert said in failure(capsys, "eval", *arguments)
    assert not any(tmp_path.iterdir())


def test_eval_of_what_is_not_there(options, capsys, tmp_path):
    """One line from each layer below: a press, a benchmark, a file without its columns, an empty answer."""
    arguments = ["--model", options["model"], "--device", "cpu", "--out", str(tmp_path / "out")]
    row = {"context": "c", "question": "q", "answer_prefix": "", "max_new_tokens": 1, "task": "t"}
    for name, answer in (("columns.jsonl", {}), ("empty.jsonl", {"answer": ""})):
        (tmp_path / name).write_text(json.dumps(row | answer) + "\n")
    for benchmark, presses, said in (
        ("perplexity", "snapvk", "snapkv"),
        ("perplexity", "knorm", "--context_length 4096: "),  # by default; the model has 2048 positions
        ("perplexty", "knorm", "perplexity"),
        (str(tmp_path / "columns.jsonl"), "knorm", "answer"),
        (str(tmp_path / "empty.jsonl"), "knorm", "answer"),
    ):
        line = failure(capsys, "eval", *arguments, "--benchmark", benchmark, "--presses", presses)
        assert said in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_status_of_a_stopped_eval(monkeypatch, capsys, number):
    monkeypatch.setattr("sparsekv.evaluation.matrix.run.evaluate", lambda config: number)
    with pytest.raises(SystemExit) as ended:
        main(["eval", *EVAL])
    assert ended.value.code == 128 + number
    (line,) = messages(capsys.readouterr().err)
    assert "the same command continues" in line


def test_interrupted_before_there_is_anything_to_keep(monkeypatch, capsys):
    def interrupt(config):
        raise KeyboardInterrupt

    monkeypatch.setattr("sparsekv.evaluation.matrix.run.evaluate", interrupt)
    with pytest.raises(SystemExit) as ended:
        main(["eval", *EVAL])
    assert ended.value.code == 130
    assert messages(capsys.readouterr().err) == []


def test_report(monkeypatch, capsys, tmp_path):
    out = str(tmp_path / "r.html")
    assert "results" in failure(capsys, "report")
    assert "nowhere: no such folder" in failure(capsys, "report", "nowhere", "--out", out)
    assert "r.txt: name a file that ends with .html" in failure(capsys, "report", "nowhere", "--out", "r.txt")
    (tmp_path / "notes.txt").write_text("mine")
    file, page = str(tmp_path / "notes.txt"), str(tmp_path / "notes.txt" / "x" / "r.html")
    assert f"{file}: is a file; name folders" in failure(capsys, "report", file, "--out", out)
    line = failure(capsys, "report", str(tmp_path), "--out", page)
    assert line == f"sparsekv: --out {page}: {file} is a file, not a folder; name a page in a folder"
    seen = []
    monkeypatch.setattr("sparsekv.report.run.report", lambda config: seen.append(config) or ["page", "folder"])
    with pytest.raises(SystemExit) as ended:
        main(["report", "--figures", "a", "b", "--out", out])
    assert ended.value.code == 0
    assert capsys.readouterr().out == "page\nfolder\n"
    assert seen == [ReportConfig(["a", "b"], out, figures=True)]


def test_compare(monkeypatch, capsys, tmp_path):
    seen = []
    monkeypatch.setattr("sparsekv.evaluation.comparison.compare.compare", lambda *arguments: seen.append(arguments))
    with pytest.raises(SystemExit) as ended:
        main(["compare", "a", "b", "c", "--output", "o"])
    assert ended.value.code == 0
    assert seen == [(["a", "b", "c"], "o")]
    monkeypatch.undo()
    assert str(tmp_path) in failure(capsys, "compare", str(tmp_path), str(tmp_path))
    assert "folders" in failure(capsys, "compare")


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
        ({"geometry": "streaming", "lambda_selection": 0, "rules": "{snapkv: 1}"}, "--rules"),
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
    (tmp_path / "loop.yaml").write_text("a: &a [*a]")
    assert "--config" in failure(capsys, "train", *as_flags(options), "--config", str(tmp_path / "loop.yaml"))
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


@pytest.mark.parametrize(
    ("command", "name"),
    [("train", "max_steps"), ("train", "anchors"), ("train", "anchors.sink_size"), ("eval", "temperature")],
)
def test_null_is_no_value(options, tmp_path, capsys, command, name):
    *groups, last = name.split(".")
    text = last + ": null\n"
    for group in reversed(groups):
        text = f"{group}: {{{text.strip()}}}\n"
    (tmp_path / "options.yaml").write_text(f"model: {options['model']}\n{text}")
    line = failure(capsys, command, "--config", str(tmp_path / "options.yaml"))
    assert line == f"sparsekv: --{name} null: give a value, or leave it out"


@pytest.mark.parametrize("spelled", ["--config {file}", "--config={file}"])
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("max_steps: 1\nlr: 1e-3\nmax_steps: 2\n", "max_steps twice, again in line 3"),
        ("anchors:\n  sink_size: 1\n  sink_size: 1\n", "sink_size twice, again in line 3"),
        ("data: {a: 1, b: 1, a: 2}\n", "a twice"),
    ],
)
def test_a_key_twice_in_a_file(tmp_path, capsys, spelled, text, said):
    file = tmp_path / "options.yaml"
    file.write_text(text)
    line = failure(capsys, "train", *spelled.format(file=file).split())
    assert line == f"sparsekv: --config {file}: gives {said}; keep one"


def test_a_key_twice_in_other_places(tmp_path, capsys):
    (tmp_path / "anchors.yaml").write_text("sink_size: 1\n\nsink_size: 2\n")
    line = failure(capsys, "eval", "--anchors", str(tmp_path / "anchors.yaml"))
    assert line == f"sparsekv: --anchors {tmp_path}/anchors.yaml: gives sink_size twice, again in line 3; keep one"
    line = failure(capsys, "train", "--data", "{pydoc: 1, pydoc: 2}")
    assert line == "sparsekv: --data {pydoc: 1, pydoc: 2}: gives pydoc twice; keep one"
    line = failure(capsys, "train", "--anchors", "{sink_size: 1, sink_size: 2}")
    assert line == "sparsekv: --anchors {sink_size: 1, sink_size: 2}: gives sink_size twice; keep one"


def test_text_that_looks_like_a_mapping_is_text(capsys):
    line = failure(capsys, "generate", "--question", "{a: 1, a: 2}")
    assert line == "sparsekv: --model is missing: a Hub name, a local folder, or smollm2-135m"


def test_the_same_key_in_two_mappings(options, tmp_path, capsys):
    """And an alias, which is one mapping in two places; the refusal is of something else."""
    (tmp_path / "options.yaml").write_text("rules: &all {knorm: 1, random: 2}\ndata: {knorm: 1}\nlora_r: -1\n")
    arguments = ["--model", options["model"], "--output_dir", str(tmp_path / "out")]
    line = failure(capsys, "train", "--config", str(tmp_path / "options.yaml"), *arguments)
    assert line == "sparsekv: --lora_r -1: must be at least 0"


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
    assert ended.value.code == STOPPED == 143
    (line,) = messages(capsys.readouterr().err)
    assert "--resume" in line


def test_the_switches_of_anchors_stand_alone_too():
    assert cli.spell_out_switches(["train", "--anchors.use_recent", "--resume"]) == [
        *("train", "--anchors.use_recent", "true"),
        *("--resume", "true"),
    ]
