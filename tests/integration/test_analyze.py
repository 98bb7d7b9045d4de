"""`sparsekv analyze` on a tiny model: what it writes, that a killed run ends as one that never was, and bad input."""

import itertools
import json
import os
import re
import runpy
import signal
import sys
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
import yaml
from peft import PromptTuningConfig, get_peft_model
from tiny import make_sharp, make_tiny_tokenizer, messages, save_tiny

from sparsekv.adapters import attach_lora, load_adapter
from sparsekv.analysis import run as run_module
from sparsekv.analysis.columns import CLASSES
from sparsekv.analysis.head_statistics import HeadStatistics
from sparsekv.analysis.results import load_analysis, load_heads
from sparsekv.analysis.samples import SampleFolder
from sparsekv.anchors import AnchorConfig
from sparsekv.cli import main, parse
from sparsekv.data import build_datasets
from sparsekv.errors import UserError
from sparsekv.models import load_model, load_tokenizer
from sparsekv.observe import observing, received_attention
from sparsekv.progress import CountProgress

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "analysis.md").read_text("utf-8")
N, L = 3, 96


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """A model whose attention is not even, an adapter that changes it, and text."""
    folder = tmp_path_factory.mktemp("inputs")
    make_sharp("llama").save_pretrained(folder / "base")
    make_tiny_tokenizer().save_pretrained(folder / "base")
    adapted = attach_lora(make_sharp("llama"), 4, 8, ["q_proj", "k_proj"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.1)
    adapted.save_pretrained(folder / "adapter")
    documents = [text[:900] for text in itertools.islice(topics.values(), 30)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), "utf-8")
    return folder


def flags(inputs: Path, out: Path, **changes) -> list[str]:
    values = {"model": inputs / "base", "data": inputs / "text.jsonl", "num_samples": N, "max_len": L, "device": "cpu"}
    values |= {"output_dir": out, "anchors.recent_size": 8, **changes}
    return [text for name, value in values.items() if value is not None for text in (f"--{name}", str(value))]


def analyze(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["analyze", *arguments])
    return int(ended.value.code)


def failure(capsys, *arguments: str) -> str:
    assert analyze(*arguments) == 2
    (line,) = messages(capsys.readouterr().err)
    assert line.startswith("sparsekv: ")
    return line


def contents(out: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def done(inputs, tmp_path_factory) -> Path:
    """A finished analysis of the base and the adapter."""
    out = tmp_path_factory.mktemp("runs") / "done"
    assert analyze(*flags(inputs, out, adapter=inputs / "adapter")) == 0
    return out


# ---- results ----


def test_the_files(done):
    pictures = {f"figures/{name}.png" for name in ("class_layers", "concentration", "class_bars", "distance")}
    samples = {f"samples/{number:05d}.safetensors" for number in range(N)}
    others = {"analysis_config.json", "anchors.yaml", "attention_analysis.json", "attention_analysis.parquet"}
    assert set(contents(done)) == pictures | samples | others
    listed = set(re.findall(r"^      (\S+)  ", DOCUMENT, flags=re.MULTILINE))
    assert listed == pictures | {"samples/00000.safetensors"} | others


def test_the_analysis_can_be_read_and_is_documented(done):
    analysis = load_analysis(done / "attention_analysis.json")
    rows = re.findall(r"^\| (`[^|]+`) \|", DOCUMENT.split("### attention_analysis.json")[1], flags=re.MULTILINE)
    documented = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert documented == set(analysis)
    assert analysis["runs"] == ["base", "adapter"]
    assert (analysis["num_layers"], analysis["num_heads"], analysis["num_samples"]) == (2, 4, N)
    assert analysis["anchors"]["recent_size"] == 8
    names = set(analysis["descriptions"])
    assert names == set(HeadStatistics(L, AnchorConfig()).names)
    for estimates in (*analysis["overall"].values(), analysis["difference"]["overall"]):
        assert set(estimates) == names
    for layers in (*analysis["layers"].values(), analysis["difference"]["layers"]):
        assert {len(values) for estimate in layers.values() for values in estimate.values()} == {2}
    assert sum(analysis["token_shares"][name] for name in CLASSES) == pytest.approx(1)


def test_figures_are_those_of_the_model(inputs, done):
    """Position 0 of every row, straight from the model, for the base and for the adapter."""
    base = load_model(str(inputs / "base"), "float32")
    rows, *_ = build_datasets(str(inputs / "text.jsonl"), load_tokenizer(str(inputs / "base")), L, N, 0, 0)
    heads = load_heads(done / "attention_analysis.parquet").set_index(["run", "layer", "head", "figure"])["mean"]
    means = {}
    for run in ("base", "adapter"):
        model = base if run == "base" else load_adapter(base, inputs / "adapter").merge_and_unload()
        received: list[torch.Tensor] = []

        def receive(layer, query, key, value, scaling, received=received):
            received.append(received_attention(query, key, scaling)[0])

        with torch.no_grad(), observing(model, receive):
            for row in rows[:]["input_ids"]:
                model.get_decoder()(input_ids=torch.tensor([row]), use_cache=False)
        means[run] = torch.stack(received).view(N, 2, 4, L).mean(0)
        for layer, head in itertools.product(range(2), range(4)):
            found = heads[run, layer, head, "position_relative.0"]
            assert found == pytest.approx(means[run][layer, head, 0].item(), rel=1e-4)
    assert (means["adapter"] - means["base"]).abs().max() > 0.05, "the adapter changes something"
    moved = heads["difference", 1, 3, "position_relative.0"]
    assert moved == pytest.approx((means["adapter"] - means["base"])[1, 3, 0].item(), abs=1e-4)


def test_the_base_is_measured_as_without_an_adapter(inputs, done, tmp_path):
    assert analyze(*flags(inputs, tmp_path / "out")) == 0
    alone, both = (load_analysis(out / "attention_analysis.json") for out in (tmp_path / "out", done))
    assert alone["runs"] == ["base"]
    assert alone["difference"] is None
    assert alone["overall"]["base"] == both["overall"]["base"]
    assert alone["recommendation"] == both["recommendation"]


def test_training_takes_the_recommended_anchors(done):
    analysis = load_analysis(done / "attention_analysis.json")
    wanted = AnchorConfig(**analysis["recommendation"]["anchors"])
    arguments = ["train", "--model", "m", "--output_dir", "o", "--anchors", str(done / "anchors.yaml")]
    assert parse(arguments)[1]["anchors"] == wanted
    assert AnchorConfig(**yaml.safe_load((done / "anchors.yaml").read_text("utf-8"))) == wanted


def test_what_is_printed(inputs, done, tmp_path, capsys):
    assert analyze(*flags(inputs, done, adapter=inputs / "adapter")) == 0
    printed = " ".join(capsys.readouterr().out.split())
    analysis = load_analysis(done / "attention_analysis.json")
    share = analysis["overall"]["adapter"]["anchor_share"]["mean"]
    assert f"adapter: anchors hold {share:.1%} of the attention" in printed
    moved = analysis["difference"]["overall"]["anchor_share"]["mean"]
    assert f"attention on anchors moved by {100 * moved:+.2f} (" in printed
    assert str(done / "anchors.yaml") in printed


def test_half_precision(inputs, done, tmp_path):
    assert analyze(*flags(inputs, tmp_path / "out"), "--bf16") == 0
    exact, rounded = (load_analysis(out / "attention_analysis.json") for out in (done, tmp_path / "out"))
    assert rounded["dtype"] == "bfloat16"
    name = "relative.content"
    near = pytest.approx(exact["overall"]["base"][name]["mean"], abs=0.05)
    assert rounded["overall"]["base"][name]["mean"] == near
    assert rounded["overall"]["base"] != exact["overall"]["base"]


def test_the_script_takes_the_same_flags(inputs, done, monkeypatch):
    arguments = flags(inputs, done, adapter=inputs / "adapter")
    before = (done / "attention_analysis.json").stat().st_mtime_ns
    monkeypatch.setattr(sys, "argv", ["analyze_attention.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "scripts" / "analyze_attention.py"), run_name="__main__")
    assert ended.value.code == 0
    assert (done / "attention_analysis.json").stat().st_mtime_ns > before


@pytest.mark.slow
def test_the_real_model_has_a_sink(demo_model, tmp_path):
    """On its first position alone; anchors get far more than their share."""
    out = tmp_path / "out"
    sized = ["--num_samples", "3", "--max_len", "256", "--anchors.recent_size", "16"]
    assert analyze("--model", str(demo_model), *sized, "--output_dir", str(out), "--device", "cpu") == 0
    analysis = load_analysis(out / "attention_analysis.json")
    figures = analysis["overall"]["base"]
    assert figures["position_relative.0"]["low"] > 10
    assert analysis["recommendation"]["anchors"]["sink_size"] == 1
    assert figures["anchor_share"]["low"] > 1.5 * figures["anchor_tokens"]["high"]


# ---- kills and stops ----


class Killed(BaseException):
    """Ends a run as SIGKILL would: nothing in the package catches it."""


def after_samples(monkeypatch, count: int, action) -> None:
    """`action` is done before the sample after `count` samples is kept."""
    plain, seen = SampleFolder.write, []

    def write(self, number, measured):
        seen.append(number)
        if len(seen) > count:
            action()
        plain(self, number, measured)

    monkeypatch.setattr(SampleFolder, "write", write)


@pytest.mark.parametrize("count", [0, 2])
def test_killed_and_resumed(inputs, done, tmp_path, monkeypatch, count, caplog):
    def kill():
        raise Killed

    arguments = flags(inputs, tmp_path / "out", adapter=inputs / "adapter")
    with monkeypatch.context() as patch:
        after_samples(patch, count, kill)
        with pytest.raises(Killed):
            main(["analyze", *arguments])
    assert not (tmp_path / "out" / "attention_analysis.json").exists()
    with caplog.at_level("INFO", logger="sparsekv"):
        assert analyze(*arguments) == 0
    assert f"{count} of {N} samples done" in caplog.text
    assert contents(tmp_path / "out") == contents(done)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_after_the_sample(inputs, done, tmp_path, monkeypatch, capsys, number):
    arguments = flags(inputs, tmp_path / "out", adapter=inputs / "adapter")
    with monkeypatch.context() as patch:
        after_samples(patch, 0, lambda: os.kill(os.getpid(), number))
        assert analyze(*arguments) == 128 + number
    assert "the same command continues" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out" / "samples").iterdir()] == ["00000.safetensors"]
    assert analyze(*arguments) == 0
    assert contents(tmp_path / "out") == contents(done)


def test_a_second_run_measures_nothing(inputs, done, monkeypatch):
    before = contents(done)
    monkeypatch.setattr(run_module, "Measurer", lambda *args: pytest.fail("loaded the model"))
    assert analyze(*flags(inputs, done, adapter=inputs / "adapter")) == 0
    assert contents(done) == before


def test_progress_counts_what_is_missing(inputs, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(CountProgress, "advance", lambda self, count: seen.append((self._what, count, self._total)))
    assert analyze(*flags(inputs, tmp_path / "out")) == 0
    assert [step for step in seen if step[0] == "samples"] == [("samples", 1, N)] * N


# ---- bad input ----


def test_another_configuration_is_refused(inputs, done, capsys):
    before = contents(done)
    arguments = {"adapter": inputs / "adapter"}
    for changes, said in (
        ({"max_len": 64}, "max_len 96, now 64"),
        ({"num_samples": 2}, "num_samples 3, now 2"),
        ({"adapter": None}, "adapter"),
        ({"anchors.sink_size": 5}, "anchors.sink_size 4, now 5"),
        ({"bf16": "true"}, "dtype 'float32', now 'bfloat16'"),
        ({"seed": 1}, "seed 0, now 1"),
    ):
        line = failure(capsys, *flags(inputs, done, **{**arguments, **changes}))
        assert f"--output_dir {done}: was made with " in line
        assert said in line
    assert contents(done) == before


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": "no-such-model"}, "--model no-such-model"),
        ({"model": None}, "--model is missing"),
        ({"output_dir": None}, "--output_dir is missing"),
        ({"data": "no-such.txt"}, "--data no-such.txt"),
        ({"max_len": 4096}, "--max_len 4096"),
        ({"max_len": 15}, "--max_len 15"),
        ({"num_samples": 1}, "--num_samples 1"),
        ({"device": "cuda:7"}, "--device cuda:7"),
        ({"adapter": "nowhere"}, "--adapter nowhere"),
        ({"seed": -1}, "--seed -1"),
        ({"anchors.sink_size": -1}, "--anchors.sink_size -1"),
        ({"anchors.sink_size": 49}, "--anchors.sink_size 49: must be at most half of --max_len 96"),
        ({"anchors": "no-such.yaml"}, "--anchors no-such.yaml"),
        ({"layers": 3}, "--layers"),
        ({"data": "recall", "max_len": 16}, "--max_len 16: too short for recall"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_values(inputs, tmp_path, capsys, changes, said):
    out = tmp_path / "out"
    assert said in failure(capsys, *flags(inputs, out, **changes))
    assert not out.exists()


def test_an_adapter_of_another_model(inputs, tmp_path, capsys):
    other = make_sharp("llama", hidden_size=32, num_attention_heads=2)
    attach_lora(other, 4, 8, ["q_proj"]).save_pretrained(tmp_path / "other")
    line = failure(capsys, *flags(inputs, tmp_path / "out", adapter=tmp_path / "other"))
    assert f"--adapter {tmp_path / 'other'}: does not fit" in line
    assert not (tmp_path / "out").exists()


def test_a_model_whose_attention_cannot_be_captured(inputs, tmp_path, capsys):
    """Sliding windows shorter than a row."""
    save_tiny(tmp_path / "gemma", "gemma3")
    line = failure(capsys, *flags(inputs, tmp_path / "out", model=tmp_path / "gemma"))
    assert f"--model {tmp_path / 'gemma'}: " in line
    assert not (tmp_path / "out").exists()


def test_text_too_short_for_a_row(inputs, tmp_path, capsys):
    (tmp_path / "short.txt").write_text("a few words")
    line = failure(capsys, *flags(inputs, tmp_path / "out", data=tmp_path / "short.txt"))
    assert "one row of --max_len 96" in line
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_of_a_larger_model(inputs, tmp_path, capsys):
    save_tiny(tmp_path / "small", "llama", vocab_size=50)
    line = failure(capsys, *flags(inputs, tmp_path / "out", model=tmp_path / "small"))
    assert f"--model {tmp_path / 'small'}: its tokenizer makes token " in line
    assert not (tmp_path / "out").exists()


def test_an_adapter_that_adds_tokens(inputs, tmp_path, capsys):
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    get_peft_model(make_sharp("llama"), prompt).save_pretrained(tmp_path / "prompt")
    line = failure(capsys, *flags(inputs, tmp_path / "out", adapter=tmp_path / "prompt"))
    assert f"--adapter {tmp_path / 'prompt'}: adds tokens" in line
    assert not (tmp_path / "out").exists()


def test_attention_that_is_not_a_number(inputs, tmp_path, capsys):
    broken = make_sharp("llama")
    torch.nn.init.constant_(broken.model.layers[1].self_attn.q_proj.weight, torch.nan)
    broken.save_pretrained(tmp_path / "broken")
    make_tiny_tokenizer().save_pretrained(tmp_path / "broken")
    line = failure(capsys, *flags(inputs, tmp_path / "out", model=tmp_path / "broken"))
    assert f"--model {tmp_path / 'broken'}: attention is not a number in layer 1" in line


def test_a_corrupt_sample(inputs, done, tmp_path, capsys):
    out = tmp_path / "out"
    for name, content in contents(done).items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(content)
    (out / "samples" / "00001.safetensors").write_bytes(b"torn")
    line = failure(capsys, *flags(inputs, out, adapter=inputs / "adapter"))
    assert f"{out / 'samples' / '00001.safetensors'}: corrupt" in line


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"schema_version": 2}', "schema_version is 2, and this version of sparsekv reads 1"),
        ('{"schema_version": 1}', "no adapter, anchors"),
        ("{}", "corrupt"),
        ("[1]", "corrupt"),
        ("{", "corrupt"),
    ],
)
def test_an_analysis_of_another_version_or_corrupt(tmp_path, content, said):
    path = tmp_path / "attention_analysis.json"
    path.write_text(content)
    with pytest.raises(UserError, match=f"^{path}: ") as raised:
        load_analysis(path)
    assert said in str(raised.value)


def test_a_corrupt_table(tmp_path):
    path = tmp_path / "attention_analysis.parquet"
    for content in (None, b"", b"PAR1 torn"):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(UserError, match=f"^{path}: corrupt or missing"):
            load_heads(path)
