import dataclasses

import pytest
import yaml

from sparsekv.training.config import TrainConfig
from sparsekv.training.model_card import describe_data, model_card

LOG = [
    {"step": 0, "eval_full_ppl": 10.0, "eval_evicted_ppl": 20.5},
    {"step": 1, "loss": 2.0},
    {"step": 2, "eval_full_ppl": 9.0, "eval_evicted_ppl": 15.0},
    {"step": 4, "eval_full_ppl": 8.12345, "eval_evicted_ppl": 11.98765},
]


def card(**changes) -> str:
    config = dataclasses.asdict(TrainConfig(model="org/base-1b", output_dir="o", **changes))
    record = {
        "config": config,
        "versions": {"sparsekv": "9.8.7"},
        "commit": "abc",
        "steps": 4,
        "seconds": 65.4,
        "validation_rows": 7,
    }
    return model_card(record, LOG)


def front_matter(text: str) -> dict:
    return yaml.safe_load(text.split("---\n")[1])


def test_figures_are_those_of_the_run():
    text = card(seed=5, num_validation_samples=7, max_seq_len=333, min_keep_ratio=0.25)
    assert "| before training | 10.000 | 20.500 |" in text
    assert "| after 4 steps | 8.123 | 11.988 |" in text
    for figure in (
        "9.8.7",
        "commit abc",
        "7 validation rows of 333 tokens",
        "11.988 at step 4",
        "seed 5",
        "65 s",
        "keep ratio of 0.25",
    ):
        assert figure in " ".join(text.split()), figure


def test_hubs_can_read_it():
    adapter, full = front_matter(card()), front_matter(card(lora_r=0))
    assert (adapter["base_model"], adapter["library_name"]) == ("org/base-1b", "peft")
    assert "lora" in adapter["tags"]
    assert full["library_name"] == "transformers"
    assert "lora" not in full["tags"]


@pytest.mark.parametrize("lora_r", [0, 8])
def test_its_code_is_code(lora_r):
    code = card(lora_r=lora_r).split("```python\n")[1].split("```")[0]
    compile(code, "README.md", "exec")
    assert ("PeftModel" in code) == bool(lora_r)
    assert ("org/base-1b" in code) == bool(lora_r)


def test_a_control_says_so():
    assert "without eviction" in card(control=True)
    assert "without eviction" not in card()
    assert "# Control of org/base-1b" in card(control=True)


def test_nothing_is_left_to_fill_in():
    for changes in ({}, {"control": True}, {"lora_r": 0}):
        assert "{" not in card(**changes)


def test_mixtures_are_named():
    assert describe_data("pydoc") == "pydoc"
    assert describe_data({"pydoc": 0.5, "recall": 2.0}) == "pydoc 0.5, recall 2"
