"""The tables of docs/results.md, from files whose figures are known."""

import json
import shutil
from pathlib import Path

import pytest

from scripts import write_results
from scripts.write_results import COMMANDS, NOT_TAKEN
from sparsekv.errors import UserError
from tests.comparison import Comparison

ROOT = Path(__file__).parents[2]
BLOCKS = ("goals", "headline", "beyond", *NOT_TAKEN, "trainings", "ablations")


@pytest.fixture
def document(tmp_path: Path) -> Path:
    path = tmp_path / "results.md"
    path.write_text("# Results\n" + "".join(f"<!-- {name} -->\nold\n<!-- /{name} -->\n" for name in BLOCKS))
    readme_of(path).write_text("# Tool\n<!-- effect -->\nold\n<!-- /effect -->\n")
    return path


def readme_of(document: Path) -> Path:
    return document.with_name("README.md")


def main(results: Path, document: Path) -> None:
    write_results.main(results, document, readme_of(document))


def block(document: Path, name: str) -> str:
    return document.read_text().split(f"<!-- {name} -->\n")[1].split(f"\n<!-- /{name} -->")[0]


def rows(text: str) -> dict[str, list[str]]:
    """First cell → the others, of every table."""
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {first: others for first, *others in lines}


def comparison(evicted: float = 60) -> Comparison:
    made = Comparison()
    made.needles("no_press", 0.0, (80, 90, 90), "no difference")
    made.needles("snapkv", 0.7, (20, 30, evicted), "better")
    made.needles("anchor", 0.5, (40, 40, 40), "no difference", bound=40.0)
    kl = {"metric": "kl", "headline": False}
    for press, ratio, nats, divergence in (
        ("no_press", 0.0, (2.0, 1.9, 1.91), (0, 0, 0)),
        ("snapkv", 0.7, (2.5, 2.4, 2.1), (0.3, 0.25, 0.125)),
    ):
        made.text(press, ratio, nats, "better" if ratio else "worse")
        made.text(press, ratio, divergence, "better" if ratio else "no difference", **kl)
    return made


def write_training(folder: Path, **changes: object) -> None:
    folder.mkdir(parents=True)
    config = {"control": False, "seed": 1, "data": {"pydoc": 0.5, "recall": 0.5}, "batch_size": 16, "grad_accum": 2}
    config |= {"max_seq_len": 1024, "lambda_kl": 1.0, "lr": 3e-4, "lora_r": 64} | changes
    (folder / "eit_config.json").write_text(json.dumps({"commit": "def5678", "config": config}))
    steps = [{"step": 0, "eval_full_ppl": 9.454, "eval_evicted_ppl": 15.59}, {"step": 9, "loss": 1.0}]
    steps.append({"step": 10, "eval_full_ppl": 6.37, "eval_evicted_ppl": 9.87})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))


def test_what_is_absent_is_said_with_its_command(tmp_path: Path, document: Path) -> None:
    main(tmp_path / "results", document)
    experiments = ("headline", "headline", "beyond", *NOT_TAKEN, "headline", "ablations")
    for name, experiment in zip(BLOCKS, experiments, strict=True):
        assert "is not there yet" in block(document, name)
        assert block(document, name).endswith(f"\n\n    {COMMANDS[experiment]}")
        assert "|" not in block(document, name)
    assert block(readme_of(document), "effect") == block(document, "headline")


def test_goals_and_cells(tmp_path: Path, document: Path) -> None:
    comparison().write(tmp_path / "results" / "headline")
    main(tmp_path / "results", document)
    goals = block(document, "goals")
    assert "tiny; base without an adapter; control out/control/final (mean of 3 trainings)" in goals
    assert "ruler-local 1024 (n = 40 rows)" in goals
    assert "evaluation seed 0; commit abc1234." in goals
    found = rows(goals)
    assert found["mean retention on needles, base → control → trained"][1:] == [
        "0.375 → 0.389 → 0.556",
        "**missed**",
        "2",
    ]
    assert found["full-cache perplexity, trained against control, worst length"][1:] == ["+1.0%", "**missed**", "1"]
    assert found["cells of positional presses above their bound on needles"][2:] == ["**missed**", "1"]
    needles, text = (
        rows(part) for part in block(document, "headline").split("**perplexity 1024")[1].split("**ruler")[::-1]
    )
    assert needles["snapkv, 70%"] == [
        *("20.0 [17.0, 23.0]", "30.0 [27.0, 33.0]", "60.0 [57.0, 63.0]", "▲ +30.0", "+29.0 … +31.0", "–")
    ]
    assert needles["anchor, 50%"][3:] == ["= +0.0", "-1.0 … +1.0", "40.0"]
    assert text["snapkv, 70%"][3:] == ["▲ -0.300", "-1.300 … +0.700", "0.300 → 0.250 → 0.125 ▲"]
    assert text["full cache"][3:] == ["▼ +0.010", "-0.990 … +1.010", "0.000 → 0.000 → 0.000 ="]
    assert "is not there yet" in block(document, "ablations")


def test_the_readme_shows_needles_by_press_and_share(tmp_path: Path, document: Path) -> None:
    comparison().write(tmp_path / "results" / "headline")
    main(tmp_path / "results", document)
    text = block(readme_of(document), "effect")
    assert "ruler-local 1024 (n = 40 rows); evaluation seed 0; commit abc1234." in text
    assert "perplexity" not in text
    assert rows(text) == {
        "press": ["50% evicted", "70% evicted"],
        "---": ["---", "---"],
        "full cache": ["80.0 → 90.0 → 90.0 ="] * 2,
        "anchor": ["40.0 → 40.0 → 40.0 =", "–"],
        "snapkv": ["–", "20.0 → 30.0 → 60.0 ▲"],
    }


def test_other_lengths_and_tasks(tmp_path: Path, document: Path) -> None:
    one_task, two_tasks = comparison(), Comparison()
    one_task.write(tmp_path / "results" / "beyond" / "lengths")
    two_tasks.needles("no_press", 0.0, (50, 60, 60), "no difference", ("fwe", "vt"))
    two_tasks.needles("snapkv", 0.7, (10, 15, 30), "worse", ("fwe", "vt"))
    two_tasks.write(tmp_path / "results" / "beyond" / "tasks")
    main(tmp_path / "results", document)
    text = block(document, "beyond")
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ruler-local")]
    assert [line[1] for line in lines] == ["vt", "all tasks", "fwe", "vt"]
    means = ["80.0 → 90.0 → 90.0", "30.0 → 35.0 → 50.0", "37.5% → 38.9% → 55.6%", "▲ 1 ▼ 0 = 1"]
    assert lines[0] == ["ruler-local 1024", "vt", "40", *means]
    assert lines[2][3:] == ["50.0 → 60.0 → 60.0", "10.0 → 15.0 → 30.0", "20.0% → 25.0% → 50.0%", "▲ 0 ▼ 1 = 0"]


@pytest.mark.parametrize("recipe", NOT_TAKEN)
def test_a_recipe_that_was_not_taken_has_the_same_tables(tmp_path: Path, document: Path, recipe: str) -> None:
    for name, evicted in (("headline", 60), (recipe, 70)):
        comparison(evicted).write(tmp_path / "results" / name)
    for name in ("beyond", f"{recipe}/beyond"):
        comparison(50).write(tmp_path / "results" / name / "lengths")
    main(tmp_path / "results", document)
    goals, needles, beyond = block(document, recipe).split("\n\ntiny;")
    assert "→ 0.611" in goals
    assert "20.0 → 30.0 → 70.0 ▲" in needles
    assert "→ 0.556" in block(document, "goals")
    assert f"tiny;{beyond}" == block(document, "beyond")


def test_trainings(tmp_path: Path, document: Path) -> None:
    write_training(tmp_path / "results" / "headline" / "training" / "trained-1")
    write_training(tmp_path / "results" / "ablations" / "x" / "training" / "c", control=True, data="pydoc", num_cuts=2)
    main(tmp_path / "results", document)
    found = rows(block(document, "trainings"))
    assert found["headline/trained-1"] == [
        *("trained", "1", "pydoc 0.5, recall 0.5", "10 × 32 × 1024", "lambda_kl 1, lr 0.0003, lora_r 64"),
        *("9.45 → 6.37", "15.59 → 9.87", "def5678"),
    ]
    assert found["ablations/x/c"][0] == "control"
    assert found["ablations/x/c"][2:5] == ["pydoc", "10 × 32 × 1024", "lambda_kl 1, lr 0.0003, lora_r 64, num_cuts 2"]


def test_a_training_that_was_stopped_has_no_perplexity_after_it(tmp_path: Path, document: Path) -> None:
    folder = tmp_path / "results" / "headline" / "training" / "trained-1"
    write_training(folder)
    before_last = (folder / "metrics.jsonl").read_text().splitlines()[:-1]
    (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in before_last))
    main(tmp_path / "results", document)
    assert rows(block(document, "trainings"))["headline/trained-1"][-3:] == ["–", "–", "def5678"]


def test_a_training_that_cannot_be_read_is_one_line(tmp_path: Path, document: Path) -> None:
    folder = tmp_path / "results" / "headline" / "training" / "trained-1"
    write_training(folder)
    for text in ("", '{"loss": 1.0}\n', '{"step": 1'):
        (folder / "metrics.jsonl").write_text(text)
        with pytest.raises(UserError, match=rf"^{folder}: .*metrics.jsonl"):
            main(tmp_path / "results", document)
    (folder / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match=rf"^{folder}: .*metrics.jsonl"):
        main(tmp_path / "results", document)


def test_ablations(tmp_path: Path, document: Path) -> None:
    for name, evicted in (("low", 45), ("high", 60)):
        comparison(evicted).write(tmp_path / "results" / "ablations" / name)
    main(tmp_path / "results", document)
    text, transfer = block(document, "ablations").split("Needles by press")
    found = rows(text)
    assert list(found)[2:] == ["base", "control", "high", "low"]
    assert found["control"] == ["–", "1.900", "2.400", "0.250", "90.0", "35.0", "38.9%", "–"]
    assert found["high"] == [
        *("control", "1.910 (+0.010)", "2.100 (-0.300)", "0.125 (-0.125)"),
        *("90.0 (+0.0)", "50.0 (+15.0)", "55.6% (+16.7%)", "▲ 2 ▼ 0 = 1"),
    ]
    assert found["low"][5:7] == ["42.5 (+7.5)", "47.2% (+8.3%)"]
    assert found["base"] == ["–", "2.000", "2.500", "0.300", "80.0", "30.0", "37.5%", "–"]
    assert "Means over 3 evicted cells of tiny;" in text
    by_press = rows(transfer)
    assert by_press["run"] == ["anchor", "snapkv", "50%", "70%"]
    assert by_press["base"] == ["40", "20", "40", "20"]
    assert by_press["high"] == ["40", "60", "40", "60"]


def test_the_same_twice_and_a_block_that_is_missing(tmp_path: Path, document: Path) -> None:
    comparison().write(tmp_path / "results" / "headline")
    main(tmp_path / "results", document)
    first = document.read_text()
    main(tmp_path / "results", document)
    assert document.read_text() == first
    document.write_text(first.replace("<!-- /goals -->", ""))
    with pytest.raises(UserError, match="expected one block between <!-- goals -->"):
        main(tmp_path / "results", document)


def test_the_page_has_its_blocks(tmp_path: Path) -> None:
    page = ROOT / "docs" / "results.md"
    shutil.copy(page, tmp_path)
    shutil.copy(ROOT / "README.md", tmp_path)
    main(tmp_path / "none", tmp_path / "results.md")
    assert all(command in page.read_text("utf-8") for command in (COMMANDS["headline"],))


def test_the_pages_say_what_the_kept_files_hold(tmp_path: Path) -> None:
    pages = [ROOT / "docs" / "results.md", ROOT / "README.md"]
    for page in pages:
        shutil.copy(page, tmp_path)
    main(ROOT / "results", tmp_path / "results.md")
    for page in pages:
        assert (tmp_path / page.name).read_text("utf-8") == page.read_text("utf-8")
