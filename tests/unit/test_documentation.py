"""What the documentation says exists, exists: links, paths, options and defaults, commands, names, code, layers."""

import ast
import dataclasses
import gzip
import json
import re
import shlex
import shutil
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import yaml
from tiny import make_tiny, make_tiny_tokenizer

from sparsekv import cli, models
from sparsekv.adapters import attach_lora
from sparsekv.analysis.columns import CLASSES
from sparsekv.analysis.config import AnalysisConfig
from sparsekv.analysis.head_statistics import HeadStatistics
from sparsekv.cluster.config import StatusConfig, SubmitConfig
from sparsekv.commands import STOPPED, MergeConfig
from sparsekv.demo import DemoConfig
from sparsekv.evaluation.benchmarks.files import file_rows
from sparsekv.evaluation.benchmarks.registry import BENCHMARKS
from sparsekv.evaluation.benchmarks.scoring.by_column import METRICS
from sparsekv.evaluation.matrix.config import EvalConfig
from sparsekv.evaluation.matrix.needles import COLUMNS
from sparsekv.evaluation.matrix.predictions import profile
from sparsekv.evaluation.matrix.views import SCHEMA_VERSION, View, save_view
from sparsekv.inference.config import ChatConfig, ExportConfig, GenerateConfig
from sparsekv.presses import PRESSES, is_decoding, make_press, needs_question, shares_prefill
from sparsekv.presses.registry import REFUSED
from sparsekv.report.config import ReportConfig
from sparsekv.training.anchor import AnchorConfig
from sparsekv.training.choices import OWN_RULES, PRESS_RULES
from sparsekv.training.config import TrainConfig, default_rules

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "sparsekv"
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text("utf-8") for path in DOCUMENTS}
FOLDERS = "sparsekv|training|presses|evaluation|tests|docs|configs|scripts|benchmarks"
OTHER_PROGRAMS = {
    *("--check", "--num_processes", "--nproc_per_node", "--config_file"),  # ruff, accelerate, torchrun
    *("--array", "--gpus", "--exclude"),  # sbatch
    *("--shape", "--doc"),  # benchmarks/eval_matrix.py
    *("--lengths", "--steps", "--variants", "--checkpointing", "--baseline", "--block"),  # benchmarks/train_step.py
    *("--force_model", "--continuous_batching"),  # transformers serve
}
SCHEMAS = {  # document → what its options are
    "docs/training.md": TrainConfig,
    "docs/evaluation.md": EvalConfig,
    "docs/analysis.md": AnalysisConfig,
    "docs/report.md": ReportConfig,
    "docs/cluster.md": SubmitConfig,
}
LAYERS = [  # a file imports from lower layers, from its own, and never from a higher one
    {"errors", "signals", "version", "fingerprint", "progress"},
    {
        "anchor_config",
        "token_classes",
        "files",
        "yaml_keys",
        "tokens",
        "prompts",
        "cuda_graph",
        "kernels",
        "modes",
        "packed_attention",
        "attention_interface",
        "recall",
        "recall_few",
        "recall_many",
        "recall_parts",
        "recall_templates",
        "sources",
        "demo_model",
        "style",
    },
    {"data", "models", "adapters", "anchors", "attention", "observe", "presses"},
    {"training", "evaluation", "analysis", "inference"},
    {"report", "cluster"},
    {"demo"},
    {"cli", "option_files", "parser_messages", "commands", "__init__"},
]
PEERS = {"training", "evaluation", "analysis", "inference"}  # none of them imports another
EVALUATION = {"benchmarks", "engine", "comparison"}  # none of them imports another, nor what stands on them

each_document = pytest.mark.parametrize("name", TEXTS)


def anchors(text: str) -> set[str]:
    """The headings of a document as GitHub names them in links."""
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands() -> list[str]:
    """Every `sparsekv …` command, in a block or in a line, as the words after the program's name."""
    joined = "\n".join(TEXTS.values()).replace("\\\n", " ")
    words = r"(\w+ [^`\n]*--[^`\n]+|compare [^`\n]+)"
    found = re.findall(rf"(?:^ {{4,}}|`)(?:[\w ./-]+ -m )?sparsekv(?:\.cli)? {words}", joined, re.MULTILINE)
    return sorted({" ".join(command.split()) for command in found})


def options_of(parser_name: str, capsys) -> set[str]:
    with pytest.raises(SystemExit):
        cli.make_parser().parse_args([parser_name, "--help"])
    return set(re.findall(r"--[A-Za-z][\w.]*", capsys.readouterr().out))


def table(text: str, first_column: str) -> list[list[str]]:
    """The cells of every table row whose first cell matches, that one without its quotes."""
    rows = re.findall(rf"^\| (`{first_column}`) \| (.+) \|$", text, flags=re.MULTILINE)
    return [[first.strip("`"), *rest.split(" | ")] for first, rest in rows]


# ---- links and paths ----


@each_document
def test_links_lead_somewhere(name):
    for target in re.findall(r"\]\(([^)]+)\)", TEXTS[name]):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / name).parent / path if path else ROOT / name
        assert file.is_file(), target
        assert not anchor or anchor in anchors(file.read_text("utf-8")), target


@each_document
def test_named_paths_exist(name):
    text = re.sub(r"https?://\S+", "", TEXTS[name])
    names = set(re.findall(rf"(?<![\w/.-])(?:{FOLDERS})/[\w./-]*\w", text)) | set(re.findall(r"`([\w/]+\.py)`", text))
    for path in names:
        candidates = (ROOT / path, PACKAGE / path, PACKAGE / "training" / path, PACKAGE / "evaluation" / path)
        assert any(candidate.exists() for candidate in candidates), path


def test_every_configuration_is_named():
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        assert f"configs/{path.name}" in TEXTS["README.md"], path.name


def test_the_picture_is_well_formed_and_described():
    root = ElementTree.parse(ROOT / "docs" / "idea.svg").getroot()
    namespace = "{http://www.w3.org/2000/svg}"
    ids = {element.get("id") for element in root.iter()}
    assert set(root.get("aria-labelledby").split()) <= ids
    assert {use.get("href").lstrip("#") for use in root.iter(f"{namespace}use")} <= ids
    assert "prefers-color-scheme: dark" in root.find(f"{namespace}style").text


def test_the_demos_result_has_its_place():
    assert re.fullmatch(r"(?s).*<!-- demo -->\n.*\n<!-- /demo -->.*", TEXTS["README.md"])
    assert TEXTS["README.md"].count("demo -->") == 2


@pytest.mark.parametrize("what", ["smollm2-135m cpu", "smollm2-135m cuda", "qwen3-8b cuda"])
def test_figures_of_the_matrix_have_their_place(what):
    name = re.escape(f"eval_matrix {what}")
    assert len(re.findall(rf"(?s)<!-- {name} -->\n.*?<!-- /{name} -->", TEXTS["docs/evaluation.md"])) == 1


# ---- options and commands ----


@each_document
def test_flags_are_accepted(name, capsys):
    known = {flag for command in cli.COMMANDS for flag in options_of(command, capsys)} | OTHER_PROGRAMS
    programs = [path for folder in ("scripts", "benchmarks") for path in (ROOT / folder).glob("*.py")]
    known |= set(re.findall(r'"(--\w+)"[:,]', "".join(path.read_text("utf-8") for path in programs)))
    used = re.findall(r"(?<![\w-])--[A-Za-z][\w.-]*\w", TEXTS[name])
    unknown = set(cli.with_underscores(used)) - known
    assert not unknown


@pytest.mark.parametrize("command", commands())
def test_commands_are_valid(command, monkeypatch, tmp_path):
    def run(name: str, values: dict) -> int:
        if name == "compare":
            assert len(values["folders"]) in (2, 3)
            return 0
        schemas = {"train": TrainConfig, "eval": EvalConfig, "analyze": AnalysisConfig, "demo": DemoConfig}
        schemas |= {"submit": SubmitConfig, "status": StatusConfig, "cancel": StatusConfig}
        schemas |= {"generate": GenerateConfig, "chat": ChatConfig, "export": ExportConfig}
        made = {**schemas, "merge": MergeConfig, "report": ReportConfig}[name](**values)
        if isinstance(made, EvalConfig):
            cells = [cell for suite in made.suites() for cell in suite.cells()]
            assert all(make_press(*cell) or cell[0] == "no_press" for cell in cells)
            assert all(suite.name in BENCHMARKS for suite in made.suites())
        return 0

    monkeypatch.chdir(ROOT)
    checked = {name: dataclasses.replace(each, run=partial(run, name)) for name, each in cli.COMMANDS.items()}
    monkeypatch.setattr(cli, "COMMANDS", checked)
    (tmp_path / "anchors.yaml").write_text("sink_size: 1")
    command = re.sub(r"--anchors \S+", f"--anchors {tmp_path / 'anchors.yaml'}", command)
    command = command.replace("$SLURM_ARRAY_TASK_ID", "0").replace("$SLURM_ARRAY_TASK_COUNT", "8")
    with pytest.raises(SystemExit) as ended:
        cli.main([word for word in shlex.split(command) if word != "--help"])
    assert ended.value.code == 0


@each_document
def test_make_targets_exist(name):
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for target in re.findall(r"(?:^    |`)make (\w+)", TEXTS[name], flags=re.MULTILINE):
        assert f"\n{target}:" in makefile, target


def test_the_commands_were_found():
    found = "\n".join(commands())
    assert all(f"train --config configs/{name}.yaml" in found for name in ("smollm2_135m", "qwen3_8b"))
    assert "merge --model" in found
    assert "--grad_accum 2" in found, "behind a launcher, on two lines"
    assert "eval --config configs/matrix.yaml --out results/matrix --shard $SLURM_ARRAY_TASK_ID/" in found
    assert "compare results/1024/base results/1024/control results/1024/trained" in found, "without a flag"


def defaults(schema: type) -> dict[str, object]:
    """Every option of a command with its default, in the order of --help."""
    values = {}
    for field in dataclasses.fields(schema):
        if field.name == "anchors":
            values |= {f"--anchors.{name}": value for name, value in dataclasses.asdict(AnchorConfig()).items()}
        elif field.name not in ("results", "target"):  # named without a flag
            made = field.default is dataclasses.MISSING
            values[f"--{field.name}"] = field.default_factory() if made else field.default
    return values


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_option_is_documented_once_with_its_default(name):
    text, wanted = TEXTS[name], defaults(SCHEMAS[name])
    assert sorted(row[0] for row in table(text, r"--[\w.]+")) == sorted(wanted)
    for option, default, _ in table(text, r"--[\w.]+"):
        if option == "--rules":
            assert default == "see [Rules](#rules)"
        elif default == "required":
            assert wanted[option] == "", option
        else:
            assert yaml.safe_load(default.strip("`")) == wanted[option], option


@pytest.mark.parametrize("name", SCHEMAS)
def test_options_stand_in_the_order_of_help(name):
    order = list(defaults(SCHEMAS[name]))
    for group in re.split(r"^### ", TEXTS[name], flags=re.MULTILINE):
        names = [row[0] for row in table(group, r"--[\w.]+")]
        assert names == sorted(names, key=order.index)


def test_every_rule_is_documented():
    rows = table(section("docs/training.md", "### Rules"), r"\w+")
    assert sorted(name for name, *_ in rows) == sorted({*OWN_RULES, *PRESS_RULES})
    assert {name: float(weight) for name, _, weight in rows if weight != "–"} == default_rules()


def section(name: str, heading: str) -> str:
    """A part of a document with its own parts: from its heading to the next one of its level."""
    level = heading.split()[0]
    return re.split(rf"^#{{1,{len(level)}}} ", TEXTS[name].split(f"\n{heading}\n")[1], flags=re.MULTILINE)[0]


def test_every_press_is_documented():
    rows = table(section("docs/evaluation.md", "## Presses"), r"\w+")
    assert sorted(name for name, *_ in rows) == sorted(PRESSES)
    for name, _, *more in rows:
        assert is_decoding(name) == (not more), name
        press = None if is_decoding(name) else make_press(name, 0.5)
        if press is not None:
            assert more[0] == ("shared" if shares_prefill(press) else "own"), name
            assert needs_question(press) == ("--query_aware" in more[1]), name
    assert all(f"`{name}`" in section("docs/evaluation.md", "## Presses") for name in REFUSED)


def test_every_benchmark_is_documented():
    rows = table(section("docs/evaluation.md", "## Benchmarks"), r"[\w-]+")
    assert sorted(name for name, *_ in rows) == sorted(BENCHMARKS)


def test_a_file_of_your_own(tmp_path):
    text = section("docs/evaluation.md", "### Your own file")
    (tmp_path / "notes.jsonl").write_text(re.findall(r"```json\n(.+?)```", text, re.DOTALL)[0], encoding="utf-8")
    assert len(file_rows(tmp_path / "notes.jsonl")) == 1
    assert all(f"`{metric}`" in text for metric in METRICS)


def test_every_figure_of_a_profile_is_documented():
    kinds = ("full", "requested", "logical", "physical")
    seconds = {"prefill_seconds": 1.0, "decode_seconds": 1.0}
    measured = {"num_tokens": 1, "peak_memory_bytes": 1, "device": "cpu", "row": 0}
    keys = profile([{"kv_bytes": dict.fromkeys(kinds, 1), **seconds, **measured}])
    text = section("docs/evaluation.md", "## Files")
    assert all(f"`{name}`" in text for name in (*keys, *kinds))


def test_every_key_of_a_view_and_column_of_needles_is_documented(tmp_path):
    make = {"tokens": ["a"], "classes": np.zeros(1, np.uint8), "anchors": np.zeros(1, bool)}
    make |= {"received": np.zeros((1, 1, 1), np.uint8), "cells": [], "not_shown": []}
    save_view(tmp_path / "view", View(**{field.name: "" for field in dataclasses.fields(View)} | make))
    keys = json.loads(gzip.decompress((tmp_path / "view").read_bytes()))
    for heading, names in (("### Views", keys), ("### Needles", COLUMNS)):
        text = section("docs/evaluation.md", heading)
        assert all(f"`{name}`" in text for name in names), heading
    assert f"`schema_version` | {SCHEMA_VERSION};" in section("docs/evaluation.md", "### Views")


def test_every_figure_of_an_analysis_is_documented():
    text = section("docs/analysis.md", "## What is measured")
    for name in HeadStatistics(1024, AnchorConfig()).names:
        kind, _, part = name.removeprefix("value_").partition(".")
        part = "CLASS" if part in CLASSES else {"position_relative": "P", "distance_share": "D"}.get(kind, part)
        assert f"`{kind}.{part}`" in text or f"`{kind}`" in text, name


@pytest.mark.parametrize(
    ("name", "text"),
    [("training", "143 stopped by a signal"), ("evaluation", "143 and 130"), ("analysis", "143 and 130")],
)
def test_the_status_of_a_stopped_run(name, text):
    assert text in TEXTS[f"docs/{name}.md"]
    assert STOPPED == 143


# ---- code ----


def python_blocks(name: str) -> list[str]:
    return re.findall(r"^```python\n(.+?)^```$", TEXTS[name], flags=re.MULTILINE | re.DOTALL)


@pytest.fixture
def user_folder(tmp_path, monkeypatch):
    """What a reader has after the README's commands, with a tiny model in place of the real one."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "LICENSE", tmp_path)
    adapted = attach_lora(make_tiny("llama"), 4, 8, ["q_proj", "v_proj"])
    adapted.save_pretrained(tmp_path / "assets" / "smollm2-135m-eit")
    monkeypatch.setattr(models, "load_model", lambda name: make_tiny("llama"))
    monkeypatch.setattr(models, "load_tokenizer", lambda name: make_tiny_tokenizer())
    return tmp_path


def test_code_of_the_readme_runs(user_folder, capsys):
    use_adapter, evict = (compile(block, "README.md", "exec") for block in python_blocks("README.md"))
    used: dict = {}
    exec(use_adapter, used)
    assert isinstance(used["result"]["answer"], str)
    evicted: dict = {}
    exec(evict, evicted)
    assert evicted["eviction"].last.keep_ratio() == pytest.approx(0.3, abs=0.01)
    assert all(torch.isfinite(weight.grad).all() for weight in evicted["model"].parameters())
    assert len(capsys.readouterr().out.splitlines()) >= 2


# ---- the architecture ----


def modules() -> dict[str, Path]:
    return {path.relative_to(PACKAGE).as_posix(): path for path in PACKAGE.rglob("*.py")}


def test_the_file_list_is_the_tree():
    block = section("docs/architecture.md", "## The files")
    listed, folders = set(), []
    for indent, name in re.findall(r"^    ((?:  )+)(\w+(?:/|\.py))(?:\s|$)", block, flags=re.MULTILINE):
        folders = folders[: len(indent) // 2 - 1]
        if name.endswith("/"):
            folders.append(name)
        else:
            listed.add("".join(folders) + name)
    assert listed == {name for name in modules() if not name.endswith("__init__.py")}


def layer(module: str) -> int:
    """The layer of `training/loss.py` or of `training.loss`."""
    part = re.split(r"[./]", module)[0]
    return next(number for number, names in enumerate(LAYERS) if part in names)


def imports(path: Path) -> set[str]:
    """What a file imports of the package, wherever in it, as `training.loss`; `__init__` for the package itself."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "sparsekv":
            names.add(node.module.partition(".")[2] or "__init__")
        elif isinstance(node, ast.Import):
            names |= {a.name.partition(".")[2] or "__init__" for a in node.names if a.name.split(".")[0] == "sparsekv"}
    return names


@pytest.mark.parametrize("name", modules())
def test_imports_point_downward(name):
    for imported in imports(modules()[name]):
        assert layer(imported) <= layer(name), f"{name} imports {imported}"
        pair = {re.split(r"[./]", part)[0] for part in (name, imported)}
        assert len(pair & PEERS) < 2, f"{name} imports {imported}"
    if name == "attention.py":
        assert imports(modules()[name]) == {"packed_attention"}


@pytest.mark.parametrize("name", [name for name in modules() if name.split("/")[1:2] and "evaluation/" in name])
def test_parts_of_evaluation_stand_alone(name):
    own = name.split("/")[1]
    used = {part.split(".")[1] for part in imports(modules()[name]) if part.startswith("evaluation.")}
    assert own not in EVALUATION or used <= {own}
